"""PerCo for Pillow: pictures in a hundred bytes.

    import pillow_perco
    from PIL import Image

    Image.open("photo.jpg").save("photo.perco", bpp=0.0019)
    Image.open("photo.perco").show()

Importing this package registers the format.  Neither importing it nor opening a file imports torch.
"""

import os
from typing import Any

from PIL import Image

from perco_engine import __version__
from perco_engine.files import place, write_beside
from perco_engine.options import check_picture

from .PercoImagePlugin import OpenerOptions, encode, register

__all__ = ["OpenerOptions", "__version__", "register_perco_opener", "save"]


def register_perco_opener(**options: Any) -> None:
    """Registers the format with Pillow, with other settings for decoding (see OpenerOptions): steps, guidance_scale,
    seed, device.  Without options: the defaults again, as the import of this package does by itself.

    Raises TypeError for an unknown option, ValueError for a wrong value.
    """
    register(OpenerOptions(**options) if options else None)


def save(image: Image.Image, path: str | bytes | os.PathLike[str], **options: Any) -> None:
    """Saves like `image.save(path, "PERCO", **options)`, but never harms the file that was there.

    The picture is encoded first, written beside `path` (or beside what that links to), and renamed onto it.
    options: those of `perco_engine.Engine.encode_batch` (bpp, max_bytes, caption, effort, ...), but exif, icc_profile
    and xmp (bytes) in place of metadata; and model and device, as `perco_engine.get_engine` takes them.
    Raises what `image.save` would raise, OSError for the path before the picture is encoded, and TypeError for what is
    no picture or no path.
    """
    place(path)
    check_picture(image)
    write_beside(path, encode(image, options))
