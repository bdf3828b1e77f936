"""The best classical file in so many bytes: found as an exhaustive search finds it, kept, and cheap for other bytes."""

import io
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from perco_engine.errors import EvaluationError
from perco_engine.evaluation import classical, classical_search, metrics, peers
from perco_engine.evaluation.classical_search import Search, Task, digest
from perco_engine.evaluation.photo_folder import Photo, find_photos
from pillow_perco.cli import main


@pytest.fixture
def folder(photo: Image.Image, tmp_path: Path) -> Path:
    path = tmp_path / "photos"
    path.mkdir()
    photo.save(path / "a.png")
    return path


def every_file(photo: Image.Image, name: str) -> list[tuple[float, int, float, int]]:
    """PSNR, quality, scale, bytes of all files of a format, by another road than the search's."""
    files = []
    for scale in classical.SCALES:
        small = photo.resize((round(192 / scale), round(128 / scale)), Image.Resampling.LANCZOS)
        for quality in range(1, 96):
            buffer = io.BytesIO()
            small.save(buffer, quality=quality, **classical.CODECS[name].options)
            with Image.open(buffer) as decoded:
                shown = decoded.convert("RGB").resize(photo.size, Image.Resampling.BICUBIC)
            error = np.asarray(shown, float) - np.asarray(photo, float)
            files.append((10 * np.log10(255**2 / (error**2).mean()), quality, scale, buffer.tell()))
    return files


@pytest.mark.parametrize(("name", "budgets"), [("webp", [150, 400, 2000]), ("jpeg", [450, 900, 3000])])
def test_the_best_file(name: str, budgets: list[int], photo: Image.Image, tmp_path: Path) -> None:
    codec, versions = classical.CODECS[name], classical.available([name])[0]
    judges = metrics.load(["psnr"], torch.device("cpu"))[0]
    tried = Search(tmp_path / "kept", digest(photo), versions).run(photo, codec, budgets, judges)
    files = every_file(photo, name)
    scored = [one for one in tried if one.scores]
    assert len(scored) < 40 and len(tried) < 250 < len(files) / 4
    for budget in budgets:
        best = classical.best(tried, budget, "psnr")
        assert best is not None and best.size_bytes <= budget
        values = [file for file in files if file[3] <= budget]
        # the finest quality that fits is found; a file may by chance be a little better at a coarser one
        assert best.scores["psnr"] >= max(values)[0] - 0.15
        assert (best.scores["psnr"], best.quality, best.scale, best.size_bytes) in [
            (pytest.approx(value, abs=1e-3), *rest) for value, *rest in values
        ]
    assert classical.best(tried, 20, "psnr") is None


def test_what_was_tried_is_kept(photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, versions = classical.CODECS["webp"], classical.available(["webp"])[0]
    asked: list[str] = []

    def counting(original: Image.Image) -> metrics.Score:
        def score(decoded: Image.Image) -> float:
            asked.append("psnr")
            return metrics.psnr(original, decoded)

        return score

    judges = {"psnr": counting}
    tried = Search(tmp_path, digest(photo), versions).run(photo, codec, [150, 300, 600, 1200], judges)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    cold = len(asked)
    with monkeypatch.context() as patch:
        patch.setattr(classical.Codec, "encode", None)
        assert Search(tmp_path, digest(photo), versions).run(photo, codec, [150, 1200], judges) == tried
    assert len(asked) == cold and path.read_bytes() == before
    # other budgets cost little, and find what is found from nothing
    other = Search(tmp_path, digest(photo), versions).run(photo, codec, [180, 400, 900], judges)
    assert len(asked) - cold <= cold / 2
    fresh = Search(tmp_path / "fresh", digest(photo), versions).run(photo, codec, [180, 400, 900], judges)
    for budget in (180, 400, 900):
        one, same = (classical.best(files, budget, "psnr") for files in (other, fresh))
        assert one is not None and same is not None and one.scores["psnr"] >= same.scores["psnr"] - 0.05
    # another version of the codec writes other files
    assert Search(tmp_path, digest(photo), {"webp": "99"}).candidates("webp") == []
    # a metric that came later is measured of few of them
    last = Search(tmp_path, digest(photo), versions).run(photo, codec, [600], {"psnr": counting, "lite0": counting})
    assert 3 <= sum("lite0" in one.scores for one in last) <= 12
    assert {(one.scale, one.quality) for one in other} <= {(one.scale, one.quality) for one in last}


def test_what_is_kept_is_of_the_pixels_and_not_of_their_file(
    folder: Path, photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which another release may read otherwise, and which may be written anew."""
    monkeypatch.setattr(classical, "SCALES", (1, 4))
    kept, read = tmp_path / "kept", Photo.read
    peers.tabulate(folder, kept, [0.2], ["webp"], ["psnr"])
    photo.save(folder / "a.png", compress_level=0)
    peers.tabulate(folder, kept, [0.2], ["webp"], ["psnr"])
    assert len(list(kept.iterdir())) == 1
    reads: list[str] = []

    def turned(self: Photo) -> Image.Image:
        reads.append(self.name)
        return read(self).transpose(Image.Transpose.ROTATE_180)

    monkeypatch.setattr(Photo, "read", turned)
    peers.tabulate(folder, kept, [0.2], ["webp"], ["psnr"])
    assert len(list(kept.iterdir())) == 2 and reads == ["a.png"] * 2  # to know its pixels, and to search
    upended = Image.frombytes("RGB", (photo.height, photo.width), photo.tobytes())
    assert digest(upended) != digest(photo)


def test_a_process_that_was_ended_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: object) -> None:
        raise BrokenProcessPool("a child process terminated abruptly")

    monkeypatch.setattr(classical_search, "ProcessPoolExecutor", ended)
    Image.new("RGB", (9, 9)).save(folder / "b.jpg")
    with pytest.raises(EvaluationError, match=r"was ended, likely for want of memory: take fewer --jobs; .* is kept"):
        peers.tabulate(folder, tmp_path / "kept", [1], ["webp"], ["psnr"], jobs=2)


def test_a_metric_that_is_not_defined_is_not_measured(photo: Image.Image, tmp_path: Path) -> None:
    judge: metrics.Judge = lambda original: lambda decoded: 1.0  # noqa: E731
    versions = classical.available(["webp"])[0]
    tried = Search(tmp_path, digest(photo), versions).run(photo, classical.CODECS["webp"], [300], {"ms_ssim": judge})
    assert all(not one.scores for one in tried) and classical.best(tried, 300, "ms_ssim") is None


def test_jobs_find_the_same(folder: Path, photo: Image.Image, tmp_path: Path) -> None:
    photo.transpose(Image.Transpose.ROTATE_180).save(folder / "b.png")
    versions = classical.available(["webp", "jxl"])[0]  # the second where its package is installed

    def files(kept: Path, jobs: int) -> dict[str, bytes]:
        tasks = [
            Task(one, digest(image), image.size, kept, versions, [200, 500], ("psnr",), torch.device("cpu"))
            for one in find_photos(folder, kept)
            for image in [one.read()]
        ]
        told: list[str] = []
        classical_search.search(tasks, jobs, told.append)
        assert [text.split(":")[0] for text in told] == ["a.png", "b.png"]
        return {path.name: path.read_bytes() for path in kept.iterdir()}

    one = files(tmp_path / "one", 1)
    assert len(one) == 2 and files(tmp_path / "two", 2) == one


def test_perco_peers(folder: Path, photo: Image.Image, tmp_path: Path) -> None:
    (folder / "broken.jpg").write_bytes(b"no picture")
    options = ["--bpp", "0.04,0.2", "--keep", str(tmp_path / "kept"), "--metrics", "psnr", "--against", "webp,jpeg"]
    result = CliRunner().invoke(main, ["peers", str(folder), *options])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "| bpp | file | PSNR, dB ↑ |" and len(lines) == 10
    assert lines[3] == "| 0.04 | JPEG | (0 of 1) |"  # 122 bytes
    webp = max(value for value, _, _, size in every_file(photo, "webp") if size <= int(0.2 * 192 * 128 / 8))
    row = next(line for line in lines if line.startswith("| 0.2 | WebP |"))
    assert float(row.split("|")[3]) == pytest.approx(webp, abs=0.15)
    assert lines[-1].startswith("- broken.jpg: left out, cannot be read: cannot identify")
    wrong = CliRunner().invoke(main, ["peers", str(folder), *options[:-1], "gif"])
    assert wrong.exit_code == 1 and "'gif' is none of jpeg, webp, avif, jxl" in wrong.output


def test_formats_are_tried_at_sizes_that_they_take(tmp_path: Path) -> None:
    sizes = [(16384, 16), (65501, 16), (70000, 16), (16383, 16)]
    least = {name: [classical.CODECS[name].scales(size)[0] for size in sizes] for name in ("webp", "jpeg", "avif")}
    assert least == {"webp": [1.5, 4, 6, 1], "jpeg": [1, 1.5, 1.5, 1], "avif": [1, 1, 1.5, 1]}
    photo, versions = Image.new("RGB", (16390, 8)), classical.available(["webp"])[0]
    judges = metrics.load(["psnr"], torch.device("cpu"))[0]
    tried = Search(tmp_path / "kept", digest(photo), versions).run(photo, classical.CODECS["webp"], [3000], judges)
    assert tried and min(one.scale for one in tried) == 1.5


def test_photos_of_the_same_pixels_are_searched_one_after_the_other(
    folder: Path, photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo.save(folder / "b.png", compress_level=0)
    photos, given = find_photos(folder, tmp_path / "kept"), list[list[str]]()
    monkeypatch.setattr(
        classical_search, "_search", lambda tasks: given.append([t.photo.name for t in tasks]) or ["told"] * len(tasks)
    )
    told: list[str] = []
    versions = classical.available(["webp"])[0]
    rest = digest(photo), photo.size, tmp_path / "kept", versions, [400], ("psnr",), torch.device("cpu")
    tasks = [Task(one, *rest) for one in photos]
    classical_search.search(tasks, 2, told.append)
    assert given == [["a.png", "b.png"]] and told == ["told", "told"]
