"""`perco captions`: the right caption, none and a wrong one, and what their differences are."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from perco_engine.errors import EvaluationError, NotEnoughMemory
from perco_engine.evaluation import captions
from pillow_perco.cli import main


def test_every_photo_gets_the_caption_of_another() -> None:
    said = ["owl", "owl", "car", "", "barn"]
    wrong = captions.shuffled(said)
    assert all(other and other != right for other, right in zip(wrong, said, strict=True))
    assert captions.shuffled(said) == wrong
    with pytest.raises(EvaluationError, match="all photos have the same caption"):
        captions.shuffled(["owl", "owl"])


def test_standard_error() -> None:
    assert captions.mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 3**-0.5))
    assert captions.mean_and_error([1.0]) == (1.0, float("inf"))


def test_what_is_ahead_is_positive_whichever_way_the_metric_goes() -> None:
    psnr, lite0 = [(22.0, 21.0, 18.0), (24.0, 21.0, 22.0)], [(5.0, 6.0, 9.0), (7.0, 6.0, 9.0)]
    values = [
        {kind: {"psnr": first[k], "lite0": other[k]} for k, kind in enumerate(captions.KINDS)}
        for first, other in zip(psnr, lite0, strict=True)
    ]
    sizes = {"right": 30, "none": 20, "wrong": 31}
    told = captions.table([captions.Found("a", 0.002, {}, sizes, one) for one in values]).splitlines()
    assert told[2:] == [
        "| 0.002 | PSNR, dB ↑ | 23.0000 | 21.0000 | 20.0000 | +2.0000 ± 1.0000 | +3.0000 ± 1.0000 | 10.0 |",
        "| 0.002 | Lite0 distance ↓ | 6.0000 | 6.0000 | 9.0000 | +0.0000 ± 1.0000 | +3.0000 ± 1.0000 | 10.0 |",
    ]


def test_one_photo_that_fails_and_none_that_can_be_read(
    tiny_model: Path, photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        photo.resize((64, 48)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"photo {name}")
    real = captions._of_photo

    def of_photo(engine: Any, photo: Any, *rest: Any) -> Any:
        if photo.name == "b.png":
            raise NotEnoughMemory("too large")
        return real(engine, photo, *rest)

    monkeypatch.setattr(captions, "_of_photo", of_photo)
    told: list[str] = []
    settings = captions.Settings(tmp_path, tmp_path / "out", str(tiny_model), (0.001,), metrics=("psnr",))
    assert [one.photo for one in captions.compare(settings, told.append)] == ["a.png", "c.png"]
    assert "b.png: left out, too large" in told
    whole = (tmp_path / "out" / "captions.jsonl").read_text()

    def interrupted(engine: Any, photo: Any, *rest: Any) -> Any:
        if photo.name == "b.png":
            raise KeyboardInterrupt
        return real(engine, photo, *rest)

    monkeypatch.setattr(captions, "_of_photo", interrupted)
    with pytest.raises(KeyboardInterrupt):
        captions.compare(settings)
    assert (tmp_path / "out" / "captions.jsonl").read_text() == whole
    assert len((tmp_path / "out" / "captions.partial.jsonl").read_text().splitlines()) == 1
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(b"damaged")
    with pytest.raises(EvaluationError, match="could be compared: cannot be read"):
        captions.compare(settings)


def test_an_empty_text_beside_a_photo_is_no_caption(
    tiny_model: Path, photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("a", "an owl"), ("b", " \n"), ("c", "a fence")):
        photo.resize((64, 48)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text)
    monkeypatch.setattr(captions, "get_captioner", lambda *_: lambda images: pytest.fail("the captioner was asked"))
    told: list[str] = []
    settings = captions.Settings(tmp_path, tmp_path / "out", str(tiny_model), (0.001,), metrics=("psnr",))
    assert [one.photo for one in captions.compare(settings, told.append)] == ["a.png", "c.png"]
    assert "b.png: left out, it has no caption" in told


def test_the_command(tiny_model: Path, photo: Image.Image, tmp_path: Path) -> None:
    """By PSNR; the tiny model reads no text, so that nothing is ahead of anything."""
    for name, text in (("a", "a barn owl"), ("b", "a fence")):
        photo.resize((64, 48)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text)
    options = ["--out", str(tmp_path / "out"), "--model", str(tiny_model), "--metrics", "psnr", "--bpp", "0.001"]
    told = CliRunner().invoke(main, ["captions", str(tmp_path), *options], catch_exceptions=False)
    assert told.exit_code == 0 and "a.png: a barn owl; not a fence" in told.output
    row = (tmp_path / "out" / "captions.md").read_text().splitlines()[-1].split(" | ")
    assert row[1] == "PSNR, dB ↑" and row[2] == row[3] == row[4] and row[5] == "+0.0000 ± 0.0000"
    assert float(row[7].strip(" |")) > 5
    lines = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert [line["captions"]["wrong"] for line in lines] == ["a fence", "a barn owl"]
