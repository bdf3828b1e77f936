"""What a user would pick instead: the best JPEG, WebP, AVIF or JPEG XL file of at most so many bytes.

A classical file of a hundred bytes is one of a smaller picture, so there is a scale (reduced by LANCZOS, shown enlarged
by BICUBIC) beside the quality.  Whole files are counted.  `classical_search.py` finds the best.
"""

import importlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from PIL import Image, features

from .metrics import METRICS

SCALES = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
"""Originals are reduced to 1/scale of their size."""

HIGHEST_QUALITY = 95


@dataclass(frozen=True)
class Codec:
    """A classical format.

    lowest: the coarsest quality; HIGHEST_QUALITY is the finest.
    options: of Pillow's save, beside the quality.
    largest_scale: smaller pictures are not tried, where the format's own bytes leave nothing to gain.
    most_side_px: what the format, or its encoder, takes.
    """

    name: str
    title: str
    lowest: int
    options: Mapping[str, Any] = field(default_factory=dict)
    largest_scale: float = SCALES[-1]
    most_side_px: int = 65535

    def scales(self, size: tuple[int, int]) -> tuple[float, ...]:
        """Those of SCALES that are tried of a picture of this size."""
        least = max(size) / self.most_side_px
        return tuple(scale for scale in SCALES if least <= scale <= self.largest_scale)

    @property
    def told(self) -> str:
        """Its options, as they stand after a version."""
        return "".join(f", {name}={value}" for name, value in self.options.items() if name != "format")

    def encode(self, picture: Image.Image, scale: float, quality: int) -> bytes:
        """The file of an RGB picture at 1/scale of its size."""
        if scale > 1:
            size = max(1, round(picture.width / scale)), max(1, round(picture.height / scale))
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, quality=quality, **self.options)
        return buffer.getvalue()


CODECS = {
    codec.name: codec
    for codec in (
        Codec("jpeg", "JPEG", 1, {"format": "JPEG", "optimize": True}, most_side_px=65500),
        Codec("webp", "WebP", 0, {"format": "WEBP", "method": 6}, most_side_px=16383),
        Codec("avif", "AVIF", 0, {"format": "AVIF", "speed": 6, "autotiling": False}, 12),  # tiles cost bytes
        Codec("jxl", "JPEG XL", 0, {"format": "JXL", "effort": 7}),
    )
}


@dataclass(frozen=True)
class Candidate:
    """A classical file of a photo: its settings, its size, and its scores in the metrics that it was measured in."""

    codec: str
    scale: float
    quality: int
    size_bytes: int
    scores: Mapping[str, float]


def available(names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The codecs of these names that this machine has, as version and options, and of the others why it has not."""
    found, missing = {}, {}
    for name in names:
        if name == "jxl":
            try:
                importlib.import_module("pillow_jxl")  # registers the format
                found[name] = metadata.version("pillow-jxl-plugin") + CODECS[name].told
            except ImportError as error:
                missing[name] = f"not available ({error}): pip install pillow-jxl-plugin"
            continue
        library = "jpg" if name == "jpeg" else name
        told = features.version(library) if features.check(library) else None
        if told:
            found[name] = told + CODECS[name].told
        else:
            missing[name] = f"not available (this Pillow is built without {CODECS[name].title})"
    return found, missing


def show(data: bytes, size: tuple[int, int]) -> Image.Image:
    """The picture in a classical file, RGB, enlarged to the photo's size."""
    with Image.open(io.BytesIO(data)) as decoded:
        return decoded.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def best(candidates: Iterable[Candidate], budget_bytes: int, metric: str) -> Candidate | None:
    """The file of at most budget_bytes that is best in this metric, the smallest of equals; None if there is none."""
    scored = [
        (score, one)
        for one in candidates
        if one.size_bytes <= budget_bytes and (score := one.scores.get(metric)) is not None
    ]
    sign = -1 if METRICS[metric].higher_is_better else 1
    return min(scored, key=lambda pair: (sign * pair[0], pair[1].size_bytes), default=(0, None))[1]
