"""`perco bench --convert N`: what a conversion of many files costs beside the networks that it runs.

Both are measured in one run and in turns, a tenth of the files each: a machine is not equally fast at all times.
"""

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image, ImageChops, ImageOps

from .. import batch
from ..batch_networks import Settings, most_in_batch
from ..conversion import Request, plan
from .bench import SIZE, machine

TURNS = 10


def measure(photo: Image.Image, count: int) -> dict[str, Any]:
    """The throughput of converting `count` JPEG photos of 768x512, and of the networks alone on the same ones.

    The networks get pictures that are in memory, in the batches that the conversion makes at most.  Thumbnails, which
    come when the files are written, are left out.
    Memory is the process's highest.  Raises RuntimeError where a file fails.
    """
    import torch

    from perco_engine import get_engine

    engine = get_engine()
    photo = ImageOps.fit(photo.convert("RGB"), SIZE)
    most = most_in_batch(SIZE[0] * SIZE[1])
    engine.encode_batch([photo] * most)
    converting = alone = 0.0
    peaks = []
    with TemporaryDirectory() as folder:
        for turn in range(TURNS):
            source = Path(folder) / str(turn)
            source.mkdir()
            numbers = range(turn * count // TURNS, (turn + 1) * count // TURNS)
            for k in numbers:
                ImageChops.offset(photo, 3 * k, k).save(source / f"{k:06}.jpg", quality=90)
            tasks = plan(Request([str(source)], str(Path(folder) / "out")))
            start = time.perf_counter()
            results = list(batch.convert(tasks, Settings(thumbnails=False)))
            converting += time.perf_counter() - start
            if any(not isinstance(one, batch.Result) or one.error for one in results):
                raise RuntimeError(f"the conversion failed: {results}")
            peaks.append(_peak_mb())
            for first in range(0, len(numbers), most):
                pictures = [ImageChops.offset(photo, 3 * k, k) for k in numbers[first : first + most]]
                start = time.perf_counter()
                engine.encode_batch(pictures)
                alone += time.perf_counter() - start
    return {
        "machine": machine(engine, torch),
        "picture": f"{SIZE[0]}x{SIZE[1]}",
        "figures": {
            "photos": count,
            "perco convert (photos/s)": round(count / converting, 3),
            "networks alone (photos/s)": round(count / alone, 3),
            "throughput, of the networks alone": round(alone / converting, 4),
            "peak memory after a tenth (MB)": round(peaks[0], 1),
            "peak memory at the end (MB)": round(peaks[-1], 1),
        },
    }


def _peak_mb() -> float:
    """The most memory that this process has had, where the system tells; else 0."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
