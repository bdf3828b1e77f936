"""What an evaluation found, as means over its photos."""

import statistics
from dataclasses import dataclass

from .distributions import SET_METRICS
from .evaluate import Run, photos_mark

PARTS = ("hyper_latent", "text", "other", "total")


@dataclass(frozen=True)
class Row:
    """One rate with one number of steps.

    bits_per_pixel: of the PARTS, means.  metrics: (mean or None, how many photos or samples it is of) by name.
    encode_s, decode_s: medians.
    """

    bpp: float
    steps: int | None
    size_bytes: float
    bits_per_pixel: dict[str, float]
    metrics: dict[str, tuple[float | None, int]]
    encode_s: float
    decode_s: float


def rows(run: Run) -> list[Row]:
    """The table of the model, rate by rate."""
    return [_row(run, point.bpp, steps) for point in run.points for steps in run.settings.steps]


def _row(run: Run, bpp: float, steps: int | None) -> Row:
    lines = [run.line(photo, bpp, steps) for photo in run.photos]
    found: dict[str, tuple[float | None, int]] = {}
    for name in run.judges:
        values = [value for line in lines if (value := line["metrics"][name]) is not None]
        found[name] = (statistics.fmean(values) if values else None, len(values))
    for name in SET_METRICS:
        line = run.sets.get((name, bpp, steps, photos_mark(run)))
        if line is not None and name in run.settings.metrics:
            found[name] = line["value"], line["samples"]
    return Row(
        bpp,
        steps,
        statistics.fmean(line["bytes"]["total"] for line in lines),
        {part: statistics.fmean(line["bits_per_pixel"][part] for line in lines) for part in PARTS},
        found,
        statistics.median(line["encode_s"] for line in lines),
        statistics.median(line["decode_s"] for line in lines),
    )
