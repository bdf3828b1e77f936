"""The command line, from outside."""

import errno
import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import opened_size
from PIL import Image, ImageCms, ImageOps

import pillow_perco
from perco_engine import get_engine, preview
from perco_engine.codes import Metadata
from perco_engine.evaluation import bench
from perco_engine.evaluation.contact_sheet import samples_sheet
from perco_engine.picture_files import picture_bytes
from perco_engine.thumbnails import cache_paths, uri
from pillow_perco.cli import main


def perco(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def jpeg(photo: Image.Image, tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    photo.save(path)
    return path


def test_encode_info_decode(jpeg: Path, tmp_path: Path) -> None:
    coded, decoded = tmp_path / "photo.perco", tmp_path / "out.png"
    result = perco("encode", jpeg, coded, "--bpp", 0.03, "--caption", "a barn owl")
    assert result.exit_code == 0 and f"{coded.stat().st_size} bytes" in result.output
    told = json.loads(perco("info", coded, "--json").output)
    assert (told["bpp"], told["caption"], told["width"], told["mode"]) == (0.03, "a barn owl", 192, "RGB")
    assert "barn owl" in perco("info", coded).output
    assert perco("decode", coded, decoded).exit_code == 0
    assert opened_size(decoded) == (192, 128)
    assert perco("decode", coded, tmp_path / "small.jpg", "--max-size", 60, "--steps", 0).exit_code == 0
    assert opened_size(tmp_path / "small.jpg") == (60, 40)


def test_samples_are_a_sheet_of_several_seeds(jpeg: Path, tiny_model: Path, tmp_path: Path) -> None:
    coded, sheet = tmp_path / "photo.perco", tmp_path / "sheet.png"
    assert perco("encode", jpeg, coded, "--model", tiny_model, "--best-of", 3).exit_code == 0
    assert perco("decode", coded, sheet, "--model", tiny_model, "--samples", 4).exit_code == 0
    with Image.open(sheet) as picture:
        assert picture.size == (2 * 192 + 3 * 16, 2 * (128 + 24 + 16) + 3 * 16)
        corners = [picture.crop((x, y, x + 192, y + 128)).tobytes() for x in (16, 224) for y in (16, 200)]
    assert len(set(corners)) == 4


def test_captions_of_a_sheet_do_not_run_into_each_other() -> None:
    seeds, picture = range(4294967290, 4294967294), Image.new("RGB", (8, 64))
    widths = [samples_sheet([picture], [seed]).width - 16 for seed in seeds]
    assert min(widths) > 100 and samples_sheet([picture] * 4, seeds).width == sum(widths) + 16


def test_photos_are_turned_upright(jpeg: Path, photo: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(jpeg, exif=exif)
    perco("encode", jpeg, tmp_path / "x.perco")
    assert opened_size(tmp_path / "x.perco") == (128, 192)


def test_metadata_outlives_the_conversion_to_srgb(jpeg: Path, photo: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a barn owl"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo.save(jpeg, exif=exif, icc_profile=profile)
    assert perco("encode", jpeg, tmp_path / "x.perco", "--keep-metadata").exit_code == 0
    with Image.open(tmp_path / "x.perco") as image:
        assert image.getexif()[0x010E] == "a barn owl"


def test_another_model_is_named_at_decoding_too(jpeg: Path, tiny_model: Path, tmp_path: Path) -> None:
    coded = tmp_path / "x.perco"
    assert perco("encode", jpeg, coded, "--model", tiny_model).exit_code == 0
    assert perco("decode", coded, tmp_path / "x.png", "--model", tiny_model).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("encode", "{jpeg}", "{out}", "--bpp", "-1"), "-1.0 is not in the range x>0"),
        (("encode", "{jpeg}", "{out}", "--max-bytes", "0"), "0 is not in the range x>=1"),
        (("encode", "{jpeg}", "{out}", "--max-bytes", "3"), "more than max_bytes=3"),
        (("encode", "{jpeg}", "{out}", "--seed", "-1"), "-1 is not in the range 0<=x<=4294967295"),
        (("encode", "{jpeg}", "{out}", "--model", "none"), "neither a registered model"),
        (("encode", "{text}", "{out}"), "cannot identify image file"),
        (("encode", "{avif}", "{out}"), "broken.avif: "),
        (("info", "{large}"), "the file is larger than 268435456 bytes, which no .perco file needs to be"),
        (("decode", "{out}", "{png}", "--samples", "130"), "130 is not in the range 1<=x<=129"),
        (("view", "{out}", "--width", "1001"), "1001 is not in the range 1<=x<=1000"),
        (("demo", "--photo", "{png}", "--out", "{png}"), "would be written over"),
        (("demo", "--photo", "{jpeg}", "--out", "{text}.foo"), "no picture format"),
        (("convert-reference", "{out}", "{out}"), "would be written over"),
        (("convert-reference", "{out}", "{png}"), "convert-reference writes .perco files"),
        (("decode", "{jpeg}", "{png}"), "not a .perco file"),
        (("decode", "{cut}", "{png}"), "copy or download it again"),
        (("info", "{cut}"), "copy or download it again"),
        (("encode", "nowhere.jpg", "{out}"), "does not exist"),
    ],
)
def test_what_goes_wrong_is_told_in_one_line(arguments: tuple[str, ...], says: str, jpeg: Path, tmp_path: Path) -> None:
    out, text, cut = tmp_path / "out.perco", tmp_path / "text.jpg", tmp_path / "cut.perco"
    png = tmp_path / "out.png"
    out.write_bytes(b"precious")
    png.write_bytes(b"precious")
    text.write_text("no picture")
    perco("encode", jpeg, cut)
    cut.write_bytes(cut.read_bytes()[:-4])
    avif, large = tmp_path / "broken.avif", tmp_path / "large.perco"
    Image.new("RGB", (64, 64), "teal").save(avif)
    avif.write_bytes(avif.read_bytes()[:-40] + bytes(40))
    with large.open("wb") as file:
        file.truncate(300 << 20)
    names = {"jpeg": jpeg, "out": out, "png": png, "text": text, "cut": cut, "avif": avif, "large": large}
    result = perco(*(argument.format(**names) for argument in arguments))
    assert result.exit_code in (1, 2)
    assert says in result.output and "Traceback" not in result.output
    assert out.read_bytes() == png.read_bytes() == b"precious"


@pytest.mark.parametrize("command", ["encode", "decode", "demo", "compare"])
def test_where_nothing_can_be_written_nothing_is_computed(
    command: str, jpeg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded, place = tmp_path / "x.perco", tmp_path / "new" / ("n" * 255)
    perco("encode", jpeg, coded)
    for work in ("engine.engine_of_file", "engine.get_engine", "evaluation.compare.get_engine", "evaluation.demo.run"):
        monkeypatch.setattr(f"perco_engine.{work}", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(pillow_perco, "save", lambda *_, **__: pytest.fail("too late"))
    arguments = {
        "encode": (jpeg, f"{place}.perco"),
        "decode": (coded, f"{place}.png"),
        "demo": ("--photo", jpeg, "--out", f"{place}.png"),
        "compare": (jpeg, "--out", f"{place}.html"),
    }
    result = perco(command, *arguments[command])
    assert result.exit_code == 1 and "cannot be written to: File name too long" in result.output


def test_missing_folders_are_made(jpeg: Path, tmp_path: Path) -> None:
    assert perco("encode", jpeg, tmp_path / "a" / "b" / "x.perco").exit_code == 0
    assert perco("decode", tmp_path / "a" / "b" / "x.perco", tmp_path / "c" / "x.png").exit_code == 0
    assert opened_size(tmp_path / "c" / "x.png") == (192, 128)


def test_python_s_own_lack_of_memory_is_told(jpeg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absurd(*_: object) -> NoReturn:
        raise MemoryError

    monkeypatch.setattr("perco_engine.picture_files.read_photo", absurd)
    result = perco("encode", jpeg, tmp_path / "x.perco")
    assert result.exit_code == 1 and "not enough memory; what takes less: smaller pictures" in result.output


def test_a_full_disk_is_told_of_help_too(jpeg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> NoReturn:
            raise OSError(errno.ENOSPC, "No space left on device")

    for arguments in (["--help"], ["--version"], ["encode", "--help"]):
        with monkeypatch.context() as patch, pytest.raises(click.ClickException, match="No space left on device"):
            patch.setattr(sys, "stdout", Full())
            main(arguments, standalone_mode=False)


def test_what_pillow_warns_programmers_of(jpeg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a warning is an error."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 192 * 128 - 1)
    monkeypatch.setattr(sys, "warnoptions", [])
    assert perco("encode", jpeg, tmp_path / "x.perco").exit_code == 0
    monkeypatch.setattr(sys, "warnoptions", ["error"])
    assert isinstance(perco("encode", jpeg, tmp_path / "y.perco").exception, Image.DecompressionBombWarning)


def test_decode_to_a_name_of_no_known_format(jpeg: Path, tmp_path: Path) -> None:
    perco("encode", jpeg, tmp_path / "x.perco")
    result = perco("decode", tmp_path / "x.perco", tmp_path / "x.nothing")
    assert result.exit_code == 1 and "no picture format" in result.output
    assert not (tmp_path / "x.nothing").exists()


def test_samples_of_the_last_seed(jpeg: Path, tiny_model: Path, tmp_path: Path) -> None:
    data, sheet = tmp_path / "x.perco", tmp_path / "sheet.png"
    assert perco("encode", jpeg, data, "--model", tiny_model, "--seed", 2**32 - 1).exit_code == 0
    assert perco("decode", data, sheet, "--samples", 2).exit_code == 0 and sheet.exists()


def test_a_reader_that_is_gone_is_no_error(jpeg: Path, tmp_path: Path) -> None:
    perco("encode", jpeg, tmp_path / "x.perco")
    command = [sys.executable, "-m", "pillow_perco.cli", "info", str(tmp_path / "x.perco")]
    ours, theirs = os.pipe()
    os.close(ours)
    run = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True, check=False)
    os.close(theirs)
    assert run.stderr == "" and run.returncode == 1


def test_demo(jpeg: Path, tmp_path: Path) -> None:
    result = perco("demo", "--photo", jpeg, "--out", tmp_path / "sheet.png")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()[1:7]] == [
        "0.002",
        "0.008",
        "0.03",
        "0.055",
        "0.085",
        "0.13",
    ]
    width, height = opened_size(tmp_path / "sheet.png")
    assert width > 4 * 192 and height > 2 * 128


def test_bench_as_a_table_and_as_json(jpeg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/test_docs.py has it measure."""
    measured = {"machine": {"threads": 2}, "picture": "768x512", "figures": {"a (s)": 0.5, "decode (s)": 12.0}}
    monkeypatch.setattr(bench, "measure", lambda _photo, _times: measured)
    assert json.loads(perco("bench", "--photo", jpeg, "--json").output) == measured
    lines = perco("bench", "--photo", jpeg).output.splitlines()
    assert lines == ["threads 2", "a (s)              0.5", "decode (s)          12"]


def test_doctor() -> None:
    result = perco("doctor")
    assert result.exit_code == 0
    assert "pillow-perco" in result.output and "model embedded" in result.output


def test_the_installed_command() -> None:
    command = Path(sys.executable).with_name("perco")
    assert "perco" in subprocess.run([command, "--version"], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("target", ["other.jpg", "photo.jpg", "photo"])
def test_encode_writes_over_no_photo(target: str, jpeg: Path, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "other.jpg")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    result = perco("encode", jpeg, tmp_path / target)
    assert result.exit_code == 1 and "encode writes .perco files" in result.output
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_encode_does_not_write_over_its_source(jpeg: Path, tmp_path: Path) -> None:
    coded = tmp_path / "x.perco"
    perco("encode", jpeg, coded, "--bpp", 0.03)
    before = coded.read_bytes()
    result = perco("encode", coded, tmp_path / "." / "x.perco", "--bpp", 0.002)
    assert result.exit_code == 1 and "would be written over" in result.output and coded.read_bytes() == before


def test_pictures_of_any_size_are_told_about(jpeg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coded = tmp_path / "x.perco"
    perco("encode", jpeg, coded)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    result = perco("encode", jpeg, tmp_path / "y.perco")
    assert result.exit_code == 1 and "exceeds limit" in result.output and "Traceback" not in result.output
    result = perco("info", coded)
    assert result.exit_code == 0 and "192" in result.output


def test_captions_and_names_cannot_write_to_the_terminal(photo: Image.Image, tmp_path: Path) -> None:
    pillow_perco.save(photo, tmp_path / "x.perco", caption="an owl\x1b]52;c;eA==\x07\nseed 7")
    told = perco("info", tmp_path / "x.perco").output
    assert "an owl\\x1b]52;c;eA==\\x07\\nseed 7" in told and "\x1b" not in told
    odd = tmp_path / os.fsdecode(b"caf\xe9.perco")
    photo.save(tmp_path / "photo.png")
    result = perco("encode", tmp_path / "photo.png", odd)
    assert result.exit_code == 0 and "caf\\xe9.perco: " in result.output and odd.exists()


def test_letters_that_the_encoding_of_the_output_lacks(photo: Image.Image, tmp_path: Path) -> None:
    pillow_perco.save(photo, tmp_path / "x.perco", caption="сова, Käuzchen")
    result = CliRunner(charset="cp1252").invoke(main, ["info", str(tmp_path / "x.perco")])
    assert result.exit_code == 0 and "\\u0441\\u043e\\u0432\\u0430, Käuzchen" in result.output


def test_letters_where_the_locale_is_c() -> None:
    program = "from perco_engine.printable import printable; print(ascii(printable('K\\xe4uzchen caf\\udce9')))"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
    assert run.stdout == "'K\\xe4uzchen caf\\\\xe9'\n"


def test_the_name_of_a_model_that_is_pulled() -> None:
    told = " ".join(perco("models", "pull", "--help").output.split())
    assert "[default: FAMILY-RATE, or that of the folder or repository]" in told


def test_every_command_without_what_windows_lacks() -> None:
    program = "import sys; sys.modules['fcntl'] = None; from pillow_perco.cli import main; main(['view', '--help'])"
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "picture viewer" in run.stdout


def test_a_decoded_picture_has_the_colours_and_the_place_of_the_one_that_was_saved(
    photo: Image.Image, tmp_path: Path
) -> None:
    """Whoever stores a profile, or EXIF that says which side is up, gets them back, or what they mean."""
    exif, coded = Image.Exif(), tmp_path / "x.perco"
    exif[0x0112], exif[0x010E] = 6, "description"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo.save(coded, exif=exif, icc_profile=profile, xmp='<x tiff:Orientation="6"/>')
    assert perco("decode", coded, tmp_path / "x.png").exit_code == 0
    assert perco("convert", coded, tmp_path / "converted.png").exit_code == 0
    with Image.open(coded) as stored, Image.open(tmp_path / "x.png") as decoded:
        shown = np.asarray(stored.transpose(Image.Transpose.ROTATE_270))
        assert decoded.info["icc_profile"] == profile and not decoded.getexif() and (np.asarray(decoded) == shown).all()
    assert (tmp_path / "converted.png").read_bytes() == (tmp_path / "x.png").read_bytes()
    assert perco("convert", coded, tmp_path / "kept.jpg", "--keep-metadata").exit_code == 0
    with Image.open(tmp_path / "kept.jpg") as kept:
        assert kept.size == (128, 192) and dict(kept.getexif()) == {0x010E: "description"}
        assert b"Orientation" not in kept.info["xmp"]
    small = preview.render(coded.read_bytes(), 96)
    assert small.size == (64, 96)
    assert np.abs(np.asarray(small.resize((16, 24)), int) - np.asarray(decoded.resize((16, 24)), int)).mean() < 12
    assert perco("desktop", "thumbnails", tmp_path).exit_code == 0
    with Image.open(cache_paths(uri(coded))["normal"]) as thumbnail:
        assert thumbnail.size == (85, 128)


@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
@pytest.mark.parametrize(
    "block", [b"II*\0", bytes(40), b"garbage" * 9, b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0a\0\0\0\0\0\0\0"]
)
def test_a_photo_with_damaged_exif_is_a_photo(kind: str, block: bytes, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / f"x.{kind}", exif=b"Exif\0\0" + block)
    result = perco("encode", tmp_path / f"x.{kind}", tmp_path / "x.perco", "--keep-metadata", "--no-thumbnails")
    assert result.exit_code == 0, result.output
    assert perco("decode", tmp_path / "x.perco", tmp_path / "y.png").exit_code == 0
    assert opened_size(tmp_path / "y.png") == (192, 128)


@pytest.mark.parametrize("kind", ["bmp", "ppm", "jpg", "pcx"])
def test_opacity_is_on_white_where_the_format_has_none(kind: str, tmp_path: Path) -> None:
    Image.new("RGBA", (128, 64), (0, 200, 0, 0)).save(tmp_path / "x.perco")
    assert perco("decode", tmp_path / "x.perco", tmp_path / f"x.{kind}").exit_code == 0
    with Image.open(tmp_path / f"x.{kind}") as picture:
        assert np.asarray(picture.convert("RGB")).min() >= 250


def test_an_icon_has_the_size_of_the_picture(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "x.perco")
    assert "192x128 pixels" in perco("decode", tmp_path / "x.perco", tmp_path / "x.ico").output
    assert opened_size(tmp_path / "x.ico") == (192, 128)
    photo.resize((300, 200)).save(tmp_path / "x.perco")
    result = perco("decode", tmp_path / "x.perco", tmp_path / "y.ico")
    assert result.exit_code == 1 and "at most 256 pixels" in result.output and not (tmp_path / "y.ico").exists()
    result = perco("decode", tmp_path / "x.perco", tmp_path / "y.icns")  # whose icons are squares
    assert result.exit_code == 1 and "no picture format" in result.output and not (tmp_path / "y.icns").exists()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_metadata_that_a_format_has_no_room_for_are_told(mode: str, photo: Image.Image) -> None:
    with pytest.raises(ValueError, match="EXIF data is too long for JPEG: write another format, such as PNG"):
        picture_bytes(photo.convert(mode), "JPEG", Metadata(exif=b"II*\0" + bytes(70_000)))


def read_but_not_written() -> bytes:
    """EXIF that says which side is up (6), with a description that is a fraction, 1/1, and no text."""
    tags = struct.pack("<HHII", 0x010E, 5, 1, 38) + struct.pack("<HHII", 0x0112, 3, 1, 6)
    return b"II*\0" + struct.pack("<IH", 8, 2) + tags + struct.pack("<III", 0, 1, 1)


def test_a_photo_is_turned_by_exif_that_cannot_be_written_anew(photo: Image.Image, tmp_path: Path) -> None:
    """Pillow turns such a picture, and then fails."""
    photo.save(tmp_path / "x.png", exif=b"Exif\0\0" + read_but_not_written())
    with Image.open(tmp_path / "x.png") as opened, pytest.raises(AttributeError, match="IFDRational"):
        ImageOps.exif_transpose(opened)
    result = perco("encode", tmp_path / "x.png", tmp_path / "x.perco", "--keep-metadata", "--no-thumbnails")
    assert result.exit_code == 0 and opened_size(tmp_path / "x.perco") == (128, 192)
    with Image.open(tmp_path / "x.perco") as coded:
        assert 0x0112 not in coded.getexif()
    photo.save(tmp_path / "y.perco", exif=b"Exif\0\0" + read_but_not_written())
    assert perco("convert", tmp_path / "y.perco", tmp_path / "y.png", "--keep-metadata").exit_code == 0
    with Image.open(tmp_path / "y.png") as decoded:
        assert decoded.size == (128, 192) and 0x0112 not in decoded.getexif()


def test_a_picture_is_turned_by_xmp_alone(photo: Image.Image, tmp_path: Path) -> None:
    coded = tmp_path / "x.perco"
    photo.save(coded, xmp=b'<x:xmpmeta><r tiff:Orientation="6"/></x:xmpmeta>')
    assert perco("decode", coded, tmp_path / "x.png").exit_code == 0
    assert perco("convert", coded, tmp_path / "kept.png", "--keep-metadata").exit_code == 0
    assert opened_size(tmp_path / "x.png") == preview.render(coded.read_bytes(), 192).size == (128, 192)
    with Image.open(tmp_path / "kept.png") as kept:
        assert kept.size == (128, 192) and 0x0112 not in kept.getexif()


def test_a_profile_of_grey_is_written_into_no_picture_in_colour(photo: Image.Image, tmp_path: Path) -> None:
    """Whoever packed the file: what it holds is decoded to RGB."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[16:20] = b"GRAY"
    data = get_engine().encode(photo, metadata=Metadata(icc_profile=bytes(profile)))
    (tmp_path / "x.perco").write_bytes(data)
    for options in ([], ["--keep-metadata"]):
        target = tmp_path / f"{len(options)}.png"
        assert perco("convert", tmp_path / "x.perco", target, *options).exit_code == 0
        with Image.open(target) as decoded:
            assert "icc_profile" not in decoded.info
