"""Metrics and their values as people read them, and Markdown tables."""

from collections.abc import Iterable, Sequence

from .distributions import SetMetric
from .metrics import Metric


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *body))


def metric_title(metric: Metric | SetMetric) -> str:
    """Its name, and which way is better."""
    return f"{metric.title} {'↑' if metric.higher_is_better else '↓'}"


def metric_value(metric: Metric | SetMetric, value: float | None) -> str:
    """A value with as many decimals as are worth telling."""
    return "not defined" if value is None else f"{value:.{metric.decimals}f}"
