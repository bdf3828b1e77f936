"""Codes that are searched for by decoding."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import PHOTO
from PIL import Image

import pillow_perco
from perco_engine import devices, get_engine, search
from perco_engine.choice import choose
from perco_engine.devices import half_precision
from perco_engine.engine import Engine
from perco_engine.lite0 import _Network
from perco_engine.models.perceptual import FeatureDistance
from perco_engine.tensors import to_tensor
from pillow_perco.cli import main

PARITY = Path(__file__).parent / "parity"


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    """What is found depends on how sums are rounded, and so on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stranger() -> FeatureDistance:
    """A network that the search does not look at."""
    return FeatureDistance("lite1")


def distances(stranger: FeatureDistance, engine: Engine, data: bytes, photo: Image.Image) -> tuple[float, float]:
    """By that network's features, and the squared error of pixels."""
    picture, target = to_tensor([engine.decode(data)]), to_tensor([photo])
    with torch.no_grad():
        of_features = stranger.between(stranger.features(picture), stranger.features(target))
    return float(of_features), float((picture - target).square().mean())


@pytest.mark.parametrize("bpp", [0.008, 0.03, 0.13])
def test_what_is_searched_for_is_nearer_in_as_many_bytes(stranger: FeatureDistance, bpp: float) -> None:
    engine = get_engine()
    with Image.open(PHOTO) as whole:
        photo = whole.convert("RGB").resize((480, 320))  # of smaller ones some come no nearer
    plain, searched = engine.encode(photo, bpp=bpp), engine.encode(photo, bpp=bpp, effort=8)
    assert abs(len(searched) - len(plain)) <= 4 + len(plain) // 20
    features, pixels = distances(stranger, engine, plain, photo)
    nearer, of_pixels = distances(stranger, engine, searched, photo)
    assert nearer < 0.97 * features
    assert of_pixels < 1.15 * pixels
    assert engine.codes(searched).rate_point == engine.codes(plain).rate_point


def test_the_same_effort_gives_the_same_bytes_alone_and_in_a_batch(photo: Image.Image) -> None:
    engine, other = get_engine(), photo.transpose(Image.Transpose.ROTATE_180)
    alone = [engine.encode(image, bpp=0.008, effort=2) for image in (photo, other)]
    assert engine.encode_batch([photo, other], bpp=0.008, effort=2) == alone
    assert alone[0] != engine.encode(photo, bpp=0.008) == engine.encode(photo, bpp=0.008, effort=0)


def test_unless_told_otherwise_it_searches_where_that_is_quick_and_pays(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = get_engine()
    plain, searched = engine.encode(photo, bpp=0.03, effort=0), engine.encode(photo, bpp=0.03, effort=4)
    lowest = engine.encode(photo, bpp=0.002, effort=8)
    assert plain != searched
    monkeypatch.setattr(search, "USUAL_PIXELS", photo.width * photo.height)
    assert engine.encode(photo, bpp=0.03) == engine.encode(photo, bpp=0.03, effort=None) == searched
    assert engine.encode(photo, bpp=0.002) == lowest
    monkeypatch.setattr(search, "USUAL_PIXELS", photo.width * photo.height - 1)
    assert engine.encode(photo, bpp=0.03) == engine.encode(photo, bpp=0.03, effort=3)
    monkeypatch.setattr(search, "USUAL_PIXELS", photo.width * photo.height // 4 - 1)
    assert engine.encode(photo, bpp=0.03) == plain


def test_larger_pictures_are_searched_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "USUAL_PIXELS", 2**20)
    pipeline = get_engine().pipeline
    heights = (16, 1024, 1025, 1365, 1366, 2048, 4096, 4097, 8192, 8193)
    assert [search.usual_steps(pipeline, 1, 1024, height) for height in heights] == [4, 4, 3, 3, 2, 2, 1, 0, 0, 0]
    assert [search.usual_steps(pipeline, 0, 1024, height) for height in heights] == [8, 8, 7, 6, 5, 4, 2, 1, 1, 0]
    assert [search.usual_steps(pipeline, 1, *size) for size in ((65535, 1), (1, 65535), (65535, 40))] == [2, 2, 1]


def test_unless_told_otherwise_models_without_a_ladder_are_not_searched(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "USUAL_PIXELS", 2**20)
    engine = get_engine(PARITY / "pipeline_tiny" / "pipeline")
    assert engine.encode(photo) == engine.encode(photo, effort=0)


def test_a_megapixel_is_small_enough_for_a_search_that_nobody_asked_for() -> None:
    fresh = "from perco_engine import search; print(search.USUAL_STEPS, search.LOWEST_STEPS, search.USUAL_PIXELS)"
    told = subprocess.run([sys.executable, "-c", fresh], check=True, capture_output=True, text=True).stdout
    assert told.split() == ["4", "8", "1048576"]


@pytest.mark.parametrize("able, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_processors_that_know_bf16_compute_in_it(
    monkeypatch: pytest.MonkeyPatch, able: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able}, raising=False)
    with half_precision(torch.device("cpu")):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


def test_large_pictures_are_searched_in_tiles(
    stranger: FeatureDistance, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, photo = get_engine(), photo.resize((403, 269))
    features, _ = distances(stranger, engine, engine.encode(photo, bpp=0.03), photo)
    whole = engine.codes(engine.encode(photo, bpp=0.03, effort=2))
    sizes = []
    tile = search._search_tile
    monkeypatch.setattr(search, "TILE", 32)
    monkeypatch.setattr(search, "_search_tile", lambda *a: sizes.append(tuple(a[3].shape[-2:])) or tile(*a))
    data = engine.encode(photo, bpp=0.03, effort=2)
    assert sizes == [(height, width) for height in (192, 208, 80) for width in (192, 256, 216, 88)]
    nearer, _ = distances(stranger, engine, data, photo)
    assert nearer < 0.98 * features
    same = [float((a == b).mean()) for a, b in zip(whole.indices, engine.codes(data).indices, strict=True)]
    assert min(same) > 0.4


@pytest.mark.parametrize("rows, columns", [(96, 96), (97, 96), (1, 9300), (203, 150), (512, 512)])
def test_every_code_is_of_exactly_one_tile(rows: int, columns: int) -> None:
    for halvings in (0, 1, 3):
        count = np.zeros((-(-rows >> halvings), -(-columns >> halvings)), int)
        for outer, inner in search._tiles(rows, columns, 8):
            for around, side, end in zip(outer, inner, (rows, columns), strict=True):
                assert max(side.start - 8, 0) == around.start and min(side.stop + 8, end) == around.stop
                assert side.start % 8 == 0
            count[tuple(search._cells(side, halvings) for side in inner)] += 1
        assert (count == 1).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 90), (65, 8)])
def test_any_size_can_be_searched(photo: Image.Image, size: tuple[int, int]) -> None:
    engine = get_engine()
    assert engine.decode(engine.encode(photo.resize(size), bpp=0.13, effort=1)).size == size


def test_a_budget_makes_bits_dearer(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = get_engine()
    most = len(engine.encode(photo, bpp=0.03))
    monkeypatch.setattr(search, "THRIFTS", (4.0,))
    thrifty = engine.encode(photo, bpp=0.03, effort=2)
    assert len(thrifty) < most
    monkeypatch.setattr(search, "THRIFTS", (0.1, 4.0, 5.0))
    assert len(engine.encode(photo, bpp=0.03, effort=2)) > most
    assert engine.encode(photo, bpp=0.03, effort=2, max_bytes=most) == thrifty


def test_a_budget_is_kept_and_costs_no_rate(photo: Image.Image) -> None:
    engine = get_engine()
    most = len(engine.encode(photo, bpp=0.03))
    for limit in (most - 1, most, most + 20):
        plain, data = engine.encode(photo, max_bytes=limit), engine.encode(photo, max_bytes=limit, effort=2)
        assert len(data) <= limit
        assert engine.codes(data).rate_point == engine.codes(plain).rate_point


def test_what_no_dearer_bits_make_fit_is_not_searched_for(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = get_engine()
    plain = engine.encode(photo, bpp=0.03)
    monkeypatch.setattr(search, "THRIFTS", (0.1,))
    assert engine.encode(photo, max_bytes=len(plain), effort=2) == plain


def test_captions_are_looked_at(photo: Image.Image) -> None:
    engine = get_engine()
    codes = [
        engine.codes(engine.encode(photo, bpp=0.008, effort=2, caption=text)) for text in ("", "a red fire engine")
    ]
    assert not all(np.array_equal(a, b) for a, b in zip(*(c.indices for c in codes), strict=True))


def test_networks_in_16_bits_search_as_well(stranger: FeatureDistance, photo: Image.Image) -> None:
    engine = get_engine(dtype=torch.bfloat16)
    features, _ = distances(stranger, engine, engine.encode(photo, bpp=0.03), photo)
    nearer, _ = distances(stranger, engine, engine.encode(photo, bpp=0.03, effort=4), photo)
    assert nearer < 0.98 * features


@pytest.mark.parametrize("effort", [-1, 101, True, 2.0, "8"])
def test_a_wrong_effort_is_a_value_error(photo: Image.Image, tmp_path: Path, effort: Any) -> None:
    with pytest.raises(ValueError, match="effort must be an integer from 0 to 100"):
        photo.save(tmp_path / "x.perco", effort=effort)


def test_models_without_a_ladder_say_so(photo: Image.Image) -> None:
    engine = get_engine(PARITY / "pipeline_tiny" / "pipeline")
    with pytest.raises(ValueError, match="leave it out"):
        engine.encode(photo, effort=1)


def test_on_the_command_line(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    engine = get_engine()
    searched = engine.encode(photo, bpp=0.008, effort=2)
    for command in (
        ["encode", str(tmp_path / "photo.png"), str(tmp_path / "a.perco")],
        ["convert", str(tmp_path / "photo.png"), str(tmp_path / "b.perco")],
    ):
        result = CliRunner().invoke(main, [*command, "--bpp", "0.008", "--effort", "2", "--no-thumbnails"])
        assert result.exit_code == 0, result.output
        assert Path(command[2]).read_bytes() == searched
    pillow_perco.save(photo, tmp_path / "c.perco", bpp=0.008, effort=2)
    assert (tmp_path / "c.perco").read_bytes() == searched


def test_a_search_in_inference_mode() -> None:
    """Where nothing has a gradient, and where what is loaded keeps that for ever."""
    with Image.open(PHOTO) as opened:
        image = opened.convert("RGB").resize((96, 64))
    expected = get_engine().encode(image, bpp=0.008, effort=1)
    devices.cache.clear()
    with torch.inference_mode():
        assert get_engine().encode(image, bpp=0.008, effort=1) == expected
    assert get_engine().encode(image, bpp=0.008, effort=1) == expected


def test_at_the_lowest_rate_steps_that_lead_astray_are_not_kept(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = get_engine()
    monkeypatch.setattr(search, "REACH", -5.0)  # uphill
    astray = engine.codes(engine.encode(photo, bpp=0.002, effort=3))
    latents = engine.pipeline.encode_latents(engine.pipeline.pad(to_tensor([photo])))
    (begun,) = choose(engine.pipeline.hyper_enc, engine.prior, latents, 0, thrift=search.THRIFT)
    assert (astray.indices[0] == begun[0].numpy()).all()


def test_what_torch_computes_in_by_default_is_of_no_matter(photo: Image.Image) -> None:
    engine = get_engine()
    expected = engine.encode(photo, bpp=0.008, effort=1)
    torch.set_default_dtype(torch.float64)
    try:
        network, picture = _Network(torch.device("cpu")).network, to_tensor([photo]).float()
        assert network.between(network.features(picture), network.features(picture)).item() == 0
        assert engine.encode(photo, bpp=0.008, effort=1) == expected
    finally:
        torch.set_default_dtype(torch.float32)
