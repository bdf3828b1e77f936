"""What a user would pick instead: the best JPEG, WebP, AVIF or JPEG XL file of at most so many bytes.

A classical file of a hundred bytes is one of a smaller picture, so the search is over scale (reduced by LANCZOS, shown
enlarged by BICUBIC) and quality, for every metric by that metric.  Whole files are counted.
"""

import importlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image, features

from .metrics import METRICS, Judge, measure
from .results import Line, Lines

SCALES = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
"""Originals are reduced to 1/scale of their size."""


@dataclass(frozen=True)
class Codec:
    """A classical format.

    qualities: those that are tried at every scale, ascending; between the largest that fits and the next, others are.
    options: of Pillow's save, beside the quality.
    largest_scale: smaller pictures are not tried, where the format's own bytes leave nothing to gain.
    """

    name: str
    title: str
    qualities: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    largest_scale: float = SCALES[-1]

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
        Codec("jpeg", "JPEG", (1, 5, 10, 20, 35, 50, 70, 90), {"format": "JPEG", "optimize": True}),
        Codec("webp", "WebP", (0, 5, 10, 20, 35, 50, 70, 90), {"format": "WEBP", "method": 6}),
        Codec("avif", "AVIF", (0, 8, 16, 25, 35, 50, 65, 80, 90), {"format": "AVIF", "speed": 6}, 12),
        Codec("jxl", "JPEG XL", (5, 15, 30, 50, 70, 90), {"format": "JXL", "effort": 7}),
    )
}


@dataclass(frozen=True)
class Candidate:
    """A classical file of a photo: its settings, its size, and how near to the photo it is in every metric."""

    codec: str
    scale: float
    quality: int
    size_bytes: int
    scores: Mapping[str, float | None]

    @property
    def name(self) -> str:
        """Its settings, for people."""
        return f"{CODECS[self.codec].title} 1/{self.scale:g}, quality {self.quality}"


def available(names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The versions of the codecs of these names that this machine has, and of the others why it has not."""
    found, missing = {}, {}
    for name in names:
        if name == "jxl":
            try:
                importlib.import_module("pillow_jxl")  # registers the format
                found[name] = metadata.version("pillow-jxl-plugin")
            except ImportError as error:
                missing[name] = f"not available ({error}): pip install pillow-jxl-plugin"
            continue
        library = "jpg" if name == "jpeg" else name
        told = features.version(library) if features.check(library) else None
        if told:
            found[name] = told
        else:
            missing[name] = f"not available (this Pillow is built without {CODECS[name].title})"
    return found, missing


def show(data: bytes, size: tuple[int, int]) -> Image.Image:
    """The picture in a classical file, RGB, enlarged to the photo's size."""
    with Image.open(io.BytesIO(data)) as decoded:
        return decoded.convert("RGB").resize(size, Image.Resampling.BICUBIC)


class Search:
    """The classical files of one photo that were tried, and what was found; kept in a file of JSON lines.

    path: of the lines, which do not say of which photo they are: one for each content of a photo.
    versions: of each codec, as `available` gives them; other versions are searched again.
    """

    def __init__(self, path: Path, versions: Mapping[str, str]) -> None:
        self._versions = versions
        self._lines = Lines(path, _key)

    def candidates(self, codec: str) -> list[Candidate]:
        """Every file of this codec that was tried and scored."""
        names = ("codec", "scale", "quality", "size_bytes", "scores")
        return [
            Candidate(**{name: line[name] for name in names})
            for line in self._lines
            if line.get("version") == self._versions[codec] and line["codec"] == codec and "scale" in line
        ]

    def run(
        self, photo: Image.Image, codec: Codec, budgets_bytes: Sequence[int], judges: Mapping[str, Judge]
    ) -> list[Candidate]:
        """Tries scales and qualities for every budget, scores whatever fits into the largest, and returns it all.

        What was done by an earlier run is not done again.  photo: RGB.
        """
        budgets, version = sorted(set(budgets_bytes)), self._versions[codec.name]
        done = self._lines.get((codec.name, version, None, None))
        if done is None or not (set(budgets) <= set(done["budgets_bytes"]) and set(judges) <= set(done["metrics"])):
            measured = measure(judges, photo)
            for scale in (scale for scale in SCALES if scale <= codec.largest_scale):
                for quality, data in _fitting(photo, codec, scale, budgets).items():
                    line = self._lines.get((codec.name, version, scale, quality))
                    scores = line["scores"] if line else {}
                    if not set(judges) <= set(scores):
                        scores = {**scores, **measured(show(data, photo.size))}
                        found = Candidate(codec.name, scale, quality, len(data), scores)
                        self._lines.append({"version": version, **asdict(found)})
            told = {"budgets_bytes": budgets, "metrics": sorted(judges)}
            self._lines.append({"codec": codec.name, "version": version, **told})
        return self.candidates(codec.name)


def _fitting(photo: Image.Image, codec: Codec, scale: float, budgets_bytes: Sequence[int]) -> dict[int, bytes]:
    """The files at this scale, by quality, that fit into the largest budget.

    Of each budget the finest quality that fits is among them, as far as a file grows with its quality.
    """
    tried: dict[int, bytes] = {}

    def fits(quality: int, budget_bytes: int) -> bool:
        if quality not in tried:
            tried[quality] = codec.encode(photo, scale, quality)
        return len(tried[quality]) <= budget_bytes

    for quality in codec.qualities:
        if not fits(quality, budgets_bytes[-1]):
            break
    for budget in budgets_bytes:
        low = max((quality for quality in tried if fits(quality, budget)), default=None)
        high = min((quality for quality in tried if low is not None and quality > low), default=None)
        while low is not None and high is not None and high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle, budget) else (low, middle)
    return {quality: data for quality, data in tried.items() if len(data) <= budgets_bytes[-1]}


def _key(line: Line) -> tuple[Any, ...]:
    return line["codec"], line["version"], line.get("scale"), line.get("quality")


def best(candidates: Iterable[Candidate], budget_bytes: int, metric: str) -> Candidate | None:
    """The file of at most budget_bytes that is best in this metric, the smallest of equals; None if there is none."""
    scored = [
        (score, one)
        for one in candidates
        if one.size_bytes <= budget_bytes and (score := one.scores.get(metric)) is not None
    ]
    sign = -1 if METRICS[metric].higher_is_better else 1
    return min(scored, key=lambda pair: (sign * pair[0], pair[1].size_bytes), default=(0, None))[1]
