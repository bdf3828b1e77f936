"""`perco compare`: photos at every rate beside the classical files of the same bytes, as one HTML page.

The page needs nothing but itself: every picture lies in it, lossless and once.
"""

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from .. import files
from ..engine import get_engine
from ..errors import EvaluationError
from ..picture_files import UNREADABLE
from ..printable import printable
from ..rates import chosen
from . import classical, metrics
from .classical_search import Search, digest
from .metrics import METRICS, Judge
from .photo_folder import Photo, photo_at
from .tables import metric_value

DEFAULT_METRICS = ("psnr", "ms_ssim", "lite2")
CHOOSE_BY = ("lite2", "lite0", "ms_ssim", "psnr")
"""Without a word of the user's, peers are chosen by the first of these metrics that is measured."""


@dataclass(frozen=True)
class Settings:
    """What is compared.

    bpp: nominal rates, () for all of the model's.  max_size_px: longer photos are reduced to this longer side before
    all else.  formats: names of CODECS.  names: of METRICS.  by: the metric that classical files are chosen by.
    kept: a folder where what was tried is kept.  effort: steps of the search for better codes; None: the usual.
    """

    model: str = "embedded"
    bpp: tuple[float, ...] = ()
    max_size_px: int = 1024
    formats: tuple[str, ...] = tuple(classical.CODECS)
    names: tuple[str, ...] = DEFAULT_METRICS
    by: str | None = None
    kept: Path | None = None
    effort: int | None = None


@dataclass(frozen=True)
class Shown:
    """A picture of the page.  title: what it is.  note: its settings, or what else there is to say.  scores: of it."""

    title: str
    note: str
    picture: Image.Image
    size_bytes: int | None = None
    scores: dict[str, float | None] | None = None
    own: bool = False


@dataclass(frozen=True)
class Row:
    """A rate: the model's picture and the peers'; the name of a format alone where none of its files fits."""

    size_bytes: int
    cells: list[Shown | str]


@dataclass(frozen=True)
class Comparison:
    """Everything about one photo."""

    name: str
    original: Shown
    rows: list[Row]


def compare(
    paths: Sequence[Path], out: Path, settings: Settings | None = None, tell: Callable[[str], None] = lambda _: None
) -> list[Comparison]:
    """Writes the page of these photos to `out`; returns what it shows.

    Raises EvaluationError (a photo cannot be read), ModelUnavailable, InvalidModel, OSError (`out` cannot be written),
    ValueError (unknown names, or a page that would be no HTML file, or take the place of a photo).
    """
    settings = settings or Settings()
    if out.resolve() in [path.resolve() for path in paths]:
        raise ValueError(f"the page would take the place of the photo {out}: name another file with --out")
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"the page is an HTML file, and {out} is not named like one: end its name in .html (--out)")
    names = tuple(dict.fromkeys((*settings.names, *([settings.by] if settings.by else []))))
    metrics.check_names(names, METRICS)
    metrics.check_names(settings.formats, classical.CODECS)
    photos = [_read(path, settings.max_size_px) for path in paths]
    smallest = min(min(image.size) for _, image, _ in photos)
    files.make_place(out)
    engine = get_engine(settings.model)
    judges, missing = metrics.load(names, engine.device)
    versions, without = classical.available(settings.formats)
    able = [name for name in judges if METRICS[name].least_side_px <= smallest]
    by = settings.by or next((name for name in CHOOSE_BY if name in able), None)
    if by not in able:
        reason = "none is measured"
        if by:
            reason = missing.get(by, f"it is not defined below {METRICS[by].least_side_px} pixels")
        raise ValueError(f"classical files cannot be chosen by {by}: {reason}; name another one with --by")
    points = chosen(engine.rate_points, settings.bpp)
    comparisons = []
    with TemporaryDirectory() as unkept:
        for photo, image, was in photos:
            measured = metrics.measure(judges, image)
            rows = []
            for point in points:
                data = engine.encode(image, bpp=point.bpp, effort=settings.effort)
                picture = engine.decode(data)
                shown = Shown("PerCo", f"rate point {point.bpp}", picture, len(data), measured(picture), own=True)
                rows.append(Row(len(data), [shown]))
                tell(f"{printable(photo.name)}: {point.bpp} bpp, {len(data):,} bytes")
            search = Search(settings.kept or Path(unkept), digest(image), versions)
            for name in versions:
                _add_peers(rows, search, image, name, judges, by, measured)
                tell(f"{printable(photo.name)}: {classical.CODECS[name].title}")
            note = f"{image.width}x{image.height} pixels" + (f", reduced from {was[0]}x{was[1]}" if was else "")
            comparisons.append(Comparison(photo.name, Shown("Original", note, image), rows))
    notes = [_name_of(name, why) for name, why in {**missing, **without}.items()]
    files.write_beside(out, page(comparisons, Path(settings.model).name, by, list(judges), notes).encode())
    return comparisons


def _read(path: Path, max_size_px: int) -> tuple[Photo, Image.Image, tuple[int, int] | None]:
    """A photo, its pixels, and the size that it was reduced from."""
    try:
        photo = photo_at(path)
        image = photo.read()
    except UNREADABLE as error:
        raise EvaluationError(f"{path} cannot be read as a photo: {error}") from error
    if max(image.size) <= max_size_px:
        return photo, image, None
    was = image.size
    image.thumbnail((max_size_px, max_size_px), Image.Resampling.LANCZOS)
    return photo, image, was


def _add_peers(
    rows: Sequence[Row],
    search: Search,
    image: Image.Image,
    name: str,
    judges: dict[str, Judge],
    by: str,
    measured: metrics.Measure,
) -> None:
    """Adds to each rate the best file of a format in the same bytes."""
    codec = classical.CODECS[name]
    tried = search.run(image, codec, [row.size_bytes for row in rows], {by: judges[by]})
    for row in rows:
        best = classical.best(tried, row.size_bytes, by)
        if best is None:
            row.cells.append(codec.title)
            continue
        picture = classical.show(codec.encode(image, best.scale, best.quality), image.size)
        note = f"1/{best.scale:g} size, quality {best.quality}"
        row.cells.append(Shown(codec.title, note, picture, best.size_bytes, measured(picture)))


def _name_of(name: str, why: str) -> str:
    return f"{(classical.CODECS[name] if name in classical.CODECS else METRICS[name]).title}: {why}."


def page(comparisons: Sequence[Comparison], model: str, by: str, names: Sequence[str], notes: Sequence[str]) -> str:
    """The HTML of the page."""
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    body = [
        "<h1>Pictures in the same bytes</h1>",
        '<p class="faint">Drag over a picture, or use the arrow keys, to wipe between two. '
        "Tap any of those below to see it on the right.</p>",
        *(line for number, one in enumerate(comparisons) for line in _section(one, number, names)),
        "<footer>",
        f"<p>PerCo: the model “{escape(model)}”, whole files, default decode. The others are the best of their "
        f"format in at most the same bytes, over scale and quality, by {escape(METRICS[by].title)}; a smaller picture "
        "is shown enlarged. Bold: the best of a row. Higher is better for "
        f"{_listed(names, higher=True)}, lower for {_listed(names, higher=False)}.</p>",
        *(f"<p>{METRICS[name].title}: {escape(METRICS[name].what)}.</p>" for name in names),
        *(f"<p>{escape(note)}</p>" for note in notes),
        "</footer>",
    ]
    return template.replace("<!-- page -->", "\n".join(body))


def _listed(names: Sequence[str], higher: bool) -> str:
    return " and ".join(METRICS[n].title for n in names if METRICS[n].higher_is_better == higher) or "none"


def _section(one: Comparison, number: int, names: Sequence[str]) -> Iterator[str]:
    """A photo: two pictures to wipe between, and all of them below."""
    width, height = one.original.picture.size
    options, figures = [(f"p{number}", "Original")], []
    for r, row in enumerate(one.rows):
        best = _best(row, names)
        figures.append(
            f"<h3>{row.size_bytes:,} bytes <span class=faint>{8 * row.size_bytes / (width * height):.4f} bits per pixel"
            "</span></h3>\n<div class=row>"
        )
        for c, cell in enumerate(row.cells):
            if isinstance(cell, str):
                figures.append(
                    f"<figure><div class=none>no file fits</div><figcaption><strong>{escape(cell)}</strong>"
                    "</figcaption></figure>"
                )
                continue
            key = f"p{number}-{r}-{c}"
            options.append((key, f"{cell.title}, {cell.size_bytes:,} bytes"))
            figures.append(_figure(key, cell, best))
        figures.append("</div>")
    right = f"p{number}-{len(one.rows) // 2}-0"
    yield f'<section style="--width: {max(width, 320)}px; --ratio: {width}/{height}">'
    yield f"<h2>{escape(printable(one.name))} <span class=faint>{escape(one.original.note)}</span></h2>"
    yield "<div class=viewer>"
    yield (
        f'<div class=stage style="aspect-ratio: {width}/{height}"><img class=right alt=""><img class=left alt="">'
        "<span class=grip aria-hidden=true>⇔</span><input type=range min=0 max=1000 value=500 step=1></div>"
    )
    yield "<div class=sides>"
    for side, key in (("left", options[0][0]), ("right", right)):
        listed = "".join(
            f"<option value={k}{' selected' * (k == key)}>{escape(label)}</option>" for k, label in options
        )
        yield f'<div><select class={side} aria-label="the picture on the {side}">{listed}</select></div>'
    yield "<div class='told left'></div><div class='told right'></div></div></div>"
    yield "<h3>Original</h3>\n<div class=row>" + _figure(f"p{number}", one.original, {}) + "</div>"
    yield from figures
    yield "</section>"


def _best(row: Row, names: Sequence[str]) -> dict[str, float]:
    """The best value of a rate in each metric."""
    best: dict[str, float] = {}
    for name in names:
        values = [
            value
            for cell in row.cells
            if isinstance(cell, Shown) and (value := (cell.scores or {}).get(name)) is not None
        ]
        if values:
            best[name] = (max if METRICS[name].higher_is_better else min)(values)
    return best


def _figure(key: str, shown: Shown, best: dict[str, float]) -> str:
    """A picture of the page.  best: the values of its row that are set in bold."""
    buffer = io.BytesIO()
    kind = "WEBP" if max(shown.picture.size) <= classical.CODECS["webp"].most_side_px else "PNG"
    shown.picture.save(buffer, kind, lossless=True)
    source = f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    told = [f"<strong>{escape(shown.title)}</strong>"]
    if shown.size_bytes is not None:
        told.append(f"<div>{shown.size_bytes:,} bytes</div>")
    told.append(f"<div class=faint>{escape(shown.note)}</div>")
    if shown.scores is not None:
        pairs = "".join(
            f"<dt>{escape(METRICS[name].title)}</dt><dd{' class=best' * (name in best and value == best[name])}>"
            f"{metric_value(METRICS[name], value)}</dd>"
            for name, value in shown.scores.items()
        )
        told.append(f"<dl>{pairs}</dl>")
    title = escape(shown.title + (f", {shown.size_bytes:,} bytes" if shown.size_bytes is not None else ""))
    return (
        f'<figure id={key} data-title="{title}"{" class=own" * shown.own}><button title="show on the right">'
        f'<img src="{source}" alt="{title}" width={shown.picture.width} height={shown.picture.height}></button>'
        f"<figcaption>{''.join(told)}</figcaption></figure>"
    )
