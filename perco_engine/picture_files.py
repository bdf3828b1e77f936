"""Pictures as files of any format that Pillow knows: which can be read and written, photos in, decoded pictures out."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from .codes import EXIF_PREFIX, Metadata, is_of_other_pixels

NO_PHOTOS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow names and, without other programs, does not read: a folder is not searched for them."""

READ_AS_OTHERS = {"MPO"}
"""Formats whose files Pillow opens as those of another: MPO's begin as a JPEG file."""

NOT_WRITTEN = {"ICNS", "PERCO"}
"""Formats that Pillow writes, and decoded pictures are not: an ICNS file holds squares of some sizes alone."""

EXIF_TAGS = (
    ExifTags.Base.ImageDescription, ExifTags.Base.Make, ExifTags.Base.Model, ExifTags.Base.XResolution,
    ExifTags.Base.YResolution, ExifTags.Base.ResolutionUnit, ExifTags.Base.Software, ExifTags.Base.DateTime,
    ExifTags.Base.Artist, ExifTags.Base.Copyright,
)  # fmt: skip
"""The tags of a TIFF file that tell of its picture, and not of how its bytes lie."""

UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError)
"""What Pillow raises for a file that is no picture, or a damaged or too large one; a RuntimeError of AVIF, DDS, BLP."""

DROPS_OPACITY = {"BMP", "DIB", "PPM"}
"""Formats that Pillow writes RGBA in, and from which it comes back without its opacity."""

LARGEST_ICON_PX = 256
"""Pixels a side of an ICO file, at most."""

QUALITY = {"JPEG": 92, "WEBP": 92, "AVIF": 85}
"""Above Pillow's defaults: a decoded picture is not to be made worse a second time."""


def readable_suffixes() -> set[str]:
    """The suffixes, in lower case with their dots, of files that may be photos; .perco is not one of them."""
    Image.init()
    kinds = (set(Image.OPEN) | READ_AS_OTHERS) - NO_PHOTOS
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in kinds} - {".perco"}


def writable_kind(suffix: str) -> str | None:
    """Pillow's name of the format that decoded pictures are written in under this suffix, or None."""
    Image.init()
    kind = Image.registered_extensions().get(suffix.lower())
    return kind if kind in Image.SAVE and kind not in NOT_WRITTEN else None


@dataclass(frozen=True)
class Photo:
    """A photo as a person sees it: upright, in sRGB; and the EXIF and XMP blocks of its file."""

    image: Image.Image
    metadata: Metadata


def read_photo(opened: Image.Image, keep_metadata: bool) -> Photo:
    """The photo in a file that Pillow has opened, its pixels loaded.  Raises what Pillow raises for bad files.

    keep_metadata: take the EXIF and XMP blocks along.
    """
    from .pixels import as_seen  # with numpy, which planning a conversion spares

    image = as_seen(opened)
    image.load()
    if not keep_metadata:
        return Photo(image, Metadata())
    xmp = image.info.get("xmp") or b""
    return Photo(image, Metadata(exif=_exif(opened, image), xmp=xmp.encode() if isinstance(xmp, str) else xmp))


def within(size: tuple[int, int], longer_px: int) -> tuple[int, int]:
    """The size of a picture whose longer side becomes so many pixels; no side less than one."""
    scale = longer_px / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def turned(picture: Image.Image, metadata: Metadata) -> tuple[Image.Image, Metadata]:
    """A decoded picture turned as the metadata of its file say, and these, which then say so no more."""
    blocks = {"exif": metadata.exif and EXIF_PREFIX + metadata.exif, "xmp": metadata.xmp}
    if not any(blocks.values()):
        return picture, metadata
    from .pixels import upright

    told = picture.copy()
    told.info = {name: block for name, block in blocks.items() if block}
    shown = upright(told)
    exif, xmp = (shown.info.pop(name, b"") for name in blocks)
    return shown, replace(metadata, exif=exif.removeprefix(EXIF_PREFIX), xmp=xmp)


def _exif(opened: Image.Image, image: Image.Image) -> bytes:
    """The EXIF block of a photo that was opened, and turned upright since; none where it is damaged."""
    try:
        exif = _exif_of_tiff(opened) or image.getexif()
        return exif.tobytes().removeprefix(EXIF_PREFIX) if exif else b""
    except Exception:  # Pillow raises whatever a damaged block leads it to
        return b""


def _exif_of_tiff(opened: Image.Image) -> Image.Exif:
    """What the tags of a TIFF file tell of its picture; none of another file, whose EXIF block Pillow copies along."""
    kept = Image.Exif()
    if opened.format == "TIFF":
        found = opened.getexif()
        kept.update({tag: found[tag] for tag in EXIF_TAGS if tag in found})
        for block in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            if values := found.get_ifd(block):
                kept[block] = dict(values)
    return kept


def picture_bytes(picture: Image.Image, kind: str, metadata: Metadata | None = None) -> bytes:
    """A decoded picture, mode RGB or RGBA, as a file of this format, with the metadata that the format can hold.

    Opacity is dropped, on white, where the format has none.  Raises OSError, ValueError where it cannot be written.
    """
    options = _metadata_options(metadata or Metadata(), kind)
    if kind in QUALITY:
        options["quality"] = QUALITY[kind]
    if kind == "ICO":  # by default, several smaller ones
        if max(picture.size) > LARGEST_ICON_PX:
            raise ValueError(f"an icon has at most {LARGEST_ICON_PX} pixels a side: write another format, such as .png")
        options["sizes"] = [picture.size]
    if kind in DROPS_OPACITY:
        picture = _on_white(picture)
    try:
        return _saved(picture, kind, options)
    except (OSError, ValueError):
        if picture.mode != "RGBA":
            raise
        return _saved(_on_white(picture), kind, options)


def _saved(picture: Image.Image, kind: str, options: Mapping[str, Any]) -> bytes:
    """The file of a picture, as Pillow writes it."""
    written = io.BytesIO()
    try:
        picture.save(written, kind, **options)
    except ValueError as error:
        if "data is too long" in str(error):  # of JPEG's segments of 64 KB
            advice = "write another format, such as PNG, or leave the metadata out"
            raise ValueError(f"{error} for {kind}: {advice}") from error
        raise
    return written.getvalue()


def _on_white(picture: Image.Image) -> Image.Image:
    """The picture in mode RGB, on white where it lets something through."""
    if picture.mode != "RGBA":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _metadata_options(metadata: Metadata, kind: str) -> dict[str, Any]:
    """What Pillow is to be told for a file of this format to hold these blocks."""
    options: dict[str, Any] = {name: block for name, block in vars(metadata).items() if block}
    if is_of_other_pixels(metadata.icc_profile):
        del options["icc_profile"]
    if metadata.exif:
        options["exif"] = EXIF_PREFIX + metadata.exif
    if metadata.xmp and kind == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", metadata.xmp.decode("utf-8", "replace"))
    if metadata.xmp and kind == "TIFF":
        exif = Image.Exif()
        exif.load(options.get("exif", b""))
        exif[ExifTags.Base.XMLPacket] = metadata.xmp
        options["exif"] = exif
    return options


def sidecar(photo: Path) -> Path:
    """The text file beside a photo that may hold its caption."""
    return photo.with_suffix(".txt")


def sidecar_caption(photo: Path) -> str | None:
    """The text of the .txt file beside a photo, or None where there is none.

    Raises OSError, and ValueError for a file that is not in UTF-8.
    """
    text = sidecar(photo)
    if text == photo or not text.is_file():
        return None
    try:
        return text.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is not in UTF-8: write it anew so, or move it away") from error
