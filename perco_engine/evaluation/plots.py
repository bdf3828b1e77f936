"""Rate-distortion plots: one figure a metric, as SVG and PNG."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .published import PUBLISHED

OURS = ("#08306b", "#2171b5", "#6baed6", "#41ab5d", "#006d2c", "#54278f", "#807dba")
OTHERS = {"jpeg": "#8c6d31", "webp": "#e6550d", "avif": "#d62728", "jxl": "#e377c2", None: "#222222"}
PUBLISHED_STYLES = (("#636363", "--"), ("#969696", "-."), ("#636363", ":"), ("#969696", (0, (1, 1))))
MARKERS = {"jpeg": "v", "webp": "^", "avif": "s", "jxl": "D", None: "*"}


STYLE = {"svg.hashsalt": "perco", "svg.fonttype": "none", "font.size": 10, "text.parse_math": False}
"""Names of models are shown as they are, whatever is in them."""


@dataclass(frozen=True)
class Series:
    """Points (bits per pixel, value) under one name.

    codec: of a classical series (None: the best of all), else "" for the model that is evaluated.
    """

    label: str
    points: Sequence[tuple[float, float]]
    codec: str | None = ""


def figure(title: str, label: str, metric: str, series: Iterable[Series]) -> dict[str, bytes]:
    """The plot of a metric: the model as solid lines, classical files as points, published numbers as broken lines.

    label: of the vertical axis.  metric: its name among the published numbers.
    Returns the files by suffix, "svg" and "png".  Raises ImportError where matplotlib is missing.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    with rc_context(STYLE):
        plot = Figure(figsize=(8, 6), layout="constrained")
        axes = plot.add_subplot()
        own = 0
        for one in series:
            x, y = zip(*sorted(one.points), strict=True)
            if one.codec == "":
                label_of = f" {one.label}"  # with "_" at its beginning, it would be left out
                axes.plot(x, y, "o-", color=OURS[own % len(OURS)], label=label_of, linewidth=2, markersize=5, zorder=3)
                own += 1
            else:
                size, order = (22, 4) if one.codec else (150, 2)  # a star behind the mark of the codec that is best
                color, marker = OTHERS[one.codec], MARKERS[one.codec]
                axes.scatter(x, y, s=size, c=color, marker=marker, label=one.label, linewidths=0, zorder=order)
        for curve, (color, dashes) in zip((c for c in PUBLISHED if metric in c.points), PUBLISHED_STYLES, strict=False):
            x, y = zip(*curve.points[metric], strict=True)
            axes.plot(x, y, linestyle=dashes, marker=".", color=color, label=curve.label, linewidth=1.2, zorder=1)
        bounds = sorted((c.bounds[metric], c.label) for c in PUBLISHED if metric in c.bounds)
        for k, (value, name) in enumerate(bounds):
            axes.axhline(value, color="#bdbdbd", linewidth=0.8, linestyle=":", zorder=0)
            top = k == len(bounds) - 1  # of two near each other, one is named above its line, the other below
            axes.annotate(
                name, (0.01, value), xycoords=("axes fraction", "data"), xytext=(0, 2 if top else -2),
                textcoords="offset points", va="bottom" if top else "top", color="#969696", fontsize=7,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("bits per pixel, whole files, mean of the photos")
        axes.set_ylabel(label)
        axes.set_title(title, fontsize=11)
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        plot.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
        files = {}
        for suffix in ("svg", "png"):
            buffer = io.BytesIO()
            plot.savefig(buffer, format=suffix, dpi=120, metadata={"Date": None} if suffix == "svg" else None)
            files[suffix] = buffer.getvalue()
    return files
