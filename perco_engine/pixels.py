"""Pictures of every Pillow mode, as files have them, to RGB, upright, and to opacity masks; no torch."""

import io

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from .codes import AlphaMask

MOST_OF_8_BITS = 511
"""What the brightest pixel of mode I has at most where 255 is white, and sums or products have gone beyond it."""

ALPHA_BITS = 4
ALPHA_LONGEST_SIDE = 128
ALPHA_LOG2_SCALES = range(3, 7)


def has_alpha(image: Image.Image) -> bool:
    """Whether any pixel may be transparent, judged by mode and info.

    A colour that stands for nothing counts where the mode can have such a one: Pillow keeps it in others, too.
    """
    mode, key = image.mode, image.info.get("transparency")
    if mode == "RGB":
        return isinstance(key, tuple) and len(key) == 3
    if mode == "P":
        return isinstance(key, int | bytes) or (image.palette is not None and image.palette.mode.endswith("A"))
    return mode in ("LA", "La", "PA", "RGBA", "RGBa") or (isinstance(key, int) and mode[:4] in ("1", "L", "I;16"))


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in mode RGB, without its opacity.

    I;16, and I with values over MOST_OF_8_BITS, as of a PGM of 16 bits, is scaled to 8 bits, and F within 0..1, as of a
    PFM, too; other I and F are clipped to 0..255, as Pillow does, and what is no number is 0.  LAB goes through its
    colour profile.
    """
    if image.mode == "RGB":
        return image
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if image.mode == "F":
            values = np.nan_to_num(values, nan=0)
        if image.mode.startswith("I;16") or (image.mode == "I" and values.size and values.max() > MOST_OF_8_BITS):
            levels = (values.clip(0, 65535).astype(np.uint32) + 128) // 257
        elif image.mode == "F" and values.size and values.min() >= 0 and values.max() <= 1:
            levels = (values * 255).round()
        else:
            levels = values.clip(0, 255)
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        assert converted is not None
        return converted
    if "transparency" in image.info and image.mode != "P":  # of which Pillow expects one of this mode
        image = image.copy()
        del image.info["transparency"]
    return straight(image).convert("RGB")


def straight(image: Image.Image) -> Image.Image:
    """The picture with colours that are not multiplied by its opacity, and each pixel with its own."""
    if image.mode == "P" and has_alpha(image):
        return image.convert("RGBA")
    return image.convert(image.mode[:-1] + "A") if image.mode in ("RGBa", "La") else image


def _opacity(image: Image.Image) -> Image.Image:
    """The opacity of a picture that has some, mode L."""
    if image.mode.startswith("I;16"):  # where one value is that of nothing
        return Image.fromarray(np.where(np.asarray(image) == image.info["transparency"], 0, 255).astype(np.uint8))
    return straight(image).convert("RGBA").getchannel("A")


def alpha_mask(image: Image.Image, log2_scale: int | None = None) -> AlphaMask | None:
    """The picture's opacity, reduced; None if every pixel is opaque.

    log2_scale: pixels per sample and side as a power of two; None: the finest of 8..64 pixels that leaves at most 128
        samples on the longer side.
    """
    if not has_alpha(image):
        return None
    opacity = _opacity(image)
    if opacity.getextrema() == (255, 255):
        return None
    if log2_scale is None:
        log2_scale = next(
            (k for k in ALPHA_LOG2_SCALES if max(image.size) <= ALPHA_LONGEST_SIDE << k), ALPHA_LOG2_SCALES[-1]
        )
    reduced = np.asarray(opacity.reduce(1 << log2_scale)).astype(np.uint16)
    top = (1 << ALPHA_BITS) - 1
    return AlphaMask(((reduced * top + 127) // 255).astype(np.uint8), ALPHA_BITS, log2_scale)


def upright(picture: Image.Image) -> Image.Image:
    """The picture turned as its EXIF block, or XMP, says, which then says so no more; as it is where neither is read.

    A block that can be read, and not written anew without its orientation, is dropped.
    """
    picture.load()
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # Pillow raises whatever a damaged block leads it to
        plain = picture.copy()
        plain.info.pop("exif", None)
    try:
        plain.getexif()[ExifTags.Base.Orientation] = picture.getexif()[ExifTags.Base.Orientation]
        return ImageOps.exif_transpose(plain)
    except Exception:
        return picture


def as_seen(photo: Image.Image) -> Image.Image:
    """A photo as a person sees it: upright, in sRGB."""
    return to_srgb(upright(photo))


def to_srgb(image: Image.Image, profile: bytes | None = None) -> Image.Image:
    """The picture in sRGB; unchanged where it has no colour profile, or one that is no good.

    profile: default the one that is embedded.
    """
    profile = profile or image.info.get("icc_profile")
    if not profile:
        return image
    opacity = _opacity(image) if has_alpha(image) else None
    if image.mode in ("LA", "La"):
        taken = straight(image).getchannel("L")
    elif image.mode.startswith("I;16"):
        taken = to_rgb(image).getchannel(0)
    elif image.mode in ("P", "PA", "RGBA", "RGBa"):
        taken = straight(image).convert("RGB")
    else:
        taken = image
    if taken.mode not in ("RGB", "CMYK", "L"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(taken, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image
    assert converted is not None
    if opacity is not None:
        converted.putalpha(opacity)
    converted.info = {name: told for name, told in image.info.items() if name not in ("icc_profile", "transparency")}
    return converted
