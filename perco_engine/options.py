"""Values that users may give, and what is said of others.  Needs no torch: the plugin checks before any is imported."""

from numbers import Integral
from typing import Any

from PIL import Image

from .bitstream.header import MAX_SEED, MAX_SIDE_PX
from .codes import Metadata
from .rates import is_number


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number of at least `least`, of Python's or of numpy's kind, as Python's.  Raises ValueError."""
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is None or number < least or (most is not None and number > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be an integer {allowed}, not {value!r:.80}")
    return number


def check_guidance_scale(value: Any) -> float:
    """A guidance scale.  Raises ValueError unless it is a finite number of at least 0."""
    if not is_number(value) or value < 0:
        raise ValueError(f"the guidance scale must be a finite number of 0 or more, not {value!r:.80}")
    return float(value)


def check_picture(image: Any) -> Image.Image:
    """A picture of Pillow's, loaded, of sides that a file can have.  Raises TypeError, ValueError."""
    if not isinstance(image, Image.Image):
        raise TypeError(f"a picture must be one of Pillow's (Image.fromarray makes them), not {type(image).__name__}")
    image.load()
    if not 1 <= min(image.size) <= max(image.size) <= MAX_SIDE_PX:
        raise ValueError(f"a .perco picture has 1 to {MAX_SIDE_PX} pixels a side, not {image.width}x{image.height}")
    return image


def check_metadata(value: Any) -> Metadata:
    """Blocks of bytes.  Raises ValueError for others."""
    if not isinstance(value, Metadata):
        raise ValueError(f"metadata must be of type Metadata, not {value!r:.80}")
    for name, block in vars(value).items():
        if not isinstance(block, bytes):
            raise ValueError(f"{name} must be bytes, not {type(block).__name__}")
    return value


def check_seed(value: Any) -> int:
    """A seed of the noise that decoding starts from: 0..2**32-1.  Raises ValueError."""
    return whole_number("seed", value, 0, MAX_SEED)
