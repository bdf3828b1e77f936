"""The reference's own files: its samples, literal bytes, Python's picklers as writers, hostile pickles."""

import ast
import json
import pickle
import pickletools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import peak_bytes
from PIL import Image

from perco_engine import reference_files
from perco_engine.bitstream import container, entropy
from perco_engine.codes import Codes, ModelReference
from perco_engine.errors import (
    BitstreamError,
    InvalidHeader,
    InvalidStream,
    LimitExceeded,
    NotAReferenceFile,
    TruncatedFile,
)
from perco_engine.rates import PERCO_SD, RatePoint
from perco_engine.reference_files import ReferenceFile
from perco_engine.store.checkpoint import Checkpoint
from pillow_perco.cli import main

FOLDER = Path(__file__).parent / "parity" / "reference_files"
SAMPLES: list[dict[str, Any]] = json.loads((FOLDER / "files.json").read_text())
RED_BARN = (FOLDER / "grid8_codebook256.pkl").read_bytes()
SAMPLE = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample["file"])

MARK = bytes.fromhex("01020304")


def install_records(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store with the record of a checkpoint of every rate, all with a fingerprint that begins with MARK."""
    monkeypatch.setenv("PERCO_HOME", str(home))
    for point in PERCO_SD:
        folder = home / "models" / f"perco-sd-{point.bpp}"
        folder.mkdir(parents=True)
        Checkpoint(folder.name, folder, "perco-sd", point.bpp, MARK + bytes(4), "a folder").write()


LITERAL = bytes.fromhex(
    "8004 95 5100000000000000"  # protocol 4, a frame of 81 bytes
    "7D94 28"  # a dict, memoized; mark
    "4B00 43 1A"  # key 0, 26 bytes, which are a pickle:
    "8004 95 0F00000000000000 43 0B 78DA4BC94F07000274013B 94 2E"  # 11 bytes: "dog" by zlib
    "94"
    "4B01 43 11"  # key 1, 17 bytes:
    "8004 95 0600000000000000 43 02 0440 94 2E"  # 2 bytes: the stream
    "94"
    "4B02 43 12"  # key 2, 18 bytes:
    "8004 95 0700000000000000 4B10 4B10 86 94 2E"  # (16, 16)
    "94"
    "75 2E"  # set items, stop
)


def pickled(value: object) -> bytes:
    return pickle.dumps(value, protocol=4)


def pickled_in_python(value: object) -> bytes:
    return pickle._dumps(value, protocol=4)


def written(text: object, stream: object, size: object, write: Callable[[object], bytes] = pickled) -> bytes:
    """What the reference writes, by Python's own pickler."""
    return write({0: write(text), 1: write(stream), 2: write(size)})


def compressed(caption: str) -> bytes:
    return zlib.compress(caption.encode(), 9)


def bytes_in_a_pickle(data: bytes) -> list[bytes]:
    return [value for _, value, _ in pickletools.genops(data) if isinstance(value, bytes)]


def point_of(bpp: float) -> RatePoint:
    return next(point for point in PERCO_SD if point.bpp == bpp)


def assert_refused_or_exact(data: bytes) -> ReferenceFile | None:
    """Reads what may be damaged: the outcome is a BitstreamError, or what Python's pickler writes these bytes for."""
    try:
        file = reference_files.read(data)
    except BitstreamError:
        return None
    (text,) = bytes_in_a_pickle(bytes_in_a_pickle(data)[0])
    assert zlib.decompress(text).decode() == file.caption
    assert written(text, file.stream, (file.height_px, file.width_px)) == data
    return file


@SAMPLE
def test_the_samples(sample: dict[str, Any]) -> None:
    path = FOLDER / sample["file"]
    file = reference_files.read(path.read_bytes())
    assert (file.caption, file.height_px, file.width_px) == (
        sample["caption"], sample["height_px"], sample["width_px"],
    )  # fmt: skip
    assert len(file.stream) == sample["stream_bytes"]
    expected = np.load(path.with_name(f"{path.stem}_indices.npy"))
    (point,) = reference_files.possible_rate_points(file)
    (grid,) = point.grids
    assert (512 // grid.pixels_per_index, grid.codebook_size) == (sample["rate_grid"], sample["codebook"])
    indices = reference_files.decode_indices(file, point)
    assert indices.dtype == np.int32
    assert np.array_equal(indices, expected)


@SAMPLE
def test_the_integers_of_the_cdf(sample: dict[str, Any]) -> None:
    stored = np.load(FOLDER / f"cdf16_uniform_{sample['codebook']}.npy").view(np.uint16)
    expected = [*stored[:-1].tolist(), 65536]  # stored as 0
    assert reference_files.reference_cdf(sample["codebook"]).tolist() == expected


def test_literal_bytes() -> None:
    file = reference_files.read(LITERAL)
    assert file == ReferenceFile("dog", b"\x04\x40", 16, 16)
    assert reference_files.decode_indices(file, point_of(0.0313)).tolist() == [[4]]
    assert reference_files.decode_indices(file, point_of(0.0507)).tolist() == [[136]]  # of 13.0007 bits: 0000010001000


@pytest.mark.parametrize("write", [pickled, pickled_in_python], ids=["compiled pickler", "Python pickler"])
@pytest.mark.parametrize(
    "caption", ["", "two owls", "".join(map(chr, range(200, 1000)))], ids=["none", "short", "long"]
)
def test_all_that_the_pickler_writes(caption: str, write: Callable[[object], bytes]) -> None:
    """Every class of length, and every place where a frame can end."""
    text = compressed(caption)
    content = np.random.default_rng(len(caption)).bytes(300_000)
    edges = [*range(4), *range(225, 260), *range(64_600, 65_700), 200_000, 300_000]
    for size_bytes in edges:
        size = (1 + size_bytes % 65535, 65535 - size_bytes % 65535)
        file = reference_files.read(written(text, content[:size_bytes], size, write))
        assert file == ReferenceFile(caption, content[:size_bytes], *size), size_bytes


@pytest.mark.parametrize("size", [(1, 1), (255, 256), (256, 255), (65535, 65535)])
def test_sizes(size: tuple[int, int]) -> None:
    file = reference_files.read(written(compressed(""), b"@", size))
    assert (file.height_px, file.width_px) == size


REARRANGED = {
    "nothing": (b"", TruncatedFile, "ends too early"),
    "text": (b"a photo of a barn", NotAReferenceFile, "from byte 0 on it has 61 20"),
    "protocol 3": (pickle.dumps({0: b"", 1: b"", 2: b""}, protocol=3), NotAReferenceFile, "80 03, not 80 04"),
    "protocol 5": (b"\x80\x05" + RED_BARN[2:], NotAReferenceFile, "80 05, not 80 04"),
    "protocol 5 within": (RED_BARN.replace(b"C>\x80\x04", b"C>\x80\x05"), NotAReferenceFile, "80 05, not 80 04"),
    "bytes behind it": (RED_BARN + b"\0", NotAReferenceFile, "1 bytes follow"),
    "another pickle behind it": (RED_BARN * 2, NotAReferenceFile, "193 bytes follow"),
    "no frame": (RED_BARN[:2] + RED_BARN[11:], NotAReferenceFile, "frames"),
    "frame too short": (RED_BARN[:3] + b"\xb5" + RED_BARN[4:], NotAReferenceFile, "frames"),
    "two frames": (RED_BARN[:11] + RED_BARN[2:11] + RED_BARN[11:], NotAReferenceFile, "from byte 11 on it has 95"),
    "a frame in a frame": (RED_BARN[:14] + RED_BARN[2:11] + RED_BARN[14:], NotAReferenceFile, "frames"),
    "a put instead of a memoize": (RED_BARN.replace(b"}\x94", b"}q\0"), NotAReferenceFile, "not 7d 94 28"),
    "no memoize": (RED_BARN.replace(b"}\x94(", b"}("), NotAReferenceFile, "not 7d 94 28"),
    "keys in another order": (pickled({1: pickled(b""), 0: pickled(b""), 2: b""}), NotAReferenceFile, "not 4b 00"),
    "a missing key": (pickled({0: pickled(b""), 1: pickled(b"")}), NotAReferenceFile, "not 4b 02"),
    "a key too many": (pickled({k: pickled(b"") for k in range(4)}), NotAReferenceFile, "not 75"),
    "a list": (pickled([pickled(b"")]), NotAReferenceFile, "not 7d 94 28"),
    "the same value twice": (pickled(dict.fromkeys(range(3), b"x")), NotAReferenceFile, "begins no bytes object"),
    "text as a str": (written("a barn", b"@", (64, 64)), NotAReferenceFile, "begins no bytes object"),
    "bytearray": (written(compressed(""), bytearray(b"@"), (64, 64)), NotAReferenceFile, "begins no bytes object"),
    "value not pickled": (pickled({0: compressed(""), 1: b"@", 2: b""}), NotAReferenceFile, "78 da, not 80 04"),
    "long opcode for short bytes": (
        RED_BARN.replace(b"C\x14", b"B\x14\0\0\0").replace(b"\xb6", b"\xb9", 1), NotAReferenceFile, "another length",
    ),
    "8 bytes of length": (RED_BARN.replace(b"C\x14", b"\x8e\x14" + bytes(7)), NotAReferenceFile, "no bytes object"),
    "length beyond the end": (RED_BARN.replace(b"C\x14", b"B\xff\xff\xff\xff"), TruncatedFile, "4294967295 bytes"),
    "long opcode for a small integer": (
        LITERAL.replace(b"\x51", b"\x52", 1).replace(
            bytes.fromhex("12 800495 07 00000000000000 4B10"), bytes.fromhex("13 800495 08 00000000000000 4D1000")
        ), NotAReferenceFile, "integer 16 has the opcode",
    ),
    "a size of three": (written(compressed(""), b"@", (64, 64, 64)), NotAReferenceFile, "from byte"),
    "a size in a list": (written(compressed(""), b"@", [64, 64]), NotAReferenceFile, "begins no integer"),
    "a size of floats": (written(compressed(""), b"@", (64.0, 64.0)), NotAReferenceFile, "begins no integer"),
    "a size of bools": (written(compressed(""), b"@", (True, True)), NotAReferenceFile, "begins no integer"),
    "a size beyond 32 bits": (written(compressed(""), b"@", (64, 2**40)), NotAReferenceFile, "begins no integer"),
    "height 0": (written(compressed(""), b"@", (0, 64)), InvalidHeader, "64 x 0 pixels"),
    "width -1": (written(compressed(""), b"@", (64, -1)), InvalidHeader, "-1 x 64 pixels"),
    "width 65536": (written(compressed(""), b"@", (64, 65536)), InvalidHeader, "65536 x 64 pixels"),
    "caption not compressed": (written(b"a barn", b"@", (64, 64)), InvalidStream, "zlib at level 9"),
    "caption at another level": (written(zlib.compress(b"a barn", 1), b"@", (64, 64)), InvalidStream, "at level 9"),
    "caption cut": (written(compressed("a barn")[:-1], b"@", (64, 64)), InvalidStream, "one complete zlib stream"),
    "caption and more": (written(compressed("a barn") + b"!", b"@", (64, 64)), InvalidStream, "one complete zlib"),
    "caption damaged": (written(b"\x78\xda\xff\xff", b"@", (64, 64)), InvalidStream, "not UTF-8 compressed by zlib"),
    "caption in Latin-1": (
        written(zlib.compress("Hütte".encode("latin-1"), 9), b"@", (64, 64)), InvalidStream, "invalid start byte",
    ),
    "half a surrogate pair": (
        written(zlib.compress(b"\xed\xa0\x80", 9), b"@", (64, 64)), InvalidStream, "invalid continuation byte",
    ),
    "caption of 4097 bytes": (written(compressed("a" * 4097), b"@", (64, 64)), LimitExceeded, "more than 4096"),
    "file of more than 4 MiB": (written(compressed(""), bytes(4 << 20), (64, 64)), LimitExceeded, "larger than"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "error", "message"), REARRANGED.values(), ids=REARRANGED)
def test_what_the_reference_does_not_write(data: bytes, error: type[BitstreamError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        reference_files.read(data)
    assert type(caught.value) is error


def test_a_caption_of_4096_bytes_is_read() -> None:
    assert reference_files.read(written(compressed("ü" * 2048), b"@", (64, 64))).caption == "ü" * 2048


@SAMPLE
def test_a_file_cut_anywhere_is_an_error(sample: dict[str, Any]) -> None:
    data = (FOLDER / sample["file"]).read_bytes()
    for length in range(len(data)):
        with pytest.raises(TruncatedFile):
            reference_files.read(data[:length])


@SAMPLE
def test_every_damaged_byte_is_refused_or_a_value(sample: dict[str, Any]) -> None:
    """No byte of the structure can change; one of a value can, and then nothing else does."""
    data = (FOLDER / sample["file"]).read_bytes()
    whole = reference_files.read(data)
    point = point_of(next(p.bpp for p in PERCO_SD if p in reference_files.possible_rate_points(whole)))
    is_small = len(data) < 1000  # of the others a decode takes milliseconds, and there are thousands of bytes
    patterns = (0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0xFF) if is_small else (0x01, 0xFF)
    outcomes = set()
    for position in range(len(data)):
        for pattern in patterns:
            damaged = bytearray(data)
            damaged[position] ^= pattern
            file = assert_refused_or_exact(bytes(damaged))
            outcomes.add(file is not None)
            if file is None:
                continue
            assert file.caption == whole.caption
            if not is_small:
                continue
            try:
                indices = reference_files.decode_indices(file, point)
            except InvalidStream:
                continue
            assert indices.shape == point.shapes(file.width_px, file.height_px)[0]
            assert 0 <= indices.min() <= indices.max() < point.grids[0].codebook_size
    assert outcomes == {True, False}


def test_random_edits_are_refused_or_exact() -> None:
    rng = np.random.default_rng(5)
    opcodes = bytes([*b"()KMJCB.u}]tlcRiob0Q", 0x80, 0x81, 0x85, 0x86, 0x8C, 0x8E, 0x93, 0x94, 0x95, 0x96])
    for _ in range(4000):
        data = bytearray(LITERAL)
        for _ in range(int(rng.integers(1, 4))):
            start = int(rng.integers(0, len(data)))
            stop = start + int(rng.integers(0, 3))
            data[start:stop] = bytes(rng.choice(list(opcodes), int(rng.integers(0, 3))).tolist())
        file = assert_refused_or_exact(bytes(data))
        if file is not None:
            reference_files.possible_rate_points(file)


class Program:
    """What unpickles by making a folder, in the place of whatever a hostile file would do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("place", ["whole file", "value", "text", "stream", "size", "height"])
def test_programs_are_not_run(place: str, tmp_path: Path) -> None:
    program = Program(tmp_path / "made")
    text, stream, size = compressed("a barn"), b"@", (64, 64)
    hostile = {
        "whole file": pickled(program),
        "value": pickled({0: program, 1: pickled(stream), 2: pickled(size)}),
        "text": written(program, stream, size),
        "stream": written(text, program, size),
        "size": written(text, stream, program),
        "height": written(text, stream, (program, 64)),
    }[place]
    with pytest.raises(NotAReferenceFile, match="may run programs"):
        reference_files.read(hostile)
    assert not program.folder.exists()
    loaded = pickle.loads(hostile)  # it is a program indeed
    if isinstance(loaded, dict):
        for value in loaded.values():
            if isinstance(value, bytes):
                pickle.loads(value)
    assert program.folder.exists()


def test_no_unpickler_is_imported() -> None:
    tree = ast.parse(Path(reference_files.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"zlib", "numpy"}
    assert not {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} & {"pickle", "importlib"}


def test_a_bomb_costs_no_memory() -> None:
    bomb = written(zlib.compress(bytes(64 << 20), 9), b"@", (64, 64))

    def read() -> None:
        with pytest.raises(LimitExceeded, match="more than 4096"):
            reference_files.read(bomb)

    read()
    assert peak_bytes(read) < 1 << 20


def test_absurd_sizes_cost_no_memory() -> None:
    file = reference_files.read(written(compressed(""), b"@", (65472, 65472)))
    assert peak_bytes(lambda: reference_files.possible_rate_points(file)) < 1 << 20
    assert reference_files.possible_rate_points(file) == ()


@pytest.mark.parametrize("point", PERCO_SD, ids=lambda point: str(point.bpp))
@pytest.mark.parametrize("size", [(512, 512), (512, 768), (1024, 576)])
def test_the_stream_and_the_size_tell_the_rate(point: RatePoint, size: tuple[int, int]) -> None:
    (grid,) = point.grids
    expected = np.random.default_rng(3).integers(0, grid.codebook_size, grid.shape(size[1], size[0])).astype(np.int32)
    stream = entropy.encode([expected.reshape(-1)], [reference_files.reference_cdf(grid.codebook_size)])
    file = reference_files.read(written(compressed("an owl"), stream, size))
    assert reference_files.choose_rate_point(file) == point
    assert np.array_equal(reference_files.decode_indices(file, point), expected)


def test_a_rate_that_does_not_fit_is_refused_by_those_that_do() -> None:
    file = reference_files.read(RED_BARN)
    for point in PERCO_SD[1:]:
        with pytest.raises(InvalidStream, match=rf"not written at {point.bpp} .*fit 0\.0019$"):
            reference_files.decode_indices(file, point)
        with pytest.raises(InvalidStream, match=rf"not written at {point.bpp} .*fit 0\.0019$"):
            reference_files.choose_rate_point(file, point.bpp)
    assert reference_files.choose_rate_point(file, 0.0019) == reference_files.choose_rate_point(file) == PERCO_SD[0]


def test_where_two_rates_fit_the_caller_chooses() -> None:
    file = reference_files.read(LITERAL)
    assert reference_files.possible_rate_points(file) == (point_of(0.0313), point_of(0.0507))
    with pytest.raises(ValueError, match=r"say as bpp .*fit 0\.0313 and 0\.0507"):
        reference_files.choose_rate_point(file)
    assert reference_files.choose_rate_point(file, 0.05) == point_of(0.0507)


@pytest.mark.parametrize(
    ("stream", "size"),
    [
        ("40", (64, 64)),
        ("a540", (64, 65)),
        ("a540", (65, 64)),
        ("a54000", (64, 64)),
        ("a580", (64, 64)),
        ("", (64, 64)),
    ],
)
def test_streams_of_no_rate(stream: str, size: tuple[int, int]) -> None:
    """Too short, for a size of no whole squares, too long, with another ending, empty."""
    file = reference_files.read(written(compressed(""), bytes.fromhex(stream), size))
    assert reference_files.possible_rate_points(file) == ()
    with pytest.raises(InvalidStream, match=r"at no rate of PerCo \(SD\); its stream and its size fit none"):
        reference_files.choose_rate_point(file)
    with pytest.raises(InvalidStream, match=r"at 0\.0019 bits a pixel; its stream and its size fit none"):
        reference_files.decode_indices(file, PERCO_SD[0])


@SAMPLE
def test_conversion_keeps_everything(sample: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_records(tmp_path, monkeypatch)
    source, target = FOLDER / sample["file"], tmp_path / "x.perco"
    result = CliRunner().invoke(main, ["convert-reference", str(source), str(target)])
    assert result.exit_code == 0, result.output
    assert f"{target.stat().st_size} bytes, the reference's file has {sample['file_bytes']}" in result.output
    assert target.stat().st_size < sample["file_bytes"] - 60
    codes = container.unpack(target.read_bytes(), PERCO_SD)
    rate_point = [(512 // p.grids[0].pixels_per_index, p.grids[0].codebook_size) for p in PERCO_SD].index(
        (sample["rate_grid"], sample["codebook"])
    )
    indices = np.load(source.with_name(f"{source.stem}_indices.npy"))
    assert codes == Codes(
        ModelReference(32, MARK), sample["width_px"], sample["height_px"], rate_point, (indices,), sample["caption"]
    )
    with Image.open(target) as picture:
        assert picture.size == (sample["width_px"], sample["height_px"])
        assert picture.info["perco"]["model"] == "perco-sd"
        assert picture.info["perco"]["bpp"] == PERCO_SD[rate_point].bpp


@pytest.mark.parametrize(
    ("data", "options", "says"),
    [
        (RED_BARN[:-1], (), "copy or download the file again"),
        (RED_BARN, ("--bpp", "0.125"), "fit 0.0019"),
        (RED_BARN, ("--bpp", "-1"), "bpp must be a positive number"),
        (LITERAL, (), "0.0313 and 0.0507"),
        (pickled(print), (), "Other pickles are not opened"),
        (bytes(5 << 20), (), "larger than"),
    ],
)
def test_a_refused_conversion_harms_nothing(data: bytes, options: tuple[str, ...], says: str, tmp_path: Path) -> None:
    source, target = tmp_path / "x.pkl", tmp_path / "x.perco"
    source.write_bytes(data)
    target.write_bytes(b"precious")
    result = CliRunner().invoke(main, ["convert-reference", str(source), str(target), *options])
    assert result.exit_code == 1
    assert says in result.output and "Traceback" not in result.output
    assert target.read_bytes() == b"precious" and source.read_bytes() == data


def test_the_command_line_takes_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "x.pkl", tmp_path / "x.perco"
    source.write_bytes(LITERAL)
    refused = CliRunner().invoke(main, ["convert-reference", str(source), str(target), "--bpp", "0.0507"])
    assert refused.exit_code == 1 and "perco models import FOLDER" in refused.output and not target.exists()
    install_records(tmp_path, monkeypatch)
    assert CliRunner().invoke(main, ["convert-reference", str(source), str(target), "--bpp", "0.0507"]).exit_code == 0
    codes = container.unpack(target.read_bytes(), PERCO_SD)
    assert (codes.rate_point, codes.indices[0].tolist(), codes.caption) == (4, [[136]], "dog")
