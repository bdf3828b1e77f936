"""Pictures as files of any format that Pillow knows: which can be read and written, photos in, decoded pictures out."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .codes import Metadata

NO_PHOTOS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow names and, without other programs, does not read: a folder is not searched for them."""

QUALITY = {"JPEG": 92, "WEBP": 92, "AVIF": 85}
"""Above Pillow's defaults: a decoded picture is not to be made worse a second time."""


def readable_suffixes() -> set[str]:
    """The suffixes, in lower case with their dots, of files that may be photos; .perco is not one of them."""
    Image.init()
    kinds = Image.registered_extensions()
    return {suffix for suffix, kind in kinds.items() if kind in Image.OPEN and kind not in NO_PHOTOS} - {".perco"}


def writable_kind(suffix: str) -> str | None:
    """Pillow's name of the format that decoded pictures are written in under this suffix, or None."""
    Image.init()
    kind = Image.registered_extensions().get(suffix.lower())
    return kind if kind in Image.SAVE and kind != "PERCO" else None


@dataclass(frozen=True)
class Photo:
    """A photo as a person sees it: upright, in sRGB; and the EXIF and XMP blocks of its file."""

    image: Image.Image
    metadata: Metadata


def read_photo(opened: Image.Image, keep_metadata: bool) -> Photo:
    """The photo in a file that Pillow has opened, its pixels loaded.  Raises what Pillow raises for bad files.

    keep_metadata: take the EXIF and XMP blocks along.
    """
    from .pixels import as_seen  # which takes torch: planning a conversion does not

    image = as_seen(opened)
    image.load()
    if not keep_metadata:
        return Photo(image, Metadata())
    exif, xmp = image.getexif(), image.info.get("xmp") or b""
    return Photo(
        image,
        Metadata(
            exif=exif.tobytes().removeprefix(b"Exif\x00\x00") if exif else b"",
            xmp=xmp.encode() if isinstance(xmp, str) else xmp,
        ),
    )


def picture_bytes(picture: Image.Image, kind: str, metadata: Metadata | None = None) -> bytes:
    """A decoded picture, mode RGB or RGBA, as a file of this format, with the metadata that the format can hold.

    Opacity is dropped, on white, where the format has none.  Raises OSError, ValueError where it cannot be written.
    """
    blocks = vars(metadata or Metadata())
    options = {name: block for name, block in blocks.items() if block}
    if kind in QUALITY:
        options["quality"] = QUALITY[kind]
    written = io.BytesIO()
    try:
        picture.save(written, kind, **options)
    except (OSError, ValueError):
        if picture.mode != "RGBA":
            raise
        white = Image.new("RGBA", picture.size, "white")
        written = io.BytesIO()
        Image.alpha_composite(white, picture).convert("RGB").save(written, kind, **options)
    return written.getvalue()


def sidecar_caption(photo: Path) -> str | None:
    """The text of the .txt file beside a photo, or None where there is none.  Raises OSError, UnicodeDecodeError."""
    text = photo.with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() if text != photo and text.is_file() else None
