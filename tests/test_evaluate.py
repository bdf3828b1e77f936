"""perco evaluate: what it measures, what it writes down, and that it goes on after a break."""

import io
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from perco_engine.bitstream import read_header
from perco_engine.errors import EvaluationError
from perco_engine.evaluation import classical, coco, distributions, metrics, peers, photo_folder, published, report
from perco_engine.evaluation.evaluate import Run, Settings, evaluate
from perco_engine.evaluation.photo_folder import find_photos
from perco_engine.evaluation.results import Line, Lines
from pillow_perco.cli import main


@pytest.fixture
def folder(photo: Image.Image, tmp_path: Path) -> Path:
    """Two photos of 192x128, one of them with a caption beside it, and a file that is no picture."""
    path = tmp_path / "photos"
    (path / "more").mkdir(parents=True)
    photo.save(path / "a.png")
    photo.transpose(Image.Transpose.ROTATE_180).save(path / "more" / "b.png")
    (path / "more" / "b.txt").write_text("a barn owl\n")
    (path / "broken.jpg").write_bytes(b"no picture")
    return path


@pytest.fixture
def settings(folder: Path, tiny_model: Path, tmp_path: Path) -> Settings:
    return Settings(folder, tmp_path / "out", str(tiny_model), (0.004, 0.02), (0, 2), ("psnr",))


def lines(run: Run) -> list[Line]:
    return [json.loads(text) for text in (run.settings.out / "results.jsonl").read_text().splitlines()]


def gray(*levels: int) -> Image.Image:
    return Image.fromarray(np.array([[[level] * 3 for level in levels]], np.uint8))


def test_psnr() -> None:
    assert metrics.psnr(gray(10, 20, 30), gray(11, 19, 31)) == pytest.approx(48.1308, abs=1e-4)
    assert metrics.psnr(gray(0, 0), gray(0, 255)) == pytest.approx(3.0103, abs=1e-4)
    assert metrics.psnr(gray(7), gray(7)) == 100


def test_frechet_distance() -> None:
    one, other = np.array([[0.0], [2.0]]), np.array([[3.0], [7.0]])  # means 1 and 5, variances 2 and 8
    assert distributions.frechet_distance(one, other) == pytest.approx(16 + 2)
    rng = np.random.default_rng(0)
    for n in (4, 30):  # fewer and more samples than dimensions
        x, y = rng.normal(size=(n, 6)), rng.normal(1, 2, size=(n + 1, 6))
        a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
        root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
        expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * root
        assert distributions.frechet_distance(x, y) == pytest.approx(expected, abs=1e-5)


def test_kernel_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    # (xy + 1)^3: within {0, 2} it is 1, within {1, 3} it is 64, between them the mean of 1, 1, 27 and 343.
    value = distributions.kernel_distance(np.array([[0.0], [2.0]]), np.array([[1.0], [3.0]]))
    assert value == pytest.approx(1 + 64 - 2 * 93)
    many = np.random.default_rng(0).normal(size=(300, 2))
    whole = distributions.kernel_distance(many, many + 1)
    monkeypatch.setattr(distributions, "SUBSET_SIZE", 200)
    some = distributions.kernel_distance(many, many + 1)
    assert some != whole and some == pytest.approx(whole, rel=0.1)
    assert some == distributions.kernel_distance(many, many + 1)


def test_patches_come_from_two_grids() -> None:
    where = np.zeros((512, 768, 3), np.uint8)
    where[:, :, 0] = np.arange(768) // 128
    where[:, :, 1] = np.arange(512)[:, None] // 128
    corners = [patch.getpixel((0, 0))[:2] for patch in distributions.patches(Image.fromarray(where))]
    assert corners == [(0, 0), (2, 0), (4, 0), (0, 2), (2, 2), (4, 2), (1, 1), (3, 1)]
    assert list(distributions.patches(Image.new("RGB", (255, 400)))) == []


def test_small_pictures_are_left_out_of_sets() -> None:
    taken: list[int] = []

    def network(picture: Image.Image) -> distributions.Features:
        taken.append(picture.height)
        return np.zeros(2)

    pictures = [Image.new("RGB", (60, height)) for height in (3, 31, 32, 200)]
    found = distributions.extract(network, distributions.SET_METRICS["lite2_kid"], pictures)
    assert taken == [32, 200] and found.shape == (2, 2)
    assert distributions.extract(network, distributions.SET_METRICS["kid"], pictures).shape == (4, 2)


def test_what_is_written_down(settings: Settings) -> None:
    run = evaluate(settings)
    assert [photo.name for photo in run.photos] == ["a.png", "more/b.png"]
    assert "cannot identify image file" in run.skipped["broken.jpg"]
    found = lines(run)
    assert [(line["photo"], line["bpp"], line["steps"]) for line in found] == [
        (name, bpp, steps) for name in ("a.png", "more/b.png") for bpp in (0.0039, 0.0195) for steps in (0, 2)
    ]
    # 18 bytes of header with a fingerprint, 6x4 codes of 4 bits and 2 bits of flush, 2 bytes of checksum
    assert found[0]["bytes"] == {"hyper_latent": 13, "text": 0, "other": 20, "total": 33}
    assert found[0]["bits_per_pixel"]["total"] == pytest.approx(8 * 33 / (192 * 128))
    # the caption's ten letters and a chunk's two bytes; the header then tells the length of the hyper-latent
    assert found[4]["bytes"] == {"hyper_latent": 13, "text": 12, "other": 21, "total": 46}
    assert found[4]["caption"] == found[4]["sidecar"] == "a barn owl"
    for line in found:
        assert (settings.out / line["file"]).stat().st_size == line["bytes"]["total"]
        with Image.open(settings.folder / line["photo"]) as a, Image.open(settings.out / line["picture"]) as b:
            difference = np.asarray(a, int) - np.asarray(b, int)
        expected = 20 * np.log10(255) - 10 * np.log10((difference**2).mean())
        assert line["metrics"] == {"psnr": pytest.approx(expected)}
        assert line["encode_s"] > 0 and line["decode_s"] > 0
    row = report.rows(run)[2]
    assert (row.bpp, row.steps) == (0.0195, 0)
    psnrs = [line["metrics"]["psnr"] for line in found if (line["bpp"], line["steps"]) == (0.0195, 0)]
    assert row.metrics["psnr"] == (pytest.approx(sum(psnrs) / 2), 2)


def test_a_run_that_broke_off_goes_on(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lines(evaluate(settings))
    path = settings.out / "results.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[: -len(data) // 5])
    kept = path.read_bytes().rsplit(b"\n", 1)[0] + b"\n"
    told: list[str] = []
    run = evaluate(settings, told.append)
    assert path.read_bytes().startswith(kept)
    assert told[0].startswith("broken.jpg") and told[1] == "more/b.png: 0.0195 bpp" and len(told) == 2

    def timeless(line: Line) -> Line:
        return {name: value for name, value in line.items() if not name.endswith("_s")}

    assert [timeless(line) for line in lines(run)] == [timeless(line) for line in whole]
    # a metric that was not there is measured from the pictures, without decoding
    luma = metrics.Metric("luma", "luma", False, "mean", "", lambda _: lambda x: lambda y: _luma(x) - _luma(y))
    monkeypatch.setitem(metrics.METRICS, "luma", luma)
    monkeypatch.setattr("perco_engine.evaluation.evaluate.ALL_METRICS", ("psnr", "luma"))
    monkeypatch.setattr(type(run.engine), "decode", None)
    again = evaluate(Settings(**{**settings.__dict__, "metrics": ("luma",)}))
    for line in again.lines:
        assert set(line["metrics"]) == {"psnr", "luma"}


def _luma(picture: Image.Image) -> float:
    return float(np.asarray(picture.convert("L")).mean())


def test_captions_of_a_captioner_fill_in_for_those_beside_the_photos(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def captioner(images: list[Image.Image]) -> list[str]:
        asked.append(len(images))
        return ["a cat"] * len(images)

    monkeypatch.setattr("perco_engine.evaluation.evaluate.get_captioner", lambda *_: captioner)
    run = evaluate(Settings(**{**settings.__dict__, "captioner": "some", "steps": (0,)}))
    assert [line["caption"] for line in lines(run)] == ["a cat"] * 2 + ["a barn owl"] * 2
    assert asked == [1]
    with pytest.raises(EvaluationError, match=r"captioner 'some' there, None now"):
        evaluate(settings)


def test_results_of_two_models_are_not_mixed(settings: Settings) -> None:
    evaluate(settings)
    before = (settings.out / "results.jsonl").read_bytes()
    with pytest.raises(EvaluationError, match=r"results of another run .*model.*not mixed; choose another folder"):
        evaluate(Settings(**{**settings.__dict__, "model": "embedded"}))
    assert (settings.out / "results.jsonl").read_bytes() == before


def test_lines_that_are_damaged_otherwise_are_told(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(EvaluationError, match=r"line 2 of .*remove this line"):
        Lines(path, lambda line: line["a"])
    path.write_text('{"a": 1, "b": 1}\n{"a": 1, "b": 2}\n{"a": 3')
    assert list(Lines(path, lambda line: line["a"])) == [{"a": 1, "b": 2}]
    assert path.read_text() == '{"a": 1, "b": 1}\n{"a": 1, "b": 2}\n'


def test_a_metric_that_is_missing_is_told_and_leaves_the_others(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("lpips", "cleanfid", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)
    wanted = Settings(**{**settings.__dict__, "metrics": ("psnr", "lpips", "kid"), "bpp": (0.004,), "steps": (0,)})
    run = evaluate(wanted)
    assert list(run.judges) == ["psnr"]
    text = report.write(run)
    assert text == (settings.out / "summary.md").read_text().rstrip("\n")
    assert ", effort: usual, " in text
    assert "- LPIPS: not available (import of lpips halted; None in sys.modules): pip install lpips" in text
    assert "- KID: not available (" in text and "): pip install clean-fid" in text
    assert "Plots: not available (import of matplotlib" in text
    assert "| 0.0039 | 0 | 40 |" in text and "PSNR, dB ↑" in text
    assert (settings.out / "sheet-0-steps.png").exists()

    def no_weights(_: object) -> metrics.Judge:
        raise OSError("HTTP Error 404\nmore")

    found, why = metrics.attempt(no_weights, None, "x")
    assert (found, why) == (None, "not available (its weights cannot be loaded: HTTP Error 404)")


def test_a_metric_is_not_defined_for_small_pictures() -> None:
    judge: metrics.Judge = lambda original: lambda decoded: 1.0  # noqa: E731
    measured = metrics.measure({"ms_ssim": judge, "psnr": judge}, Image.new("RGB", (300, 160)))
    assert measured(Image.new("RGB", (300, 160))) == {"ms_ssim": None, "psnr": 1.0}


def test_peers_in_the_same_bytes(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classical, "SCALES", (1, 2, 4))
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    wanted = {**settings.__dict__, "bpp": (0.004, 1.0), "steps": (0,), "against": ("webp", "jpeg", "jxl")}
    run = evaluate(Settings(**wanted))
    assert list(run.codecs) == ["jpeg", "webp"]
    text = report.write(run)
    assert "| 0.0039 | WebP | (0 of 2) |" in text and "- JPEG XL: not available (import of pillow_jxl" in text
    chosen = [json.loads(line) for line in (settings.out / "against.jsonl").read_text().splitlines()]
    top = max(line["bpp"] for line in chosen)
    best = {
        name: max(line["value"] for line in chosen if line["photo"] == name and line["bpp"] == top)
        for name in ("a.png", "more/b.png")
    }
    assert f"| {top} | best of these | {sum(best.values()) / 2:.2f} |" in text
    assert all(line["bytes"] <= line["budget_bytes"] for line in chosen)


def test_photos_of_a_folder(folder: Path, photo: Image.Image) -> None:
    out = folder / "out"
    out.mkdir()
    photo.save(out / "decoded.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(folder / "a.jpg", exif=exif)
    found = find_photos(folder, out)
    assert [p.name for p in found] == ["a.jpg", "a.png", "broken.jpg", "more/b.png"]
    assert [p.place for p in found] == ["a.jpg", "a.png", "broken", "more/b"]
    assert found[0].read().size == (128, 192)
    assert [p.name for p in find_photos(folder, out, 2)] == ["a.jpg", "a.png"]
    (folder / "empty").mkdir()
    with pytest.raises(EvaluationError, match="no picture in"):
        find_photos(folder / "empty", out)
    assert [p.name for p in find_photos(folder / "more", folder)] == ["b.png"]  # results beside the photos' folder


@pytest.mark.parametrize("options", [["evaluate", "--out"], ["captions", "--out"], ["peers", "--bpp", "1", "--keep"]])
def test_results_among_the_photos_are_refused(options: list[str], settings: Settings) -> None:
    if options[0] != "peers":
        options = [options[0], "--model", settings.model, *options[1:]]
    result = CliRunner().invoke(main, [*options, str(settings.folder), str(settings.folder)])
    assert result.exit_code == 1 and "the results need a folder of their own" in result.output


def test_steps_that_are_named_twice_are_done_once(settings: Settings) -> None:
    run = evaluate(replace(settings, steps=(2, 0, 2)))
    assert run.settings.steps == (2, 0) and len(lines(run)) == len(report.rows(run)) * 2 == 8


def test_a_report_keeps_nothing_of_one_before(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither classical files that are no longer asked for, nor plots."""
    monkeypatch.setattr(classical, "SCALES", (1, 4))
    monkeypatch.setattr(report.plots, "figure", lambda *_: {"svg": b"<svg/>"})
    wanted = replace(settings, bpp=(1.0,), steps=(0,), against=("webp",))
    report.write(evaluate(wanted))
    assert (settings.out / "against.jsonl").exists()
    (settings.out / "plots" / "kid.svg").touch()
    report.write(evaluate(replace(wanted, against=())))
    assert not (settings.out / "against.jsonl").exists()
    assert [path.name for path in (settings.out / "plots").iterdir()] == ["psnr.svg"]


def test_published_numbers_belong_to_metrics_and_rise_with_the_rate() -> None:
    known = metrics.METRICS | distributions.SET_METRICS
    for curve in published.PUBLISHED:
        assert "published, not measured" in curve.label and curve.points.keys() | curve.bounds.keys() <= known.keys()
        for name, points in curve.points.items():
            values = [value for _, value in sorted(points)]
            assert values == sorted(values, reverse=not known[name].higher_is_better)
    assert published.PUBLISHED[0].points["fid"][2] == (0.0329, 2.57)


def test_coco(tmp_path: Path, photo: Image.Image) -> None:
    names = [f"{number:012}.jpg" for number in (9, 25, 30, 34, 36, 42, 49)]
    told = {
        "images": [{"id": k, "file_name": name} for k, name in reversed(list(enumerate(names)))],
        "annotations": [
            {"id": 8, "image_id": 0, "caption": "second"},
            {"id": 7, "image_id": 0, "caption": " first "},
            {"id": 9, "image_id": 3, "caption": "other"},
        ],
    }
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(told))
    assert coco.select(path, 2) == {"000000000009.jpg": "first", "000000000034.jpg": "other"}
    with pytest.raises(EvaluationError, match=r"take captions_train2017\.json"):
        coco.select(path)
    for name in names[::3]:
        photo.save(tmp_path / name)
    assert list(coco.gather(path, tmp_path, tmp_path / "out", 2)) == names[:4:3]
    assert (tmp_path / "out" / "000000000009.txt").read_text() == "first\n"
    assert [p.sidecar for p in find_photos(tmp_path / "out", tmp_path / "x")] == ["first", "other"]
    path.write_text("[]")
    with pytest.raises(EvaluationError, match="does not hold MS-COCO captions"):
        coco.select(path)


def test_the_command(settings: Settings) -> None:
    arguments = ["evaluate", settings.folder, "--out", settings.out, "--model", settings.model, "--metrics", "psnr"]
    options = ["--bpp", "0.004,0.02", "--steps", "0", "--limit", "1"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments + options])
    assert result.exit_code == 0, result.output
    assert f"look at {settings.out / 'summary.md'}" in result.output and "| 0.0195 | 0 |" in result.output
    for wrong, says in (
        (["--metrics", "beauty"], "'beauty' is none of psnr, "),
        (["--against", "gif"], "'gif' is none of jpeg, "),
        (["--steps", "few"], "no list of numbers"),
        (["--out", str(settings.folder)], "folder of their own"),
    ):
        result = CliRunner().invoke(main, [str(argument) for argument in (*arguments, *wrong)])
        assert result.exit_code in (1, 2) and says in result.output, result.output


def test_a_plot_says_what_was_not_measured() -> None:
    pytest.importorskip("matplotlib")
    from perco_engine.evaluation import plots

    files = plots.figure("title", "MS-SSIM", "ms_ssim", [plots.Series("ours", [(0.1, 0.8), (0.01, 0.6)])])
    text = files["svg"].decode()
    assert "PerCo (SD), Kodak (published, not measured)" in text and "ours" in text
    with Image.open(io.BytesIO(files["png"])) as picture:
        assert picture.width > 600


def test_the_feature_distance_is_the_one_of_its_definition(photo: Image.Image) -> None:
    torch = pytest.importorskip("torch")
    from perco_engine.models.perceptual import FeatureDistance

    judges, missing = metrics.load(["lite0"], torch.device("cpu"))
    if missing:
        pytest.skip(missing["lite0"])
    decoded = photo.resize((48, 32)).resize(photo.size)
    value = metrics.measure(judges, photo)(decoded)["lite0"]
    x, y = (torch.from_numpy(np.array(p)).permute(2, 0, 1)[None] / 127.5 - 1 for p in (photo, decoded))
    network = FeatureDistance("lite0")
    with torch.no_grad():
        expected = sum(
            float((a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)).pow(2).sum(1).mean())
            for a, b in zip(network.features(x), network.features(y), strict=True)
        )
    assert value == pytest.approx(expected, abs=1e-4)


def test_photos_whose_captions_cannot_be_read_are_left_out(settings: Settings) -> None:
    (settings.folder / "a.txt").write_bytes("Käuzchen".encode("latin-1"))
    run = evaluate(settings)
    assert [photo.name for photo in run.photos] == ["more/b.png"]
    assert "a.txt is not in UTF-8" in run.skipped["a.png"]


def test_a_problem_without_a_text_is_a_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> str:
        raise OSError

    monkeypatch.setattr(photo_folder, "sidecar_caption", fail)
    assert find_photos(folder, folder / "out", 1)[0].problem == "OSError"


def test_photos_of_any_name(settings: Settings) -> None:
    (settings.folder / "a.png").rename(settings.folder / os.fsdecode(b"caf\xe9.png"))
    run = evaluate(settings)
    assert [photo.name for photo in run.photos] == ["caf\udce9.png", "more/b.png"]
    assert evaluate(settings).line(run.photos[0], 0.0039, 0)["bytes"]["total"] == 33


def test_a_photo_whose_results_would_have_too_long_names_is_left_out(settings: Settings) -> None:
    (settings.folder / "a.png").rename(settings.folder / f"{'a' * 251}.png")
    run = evaluate(replace(settings, bpp=(0.004,), steps=(0,), effort=0))
    assert [photo.name for photo in run.photos] == ["more/b.png"]
    assert "its name is too long for files with its results" in run.skipped[f"{'a' * 251}.png"]


def test_what_photos_carry_beside_their_pixels_is_left_out(photo: Image.Image, tmp_path: Path) -> None:
    """A colour that is transparent, and blocks that classical files would carry along."""
    exif = Image.Exif()
    exif[0x010E] = "a barn owl"
    photo.save(tmp_path / "a.png", transparency=photo.getpixel((5, 5)), exif=exif)
    (found,) = find_photos(tmp_path, tmp_path / "out")
    image = found.read()
    assert (image.mode, image.info, dict(image.getexif())) == ("RGB", {}, {})


def test_summaries_of_photos_of_any_name(settings: Settings) -> None:
    (settings.folder / "broken.jpg").rename(settings.folder / os.fsdecode(b"caf\xe9.jpg"))
    assert "- caf\\xe9.jpg: " in report.write(evaluate(settings))


def test_what_was_changed_and_changed_back_is_done_again(settings: Settings) -> None:
    """There is one file of a photo: that of its last caption."""
    evaluate(settings)
    caption = settings.folder / "more" / "b.txt"
    caption.write_text("something else")
    evaluate(settings)
    caption.write_text("a barn owl\n")
    run = evaluate(settings)
    (photo,) = (photo for photo in run.photos if photo.name == "more/b.png")
    line = run.line(photo, run.points[0].bpp, 0)
    file = (settings.out / line["file"]).read_bytes()
    assert line["caption"] == read_header(file).caption == "a barn owl"
    count = len(lines(run))
    evaluate(settings)
    assert len(lines(run)) == count


def test_names_that_end_like_files_are_kept_apart(folder: Path, photo: Image.Image) -> None:
    for name in ("a.jpg", "a.jpg.png"):
        photo.save(folder / name)
    places = [one.place for one in find_photos(folder, folder / "out")]
    assert places == ["a.jpg", "a.jpg.png", "a.png", "broken", "more/b"]


def test_a_caption_that_no_file_can_hold_costs_its_photo(settings: Settings) -> None:
    (settings.folder / "a.txt").write_text("x" * 4097)
    run = evaluate(settings)
    assert [photo.name for photo in run.photos] == ["more/b.png"]
    assert run.skipped["a.png"] == (
        f"cannot be read: its caption has more than 4096 bytes: shorten {settings.folder / 'a.txt'}"
    )


def test_names_of_models_are_shown_as_they_are() -> None:
    pytest.importorskip("matplotlib")
    from perco_engine.evaluation import plots

    files = plots.figure("cost_$5_$7", "PSNR", "psnr", [plots.Series("_x $1", [(0.1, 0.8), (0.01, 0.6)])])
    assert "cost_$5_$7" in files["svg"].decode() and "_x $1" in files["svg"].decode()


def test_other_steps_of_another_caption_leave_no_line_of_its_file(settings: Settings) -> None:
    caption = settings.folder / "more" / "b.txt"
    evaluate(replace(settings, steps=(0,)))
    caption.write_text("something quite else")
    evaluate(replace(settings, steps=(2,)))
    caption.write_text("a barn owl\n")
    run = evaluate(replace(settings, steps=(0,)))
    (photo,) = (photo for photo in run.photos if photo.name == "more/b.png")
    line = run.line(photo, run.points[0].bpp, 0)
    assert read_header((settings.out / line["file"]).read_bytes()).caption == line["caption"] == "a barn owl"
    assert run.find(photo, run.points[0].bpp, 2) is None


def test_a_file_of_another_photo_in_its_place_is_not_taken_for_its_own(settings: Settings, photo: Image.Image) -> None:
    """a.png and a.bmp alone are both called a; together they are not."""
    first = evaluate(settings)
    before = first.line(first.photos[0], first.points[0].bpp, 2)["bytes"]["total"]
    (settings.folder / "a.png").rename(settings.folder / "kept")
    Image.new("RGB", photo.size, "blue").save(settings.folder / "a.bmp")
    evaluate(settings)
    (settings.folder / "a.bmp").rename(settings.folder / "kept too")
    (settings.folder / "kept").rename(settings.folder / "a.png")
    run = evaluate(settings)
    line = run.line(run.photos[0], run.points[0].bpp, 2)
    assert line["bytes"]["total"] == before == (settings.out / line["file"]).stat().st_size
    assert run.picture(line).resize((1, 1)).getpixel((0, 0)) != (0, 0, 255)


def test_pictures_that_were_removed_are_made_anew(settings: Settings) -> None:
    evaluate(settings)
    shutil.rmtree(settings.out / "pictures")
    run = evaluate(settings)
    assert all(run.picture(run.line(photo, point.bpp, 0)) for photo in run.photos for point in run.points)


@pytest.mark.parametrize("bpps", [(), (-3.0,), (float("inf"),)])
def test_peers_of_no_rate(bpps: tuple[float, ...], settings: Settings) -> None:
    with pytest.raises(ValueError, match="name the rates, each a positive number"):
        peers.tabulate(settings.folder, settings.out, bpps)
