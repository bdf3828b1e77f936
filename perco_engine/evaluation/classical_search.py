"""The best classical file of a photo in so many bytes, over scale and quality, for each metric by that metric.

    budget ─> at each scale the finest quality that fits ─> some of these scored ─> the best scale, and its neighbours

Encoding is cheap and scoring is not.  In a given number of bytes quality rises with the scale of the picture and falls
again, so the best scale is climbed to; what was scored nearby tells where to begin.  All that was tried is kept, by
(codec, scale, quality): other budgets, as those of another model, cost a few files each.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import EvaluationError
from ..printable import printable
from . import metrics
from .classical import CODECS, HIGHEST_QUALITY, Candidate, Codec, available, show
from .metrics import METRICS, Judge
from .photo_folder import Photo
from .results import Line, Lines

MOST_RATIO = 2.0
"""Between two scored files of one scale a third is estimated if the larger has at most so many times the bytes."""


class Search:
    """The classical files of one photo that were tried, and what was found; kept in a file of JSON lines.

    folder: of the files that are kept, one for the pixels of each photo.  digest: of the pixels of this one.
    versions: of each codec, as `available` gives them; what another version wrote is not looked at.
    """

    def __init__(self, folder: Path, digest: str, versions: Mapping[str, str]) -> None:
        self._versions = versions
        self._lines = Lines(folder / f"{digest}.jsonl", _key)

    def candidates(self, codec: str) -> list[Candidate]:
        """Every file of this codec that was tried."""
        return [_candidate(line) for line in self._lines if _key(line)[:2] == (codec, self._versions[codec])]

    def run(
        self, photo: Image.Image, codec: Codec, budgets_bytes: Iterable[int], judges: Mapping[str, Judge]
    ) -> list[Candidate]:
        """Tries scales and qualities until the best file of each budget is known in each metric; returns all files.

        photo: RGB.  What an earlier run has done is not done again.
        """
        trials = _Trials(photo, codec, self._versions[codec.name], self._lines, judges)
        for budget in sorted(set(budgets_bytes)):
            scale = None
            for metric in judges:
                if min(photo.size) >= METRICS[metric].least_side_px:
                    scale = trials.settle(budget, metric, scale)
            trials.keep()
        return self.candidates(codec.name)


def digest(photo: Image.Image) -> str:
    """Of the pixels of a photo, RGB, in whatever file they are."""
    return hashlib.sha256(f"{photo.width}x{photo.height} ".encode() + photo.tobytes()).hexdigest()


def _key(line: Line) -> tuple[Any, ...]:
    return line["codec"], line["version"], line["scale"], line["quality"]


def _candidate(line: Line) -> Candidate:
    return Candidate(**{name: line[name] for name in ("codec", "scale", "quality", "size_bytes", "scores")})


class _Trials:
    """The files of one photo in one format, each encoded when its size is asked for, and scored when its score is."""

    def __init__(
        self, photo: Image.Image, codec: Codec, version: str, lines: Lines, judges: Mapping[str, Judge]
    ) -> None:
        self._photo, self._codec, self._version, self._lines = photo, codec, version, lines
        self._scorer = cache(lambda metric: judges[metric](photo))
        self._data: dict[tuple[float, int], bytes] = {}
        self._tried: dict[float, dict[int, Candidate]] = {scale: {} for scale in codec.scales(photo.size)}
        self._unkept: list[Candidate] = []
        for line in lines:
            if _key(line)[:2] == (codec.name, version) and line["scale"] in self._tried:
                self._tried[line["scale"]][line["quality"]] = _candidate(line)

    def settle(self, budget_bytes: int, metric: str, likely_scale: float | None = None) -> float | None:
        """Scores files of at most this size until the best is better than those at the scales beside its own.

        likely_scale: where to begin if nothing is known, as the best in another metric.
        Returns the scale of the best file; None if no file fits.
        """
        finest = {scale: one for scale in self._tried if (one := self._finest(scale, budget_bytes))}
        fitting, sign = list(finest), -1 if METRICS[metric].higher_is_better else 1
        known = {scale: told for scale, one in finest.items() if (told := self._estimate(one, metric)) is not None}
        ahead = [] if known else fitting[::3] if likely_scale is None else [likely_scale]
        while True:
            order = sorted(known, key=lambda scale: sign * known[scale])
            # the best must not be an estimate, nor what it is better than by an estimate only
            ahead = ahead or [scale for scale in order[:2] if metric not in finest[scale].scores]
            if not ahead and order:
                k = fitting.index(order[0])
                ahead = [scale for scale in fitting[max(0, k - 1) : k + 2] if scale not in known]
            if not ahead:
                return order[0] if order else None
            scale = ahead.pop(0)
            finest[scale] = self._scored(finest[scale], metric)
            known[scale] = finest[scale].scores[metric]

    def _finest(self, scale: float, budget_bytes: int) -> Candidate | None:
        """The file of the finest quality that fits at this scale, as far as files grow with their quality."""
        tried = self._tried[scale]
        fits = [quality for quality, one in tried.items() if one.size_bytes <= budget_bytes]
        low = max(fits, default=self._codec.lowest - 1)
        high = min((quality for quality in tried if quality > low), default=None)
        while low < HIGHEST_QUALITY and (high is None or high - low > 1):
            # towards the fine end in growing steps: a fine file takes the longest
            quality = min(HIGHEST_QUALITY, max(low + 1, 2 * low)) if high is None else (low + high) // 2
            if self._try(scale, quality).size_bytes <= budget_bytes:
                low = quality
            else:
                high = quality
        return tried.get(low)

    def _try(self, scale: float, quality: int) -> Candidate:
        data = self._codec.encode(self._photo, scale, quality)
        self._data[scale, quality] = data
        return self._note(Candidate(self._codec.name, scale, quality, len(data), {}))

    def _scored(self, one: Candidate, metric: str) -> Candidate:
        """The same file with its score in this metric."""
        key = one.scale, one.quality
        if key not in self._data:
            self._data[key] = self._codec.encode(self._photo, *key)
        score = self._scorer(metric)(show(self._data[key], self._photo.size))
        return self._note(Candidate(one.codec, *key, one.size_bytes, {**one.scores, metric: score}))

    def _note(self, one: Candidate) -> Candidate:
        self._tried[one.scale][one.quality] = one
        self._unkept.append(one)
        return one

    def keep(self) -> None:
        """Writes down what was tried since the last time."""
        last = {(one.scale, one.quality): one for one in self._unkept}
        if last:
            self._lines.append(*({"version": self._version, **asdict(one)} for one in last.values()))
        self._unkept.clear()

    def _estimate(self, one: Candidate, metric: str) -> float | None:
        """The score of a file, or what others of its scale, a little smaller and larger, tell of it; None: nothing."""
        if metric in one.scores:
            return one.scores[metric]
        scored = [other for other in self._tried[one.scale].values() if metric in other.scores]
        below = max((o for o in scored if o.size_bytes <= one.size_bytes), key=lambda o: o.size_bytes, default=None)
        above = min((o for o in scored if o.size_bytes > one.size_bytes), key=lambda o: o.size_bytes, default=None)
        if below is None or above is None or above.size_bytes > MOST_RATIO * below.size_bytes:
            return None
        sizes = [math.log(o.size_bytes) for o in (below, above)]
        return float(np.interp(math.log(one.size_bytes), sizes, [o.scores[metric] for o in (below, above)]))


@dataclass(frozen=True)
class Task:
    """The search for one photo.

    digest, size: of its pixels.  folder: where what was tried is kept.  versions: of the codecs to try.
    """

    photo: Photo
    digest: str
    size: tuple[int, int]
    folder: Path
    versions: Mapping[str, str]
    budgets_bytes: Sequence[int]
    metrics: tuple[str, ...]
    device: torch.device


def search(tasks: Sequence[Task], jobs: int = 1, tell: Callable[[str], None] = lambda _: None) -> None:
    """Searches for every photo, in so many processes at a time.  Raises EvaluationError where one of them is ended."""
    alike: dict[str, list[Task]] = {}  # photos of the same pixels have one file of what was tried: one after the other
    for task in tasks:
        alike.setdefault(task.digest, []).append(task)
    for told in _told(list(alike.values()), jobs):
        for line in told:
            tell(line)


def _told(tasks: Sequence[Sequence[Task]], jobs: int) -> Iterator[list[str]]:
    if jobs == 1 or len(tasks) < 2:
        yield from map(_search, tasks)
        return
    # spawned, for torch's threads do not survive a fork; a thread each, for they would fight over the cores
    try:
        with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            yield from pool.map(_search, tasks)
    except BrokenProcessPool as error:
        raise EvaluationError(
            "a process that looked for classical files was ended, likely for want of memory: take fewer --jobs; what "
            "was tried is kept"
        ) from error


def _search(tasks: Sequence[Task]) -> list[str]:
    """Does tasks, one after the other; tells of each how many files are known of the photo."""
    told = []
    for task in tasks:
        available(task.versions)  # a spawned process knows no formats of plugins yet
        image, judges = task.photo.read(), _judges(task.metrics, task.device)
        searched = Search(task.folder, digest(image), task.versions)  # not task.digest: it may be another by now
        count = sum(len(searched.run(image, CODECS[name], task.budgets_bytes, judges)) for name in task.versions)
        told.append(f"{printable(task.photo.name)}: {count} classical files")
    return told


@cache
def _judges(names: tuple[str, ...], device: torch.device) -> dict[str, Judge]:
    return metrics.load(names, device)[0]
