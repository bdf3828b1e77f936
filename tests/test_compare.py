"""perco compare: one page that needs nothing else, and tells what the files are."""

import base64
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from perco_engine import get_engine
from perco_engine.errors import EvaluationError
from perco_engine.evaluation import classical, classical_search, compare, metrics
from pillow_perco.cli import main


@pytest.fixture(autouse=True)
def few_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classical, "SCALES", (1, 2, 4))


@pytest.fixture
def paths(photo: Image.Image, tmp_path: Path) -> list[Path]:
    photo.save(tmp_path / "a<b>&.png")
    photo.transpose(Image.Transpose.ROTATE_90).resize((256, 384)).save(tmp_path / "tall.png")
    return [tmp_path / "a<b>&.png", tmp_path / "tall.png"]


class Page(HTMLParser):
    """The figures of a page by id, what it would load, and its sections."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.figures: dict[str, Image.Image] = {}
        self.loads: list[str] = []
        self.options: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self._id = ""
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        told = dict(attributes)
        if tag == "figure":
            self._id = told.get("id") or ""
        if tag == "option":
            self.options.append(told["value"] or "")
        for name in ("src", "href", "srcset", "data", "action"):
            if source := told.get(name):
                kind, _, data = source.partition("base64,")
                if kind != "data:image/webp;":
                    self.loads.append(source)
                else:
                    assert self._id not in self.figures
                    self.figures[self._id] = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def test_the_page(paths: list[Path], tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    settings = compare.Settings(str(tiny_model), (0.02, 1), 192, ("jpeg", "webp"), ("psnr",), kept=tmp_path / "kept")
    first, tall = compare.compare(paths, out, settings)
    page = Page(out)
    assert page.loads == [] and not re.search(r"https?:|@import|url\(|<link|<b>&", page.text)
    assert {"p0", "p0-0-0", "p1", "p1-1-0"} <= set(page.figures) and set(page.options) == set(page.figures)
    assert tall.original.picture.size == (128, 192) and "reduced from 256x384" in page.text
    engine = get_engine(str(tiny_model))
    with Image.open(paths[0]) as photo:
        assert np.array_equal(page.figures["p0"], photo)
        for r, row in enumerate(first.rows):
            data = engine.encode(photo, bpp=(0.02, 1)[r])
            assert row.size_bytes == len(data) and f"<h3>{len(data):,} bytes" in page.text
            assert np.array_equal(page.figures[f"p0-{r}-0"], engine.decode(data))
            for c, cell in enumerate(row.cells):
                if isinstance(cell, str):
                    assert f"p0-{r}-{c}" not in page.figures
                    continue
                assert np.array_equal(page.figures[f"p0-{r}-{c}"], cell.picture)
                assert cell.size_bytes is not None and cell.size_bytes <= row.size_bytes
                assert cell.scores == {"psnr": pytest.approx(metrics.psnr(photo, cell.picture))}
                assert f"{cell.scores['psnr']:.2f}</dd>" in page.text
    assert first.rows[0].cells[1] == "JPEG" and "no file fits" in page.text  # a JPEG has some hundred bytes of its own
    assert isinstance(first.rows[1].cells[2], compare.Shown)
    best = max(cell.scores["psnr"] for cell in first.rows[1].cells if isinstance(cell, compare.Shown) and cell.scores)
    assert f"<dd class=best>{best:.2f}</dd>" in page.text
    # what is kept of a reduced photo is not mixed with the photo's own
    shown = {classical_search.digest(one.original.picture) for one in (first, tall)}
    assert {path.stem for path in (tmp_path / "kept").iterdir()} == shown and len(shown) == 2


def test_without_the_optional_packages(
    paths: list[Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("pillow_jxl", "pytorch_msssim", "efficientnet_lite_pytorch"):
        monkeypatch.setitem(sys.modules, module, None)
    out = tmp_path / "page.html"
    options = ["--model", str(tiny_model), "--bpp", "1", "--out", str(out), "--against", "webp,jxl"]
    result = CliRunner().invoke(main, ["compare", str(paths[0]), *options])
    assert result.exit_code == 0, result.output
    assert f"look at {out}" in result.output
    text = out.read_text()
    assert "by PSNR, dB" in text and "<strong>WebP</strong>" in text and "<strong>JPEG XL" not in text
    assert "JPEG XL: not available (" in text and "MS-SSIM: not available (" in text
    wrong = CliRunner().invoke(main, ["compare", str(paths[0]), *options, "--by", "lite2"])
    assert wrong.exit_code == 1 and "cannot be chosen by lite2: not available" in wrong.output


def test_what_is_no_photo_is_told_before_anything_is_done(tmp_path: Path, paths: list[Path]) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    with pytest.raises(EvaluationError, match=r"broken\.jpg cannot be read as a photo"):
        compare.compare([*paths, broken], tmp_path / "page.html")
    with pytest.raises(ValueError, match="'gif' is none of jpeg"):
        compare.compare(paths, tmp_path / "page.html", compare.Settings(formats=("gif",)))
    assert not (tmp_path / "page.html").exists()


def test_a_page_takes_no_photos_place(paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = paths[0].read_bytes()
    (tmp_path / "page.html").symlink_to(paths[0])
    monkeypatch.setattr(compare, "photo_at", lambda _: pytest.fail("a photo was read before that was seen"))
    for out, told in (
        (paths[0], "would take the place of the photo"),
        (tmp_path / "page.html", "would take the place of the photo"),
        (tmp_path / "other.png", r"other\.png is not named like one: end its name in \.html"),
    ):
        with pytest.raises(ValueError, match=told):
            compare.compare(paths, out)
    assert paths[0].read_bytes() == before


def test_by_any_metric_into_a_new_folder(paths: list[Path], tiny_model: Path, tmp_path: Path) -> None:
    options = ["--model", tiny_model, "--bpp", 1, "--against", "jpeg", "--metrics", "psnr", "--by", "ms_ssim"]
    out = tmp_path / "pages" / "page.html"
    told = CliRunner().invoke(main, ["compare", *map(str, [paths[1], "--out", out, *options])])
    assert told.exit_code == 0 and "by MS-SSIM" in out.read_text(encoding="utf-8")
    told = CliRunner().invoke(main, ["compare", *map(str, [paths[0], "--out", out, *options])])  # 192x128
    assert told.exit_code == 1 and "not defined below 161 pixels" in told.output


def test_a_text_that_is_no_caption_does_not_matter(paths: list[Path], tiny_model: Path, tmp_path: Path) -> None:
    paths[0].with_suffix(".txt").write_text("x" * 5000)
    out = tmp_path / "page.html"
    options = ["--out", out, "--model", tiny_model, "--bpp", 1, "--against", "jpeg", "--metrics", "psnr"]
    told = CliRunner().invoke(main, ["compare", *map(str, [paths[0], *options])])
    assert told.exit_code == 0 and out.exists(), told.output
