"""The Pillow plugin, on the embedded model and on a tiny one."""

import copy
import gc
import io
import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import opened_size, peak_bytes
from PIL import ExifTags, Image, ImageCms, ImageFile, UnidentifiedImageError

import pillow_perco
from perco_engine import get_engine
from perco_engine.pixels import alpha_mask, as_seen, to_rgb
from pillow_perco.PercoImagePlugin import PercoImageFile


def saved(image: Image.Image, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, "PERCO", **options)
    return data.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_a_photo_at_the_lowest_rate_has_eighty_bytes_at_most() -> None:
    gradient = Image.linear_gradient("L").resize((512, 512)).convert("RGB")
    data = saved(gradient, bpp=0.0019)
    assert len(data) <= 80
    assert data[:4] == b"\x93PCo"
    assert data[4:10] == bytes([0x18, 10, 0x01, 0xFF, 0x01, 0xFF])


def test_the_picture_comes_back_as_a_picture_of_the_same_thing(photo: Image.Image) -> None:
    reopened = opened(saved(photo, bpp=0.13))
    assert (reopened.size, reopened.mode, reopened.format) == (photo.size, "RGB", "PERCO")
    mse = float(((pixels(reopened) - pixels(photo)) ** 2).mean())
    upside_down = float(((pixels(reopened) - pixels(photo)[::-1]) ** 2).mean())
    assert mse < upside_down / 4


def test_info_tells_what_the_file_says(photo: Image.Image) -> None:
    data = saved(photo, bpp=0.01, caption="a barn owl", seed=7)
    told = opened(data).info["perco"]
    assert (told["model"], told["rate_point"], told["bpp"]) == ("embedded", 1, 0.008)
    assert (told["caption"], told["seed"]) == ("a barn owl", 7)
    assert told["bytes"]["total"] == len(data) == sum(v for k, v in told["bytes"].items() if k != "total")
    assert told["bits_per_pixel"] == 8 * len(data) / (192 * 128)


def test_the_same_image_gives_the_same_bytes_and_the_same_file_the_same_pixels(photo: Image.Image) -> None:
    first, second = saved(photo), saved(photo)
    assert first == second
    assert opened(first).tobytes() == opened(second).tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr",
                                  "LAB", "HSV", "I", "F", "I;16", "I;16L", "I;16B"])  # fmt: skip
def test_every_mode_is_accepted(mode: str, photo: Image.Image, tiny_model: Path) -> None:
    image = Image.new(mode, (20, 12)) if mode in ("LAB", "PA", "La", "RGBa") else photo.convert("L").convert(mode)
    reopened = opened(saved(image, model=tiny_model))
    reopened.load()
    assert reopened.size == image.size
    assert reopened.mode in ("RGB", "RGBA")


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.full((64, 64), 128 * 257, np.uint16))
    assert abs(pixels(opened(saved(grey, bpp=0.13))).mean() - 128) < 16


@pytest.mark.parametrize(
    ("head", "kind", "top"), [(b"P5\n64 64\n65535\n", ">u2", 65535), (b"P5\n64 64\n4095\n", ">u2", 4095),
                              (b"Pf\n64 64\n-1.0\n", "<f4", 1)],
)  # fmt: skip
def test_grey_of_other_files_keeps_its_range(head: bytes, kind: str, top: int) -> None:
    ramp = np.linspace(0, top, 64 * 64).astype(kind)
    with Image.open(io.BytesIO(head + ramp.tobytes())) as image:
        levels = np.sort(np.asarray(to_rgb(image)), axis=None)
    assert np.abs(levels[::3] - np.linspace(0, 255, 64 * 64)).max() <= 1


def test_what_is_no_number_is_black_and_its_neighbours_are_not() -> None:
    """As of a depth map that has holes."""
    ramp = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    whole, holes = to_rgb(Image.fromarray(ramp)), ramp.copy()
    holes[5, 7] = np.nan
    levels = np.asarray(to_rgb(Image.fromarray(holes))).copy()
    assert not levels[5, 7].any()
    levels[5, 7] = whole.getpixel((7, 5))
    assert (levels == np.asarray(whole)).all()


def test_a_value_beyond_eight_bits_is_clipped() -> None:
    assert to_rgb(Image.fromarray(np.array([[200, 260]], np.int32))).getpixel((0, 0)) == (200, 200, 200)


def test_a_colour_that_stood_for_nothing_in_another_mode_is_none(photo: Image.Image) -> None:
    keyed = photo.copy()
    keyed.info["transparency"] = photo.getpixel((0, 0))
    palette = photo.quantize(8)
    palette.info["transparency"] = bytes([0, 255])
    for source, mode in ((keyed, "L"), (keyed, "F"), (keyed, "I;16"), (palette, "1"), (palette, "I")):
        image = photo.convert("L").convert(mode)
        image.info["transparency"] = source.info["transparency"]
        assert alpha_mask(image) is None and to_rgb(image).size == photo.size
    assert alpha_mask(keyed) is not None and alpha_mask(palette) is not None


def test_info_belongs_to_the_user(photo: Image.Image) -> None:
    data = saved(photo)
    image = opened(data)
    image.info.clear()
    assert pixels(image).tolist() == pixels(opened(data)).tolist()


def test_a_closed_picture_is_not_decoded(photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo.save(tmp_path / "x.perco")
    monkeypatch.setattr("perco_engine.engine.Engine.decode", lambda *_, **__: pytest.fail("decoded"))
    with Image.open(tmp_path / "x.perco") as image:
        pass
    image.close()
    with pytest.raises(ValueError, match="closed image"):
        image.load()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (7, 9), (65, 64), (300, 1), (511, 65)])
def test_any_size(size: tuple[int, int], tiny_model: Path) -> None:
    reopened = opened(saved(Image.new("RGB", size, "teal"), model=tiny_model, bpp=9))
    reopened.load()
    assert reopened.size == size


def test_opacity_is_kept(photo: Image.Image) -> None:
    mask = Image.new("L", photo.size, 0)
    mask.paste(255, (0, 0, 96, 128))
    image = photo.copy()
    image.putalpha(mask)
    reopened = opened(saved(image))
    assert reopened.mode == "RGBA"
    alpha = np.asarray(reopened.getchannel("A")).astype(int)
    assert alpha[:, :88].min() > 250 and alpha[:, 104:].max() < 5


def test_opacity_is_dropped_on_request_and_where_everything_is_opaque(photo: Image.Image) -> None:
    image = photo.convert("RGBA")
    assert saved(image) == saved(photo)
    image.putalpha(100)
    assert opened(saved(image)).mode == "RGBA"
    assert saved(image, alpha=False) == saved(photo)


def test_transparent_palette_colour(photo: Image.Image, tiny_model: Path) -> None:
    image = photo.quantize(8)
    image.info["transparency"] = image.getpixel((0, 0))
    assert opened(saved(image, model=tiny_model)).mode == "RGBA"


def test_metadata_round_trips_only_when_given(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "description"
    data = saved(photo, exif=exif, icc_profile=b"profile", xmp="<x:xmpmeta/>")
    reopened = opened(data)
    assert reopened.getexif()[0x0112] == 6 and reopened.getexif()[0x010E] == "description"
    assert (reopened.info["icc_profile"], reopened.info["xmp"]) == (b"profile", b"<x:xmpmeta/>")
    assert (
        opened(saved(photo, exif=b"Exif\x00\x00" + exif.tobytes().removeprefix(b"Exif\x00\x00"))).getexif()[0x0112] == 6
    )
    place = Image.Exif()
    place.get_ifd(ExifTags.IFD.GPSInfo)[1] = "N"
    assert not len(place) and opened(saved(photo, exif=place)).getexif().get_ifd(ExifTags.IFD.GPSInfo) == {1: "N"}
    photo = photo.copy()
    photo.info["exif"] = exif.tobytes()
    assert "exif" not in opened(saved(photo)).info
    looked_at, emptied = Image.Exif(), Image.Exif()
    looked_at.get_ifd(ExifTags.IFD.GPSInfo)
    emptied.load(
        b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00\x00"
    )
    assert emptied.pop(0x0112) == 6
    for empty in (Image.Exif(), looked_at, emptied):
        assert "exif" not in opened(saved(photo, exif=empty)).info


def test_max_bytes_takes_the_best_that_fits(photo: Image.Image) -> None:
    sizes = [len(saved(photo, bpp=bpp)) for bpp in (0.002, 0.008, 0.03, 0.055, 0.085, 0.13)]
    assert sizes == sorted(set(sizes))
    for size in sizes:
        assert len(saved(photo, max_bytes=size)) == size
    assert len(saved(photo, max_bytes=sizes[1] + 9)) == sizes[1]
    assert len(saved(photo, max_bytes=10_000, bpp=0.008)) == sizes[1]
    with pytest.raises(ValueError, match=f"at least {sizes[0]} bytes"):
        saved(photo, max_bytes=sizes[0] - 1)


def test_a_budget_that_the_usual_codes_exceed_costs_a_few_bits_and_no_rate(photo: Image.Image) -> None:
    whole, lower = saved(photo, bpp=0.03), saved(photo, bpp=0.008)
    data = saved(photo, max_bytes=len(whole) - 1)
    assert len(lower) < len(data) < len(whole)
    assert opened(data).info["perco"]["rate_point"] == opened(whole).info["perco"]["rate_point"]
    errors = [np.square(pixels(opened(one)) - np.asarray(photo, float)).mean() for one in (whole, data, lower)]
    assert errors[1] - errors[0] < (errors[2] - errors[0]) / 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        *(({"bpp": value}, "bpp must be") for value in (0, -1, float("nan"), "0.1", True, 10**400)),
        *(({"max_bytes": value}, "max_bytes must be an integer") for value in (0, 1.5, True)),
        *(({"seed": value}, "seed must be an integer from 0") for value in (-1, 2**32, 1.0, True)),
        ({"caption": 3}, "caption must be of type str"), ({"caption": "x" * 4097}, "the format holds 4096"),
        ({"alpha": "no"}, "alpha must be of type bool"), ({"exif": "text"}, "exif must be bytes"),
        ({"icc_profile": 1}, "icc_profile must be bytes"), ({"best_of": 2.0}, "best_of must be an integer"),
        ({"model": 3}, "model"), ({"model": b"embedded"}, "model"), ({"device": "toaster"}, "'toaster' cannot be used"),
        ({"device": "cuda:77"}, "'cuda:77' cannot be used"), ({"device": ["cpu"]}, "the device must be named"),
    ],
)  # fmt: skip
def test_wrong_values_are_value_errors(options: dict[str, object], says: str, photo: Image.Image) -> None:
    with pytest.raises(ValueError, match=says):
        saved(photo, **options)


def test_numbers_of_numpy_are_numbers(photo: Image.Image) -> None:
    plain = saved(photo, bpp=0.008, max_bytes=900, seed=7)
    assert saved(photo, bpp=np.float32(0.008), max_bytes=np.int64(900), seed=np.uint32(7)) == plain
    image = photo.copy()
    image.putalpha(100)
    assert saved(image, bpp=0.008, max_bytes=900, seed=7, alpha=np.False_) == plain


def test_an_unknown_model_says_what_to_do(photo: Image.Image) -> None:
    with pytest.raises(OSError, match="neither a registered model"):
        saved(photo, model="no-such-model")
    with pytest.raises(OSError, match="not on this machine"):
        saved(photo, model="perco-sd")


def test_a_file_of_an_unregistered_model_names_it(
    photo: Image.Image, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = saved(photo, model=tiny_model)
    reopened = opened(data)
    assert len(reopened.info["perco"]["model"]) == 16
    reopened.load()
    monkeypatch.setattr("perco_engine.weights._seen", {})
    elsewhere = opened(data)
    with pytest.raises(OSError, match="unregistered model"):
        elsewhere.load()
    assert elsewhere.size == photo.size


def test_a_file_of_a_model_that_this_release_does_not_know() -> None:
    from perco_engine.bitstream.header import checksum

    for number, mark in ((31, b""), (62, bytes(4))):
        body = b"\x93PCo\x10" + bytes([number]) + b"\x00\x07\x00\x07" + mark + b"\x00"
        image = opened(body + checksum(body))
        assert image.info["perco"]["model"] == f"unknown model number {number}"
        with pytest.raises(OSError, match=f"model number {number}"):
            image.load()


def test_damage_is_an_os_error_and_other_formats_are_not_identified(photo: Image.Image) -> None:
    data = saved(photo)
    for wrong in (data[:-1], data[:30], data[:9], data + b"\x00", data[:20] + b"\xff" + data[21:]):
        with pytest.raises(OSError) as caught:
            opened(wrong).load()
        assert not isinstance(caught.value, UnidentifiedImageError)
    with pytest.raises(UnidentifiedImageError):
        opened(b"GIF87b" + data)


def test_truncated_files_show_what_the_coarse_levels_give(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    data, coarse = saved(photo, bpp=0.13), saved(photo, bpp=0.008)
    cut = data[: len(coarse) + 20]
    with pytest.raises(OSError):
        opened(cut).load()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert opened(cut).tobytes() == opened(coarse).tobytes()
    with pytest.raises(OSError, match="coarsest"):
        opened(data[:12]).load()


def test_a_cut_file_whose_opacity_is_broken_is_opaque(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    translucent = photo.copy()
    translucent.putalpha(Image.linear_gradient("L").resize(photo.size))
    data = saved(translucent, bpp=0.002, effort=0)
    sizes = opened(data).info["perco"]["bytes"]
    no_deflate = bytes.fromhex("09 03 FFFFFF")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    image = opened(data[: -sizes["alpha"] - sizes["checksum"]] + no_deflate)
    assert image.mode == "RGBA"
    assert image.getchannel("A").getextrema() == (255, 255)


def test_draft_decodes_at_a_smaller_size(photo: Image.Image) -> None:
    large = photo.resize((640, 400))
    image = opened(saved(large, bpp=0.13))
    assert image.draft(None, (100, 100)) == ("RGB", (0, 0, 160, 100))
    assert image.size == (160, 100)
    reduced = large.reduce(4)
    assert float(((pixels(image) - pixels(reduced)) ** 2).mean()) < 300
    assert image.draft(None, (10, 10)) is None
    thumbnail = opened(saved(large))
    thumbnail.thumbnail((64, 64))
    assert thumbnail.size == (64, 40)


def test_no_resource_warning(photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "x.perco"
    photo.save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Image.open(path).load()
        with Image.open(path) as image:
            assert image.size == photo.size
        gc.collect()


def test_the_file_pointer_can_be_reused(photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "x.perco"
    photo.save(path)
    with path.open("rb") as file:
        Image.open(file).load()
        file.seek(0)
        assert Image.open(file).size == photo.size
        assert not file.closed


def test_copy_pickle_verify_and_parser(photo: Image.Image) -> None:
    data = saved(photo)
    whole = opened(data).tobytes()
    assert opened(data).copy().tobytes() == whole
    assert copy.deepcopy(opened(data)).tobytes() == whole
    assert pickle.loads(pickle.dumps(opened(data))).tobytes() == whole
    opened(data).verify()
    parser = ImageFile.Parser()
    for start in range(0, len(data), 50):
        parser.feed(data[start : start + 50])
    assert parser.close().tobytes() == whole


def test_threads_decode_the_same(photo: Image.Image) -> None:
    data = saved(photo)
    whole = opened(data).tobytes()
    barrier = threading.Barrier(4)

    def decode(_: int) -> bytes:
        barrier.wait()
        return opened(data).tobytes()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(decode, range(4))) == {whole}


def _size_in_a_worker(path: str) -> tuple[int, int]:
    return Image.open(path).size


def test_spawned_workers_know_the_format(photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "x.perco"
    photo.save(path)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_size_in_a_worker, [str(path)]) == [photo.size]


FORKED = """
import multiprocessing, sys, threading
import torch
import pillow_perco
from PIL import Image
from perco_engine import get_engine

def decoded(path):
    return Image.open(path).reduce(16).tobytes()

def child(queue):
    queue.put(decoded(sys.argv[1]))

torch.set_num_threads(2)
whole = decoded(sys.argv[1])
queue = multiprocessing.get_context("fork").SimpleQueue()
engine = get_engine()
held, free = threading.Event(), threading.Event()

def work():
    with engine.at_work("decode", 1, (1, 1)):
        held.set()
        free.wait()

threading.Thread(target=work).start()
held.wait()
process = multiprocessing.get_context("fork").Process(target=child, args=(queue,))
process.start()
process.join(60)
free.set()
if process.exitcode != 0:
    queue.put(b"")
process.kill()
seen = queue.get()
print(len(seen) == len(whole) and max(abs(a - b) for a, b in zip(seen, whole)) <= 1)  # on another number of threads
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_worker_decodes_while_its_parent_does(photo: Image.Image, tmp_path: Path) -> None:
    """Neither torch's threads nor those that hold a lock are copied along."""
    path = tmp_path / "x.perco"
    photo.save(path, effort=0)
    command = [sys.executable, "-W", "ignore", "-c", FORKED, path]
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300).stdout == "True\n"


def test_what_a_captioner_says_is_not_taken_for_the_networks(photo: Image.Image) -> None:
    def busy(_: object) -> list[str]:
        raise RuntimeError("429: too many requests")

    with pytest.raises(OSError, match=r"^the picture was not encoded: 429: too many requests$"):
        saved(photo, captioner=busy)


def test_neither_autocast_nor_traps_of_the_caller_change_anything(photo: Image.Image) -> None:
    plain, whole = saved(photo, effort=0), pixels(opened(saved(photo, effort=0)))
    with torch.autocast("cpu", torch.bfloat16):
        assert saved(photo, effort=0) == plain
        assert (pixels(opened(plain)) == whole).all()
    with np.errstate(all="raise"):
        opened(plain).thumbnail((48, 32))


def test_a_save_that_fails_leaves_nothing_and_destroys_nothing(photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "x.perco"
    with pytest.raises(ValueError, match="bpp"):
        photo.save(path, bpp=-1)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"precious")
    with pytest.raises(ValueError, match="bpp"):
        pillow_perco.save(photo, path, bpp=-1)
    assert path.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [path]
    pillow_perco.save(photo, path)
    assert opened_size(path) == photo.size and list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_to_is_told_before_the_picture_is_encoded(
    photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pillow_perco, "encode", lambda *_: pytest.fail("encoded"))
    (tmp_path / "file").touch()
    places: list[tuple[Any, type[Exception]]] = [
        (tmp_path / "no" / "x.perco", FileNotFoundError), (tmp_path, IsADirectoryError), (io.BytesIO(), TypeError),
        (tmp_path / "file" / "x.perco", NotADirectoryError), (None, TypeError),
    ]  # fmt: skip
    for place, kind in places:
        with pytest.raises(kind):
            pillow_perco.save(photo, place)
    with pytest.raises(TypeError, match="not ndarray"):
        pillow_perco.save(np.asarray(photo), tmp_path / "x.perco")  # type: ignore[arg-type]


def test_a_decompression_bomb_is_refused_at_open(monkeypatch: pytest.MonkeyPatch, photo: Image.Image) -> None:
    data = saved(photo)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError):
        opened(data)


def test_register_perco_opener_sets_how_files_are_decoded(photo: Image.Image) -> None:
    data = saved(photo, bpp=0.0019)
    default = opened(data).tobytes()
    try:
        pillow_perco.register_perco_opener(steps=0)
        assert opened(data).tobytes() != default
        with pytest.raises(TypeError):
            pillow_perco.register_perco_opener(colour="blue")
        for wrong in ({"steps": -1}, {"steps": 1.5}, {"guidance_scale": float("nan")}, {"seed": 2**32}):
            with pytest.raises(ValueError, match="must be"):
                pillow_perco.register_perco_opener(**wrong)
    finally:
        pillow_perco.register_perco_opener()
    assert opened(data).tobytes() == default
    assert type(opened(data)) is PercoImageFile


def test_palettes_with_many_transparent_colours(photo: Image.Image, tiny_model: Path) -> None:
    image = photo.quantize(8)
    image.info["transparency"] = bytes([0, 128, 255, 255, 255, 255, 255, 255])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert opened(saved(image, model=tiny_model)).mode == "RGBA"


def exchanged() -> bytes:
    """A colour profile whose red and blue primaries are exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    data[24:36] = bytes(12)  # when it was made, to the second
    tags = {bytes(data[at : at + 4]): at for at in range(132, 132 + 12 * data[131], 12)}
    red, blue = (data[tags[name] + 4 : tags[name] + 12] for name in (b"rXYZ", b"bXYZ"))
    data[tags[b"rXYZ"] + 4 : tags[b"rXYZ"] + 12], data[tags[b"bXYZ"] + 4 : tags[b"bXYZ"] + 12] = blue, red
    return bytes(data)


def test_palettes_with_a_profile(photo: Image.Image) -> None:
    """Colours of a palette are the profile's too."""
    palette = photo.quantize(64)
    plain = palette.convert("RGB")
    palette.info["icc_profile"] = exchanged()
    seen = np.asarray(as_seen(palette), int)
    assert np.abs(seen - np.asarray(plain, int)[..., ::-1]).max() <= 3


def linear_grey() -> bytes:
    """A colour profile of grey, one of whose tones is half as light where its value is (gamma 1; ICC.1:2022)."""
    tags = {
        b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061),
        b"kTRC": b"curv\0\0\0\0" + struct.pack(">IHH", 1, 256, 0),
    }
    body, table, at = b"", struct.pack(">I", len(tags)), 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack(">II", at + len(body), len(tag) // 4 * 4)
        body += tag[: len(tag) // 4 * 4]
    header = struct.pack(">I4sI4s4s4s", at + len(body), b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + body


def test_a_profile_of_grey_is_of_no_picture_in_colour(photo: Image.Image) -> None:
    """It is converted with, and not stored: the file's pixels are RGB."""
    grey = Image.new("L", (64, 64), 55)
    seen = np.asarray(as_seen(with_profile(grey, linear_grey())))
    assert abs(int(seen[0, 0, 0]) - 127) < 4  # linear 0.216 is 0.5 in sRGB
    again = opened(saved(grey, icc_profile=linear_grey(), bpp=0.13))
    assert "icc_profile" not in again.info
    assert abs(pixels(again).mean() - 127) < 8
    assert opened(saved(photo, icc_profile=exchanged())).info["icc_profile"] == exchanged()


def with_profile(image: Image.Image, profile: bytes) -> Image.Image:
    image.info["icc_profile"] = profile
    return image


@pytest.mark.parametrize("kind", ["RGBA", "LA", "PA", "colour key", "palette of RGBA", "16 bits", "grey key"])
def test_opacity_of_every_kind_is_kept_with_a_profile_or_without(kind: str, photo: Image.Image) -> None:
    """Its left half lets everything through."""
    half = Image.new("L", photo.size, 255)
    half.paste(0, (0, 0, 96, 128))
    whole = photo.convert("RGBA")
    whole.putalpha(half)
    if kind == "palette of RGBA":
        image = whole.quantize(32)
        assert "transparency" not in image.info
    elif kind == "16 bits":
        samples = np.asarray(photo.convert("L")).astype(np.uint16) * 200 + 7
        samples[:, :96] = 1000
        image = Image.fromarray(samples)
        image.info["transparency"] = 1000
    elif kind in ("colour key", "grey key"):
        image = photo.convert("RGB" if kind == "colour key" else "L")
        key: Any = (1, 2, 3) if kind == "colour key" else 77
        image = image.point(lambda value: value | 128)
        image.paste(key, (0, 0, 96, 128))
        image.info["transparency"] = key
    else:
        image = whole.convert(kind)
    for profile in (None, linear_grey() if image.mode in ("LA", "L", "I;16") else exchanged()):
        if profile:
            image.info["icc_profile"] = profile
        mask = alpha_mask(as_seen(image))
        assert mask is not None
        assert mask.samples[:, :11].max() <= 2 and mask.samples[:, 13:].min() == 15, (kind, profile and len(profile))


def test_a_picture_that_is_decoded_only_now_can_be_encoded(photo: Image.Image, tiny_model: Path) -> None:
    """By the same engine, which does one thing at a time."""
    engine = get_engine(tiny_model)
    picture, made = opened(engine.encode(photo)), list[bytes]()
    thread = threading.Thread(target=lambda: made.append(engine.encode(picture)), daemon=True)
    thread.start()
    thread.join(60)
    assert made == [engine.encode(opened(engine.encode(photo)).copy())]


def test_threads_that_save_one_picture_have_each_their_own_options(
    photo: Image.Image, tiny_model: Path, tmp_path: Path
) -> None:
    """Into memory by Pillow, to paths by this package."""
    image = photo.copy()
    options = [{"bpp": 1e-3, "seed": 1}, {"bpp": 1.0, "seed": 2}, {"caption": "a"}]
    alone = [saved(photo, model=tiny_model, **one) for one in options]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda one: saved(image, model=tiny_model, **one), options * 4))
        assert together == alone * 4
        paths = [tmp_path / f"{k}.perco" for k in range(12)]
        list(pool.map(lambda path, one: pillow_perco.save(image, path, model=tiny_model, **one), paths, options * 4))
    assert [path.read_bytes() for path in paths] == alone * 4
    assert saved(image, model=tiny_model) == saved(photo, model=tiny_model)


def test_a_small_file_takes_no_memory_of_a_large_one(photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "x.perco"
    photo.save(path)
    assert peak_bytes(lambda: Image.open(path).close()) < 4 << 20


def test_options_that_are_not_for_the_model_are_told_when_it_decodes(photo: Image.Image) -> None:
    data = saved(photo)
    pillow_perco.register_perco_opener(steps=100_000)
    try:
        with pytest.raises(OSError, match="1000"):
            opened(data).load()
    finally:
        pillow_perco.register_perco_opener()
