"""`perco evaluate`: every photo of a folder at every rate, as real files, measured and written down.

    FOLDER ─> photo ─> files/<bpp>/*.perco ─> pictures/<bpp>/<steps>/*.png ─> results.jsonl: a line for each picture
                └────> classical/*.jsonl (--against)                      └─> sets.jsonl: a line for each FID, KID

A run that was broken off goes on where it stopped: what has its line is not done again.  `report.py` tells what was
found.
"""

import errno
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from PIL import Image

from .. import bitstream, rates, weights
from ..captioner import caption_pictures, get_captioner
from ..engine import Engine, get_engine
from ..errors import EvaluationError, PercoError, first_line
from ..family import FamilyEngine
from ..picture_files import UNREADABLE, picture_bytes
from ..printable import printable
from ..version import __version__
from . import classical, classical_search, distributions, metrics
from .distributions import SET_METRICS
from .metrics import METRICS
from .photo_folder import Photo, find_photos
from .results import Line, Lines, claim, write_result

ALL_METRICS = (*METRICS, *SET_METRICS)
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is evaluated, and how.

    bpp: nominal rates, () for all of the model's.  steps: denoising steps of each decode, None: the model's default.
    metrics: names of METRICS and SET_METRICS.  against: names of CODECS.  limit: of the sorted photos, so many.
    effort: steps of the search for better codes; None: the usual.
    captioner: of photos without a caption beside them (a .txt file of the photo's name); None: they have no caption.
    peers: the folder where the classical files that were tried are kept; None: in `out`.  Any number of runs may share
    it, one after another.  jobs: processes that look for classical files.
    """

    folder: Path
    out: Path
    model: str = "embedded"
    bpp: tuple[float, ...] = ()
    steps: tuple[int | None, ...] = (None,)
    metrics: tuple[str, ...] = ALL_METRICS
    against: tuple[str, ...] = ()
    limit: int | None = None
    captioner: str | None = None
    effort: int | None = None
    peers: Path | None = None
    jobs: int = 1


@dataclass
class Run:
    """An evaluation: what it works with, and what it has found.

    described: what all lines have in common.  judges: of the metrics that can be had.  codecs: versions of those that
    can.  missing: why the other metrics and codecs cannot.  photos: those that were evaluated.  skipped: why others
    were not.  digests: of the pixels of photos, by their names, where there are codecs.  warm: rates of a family whose
    networks ran before; None: of another model.
    """

    settings: Settings
    engine: Engine | FamilyEngine
    points: tuple[rates.RatePoint, ...]
    described: Line
    lines: Lines
    sets: Lines
    judges: dict[str, metrics.Judge]
    codecs: dict[str, str]
    missing: dict[str, str]
    photos: list[Photo] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    warm: set[float | None] = field(default_factory=set)

    @property
    def name(self) -> str:
        """The model's, for people."""
        return Path(self.settings.model).name

    def find(self, photo: Photo, bpp: float, steps: int | None) -> Line | None:
        """What was found of this photo, if anything, and not of another one, or caption, that was there before.

        Nothing where the decoded picture is gone.
        """
        line = self.lines.get((photo.name, bpp, steps))
        if line is None or not _is_of(line, photo) or not (self.settings.out / line["picture"]).is_file():
            return None
        return line

    def line(self, photo: Photo, bpp: float, steps: int | None) -> Line:
        """What was found of this photo, which was evaluated."""
        found = self.find(photo, bpp, steps)
        assert found is not None
        return found

    def task(self, photo: Photo) -> classical_search.Task:
        """The search for the best classical files in the bytes of each rate of a photo, which was evaluated."""
        lines = [self.line(photo, point.bpp, self.settings.steps[0]) for point in self.points]
        pixels = self.digests[photo.name], (lines[0]["width"], lines[0]["height"])
        folder = self.settings.peers or self.settings.out / "classical"
        budgets, names = [line["bytes"]["total"] for line in lines], tuple(self.judges)
        return classical_search.Task(photo, *pixels, folder, self.codecs, budgets, names, self.engine.device)

    def picture(self, line: Line) -> Image.Image:
        """The decoded picture that a line speaks of."""
        with Image.open(self.settings.out / line["picture"]) as decoded:
            return decoded.convert("RGB")


def evaluate(settings: Settings, tell: Tell = lambda _: None) -> Run:
    """Evaluates the photos of a folder; all files are written below `settings.out`.

    Photos that cannot be read or coded are left out, and told.

    Raises EvaluationError (nothing to evaluate, or results of other settings in the folder), ModelUnavailable,
    InvalidModel, ValueError.
    """
    settings = replace(settings, steps=tuple(dict.fromkeys(settings.steps)))
    metrics.check_names(settings.metrics, ALL_METRICS)
    metrics.check_names(settings.against, classical.CODECS)
    photos = find_photos(settings.folder, settings.out, settings.limit)
    run = _open(settings)
    for photo in photos:
        why = _left_out(run, photo, tell)
        if why:
            run.skipped[photo.name] = why
            tell(f"{printable(photo.name)}: left out, {why}")
        else:
            run.photos.append(photo)
    if not run.photos:
        raise EvaluationError(f"no photo of {settings.folder} could be evaluated: {next(iter(run.skipped.values()))}")
    if run.codecs:
        classical_search.search([run.task(photo) for photo in run.photos], settings.jobs, tell)
    _measure_sets(run, tell)
    return run


def _open(settings: Settings) -> Run:
    """A run in its folder, with the model, the metrics and the codecs that this machine has."""
    engine = get_engine(settings.model)
    points = rates.chosen(engine.rate_points, settings.bpp)
    described = {
        "model": settings.model,
        "weights": _fingerprint(settings.model),
        "captioner": settings.captioner,
        "effort": settings.effort,
        "device": engine.device.type,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "version": __version__,
    }
    claim(settings.out, described)
    judges, missing = metrics.load([name for name in METRICS if name in settings.metrics], engine.device)
    codecs, without = classical.available([name for name in classical.CODECS if name in settings.against])
    return Run(
        settings,
        engine,
        points,
        described,
        Lines(settings.out / "results.jsonl", lambda a: (a["photo"], a["bpp"], a["steps"])),
        Lines(settings.out / "sets.jsonl", lambda a: (a["metric"], a["bpp"], a["steps"], a["photos"])),
        judges,
        codecs,
        missing | without,
    )


def _fingerprint(model: str) -> str:
    """Of the weights that are evaluated; of a family, of all its checkpoints."""
    spec = weights.named(model)
    found = weights.checkpoints(spec) if spec is not None and spec.is_family else [weights.find(model)]
    return "+".join(weights.fingerprint(one.folder).hex() for one in found)


def _left_out(run: Run, photo: Photo, tell: Tell) -> str:
    """Does what is to be done for one photo; why it cannot be, or "" if it was."""
    try:
        image, caption = photo.read(), photo.caption()
    except UNREADABLE as error:
        return f"cannot be read: {first_line(error)}"
    try:
        _evaluate_photo(run, photo, image, caption, tell)
    except EvaluationError:
        raise
    except PercoError as error:
        return first_line(error)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return f"its name is too long for files with its results: {error}"
    if run.codecs:
        run.digests[photo.name] = classical_search.digest(image)
    return ""


def _evaluate_photo(run: Run, photo: Photo, image: Image.Image, caption: str | None, tell: Tell) -> None:
    """Does what is to be done for one photo at every rate."""
    measured = cache(lambda: metrics.measure(run.judges, image))
    for point in run.points:
        missing = [steps for steps in run.settings.steps if run.find(photo, point.bpp, steps) is None]
        if missing and caption is None:
            captioner = get_captioner(run.settings.captioner, run.engine.device)
            caption = caption_pictures(captioner, [image])[0]
        for steps in run.settings.steps:
            line = run.find(photo, point.bpp, steps)
            if line is not None and not set(run.judges) <= set(line["metrics"]):
                told = {**line["metrics"], **measured()(run.picture(line))}
                run.lines.append({**line, "metrics": told})
        if missing:
            _code(run, photo, image, point, missing, caption or "", measured)
            tell(f"{printable(photo.name)}: {point.bpp} bpp")


def _code(
    run: Run,
    photo: Photo,
    image: Image.Image,
    point: rates.RatePoint,
    all_steps: list[int | None],
    caption: str,
    measured: Callable[[], metrics.Measure],
) -> None:
    """Encodes a photo at one rate, decodes it with each number of steps, and writes down what there is to say."""
    out = run.settings.out
    networks = point.bpp if isinstance(run.engine, FamilyEngine) else None
    if networks not in run.warm:  # what the first call of a network loads or compiles is no photo's time
        warming = run.engine.encode(image, bpp=point.bpp, caption=caption, effort=run.settings.effort)
        run.engine.decode(warming, steps=all_steps[0])
        run.warm.add(networks)
    start = time.perf_counter()
    data = run.engine.encode(image, bpp=point.bpp, caption=caption, effort=run.settings.effort)
    encode_s = time.perf_counter() - start
    file = Path("files", f"{point.bpp}", f"{photo.place}.perco")
    # What is known of another photo, or caption, in this place was found in the files that are written over now.
    here = [line for line in run.lines if line["file"] == file.as_posix()]
    run.lines.append(*({**line, "sha256": None} for line in here if line["sha256"] and not _is_of(line, photo)))
    write_result(out / file, data)
    sizes = sizes_bytes(data)
    for steps in all_steps:
        start = time.perf_counter()
        decoded = run.engine.decode(data, steps=steps)
        decode_s = time.perf_counter() - start
        picture = Path("pictures", f"{point.bpp}", folder_name(steps), f"{photo.place}.png")
        write_result(out / picture, picture_bytes(decoded, "PNG"))
        run.lines.append(
            {
                "photo": photo.name,
                "sha256": photo.sha256,
                "sidecar": photo.sidecar,
                "bpp": point.bpp,
                "steps": steps,
                "width": image.width,
                "height": image.height,
                "caption": caption,
                "bytes": sizes,
                "bits_per_pixel": {part: 8 * size / (image.width * image.height) for part, size in sizes.items()},
                "metrics": measured()(decoded),
                "encode_s": round(encode_s, 4),
                "decode_s": round(decode_s, 4),
                "file": file.as_posix(),
                "picture": picture.as_posix(),
            }
        )


def _is_of(line: Line, photo: Photo) -> bool:
    """Whether a line speaks of these very pixels, with this caption."""
    return (line["sha256"], line["sidecar"]) == (photo.sha256, photo.sidecar)


def named(steps: int | None) -> str:
    """A number of steps, for people."""
    return "default steps" if steps is None else "1 step" if steps == 1 else f"{steps} steps"


def folder_name(steps: int | None) -> str:
    """A number of steps, for folders and files."""
    return named(steps).replace(" ", "-")


def sizes_bytes(data: bytes) -> dict[str, int]:
    """The bytes of a whole .perco file: of its hyper-latent, its text, everything else, and all of them."""
    sizes = bitstream.read_header(data).sizes_bytes
    latent, text = sizes["hyper_latent"], sizes.get("caption", 0)
    return {"hyper_latent": latent, "text": text, "other": len(data) - latent - text, "total": len(data)}


def _measure_sets(run: Run, tell: Tell) -> None:
    """Writes down the distances of all decoded pictures, as a set, from all photos, for each rate and steps."""
    chosen = [metric for name, metric in SET_METRICS.items() if name in run.settings.metrics]
    networks: dict[str, distributions.Network] = {}
    for name in dict.fromkeys(metric.network for metric in chosen):
        network, why = metrics.attempt(
            distributions.NETWORKS[name][0], run.engine.device, distributions.NETWORKS[name][1]
        )
        if network is None:
            run.missing |= {metric.name: why for metric in chosen if metric.network == name}
        else:
            networks[name] = network
    chosen = [metric for metric in chosen if metric.network in networks]
    originals: dict[object, distributions.Features] = {}
    for point in run.points:
        for steps in run.settings.steps:
            decoded: dict[object, distributions.Features] = {}
            for metric in chosen:
                key = metric.name, point.bpp, steps, photos_mark(run)
                if run.sets.get(key) is not None:
                    continue
                samples = metric.network, metric.samples
                network = networks[metric.network]
                if samples not in originals:
                    originals[samples] = distributions.extract(network, metric, (p.read() for p in run.photos))
                if samples not in decoded:
                    decoded[samples] = distributions.extract(network, metric, _pictures(run, point.bpp, steps))
                    tell(f"{metric.network} features, {metric.samples.__name__}: {point.bpp} bpp, {named(steps)}")
                count = len(decoded[samples])
                value = metric.distance(originals[samples], decoded[samples]) if count > 1 else None
                run.sets.append(
                    {
                        **dict(zip(("metric", "bpp", "steps", "photos"), key, strict=True)),
                        "samples": count,
                        "value": value,
                    }
                )


def _pictures(run: Run, bpp: float, steps: int | None) -> Iterator[Image.Image]:
    for photo in run.photos:
        yield run.picture(run.line(photo, bpp, steps))


def photos_mark(run: Run) -> str:
    """A mark of which photos, with which captions, were evaluated."""
    told = [(photo.name, photo.sha256, photo.sidecar) for photo in run.photos]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
