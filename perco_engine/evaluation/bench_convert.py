"""`perco bench --convert N`: what a conversion of many files costs beside the networks that it runs, and its memory.

Both are measured in one run and in turns, a tenth of the files each: a machine is not equally fast at all times.  It is
one conversion, which waits for its next files while the networks run alone.
"""

import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image, ImageChops, ImageOps

from .. import batch, heap
from ..batch_networks import Settings, most_in_batch
from ..conversion import Request, Task, plan
from ..pixels import to_rgb
from .bench import SIZE, machine

TURNS = 10
SAMPLE_SECONDS = 0.05


def measure(photo: Image.Image, count: int, *, mixed: bool = False) -> dict[str, Any]:
    """The throughput of converting `count` JPEG photos, and of the networks alone on the same ones.

    mixed: photos of many sizes, from half to one and a half times 768 and 512 pixels a side; else all of 768x512.
    The networks get pictures that are in memory, in the batches that the conversion makes at most.  Thumbnails, which
    come when the files are written, are left out.
    Memory is what the process has at a time, while it converts: the medians of the four quarters of that time.
    Raises RuntimeError where a file fails.
    """
    import torch

    from perco_engine import get_engine

    engine = get_engine()
    photo = to_rgb(photo)
    most = 1 if mixed else most_in_batch(SIZE[0] * SIZE[1])
    engine.encode_batch([_variant(photo, 0, mixed)] * most)
    turns = [range(turn * count // TURNS, (turn + 1) * count // TURNS) for turn in range(TURNS)]
    go_on = threading.Semaphore(0)
    memory = _Memory()
    converting = alone = 0.0
    with TemporaryDirectory() as folder:
        sources = [Path(folder) / str(turn) for turn in range(TURNS)]
        for source, numbers in zip(sources, turns, strict=True):
            source.mkdir()
            for k in numbers:
                _variant(photo, k, mixed).save(source / f"{k:06}.jpg", quality=90)

        def tasks() -> Iterator[Task]:
            for source in sources:
                go_on.acquire()
                yield from plan(Request([str(source)], str(Path(folder) / "out")))

        with closing(batch.convert(tasks(), Settings(thumbnails=False))) as results:
            for numbers in turns:
                start = time.perf_counter()
                with memory:
                    go_on.release()
                    for result in islice(results, len(numbers)):
                        if not isinstance(result, batch.Result) or result.error:
                            raise RuntimeError(f"the conversion failed: {result}")
                converting += time.perf_counter() - start
                for first in range(0, len(numbers), most):
                    pictures = [_variant(photo, k, mixed) for k in numbers[first : first + most]]
                    start = time.perf_counter()
                    engine.encode_batch(pictures)
                    alone += time.perf_counter() - start
                # What this thread has freed is not the conversion's.
                heap.release()
    return {
        "machine": machine(engine, torch),
        "picture": "many sizes" if mixed else f"{SIZE[0]}x{SIZE[1]}",
        "figures": {
            "photos": count,
            "perco convert (photos/s)": round(count / converting, 3),
            "networks alone (photos/s)": round(count / alone, 3),
            "throughput, of the networks alone": round(alone / converting, 4),
            **memory.figures(),
        },
    }


def _variant(photo: Image.Image, k: int, mixed: bool) -> Image.Image:
    """The photo moved about, as the k-th of many; in a size of its own where they are mixed."""
    width, height = SIZE
    if mixed:
        # Steps that have no divisor in common with the range: no size comes soon again.
        width, height = width // 2 + 181 * k % width, height // 2 + 223 * k % height
    return ImageChops.offset(ImageOps.fit(photo, (width, height)), 3 * k, k)


class _Memory:
    """A context that notes what memory the process has meanwhile; entered again, it goes on."""

    def __init__(self) -> None:
        self._samples_mb: list[float] = []

    def __enter__(self) -> None:
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopping.wait(SAMPLE_SECONDS):
            try:
                pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            except OSError:  # another system
                return
            self._samples_mb.append(pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20))

    def figures(self) -> dict[str, float]:
        """The medians of the quarters, the highest, and the last quarter beside the second; {} where none is known."""
        if len(self._samples_mb) < 4:
            return {}
        ends = [quarter * len(self._samples_mb) // 4 for quarter in range(5)]
        medians = [statistics.median(self._samples_mb[first:end]) for first, end in pairwise(ends)]
        return {
            **{f"memory, quarter {k} (MB)": round(median, 1) for k, median in enumerate(medians, 1)},
            "memory, highest (MB)": round(max(self._samples_mb), 1),
            "memory, quarter 4 of quarter 2": round(medians[3] / medians[1], 4),
        }
