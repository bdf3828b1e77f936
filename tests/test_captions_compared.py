"""`perco captions`: the right caption, none and a wrong one, and what their differences are."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from perco_engine.errors import EvaluationError
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
