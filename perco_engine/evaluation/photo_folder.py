"""The photos of a folder: found, named, read as a person sees them."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .. import pixels
from ..bitstream.chunks import MAX_CAPTION_BYTES
from ..bitstream.header import MAX_SIDE_PX
from ..errors import EvaluationError, first_line
from ..picture_files import readable_suffixes, sidecar, sidecar_caption


@dataclass(frozen=True)
class Photo:
    """A photo of the folder.

    name: its path in the folder.  place: the same without the suffix, unless another photo has the same without it.
    sidecar: the caption in the .txt file beside it, or None.  problem: why the one or the other cannot be read, or "".
    """

    path: Path
    name: str
    place: str
    sha256: str
    sidecar: str | None
    problem: str = ""

    def read(self) -> Image.Image:
        """The photo upright, in sRGB, without opacity: mode RGB.  Raises UNREADABLE."""
        if self.problem:
            raise ValueError(self.problem)
        with Image.open(self.path) as picture:
            photo = pixels.to_rgb(pixels.as_seen(picture)).copy()
        photo.info = {}  # classical files of it are not to carry what .perco files do not
        if max(photo.size) > MAX_SIDE_PX:
            raise ValueError(f"{photo.width}x{photo.height} pixels, and a side has at most {MAX_SIDE_PX}")
        return photo

    def caption(self) -> str | None:
        """The caption beside it, or None.  Raises ValueError where it is too long for a .perco file."""
        if len((self.sidecar or "").encode()) > MAX_CAPTION_BYTES:
            raise ValueError(f"its caption has more than {MAX_CAPTION_BYTES} bytes: shorten {sidecar(self.path)}")
        return self.sidecar


def find_photos(folder: Path, out: Path, limit: int | None = None) -> list[Photo]:
    """The pictures below a folder, sorted by path, at most `limit`: files with a picture's suffix, none below `out`.

    Raises EvaluationError if there is none, and ValueError where `out` is the folder itself.
    """
    kinds, results = readable_suffixes(), out.resolve()
    if results == folder.resolve():
        raise ValueError("the results need a folder of their own, and not that of the photos: choose another one")
    above = results in folder.resolve().parents  # then the photos are below it, and no results
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in kinds and path.is_file() and (above or results not in path.resolve().parents)
    ]
    if not paths:
        raise EvaluationError(f"there is no picture in {folder}: name a folder of photos")
    stems = Counter([path.with_suffix("") for path in paths] + paths)  # a.jpg is what a.jpg.png is without its suffix
    return [_photo(folder, path, shared=stems[path.with_suffix("")] > 1) for path in paths[:limit]]


def photo_at(path: Path) -> Photo:
    """One photo, named as its file is."""
    return _photo(path.parent, path, shared=False)


def _photo(folder: Path, path: Path, shared: bool) -> Photo:
    name = path.relative_to(folder)
    names = path, name.as_posix(), (name if shared else name.with_suffix("")).as_posix()
    try:
        return Photo(*names, hashlib.sha256(path.read_bytes()).hexdigest(), sidecar_caption(path))
    except (OSError, ValueError) as error:
        return Photo(*names, "", None, first_line(error))
