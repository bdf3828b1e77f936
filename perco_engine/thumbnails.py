"""The thumbnail cache that file managers share (freedesktop.org, Thumbnail Managing Standard, 0.9).

A file manager that finds a current thumbnail there shows it, and runs no thumbnailer.  Only `fill` and `fill_files`
decode, and need torch.
"""

import hashlib
import io
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from . import files
from .codes import MIME_TYPE
from .errors import PercoError, first_line

if TYPE_CHECKING:
    from PIL import Image

    from .engine import Engine
    from .family import FamilyEngine

SIZES_PX = {"xx-large": 1024, "x-large": 512, "large": 256, "normal": 128}
"""The folders of the cache, and the longer side of a thumbnail in each; largest first."""

LARGEST_PX = SIZES_PX["xx-large"]
"""What a picture has to have on its longer side for the largest thumbnail."""

_UNESCAPED = "!$&'()*+,-./:=@_~"
"""What GLib leaves as it is in the path of a file's URI, besides letters and digits.  The hash is of the very bytes of
the URI, so another choice, valid as it may be, finds nothing that file managers look for."""


def uri(path: str | os.PathLike[str]) -> str:
    """The canonical URI of a file, as GLib's g_filename_to_uri makes it, from the bytes of its absolute path.

    Symbolic links stay: file managers ask for the path that they show.
    """
    # Not Path.absolute, which keeps "..".
    return "file://" + quote(os.fsencode(os.path.abspath(path)), safe=_UNESCAPED)  # noqa: PTH100


def cache_folder() -> Path | None:
    """The user's thumbnail cache, there or yet to be made; None where there is no home, or none of this user's.

    (With sudo the home may be another user's: root's files in it would be in their way.)
    """
    if sys.platform in ("win32", "darwin"):
        return None
    try:
        named = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not named.is_absolute():
            home = Path.home()
            # The root is what an empty HOME comes to, and the home of users who have none.
            if home == home.parent or not (home.is_absolute() and home.is_dir()):
                return None
            named = home / ".cache"
        folder = named / "thumbnails"
        there = next(one for one in (folder, *folder.parents) if one.exists())
        usable = there.stat().st_uid == os.geteuid() and os.access(there, os.W_OK)
    except (OSError, RuntimeError):
        return None
    return folder if usable else None


def cache_paths(file_uri: str) -> dict[str, Path]:
    """Where the thumbnails of a URI lie, by the names of SIZES_PX; {} where there is no cache."""
    folder = cache_folder()
    if folder is None:
        return {}
    return {size: folder / size / thumbnail_name(file_uri) for size in SIZES_PX}


def failed_entries(file_uri: str) -> list[Path]:
    """What programs have noted in the cache about their failure to make thumbnails of a URI."""
    folder = cache_folder()
    return [] if folder is None else sorted((folder / "fail").glob(f"*/{thumbnail_name(file_uri)}"))


def thumbnail_name(file_uri: str) -> str:
    """What the cache calls the thumbnails of a URI."""
    return hashlib.md5(file_uri.encode(), usedforsecurity=False).hexdigest() + ".png"


def keys(path: str | os.PathLike[str], state: os.stat_result | None = None) -> dict[str, str]:
    """What a thumbnail in the cache says of its file: URI, time, size and kind.  Raises OSError where it is not there.

    state: of the file when it was read (default: now), so that a file that was changed since is seen to be.
    """
    state = state or Path(path).stat()
    return {
        "Thumb::URI": uri(path),
        "Thumb::MTime": str(state.st_mtime_ns // 10**9),
        "Thumb::Size": str(state.st_size),
        "Thumb::Mimetype": MIME_TYPE,
        "Software": "pillow-perco",
    }


def reduced(picture: "Image.Image", size_px: int) -> "Image.Image":
    """The picture, within a square of size_px; one that is smaller stays as it is."""
    if max(picture.size) <= size_px:
        return picture
    from PIL import Image

    from .picture_files import within

    return picture.resize(within(picture.size, size_px), Image.Resampling.LANCZOS, reducing_gap=3)


def png(picture: "Image.Image", text: dict[str, str]) -> bytes:
    """The picture as a PNG of 8 bits a sample that holds these text keys."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    written = io.BytesIO()
    picture.save(written, "PNG", pnginfo=info, compress_level=1)
    return written.getvalue()


def write_thumbnails(path: str | os.PathLike[str], picture: "Image.Image", state: os.stat_result | None = None) -> bool:
    """Puts thumbnails of a .perco file into the cache, in all four sizes, and takes out what was noted of failures.

    picture: what the file holds, mode RGB or RGBA, of LARGEST_PX on its longer side, or of its full size.
    state: of the file when the picture was read (default: now).
    Each is written beside its place, for this user alone (0600), and renamed.  Returns whether all are there; a cache
    that cannot be written, or is not there, is no error.
    """
    try:
        text, places = keys(path, state), cache_paths(uri(path))
        if not places or _is_thumbnail(path):
            return False
        for size, px in SIZES_PX.items():
            picture = reduced(picture, px)
            files.make_private(places[size].parent)
            files.write_beside(places[size], png(picture, text), mode=0o600, sync=False)
        for entry in failed_entries(text["Thumb::URI"]):
            entry.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def are_current(path: str | os.PathLike[str]) -> bool:
    """Whether the cache holds thumbnails of a file, as it is now, in all four sizes."""
    from PIL import Image

    try:
        text, places = keys(path), cache_paths(uri(path))
        for place in places.values():
            with Image.open(place, formats=["PNG"]) as thumbnail:
                told = thumbnail.info
            if any(told.get(key) != text[key] for key in ("Thumb::URI", "Thumb::MTime")):
                return False
            if told.get("Thumb::Size", text["Thumb::Size"]) != text["Thumb::Size"]:
                return False
    except (OSError, SyntaxError, ValueError):
        return False
    return bool(places)


def _is_thumbnail(path: str | os.PathLike[str]) -> bool:
    """Whether a file lies in the cache itself: those get no thumbnails of their own."""
    folder = cache_folder()
    return folder is not None and folder.resolve() in Path(path).resolve().parents


def is_wanted(asked: bool | None, engine: "Engine | FamilyEngine") -> bool:
    """Whether files that this engine encodes are to have thumbnails: as asked, else if it decodes them in one step.

    Never where there is no cache.  (A picture of twenty steps takes minutes on a CPU: that is not done unasked.)
    """
    wanted = engine.steps in (0, 1) if asked is None else asked
    return bool(wanted) and cache_folder() is not None


@dataclass(frozen=True)
class Filled:
    """What `fill` did for one file: `made` new thumbnails, or found current ones, or failed for the reason `error`.

    Or why a folder cannot be read.
    """

    path: Path
    made: bool = False
    error: str = ""


def fill(folder: Path, *, recursive: bool = False, again: bool = False) -> Iterator[Filled]:
    """Puts thumbnails of the .perco files of a folder into the cache, decoded by their models; one result a file.

    recursive: with those of all folders below it.  Hidden ones are left out, and folders that cannot be read are told.
    again: also where the cache holds current ones.
    Raises OSError where there is no cache or no such folder.
    """
    if cache_folder() is None:
        raise OSError("there is no thumbnail cache to fill: this user has no home folder of their own")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder")
    from .conversion import is_perco, scan  # which imports Pillow

    found = scan(folder, recursive)
    yield from fill_files((path for path, problem in found if is_perco(path) and not problem), again=again)
    yield from (Filled(path, error=problem) for path, problem in found if problem)


def fill_files(paths: Iterable[Path], *, again: bool = False) -> Iterator[Filled]:
    """The same for these files, one after the other: a result each, as soon as its thumbnails are there."""
    for path in paths:
        if not again and are_current(path):
            yield Filled(path)
            continue
        try:
            state, data = path.stat(), files.read_perco_file(path)
            made = write_thumbnails(path, _decoded(data), state)
            yield Filled(path, made, "" if made else "the thumbnail cache cannot be written")
        except (PercoError, OSError, RuntimeError, MemoryError) as error:
            yield Filled(path, error=first_line(error))


def _decoded(data: bytes) -> "Image.Image":
    """The picture in the bytes of a file, upright, by its own model."""
    from .bitstream import read_header
    from .engine import engine_of_file
    from .picture_files import turned

    return turned(engine_of_file(data).decode(data, max_size_px=LARGEST_PX), read_header(data).metadata)[0]
