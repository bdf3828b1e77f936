"""The squares that training cuts out of photos."""

import random

from PIL import Image


def random_crop(photo: Image.Image, side: int, rng: random.Random) -> Image.Image:
    """A random square, maybe mirrored: as it is in half of the cases, else reduced to `side` from up to 1/0.35 of it.

    Codecs meet photos at their own scale first of all; crops that are mostly reduced teach too much fine detail.
    """
    if rng.random() < 0.5 and min(photo.size) >= side:
        left, top = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
        crop = photo.crop((left, top, left + side, top + side))
    else:
        largest = min(side / 0.35, *photo.size)
        source = rng.uniform(min(side, largest), largest)
        x, y = rng.uniform(0, photo.width - source), rng.uniform(0, photo.height - source)
        crop = photo.resize((side, side), Image.Resampling.BICUBIC, (x, y, x + source, y + source), 2.0)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def short_side_crop(photo: Image.Image, side: int, rng: random.Random) -> Image.Image:
    """A random square of the photo after its short side has become `side`, maybe mirrored: PerCo (SD)'s crops."""
    source = min(photo.size)
    x, y = rng.uniform(0, photo.width - source), rng.uniform(0, photo.height - source)
    crop = photo.resize((side, side), Image.Resampling.LANCZOS, (x, y, x + source, y + source))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def middle(photo: Image.Image, side: int) -> Image.Image:
    """The square in the middle of the photo after its short side has become `side`."""
    source = min(photo.size)
    x, y = (photo.width - source) / 2, (photo.height - source) / 2
    return photo.resize((side, side), Image.Resampling.LANCZOS, (x, y, x + source, y + source))
