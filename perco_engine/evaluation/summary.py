"""What an evaluation found, as means over its photos."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from . import classical
from .distributions import SET_METRICS
from .evaluate import Run, named, photos_mark
from .metrics import METRICS
from .results import Line

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

    @property
    def name(self) -> str:
        """Rate and steps, for people."""
        return f"{self.bpp} bpp, {named(self.steps)}"


@dataclass(frozen=True)
class Opponent:
    """The classical files of the same bytes, at one rate: for each photo the one that is best in `metric`.

    codec: its name, or None: of all of them.  value, bits_per_pixel: means; None unless a file fits for every photo.
    fitting: for how many photos one does.
    """

    bpp: float
    codec: str | None
    metric: str
    value: float | None
    bits_per_pixel: float | None
    fitting: int


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


def chosen_files(run: Run) -> list[Line]:
    """For each photo, rate, codec and metric the classical file that is best in this metric in the file's bytes."""
    found = []
    for photo in run.photos:
        search = run.search(photo)
        tried = [search.candidates(codec) for codec in run.codecs]
        for point in run.points:
            line = run.line(photo, point.bpp, run.settings.steps[0])
            for candidates in tried:
                for metric in run.judges:
                    best = classical.best(candidates, line["bytes"]["total"], metric)
                    if best is not None:
                        found.append(_chosen(line, metric, best))
    return found


def _chosen(line: Line, metric: str, best: classical.Candidate) -> Line:
    return {
        "photo": line["photo"],
        "bpp": line["bpp"],
        "budget_bytes": line["bytes"]["total"],
        "metric": metric,
        "value": best.scores[metric],
        "codec": best.codec,
        "scale": best.scale,
        "quality": best.quality,
        "bytes": best.size_bytes,
        "bits_per_pixel": 8 * best.size_bytes / (line["width"] * line["height"]),
    }


def best_lines(chosen: Iterable[Line], key: Callable[[Line], Any]) -> dict[Any, Line]:
    """Of the chosen files with the same key, all of one metric, the one that is best in it; the first of equals."""
    best: dict[Any, Line] = {}
    for line in chosen:
        kept = best.setdefault(key(line), line)
        if METRICS[line["metric"]].is_better(line["value"], kept["value"]):
            best[key(line)] = line
    return best


def opponents(run: Run, chosen: Sequence[Line]) -> list[Opponent]:
    """Means of the chosen files, for each rate, codec (and the best of all codecs) and metric."""
    return [
        _opponent(chosen, point.bpp, codec, name, len(run.photos))
        for point in run.points
        for codec in (*run.codecs, *([None] if len(run.codecs) > 1 else []))
        for name in run.judges
    ]


def _opponent(chosen: Sequence[Line], bpp: float, codec: str | None, metric: str, photos: int) -> Opponent:
    of_this = [
        line for line in chosen if (line["bpp"], line["metric"]) == (bpp, metric) and codec in (None, line["codec"])
    ]
    best = best_lines(of_this, lambda line: line["photo"])
    if not best or len(best) < photos:
        return Opponent(bpp, codec, metric, None, None, len(best))
    value, real = (statistics.fmean(line[name] for line in best.values()) for name in ("value", "bits_per_pixel"))
    return Opponent(bpp, codec, metric, value, real, len(best))
