"""torchac and the own coder make the same bytes.  Where CI is set, a machine that cannot build torchac fails."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from perco_engine import torchac_backend
from perco_engine.bitstream import entropy, pack, unpack
from perco_engine.bitstream.entropy import uniform_cdf
from perco_engine.codes import Codes, ModelReference
from perco_engine.errors import CoderUnavailable, InvalidStream, TruncatedFile
from perco_engine.rates import PERCO_SD
from perco_engine.torchac_backend import AutomaticCoder

pytestmark = pytest.mark.torchac


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """torchac's extension, compiled once if it is not there."""
    if torchac_backend.available():
        return
    try:
        torchac_backend.build()
    except CoderUnavailable as error:
        if os.environ.get("CI", "").lower() not in ("", "0", "false"):
            raise
        pytest.skip(str(error))


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A machine on which nothing was built."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("torch_extensions")))
    torchac_backend._extension.cache_clear()
    yield
    torchac_backend._extension.cache_clear()


def assert_equal_coders(symbols: list[NDArray[np.int32]], cdfs: list[NDArray[np.int32]]) -> None:
    counts = [len(values) for values in symbols]
    stream = entropy.encode(symbols, cdfs)
    assert torchac_backend.encode(symbols, cdfs) == stream
    for decoded in (torchac_backend.decode(stream, counts, cdfs), entropy.decode(stream, counts, cdfs)):
        assert len(decoded) == len(symbols)
        for given, back in zip(symbols, decoded, strict=True):
            assert np.array_equal(given, back)
            assert back.dtype == np.int32


@pytest.mark.parametrize("codebook_size", [2, 3, 64, 255, 256, 1024, 8196, 32767])
def test_equal_on_uniform_cdfs(codebook_size: int) -> None:
    rng = np.random.default_rng(codebook_size)
    for count in (1, 2, 64, 700):
        symbols = rng.integers(0, codebook_size, count).astype(np.int32)
        assert_equal_coders([symbols], [uniform_cdf(codebook_size)])


@pytest.mark.parametrize("seed", range(100))
def test_equal_on_random_cdfs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codebook_size = int(rng.integers(2, 100))
    candidates = np.r_[1:100, 65436:65536] if seed % 2 else np.arange(1, 65536)

    def random_cdf() -> NDArray[np.int32]:
        inner = np.sort(rng.choice(candidates, codebook_size - 1, replace=False))
        return np.concatenate([[0], inner, [65536]]).astype(np.int32)

    shared = random_cdf()
    likely = rng.choice(codebook_size, 500, p=np.diff(shared) / 65536).astype(np.int32)
    unlikely = rng.integers(0, codebook_size, 100).astype(np.int32)
    own = np.stack([random_cdf() for _ in range(100)])
    assert_equal_coders([likely, unlikely], [shared, own])


def test_equal_where_bits_stay_pending() -> None:
    cdf = np.array([0, 32767, 32769, 65536], dtype=np.int32)
    assert_equal_coders([np.array([1] * 300 + [0], dtype=np.int32)], [cdf])
    assert_equal_coders([np.array([1] * 300 + [2], dtype=np.int32)], [cdf])


def test_errors_are_those_of_the_own_coder() -> None:
    symbols = np.random.default_rng(0).integers(0, 8196, 100).astype(np.int32)
    cdf = uniform_cdf(8196)
    stream = torchac_backend.encode([symbols], [cdf])
    for length in range(len(stream)):
        with pytest.raises(TruncatedFile):
            torchac_backend.decode(stream[:length], [100], [cdf])
    with pytest.raises(InvalidStream):
        torchac_backend.decode(stream + b"\0", [100], [cdf])
    with pytest.raises(ValueError, match="symbols must be 0 to 8195"):
        torchac_backend.encode([symbols + 8196], [cdf])
    with pytest.raises(ValueError, match="CDF"):
        torchac_backend.encode([symbols], [cdf[1:]])


def test_what_torchac_cannot_code() -> None:
    assert not torchac_backend.supports([1, 1], [uniform_cdf(64), uniform_cdf(256)])
    assert not torchac_backend.supports([1], [uniform_cdf(32768)])
    assert not torchac_backend.supports([10**6], [uniform_cdf(8196)])
    assert torchac_backend.supports([10**5], [uniform_cdf(256)])
    with pytest.raises(ValueError, match="own coder"):
        torchac_backend.encode([np.zeros(1, np.int32)] * 2, [uniform_cdf(64), uniform_cdf(256)])


def test_automatic_coder_takes_torchac_for_large_streams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    by_torchac: list[int] = []
    encode = torchac_backend.encode

    def recording(symbols: list[NDArray[np.int32]], cdfs: list[NDArray[np.int32]]) -> bytes:
        by_torchac.append(sum(len(values) for values in symbols))
        return encode(symbols, cdfs)

    monkeypatch.setattr(torchac_backend, "encode", recording)
    for count in (torchac_backend.MIN_SYMBOLS - 1, torchac_backend.MIN_SYMBOLS):
        symbols = np.random.default_rng(count).integers(0, 256, count).astype(np.int32)
        stream = AutomaticCoder().encode([symbols], [uniform_cdf(256)])
        assert stream == entropy.encode([symbols], [uniform_cdf(256)])
        assert np.array_equal(AutomaticCoder().decode(stream, [count], [uniform_cdf(256)])[0], symbols)
    assert by_torchac == [torchac_backend.MIN_SYMBOLS]


def test_files_are_the_same_with_either_coder() -> None:
    indices = np.random.default_rng(0).integers(0, 256, (200, 150)).astype(np.int32)
    codes = Codes(ModelReference(32, b"\x01\x02\x03\x04"), 1200, 1600, 6, (indices,))
    data = pack(codes, PERCO_SD, coder=AutomaticCoder())
    assert data == pack(codes, PERCO_SD)
    assert unpack(data, PERCO_SD, coder=AutomaticCoder()) == codes
    with pytest.raises(TruncatedFile):
        unpack(data[:-3], PERCO_SD, coder=AutomaticCoder())


@pytest.mark.usefixtures("not_built")
def test_without_the_extension_nothing_is_compiled() -> None:
    assert not torchac_backend.available()
    symbols = np.zeros(torchac_backend.MIN_SYMBOLS, dtype=np.int32)
    with pytest.raises(CoderUnavailable, match="perco doctor --build-torchac"):
        torchac_backend.encode([symbols], [uniform_cdf(256)])
    assert AutomaticCoder().encode([symbols], [uniform_cdf(256)]) == entropy.encode([symbols], [uniform_cdf(256)])
    assert not list(Path(os.environ["TORCH_EXTENSIONS_DIR"]).iterdir())
    assert "torchac" not in sys.modules


@pytest.mark.usefixtures("not_built")
def test_a_build_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CoderUnavailable, match="no-such-compiler"):
        torchac_backend.build()
    assert capfd.readouterr() == ("", "")


def test_loading_prints_nothing_and_leaves_torchac_out() -> None:
    program = (
        "import sys; from perco_engine import torchac_backend as t; assert 'torch' not in sys.modules; "
        "assert t.available(); assert 'torchac' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")
