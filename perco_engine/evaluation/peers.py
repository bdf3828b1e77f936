"""What a user would pick instead: the best classical files that a search found, and their means over photos."""

import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import EvaluationError, first_line
from ..picture_files import UNREADABLE
from ..printable import printable
from ..rates import is_number
from . import classical, classical_search, metrics
from .metrics import METRICS, check_names
from .photo_folder import find_photos
from .results import Line
from .tables import markdown, metric_title, metric_value


@dataclass(frozen=True)
class Peer:
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

    @property
    def name(self) -> str:
        """The codec's, for people."""
        return "best of these" if self.codec is None else classical.CODECS[self.codec].title


def chosen_files(task: classical_search.Task, bpps: Sequence[float]) -> list[Line]:
    """Of what the search for a photo found, the file that is best in each metric in the bytes of each rate.

    bpps: names of the rates, in the order of the task's budgets.
    """
    found = classical_search.Search(task.folder, task.digest, task.versions)
    width, height = task.size
    tried = [found.candidates(codec) for codec in task.versions]
    return [
        {
            "photo": task.photo.name,
            "bpp": bpp,
            "budget_bytes": budget,
            "metric": metric,
            "value": best.scores[metric],
            "codec": best.codec,
            "scale": best.scale,
            "quality": best.quality,
            "bytes": best.size_bytes,
            "bits_per_pixel": 8 * best.size_bytes / (width * height),
        }
        for bpp, budget in zip(bpps, task.budgets_bytes, strict=True)
        for candidates in tried
        for metric in task.metrics
        if (best := classical.best(candidates, budget, metric)) is not None
    ]


def best_lines(chosen: Iterable[Line], key: Callable[[Line], Any]) -> dict[Any, Line]:
    """Of the chosen files with the same key, all of one metric, the one that is best in it; the first of equals."""
    best: dict[Any, Line] = {}
    for line in chosen:
        kept = best.setdefault(key(line), line)
        if METRICS[line["metric"]].is_better(line["value"], kept["value"]):
            best[key(line)] = line
    return best


def means(
    chosen: Sequence[Line], bpps: Iterable[float], codecs: Collection[str], names: Iterable[str], photos: int
) -> list[Peer]:
    """Means of the files chosen of so many photos, for each rate, codec (and the best of all codecs) and metric."""
    return [
        _mean(chosen, bpp, codec, name, photos)
        for bpp in bpps
        for codec in (*codecs, *([None] if len(codecs) > 1 else []))
        for name in names
    ]


def _mean(chosen: Sequence[Line], bpp: float, codec: str | None, metric: str, photos: int) -> Peer:
    of_this = [
        line for line in chosen if (line["bpp"], line["metric"]) == (bpp, metric) and codec in (None, line["codec"])
    ]
    best = best_lines(of_this, lambda line: line["photo"])
    if not best or len(best) < photos:
        return Peer(bpp, codec, metric, None, None, len(best))
    value, real = (statistics.fmean(line[name] for line in best.values()) for name in ("value", "bits_per_pixel"))
    return Peer(bpp, codec, metric, value, real, len(best))


def peer_rows(found: Iterable[Peer], photos: int) -> dict[tuple[float, str], list[str]]:
    """The values of each rate and codec, for a table: one for each metric, in their order."""
    told: dict[tuple[float, str], list[str]] = {}
    for peer in found:
        none = f"({peer.fitting} of {photos})"
        value = none if peer.value is None else metric_value(METRICS[peer.metric], peer.value)
        told.setdefault((peer.bpp, peer.name), []).append(value)
    return told


def tabulate(
    folder: Path,
    kept: Path,
    bpps: Sequence[float],
    formats: Collection[str] = tuple(classical.CODECS),
    names: Collection[str] = tuple(METRICS),
    jobs: int = 1,
    tell: Callable[[str], None] = lambda _: None,
) -> str:
    """Finds the best classical files of a folder's photos at rates in bits per pixel; their means as a Markdown table.

    kept: the folder where what was tried is kept for further runs, also of `perco evaluate --peers`.

    Raises EvaluationError (no photos there), ValueError (a format or metric of this name is not known, or no rate).
    """
    bpps = sorted(set(bpps))
    if not bpps or not all(is_number(bpp) and bpp > 0 for bpp in bpps):
        raise ValueError("name the rates, each a positive number of bits a pixel")
    check_names(names, METRICS)
    check_names(formats, classical.CODECS)
    device = torch.device("cpu")
    versions, missing = classical.available(formats)
    judges, without = metrics.load(names, device)
    tasks, skipped = [], {}
    for photo in find_photos(folder, kept):
        try:
            image = photo.read()
        except UNREADABLE as error:
            skipped[printable(photo.name)] = f"left out, cannot be read: {first_line(error)}"
            continue
        budgets = [int(bpp * image.width * image.height / 8) for bpp in bpps]
        pixels = classical_search.digest(image), image.size
        tasks.append(classical_search.Task(photo, *pixels, kept, versions, budgets, tuple(judges), device))
    if not tasks:
        raise EvaluationError(f"no photo of {folder} can be read: {next(iter(skipped.values()))}")
    classical_search.search(tasks, jobs, tell)
    chosen = [line for task in tasks for line in chosen_files(task, bpps)]
    found = means(chosen, bpps, versions, judges, len(tasks))
    header = ["bpp", "file", *(metric_title(METRICS[name]) for name in judges)]
    told = markdown(header, ([f"{bpp:g}", name, *row] for (bpp, name), row in peer_rows(found, len(tasks)).items()))
    notes = [f"- {name}: {why}" for name, why in {**missing, **without, **skipped}.items()]
    return "\n".join([told, *([""] if notes else []), *notes])
