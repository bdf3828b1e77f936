"""Opacity masks to pictures, without torch."""

import numpy as np
from PIL import Image

from .codes import AlphaMask


def opacity(mask: AlphaMask, width_px: int, height_px: int, size: tuple[int, int] | None = None) -> Image.Image:
    """The opacity of a picture of width_px x height_px, mode L, interpolated from its mask.

    size: of the result, (width, height); the picture's own where it is None.
    """
    top = (1 << mask.bits_per_sample) - 1
    samples = Image.fromarray((mask.samples.astype(np.uint16) * 255 // top).astype(np.uint8))
    scale = 1 << mask.log2_scale
    box = (0, 0, width_px / scale, height_px / scale)
    return samples.resize(size or (width_px, height_px), Image.Resampling.BILINEAR, box)
