"""A .perco file shown: decoded once, kept as a PNG in a private folder, and opened in the user's own viewer."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import platformdirs
from PIL import Image

from . import files, picture_files, service
from .bitstream import read_header
from .version import __version__

if TYPE_CHECKING:
    from .batch_options import DecodeOptions

KEPT_BYTES = 256 << 20
"""Of pictures in the folder: older ones are removed when it holds more."""


def folder() -> Path:
    """Where decoded pictures are kept, for this user alone: in the user's cache, or runtime folder if there is none."""
    for place in (_cache_folder, service.runtime_folder):
        with contextlib.suppress(OSError, RuntimeError):  # a RuntimeError: this process has no home
            kept = place() / "view"
            files.make_private(kept)
            if os.access(kept, os.W_OK):
                return kept
    return Path(tempfile.mkdtemp(prefix="perco-view-"))


def _cache_folder() -> Path:
    return Path(platformdirs.user_cache_dir("pillow-perco", appauthor=False))


def decoded(file: Path, model: str | None = None, **options: "Unpack[DecodeOptions]") -> Path:
    """The PNG of what a .perco file holds: the one that is kept, or a new one, decoded by the warm engine.

    The options are those of `decode`.  Raises OSError, PercoError.
    """
    data = files.read_perco_file(file)
    header = read_header(data)
    told = repr((__version__, model, sorted(options.items()))).encode()
    kept = folder() / hashlib.sha256(told + data).hexdigest()[:24]
    # The viewer shows the name; a very long one leaves no room for .png.
    name = os.fsdecode(os.fsencode(file.stem)[:200]) + ".png"
    place = kept / name
    if not place.is_file():
        picture, metadata = picture_files.turned(decode(data, model, **options), header.metadata)
        png = picture_files.picture_bytes(picture, "PNG", metadata.colours)
        _make_room(kept.parent)
        files.make_private(kept)
        files.write_beside(place, png, mode=0o600, sync=False)
    with contextlib.suppress(FileNotFoundError):
        os.utime(kept)
    return place


def decode(data: bytes, model: str | None = None, **options: "Unpack[DecodeOptions]") -> Image.Image:
    """The picture in the bytes of a file, by the warm engine, or by one of this process where there is none.

    model: the folder of the file's model, if it is not installed.  options: of `Engine.decode_batch`.
    """
    picture = service.decode(data, start_it=True, model=model, **options)
    if picture is None:
        from .engine import engine_of_file

        picture = engine_of_file(data, model).decode(data, **options)
    return picture


def open_in_viewer(picture: Path) -> None:
    """Opens a picture in the program that the user has chosen for its kind.  Raises OSError where that fails."""
    if sys.platform == "win32":
        os.startfile(picture)
        return
    opener = shutil.which("open" if sys.platform == "darwin" else "xdg-open")
    if opener is None:
        raise OSError("there is no xdg-open here (package xdg-utils): perco view --terminal shows it in the terminal")
    with tempfile.TemporaryFile() as errors:  # and no pipe, which would be open for as long as the viewer is
        run = subprocess.run(
            [opener, picture], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, check=False
        )
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines() if run.returncode else []
    if run.returncode:
        said = lines[-1:] or [f"it ended with {run.returncode}"]
        raise OSError(f"{opener} opened no viewer ({said[0]}): perco view --terminal shows it in the terminal")


def _make_room(kept: Path) -> None:
    """Removes the pictures that were shown longest ago, until KEPT_BYTES hold the rest."""
    found = []
    for one in kept.iterdir():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # another process may be clearing it
            found.append((one.stat().st_mtime, sum(file.stat().st_size for file in one.iterdir()), one))
    total = 0
    for _, size, one in sorted(found, reverse=True):
        total += size
        if total > KEPT_BYTES:
            shutil.rmtree(one, ignore_errors=True)
