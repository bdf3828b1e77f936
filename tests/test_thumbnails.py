"""The thumbnail cache: names as GLib computes them, keys, permissions, and what must not go wrong."""

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import pillow_perco
from perco_engine import files, thumbnails

pytestmark = pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="freedesktop's cache")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not yet" / "cache"))
    return tmp_path / "not yet" / "cache" / "thumbnails"


@pytest.mark.parametrize(
    ("path", "uri", "name"),
    [
        (b"/home/a/photo.perco", "file:///home/a/photo.perco", "f56cace96286c96a10a47d9c4304fba0"),
        (
            "/home/a/Käse & Brot.perco".encode(),
            "file:///home/a/K%C3%A4se%20&%20Brot.perco",
            "1df4b3bead02816523f4b1888db78499",
        ),
        (b"/x/100%.perco", "file:///x/100%25.perco", "67b0ff0cc1b2e9e417d9a0f5fff6700f"),
        (b"/x/a#b?c.perco", "file:///x/a%23b%3Fc.perco", "78a259f2a0669396dd16fcbc8f5f9438"),
        (b"/x/line\nbreak.perco", "file:///x/line%0Abreak.perco", "0fe88a33719bb998ebc294f3d2acf4bf"),
        (b"/x/\xff\xfe.perco", "file:///x/%FF%FE.perco", "4779c93e10540bc9350bc179e3a4d225"),
        (
            b'/x/a b;c[d]{e}^`|\\"<>.perco',
            "file:///x/a%20b%3Bc%5Bd%5D%7Be%7D%5E%60%7C%5C%22%3C%3E.perco",
            "52b8fd2045ae3a45b5c73c018e93077f",
        ),
        (b"/x/~-_.!*'()$&+,=:@.perco", "file:///x/~-_.!*'()$&+,=:@.perco", "1e41ce05b005c35406b4995bd7b93f7e"),
    ],
)
def test_names_are_those_that_glib_computes(path: bytes, uri: str, name: str, cache: Path) -> None:
    assert thumbnails.uri(os.fsdecode(path)) == uri
    assert thumbnails.cache_paths(uri) == {
        size: cache / size / f"{name}.png" for size in ("normal", "large", "x-large", "xx-large")
    }


def test_the_names_of_glib_itself() -> None:
    code = "import sys\nfrom gi.repository import GLib\nprint(GLib.filename_to_uri(sys.argv[1], None))"
    path = "/a/" + "".join(map(chr, range(1, 127))).replace("/", "") + "ü.perco"
    run = subprocess.run(["/usr/bin/python3", "-c", code, path], capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip("the system's python3 has no GLib (apt-get install python3-gi)")
    assert thumbnails.uri(path) == run.stdout.removesuffix("\n")


def test_the_path_is_the_one_that_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert thumbnails.uri("link/x/../y.perco") == f"file://{tmp_path}/link/y.perco"


def test_all_sizes_with_their_keys(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "a b.perco"
    file.write_bytes(b"twelve bytes")
    os.utime(file, ns=(0, 1_700_000_000_999_999_999))  # which no float holds
    failed = cache / "fail" / "gnome-thumbnail-factory" / thumbnails.cache_paths(thumbnails.uri(file))["normal"].name
    failed.parent.mkdir(parents=True)
    failed.write_bytes(b"failed")
    assert not thumbnails.are_current(file)
    assert thumbnails.write_thumbnails(file, Image.new("RGB", (1200, 600), "red"))
    for size, expected in {
        "normal": (128, 64), "large": (256, 128), "x-large": (512, 256), "xx-large": (1024, 512),
    }.items():  # fmt: skip
        (place,) = (cache / size).iterdir()
        assert stat.S_IMODE(place.stat().st_mode) == 0o600
        assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
        with Image.open(place) as thumbnail:
            assert thumbnail.format == "PNG" and thumbnail.size == expected and thumbnail.mode == "RGB"
            assert thumbnail.getpixel((5, 5)) == (255, 0, 0)
            assert thumbnail.info["Thumb::URI"] == f"file://{tmp_path}/a%20b.perco"
            assert thumbnail.info["Thumb::MTime"] == "1700000000"
            assert thumbnail.info["Thumb::Size"] == "12"
            assert thumbnail.info["Thumb::Mimetype"] == "image/x-perco"
    assert not failed.exists()
    assert thumbnails.are_current(file)
    os.utime(file, (1_700_000_001, 1_700_000_001))
    assert not thumbnails.are_current(file)


def test_small_and_thin_pictures(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.perco"
    file.touch()
    for size, expected in (((3, 2), (3, 2)), ((2000, 1), (128, 1))):
        assert thumbnails.write_thumbnails(file, Image.new("RGBA", size))
        with Image.open(next((cache / "normal").iterdir())) as thumbnail:
            assert (thumbnail.size, thumbnail.mode) == (expected, "RGBA")


def test_a_file_that_was_changed_after_it_was_read(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.perco"
    file.write_bytes(b"old")
    os.utime(file, (5, 5))
    read = file.stat()
    file.write_bytes(b"new")
    assert thumbnails.write_thumbnails(file, Image.new("RGB", (9, 9)), read)
    assert not thumbnails.are_current(file)


def test_no_home_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.perco"
    file.touch()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for home in (str(tmp_path / "none"), "", "relative", str(file)):
        monkeypatch.setenv("HOME", home)
        assert not thumbnails.write_thumbnails(file, Image.new("RGB", (9, 9)))
        assert thumbnails.cache_folder() is None and not thumbnails.are_current(file)
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(OSError, match="no thumbnail cache"):
        next(thumbnails.fill(tmp_path))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root may give files away")
def test_another_users_home_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert thumbnails.cache_folder() == tmp_path / ".cache" / "thumbnails"
    os.chown(tmp_path, 12345, 12345)
    assert thumbnails.cache_folder() is None


def test_a_cache_in_the_way_is_no_error(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.perco"
    file.touch()
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    assert not thumbnails.write_thumbnails(file, Image.new("RGB", (9, 9)))


def test_thumbnails_get_no_thumbnails(cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / "x.perco").touch()
    assert not thumbnails.write_thumbnails(cache / "x.perco", Image.new("RGB", (9, 9)))
    assert not (cache / "normal").exists()


def test_a_folder_is_filled_once(cache: Path, tmp_path: Path, photo: Image.Image) -> None:
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    pillow_perco.save(photo, folder / "a\n%#ü.perco")
    pillow_perco.save(photo, folder / "below" / "b.PERCO")
    (folder / "bad.perco").write_bytes(b"no picture")
    (folder / "text.txt").write_bytes(b"text")
    assert [(one.path.name, one.made, bool(one.error)) for one in thumbnails.fill(folder)] == [
        ("a\n%#ü.perco", True, False), ("bad.perco", False, True),
    ]  # fmt: skip
    assert [(one.path.name, one.made) for one in thumbnails.fill(folder, recursive=True)] == [
        ("a\n%#ü.perco", False), ("bad.perco", False), ("b.PERCO", True),
    ]  # fmt: skip
    assert [one.made for one in thumbnails.fill(folder, again=True)] == [True, False]
    place = thumbnails.cache_paths(thumbnails.uri(folder / "a\n%#ü.perco"))["normal"]
    with Image.open(place) as thumbnail:
        assert thumbnail.size == (128, 85)
        mean = thumbnail.resize((1, 1)).getpixel((0, 0))
        assert max(abs(a - b) for a, b in zip(mean, photo.resize((1, 1)).getpixel((0, 0)), strict=True)) < 12


def test_a_folder_that_cannot_be_read_is_told(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, closed = os.scandir, tmp_path / "closed"

    def scandir(path: Any) -> Any:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    closed.mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    told = thumbnails.Filled(closed, error="this folder cannot be read (Permission denied)")
    assert list(thumbnails.fill(tmp_path, recursive=True)) == [told]
    assert list(thumbnails.fill(closed)) == [told] and not list(thumbnails.fill(tmp_path))


def test_a_failure_without_a_text_is_a_failure(
    cache: Path, tmp_path: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise MemoryError

    pillow_perco.save(photo, tmp_path / "a.perco")
    monkeypatch.setattr(files, "read_perco_file", fail)
    assert [one.error for one in thumbnails.fill(tmp_path)] == ["MemoryError"]


def test_the_module_leaves_torch_alone() -> None:
    code = "import sys, perco_engine.thumbnails; print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
