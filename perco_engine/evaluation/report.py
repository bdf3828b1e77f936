"""The report of an evaluation: summary.md, against.jsonl, rate-distortion plots, contact sheets."""

import json
from collections.abc import Sequence

from PIL import Image

from ..files import new_folder
from ..picture_files import picture_bytes
from ..printable import printable
from . import classical, plots
from .contact_sheet import PAPER, Cell, contact_sheet
from .distributions import SET_METRICS, SetMetric
from .evaluate import Run, folder_name, named
from .metrics import METRICS, Metric
from .peers import Peer, best_lines, chosen_files, means, peer_rows
from .published import PUBLISHED
from .results import Line, write_result
from .summary import Row, rows
from .tables import markdown, metric_title, metric_value

SHEET_PHOTOS = 8
SHEET_CELL_PX = 320
SHEET_METRICS = ("lite2", "lite0", "psnr")
"""What is told, and what the classical pictures are chosen by, on a contact sheet: the first of these that is there."""


def write(run: Run) -> str:
    """Writes the report of a run into its folder; returns the text of summary.md."""
    out = run.settings.out
    found = rows(run)
    chosen = _chosen(run)
    bpps = [point.bpp for point in run.points]
    others = means(chosen, bpps, run.codecs, run.judges, len(run.photos)) if run.codecs else []
    if chosen:
        write_result(out / "against.jsonl", "".join(json.dumps(line) + "\n" for line in chosen).encode())
    else:
        (out / "against.jsonl").unlink(missing_ok=True)  # an earlier run's
    pictures = [*_write_plots(run, found, others), *_write_sheets(run, chosen)]
    text = "\n\n".join(
        part
        for part in (
            _heading(run),
            "## Rates\n\n" + _table_of_rates(run, found),
            _table_of_peers(run, found, others) if others else "",
            _notes(run, found),
            "## Pictures\n\n" + "\n".join(pictures),
        )
        if part
    )
    write_result(out / "summary.md", (text + "\n").encode())
    return text


def _chosen(run: Run) -> list[Line]:
    """The best classical file of each photo, rate, format and metric, in the bytes of the .perco file."""
    bpps = [point.bpp for point in run.points]
    return [line for photo in (run.photos if run.codecs else ()) for line in chosen_files(run.task(photo), bpps)]


def _subject(run: Run) -> str:
    return f"{run.name} on {len(run.photos)} photo{'s' * (len(run.photos) > 1)}"


def _metric(name: str) -> Metric | SetMetric:
    return METRICS[name] if name in METRICS else SET_METRICS[name]


def _heading(run: Run) -> str:
    known = run.described
    effort = "usual" if known["effort"] is None else known["effort"]
    lines = [
        f"# {_subject(run)}",
        f"Weights {known['weights']}, {known['device']}, {known['dtype']}, effort: {effort}, pillow-perco "
        f"{known['version']}; means over the photos, times are medians; whole files. "
        f"↑ higher is better, ↓ lower is better.",
    ]
    if 0 in run.settings.steps:
        lines.append("0 steps: the estimate in the hyper-latent itself, without the U-Net.")
    if run.skipped:
        lines.append(
            "Left out:\n\n" + "\n".join(f"- {printable(name)}: {printable(why)}" for name, why in run.skipped.items())
        )
    return "\n\n".join(lines)


def _table_of_rates(run: Run, found: Sequence[Row]) -> str:
    names = list(found[0].metrics)
    header = [
        "bpp", "steps", "bytes", "hyper-latent", "text", "other", "total bpp",
        *(metric_title(_metric(name)) for name in names), "encode, s", "decode, s",
    ]  # fmt: skip
    body = []
    for row in found:
        values = []
        for name in names:
            value, count = row.metrics[name]
            partial = name in METRICS and 0 < count < len(run.photos)
            values.append(metric_value(_metric(name), value) + (f" ({count} photos)" if partial else ""))
        parts = [f"{row.bits_per_pixel[part]:.4f}" for part in ("hyper_latent", "text", "other", "total")]
        steps = "default" if row.steps is None else str(row.steps)
        times = [f"{row.encode_s:.2f}", f"{row.decode_s:.2f}"]
        body.append([f"{row.bpp}", steps, f"{row.size_bytes:,.0f}", *parts, *values, *times])
    return markdown(header, body)


def _table_of_peers(run: Run, found: Sequence[Row], others: Sequence[Peer]) -> str:
    names = list(run.judges)
    peers = peer_rows(others, len(run.photos))
    body = []
    for row in found:
        own = [metric_value(METRICS[name], row.metrics[name][0]) for name in names]
        body.append([f"{row.bpp}", f"**{run.name}**, {named(row.steps)}", *own])
        if row.steps == run.settings.steps[-1]:
            body += [[f"{bpp}", name, *values] for (bpp, name), values in peers.items() if bpp == row.bpp]
    return (
        "## In the same bytes\n\n"
        "The best classical file of at most the bytes of the .perco file, over scale and quality, photo by photo, for "
        "each metric by that metric: each column shows other files. (n of m): a file fits, and the metric "
        "is defined, for only n photos.\n\n"
        + markdown(["bpp", "file", *(metric_title(METRICS[name]) for name in names)], body)
    )


def _notes(run: Run, found: Sequence[Row]) -> str:
    lines = ["## Metrics", ""]
    for name, (_, count) in found[0].metrics.items():
        metric = _metric(name)
        note = f" ({count} samples a row)" if isinstance(metric, SetMetric) else ""
        if metric.least_side_px > 1:
            note += f"; not defined below {metric.least_side_px} pixels"
        lines.append(f"- {metric.title}: {metric.what}{note}.")
    for name, why in run.missing.items():
        title = classical.CODECS[name].title if name in classical.CODECS else _metric(name).title
        lines.append(f"- {title}: {why}.")
    lines += ["", "Published numbers in the plots, not measured here:", ""]
    lines += [f"- {curve.name}, {curve.dataset}: {curve.source}." for curve in PUBLISHED]
    return "\n".join(lines)


def _write_plots(run: Run, found: Sequence[Row], others: Sequence[Peer]) -> list[str]:
    """Writes a plot for every metric, and no other; returns the lines of the summary that show them."""
    lines, written = [], dict[str, bytes]()
    for name in found[0].metrics:
        series = []
        for steps in run.settings.steps:
            points = [
                (row.bits_per_pixel["total"], value)
                for row in found
                if row.steps == steps and (value := row.metrics[name][0]) is not None
            ]
            series.append(plots.Series(f"{run.name}, {named(steps)}", points))
        of_this = [other for other in others if other.metric == name]
        for codec, label in {other.codec: other.name for other in of_this}.items():
            points = [
                (other.bits_per_pixel, other.value)
                for other in of_this
                if other.codec == codec and other.value is not None and other.bits_per_pixel is not None
            ]
            series.append(plots.Series(f"{label} in the same bytes, best by this metric", points, codec))
        drawn = [one for one in series if one.points]
        if not drawn:
            continue
        title, better = _metric(name).title, "higher" if _metric(name).higher_is_better else "lower"
        try:
            files = plots.figure(f"{_subject(run)}, {better} is better", title, name, drawn)
        except ImportError as error:
            lines = [f"Plots: not available ({error}): pip install matplotlib"]
            break
        written |= {f"{name}.{suffix}": data for suffix, data in files.items()}
        lines.append(f"![{title}](plots/{name}.png)")
    with new_folder(run.settings.out / "plots") as folder:
        for name, data in written.items():
            (folder / name).write_bytes(data)
    return lines


def _write_sheets(run: Run, chosen: Sequence[Line]) -> list[str]:
    """Writes a contact sheet for each number of steps; returns the lines of the summary that show them."""
    metric = next((name for name in SHEET_METRICS if name in run.judges), None)
    best = best_lines((line for line in chosen if line["metric"] == metric), lambda line: (line["photo"], line["bpp"]))
    lines = []
    for steps in run.settings.steps:
        name = f"sheet-{folder_name(steps)}.png"
        write_result(run.settings.out / name, picture_bytes(_sheet(run, steps, metric, best), "PNG"))
        lines.append(f"![contact sheet, {named(steps)}]({name})")
    return lines


def _sheet(run: Run, steps: int | None, metric: str | None, best: dict[tuple[str, float], Line]) -> Image.Image:
    """Up to 8 photos, evenly spread over all: the original and every rate, the best classical files below."""
    last = len(run.photos) - 1
    count = min(SHEET_PHOTOS, last + 1)
    photos = [run.photos[round(k * last / max(1, count - 1))] for k in range(count)]
    sheet = []
    for photo in photos:
        image = photo.read()
        own = [Cell(_small(image), (photo.name, f"{image.width}x{image.height}"))]
        others = (
            [Cell(Image.new("RGB", (1, 1), PAPER), ("same bytes:", f"best by {METRICS[metric].title}"))]
            if metric
            else []
        )
        for point in run.points:
            line = run.line(photo, point.bpp, steps)
            told = f"{line['bytes']['total']:,} bytes{_told(metric, line['metrics'].get(metric))}"
            own.append(Cell(_small(run.picture(line)), (told, f"{line['bits_per_pixel']['total']:.4f} bpp")))
            other = best.get((photo.name, point.bpp))
            if other is None:
                others.append(Cell(Image.new("RGB", (1, 1), PAPER), ("no file fits",)))
                continue
            codec = classical.CODECS[other["codec"]]
            picture = classical.show(codec.encode(image, other["scale"], other["quality"]), image.size)
            told = f"{other['bytes']:,} bytes{_told(metric, other['value'])}"
            others.append(
                Cell(_small(picture), (told, f"{codec.title} 1/{other['scale']:g}, quality {other['quality']}"))
            )
        sheet += [own, others] if best else [own]
    return contact_sheet(sheet, text_px=15)


def _told(metric: str | None, value: float | None) -> str:
    if metric is None or value is None:
        return ""
    return f", {METRICS[metric].title.removesuffix(', dB').removesuffix(' distance')} {value:.2f}"


def _small(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((SHEET_CELL_PX, SHEET_CELL_PX), Image.Resampling.LANCZOS)
    return small
