"""`perco bench`: what things cost on this machine, as numbers for people and programs.

Times are medians; start-up costs are measured in fresh processes.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from PIL import Image

from .. import rates

if TYPE_CHECKING:
    from ..engine import Engine
    from ..family import FamilyEngine

SIZE = 768, 512

EFFORT = 8
"""Steps of the search for codes that is timed."""

_IMPORT = """
import sys, time
from PIL import Image
Image.preinit()
start = time.perf_counter()
import pillow_perco
print((time.perf_counter() - start) * 1000)
"""

_OPEN = """
import sys, time
from PIL import Image
import pillow_perco
times = []
for _ in range(20):
    start = time.perf_counter()
    Image.open(sys.argv[1]).close()
    times.append((time.perf_counter() - start) * 1000)
print(sorted(times)[len(times) // 2])
"""

_PEAK = """
import resource, sys
import pillow_perco
from PIL import Image
pillow_perco.save(Image.open(sys.argv[1]), sys.argv[2], bpp=1)
Image.open(sys.argv[2]).load()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10))
"""


_DRAFT = """
import sys, time
start = time.perf_counter()
import pillow_perco
from PIL import Image
Image.open(sys.argv[1]).thumbnail((128, 128))
print((time.perf_counter() - start) * 1000)
"""


def _thumbnailer_seconds(source: Path, target: Path, times: int) -> float:
    """The median time of a cold perco-thumbnailer, from its start to its end."""
    command = [sys.executable, "-m", "perco_engine.thumbnailer", "-s", "128", str(source), str(target)]
    return _median_seconds(lambda: subprocess.run(command, check=True, env={}), times)


def _fresh_process(code: str, *arguments: str, times: int = 5) -> float:
    """The median of the number that `code` prints, each time in a new interpreter."""
    command = [sys.executable, "-c", code, *arguments]
    return statistics.median(
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(times)
    )


def _median_seconds(action: Callable[[], Any], times: int) -> float:
    """The median time of `action` after one run that is not counted."""
    action()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(photo: Image.Image, times: int = 5) -> dict[str, Any]:
    """Every figure of the bench, for `photo` cropped and resized to 768x512."""
    import torch
    from PIL import ImageOps

    from perco_engine import get_engine
    from perco_engine.pixels import to_rgb

    photo = ImageOps.fit(to_rgb(photo), SIZE)
    engine = get_engine()
    points = engine.rate_points
    files = [engine.encode(photo, bpp=point.bpp) for point in points]
    figures: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        source, target = Path(folder) / "photo.png", Path(folder) / "photo.perco"
        photo.save(source)
        target.write_bytes(files[rates.nearest(points, rates.DEFAULT_BPP)])
        figures["import pillow_perco, beyond PIL, cold (ms)"] = _fresh_process(_IMPORT, times=times)
        figures["Image.open (ms)"] = _fresh_process(_OPEN, str(target), times=times)
        figures["Image.thumbnail to 128 pixels, cold (ms)"] = _fresh_process(_DRAFT, str(target), times=times)
        for point, data in ((points[0], files[0]), (points[-1], files[-1])):
            target.write_bytes(data)
            name = f"perco-thumbnailer at {point.bpp} bpp, cold process (s)"
            figures[name] = _thumbnailer_seconds(target, Path(folder) / "thumbnail.png", times)
        if find_spec("resource"):  # which Windows lacks
            figures["peak memory of a save and a load (MB)"] = _fresh_process(_PEAK, str(source), str(target), times=1)
    for point, data in zip(points, files, strict=True):
        figures[f"file at {point.bpp} bpp (bytes)"] = len(data)
        encoding = partial(engine.encode, photo, bpp=point.bpp)
        figures[f"encode at {point.bpp} bpp (s)"] = _median_seconds(encoding, times)
        figures[f"encode at {point.bpp} bpp, effort 0 (s)"] = _median_seconds(partial(encoding, effort=0), times)
    start = time.perf_counter()
    engine.encode(photo, bpp=points[-1].bpp, effort=EFFORT)
    figures[f"encode at {points[-1].bpp} bpp, effort {EFFORT}, once (s)"] = time.perf_counter() - start
    figures["decode, default steps (s)"] = _median_seconds(lambda: engine.decode(data), times)
    for steps in (0, 1, 4, 20):
        figures[f"decode, {steps} steps (s)"] = _median_seconds(partial(engine.decode, data, steps=steps), times)
    figures["decode to 256 pixels (s)"] = _median_seconds(lambda: engine.decode(data, max_size_px=256), times)
    return {
        "machine": machine(engine, torch),
        "picture": f"{SIZE[0]}x{SIZE[1]}",
        "figures": {name: round(value, 4) for name, value in figures.items()},
    }


def machine(engine: "Engine | FamilyEngine", torch: Any) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": str(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
    }


def table(result: dict[str, Any]) -> str:
    """The result as lines of text."""
    lines = [", ".join(f"{name} {value}" for name, value in result["machine"].items())]
    width = max(len(name) for name in result["figures"])
    lines += [f"{name:<{width}}  {value:>10.4g}" for name, value in result["figures"].items()]
    return "\n".join(lines)


def to_json(result: dict[str, Any]) -> str:
    """The result as JSON."""
    return json.dumps(result, indent=1)
