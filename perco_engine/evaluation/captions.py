"""`perco captions`: whether captions do what they are for.

Each photo becomes a file with the right caption, one with none, and one with that of another photo; codes and noise are
the same.  What counts is the difference photo by photo, beside its standard error.
"""

import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import rates
from ..captioner import caption_pictures, get_captioner
from ..engine import Engine, get_engine
from ..errors import EvaluationError, NotEnoughMemory, NotFinite, first_line
from ..family import FamilyEngine
from ..picture_files import UNREADABLE
from ..printable import printable
from . import metrics
from .metrics import METRICS
from .photo_folder import Photo, find_photos
from .results import write_result
from .tables import markdown, metric_title

KINDS = ("right", "none", "wrong")
SEED = 0


@dataclass(frozen=True)
class Settings:
    """What is compared.

    bpp: nominal rates, () for all of the model's.  captioner: of photos without a caption beside them.
    metrics: names of METRICS.  limit: of the sorted photos, so many.
    """

    folder: Path
    out: Path
    model: str = "embedded"
    bpp: tuple[float, ...] = ()
    captioner: str = "tags"
    metrics: tuple[str, ...] = ("lite0", "lite2")
    limit: int | None = None


@dataclass(frozen=True)
class Found:
    """What was measured of a photo at a rate: values by metric, for each of KINDS, and bytes of each file."""

    photo: str
    bpp: float
    captions: dict[str, str]
    size_bytes: dict[str, int]
    values: dict[str, dict[str, float | None]]


def shuffled(captions: Sequence[str]) -> list[str]:
    """For each photo a caption of another one that says something else.

    Raises EvaluationError where a photo has none: all captions are the same.
    """
    order = list(range(len(captions)))
    random.Random(SEED).shuffle(order)
    others = []
    for k, caption in enumerate(captions):
        at = order.index(k)
        following = (captions[number] for number in order[at + 1 :] + order[:at])
        other = next((text for text in following if text and text != caption), None)
        if other is None:
            raise EvaluationError("all photos have the same caption, so that none has a wrong one: take more photos")
        others.append(other)
    return others


def compare(settings: Settings, tell: Callable[[str], None] = lambda _: None) -> list[Found]:
    """Measures the photos of a folder; results are also written to out/captions.jsonl.

    Raises EvaluationError, ModelUnavailable, InvalidModel, ValueError.
    """
    metrics.check_names(settings.metrics, METRICS)
    engine = get_engine(settings.model)
    points = rates.chosen(engine.rate_points, settings.bpp)
    judges, missing = metrics.load(settings.metrics, engine.device)
    for name, why in missing.items():
        tell(f"{name}: {why}")
    captioner = get_captioner(settings.captioner, engine.device)
    photos: list[tuple[Photo, str]] = []
    why = ""
    for photo in find_photos(settings.folder, settings.out, settings.limit):
        try:
            image, caption = photo.read(), photo.caption()
        except UNREADABLE as error:
            why = f"cannot be read: {first_line(error)}"
            tell(f"{printable(photo.name)}: left out, {why}")
            continue
        if caption is None:
            (caption,) = caption_pictures(captioner, [image])
        if not caption:
            why = "it has no caption"
            tell(f"{printable(photo.name)}: left out, {why}")
            continue
        photos.append((photo, caption))
    if not photos:
        raise EvaluationError(f"no photo of {settings.folder} could be compared: {why}")
    found: list[Found] = []
    wrong = shuffled([caption for _, caption in photos])
    name = "captions.partial.jsonl"  # what an interrupt leaves, beside the results of a run before
    try:
        for (photo, right), other in zip(photos, wrong, strict=True):
            try:
                found += _of_photo(engine, photo, dict(zip(KINDS, (right, "", other), strict=True)), points, judges)
            except (NotEnoughMemory, NotFinite) as error:
                why = str(error)
                tell(f"{printable(photo.name)}: left out, {why}")
                continue
            tell(f"{printable(photo.name)}: {printable(right)}; not {printable(other)}")
        name = "captions.jsonl"
    finally:
        if found:
            write_result(settings.out / name, "".join(json.dumps(vars(one)) + "\n" for one in found).encode())
    if not found:
        raise EvaluationError(f"no photo of {settings.folder} could be compared: {why}")
    (settings.out / "captions.partial.jsonl").unlink(missing_ok=True)
    return found


def _of_photo(
    engine: Engine | FamilyEngine,
    photo: Photo,
    captions: dict[str, str],
    points: Sequence[rates.RatePoint],
    judges: dict[str, metrics.Judge],
) -> list[Found]:
    """What each of these captions makes of a photo, at each rate."""
    image = photo.read()
    measure = metrics.measure(judges, image)
    found = []
    for point in points:
        files = {  # without a search, whose codes make up for what a caption lacks
            kind: engine.encode(image, bpp=point.bpp, caption=text, seed=SEED, effort=0)
            for kind, text in captions.items()
        }
        values = {kind: measure(engine.decode(data)) for kind, data in files.items()}
        found.append(Found(photo.name, point.bpp, captions, {kind: len(data) for kind, data in files.items()}, values))
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, which is infinite for a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("inf")
    return statistics.fmean(values), error


def tabulate(settings: Settings, tell: Callable[[str], None] = lambda _: None) -> str:
    """Measures the photos, and returns the table of what was found, which is also written to out/captions.md."""
    told = table(compare(settings, tell))
    write_result(settings.out / "captions.md", (told + "\n").encode())
    return told


def table(found: Sequence[Found]) -> str:
    """For each rate and metric the means, and how much the right caption is ahead.

    Positive differences are better, whichever way the metric goes.
    """
    header = ["bpp", "metric", *KINDS, "right over none", "right over wrong", "bytes of the caption"]
    body = []
    for bpp in sorted({one.bpp for one in found}):
        here = [one for one in found if one.bpp == bpp]
        spent = statistics.fmean(one.size_bytes["right"] - one.size_bytes["none"] for one in here)
        for name in here[0].values["right"]:
            sign = 1 if METRICS[name].higher_is_better else -1
            rows = [{kind: one.values[kind][name] for kind in KINDS} for one in here]
            told = [{k: v for k, v in row.items() if v is not None} for row in rows]
            told = [row for row in told if len(row) == len(KINDS)]
            if not told:
                continue
            means = [f"{statistics.fmean(row[kind] for row in told):.4f}" for kind in KINDS]
            ahead = [
                "{:+.4f} ± {:.4f}".format(*mean_and_error([sign * (row["right"] - row[other]) for row in told]))
                for other in ("none", "wrong")
            ]
            body.append([f"{bpp}", metric_title(METRICS[name]), *means, *ahead, f"{spent:.1f}"])
    return markdown(header, body)
