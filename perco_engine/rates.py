"""Rate points: a nominal rate in bits a pixel, and the code grids and codebooks that give it.

PerCo (Careil et al., ICLR 2024, section 4 and appendix) names a rate point by the nominal rate of its hyper-latent:
log2(codebook size) / pixels per index.  A rate point of PerCo (SD) is one grid; one of a ladder is several, coarse to
fine, each refining the ones before it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

REFERENCE_SIDE_PX = 512
"""The side of a picture whose grid of codes PerCo (SD)'s configurations tell the side of (cfg_ss)."""

LATENT_PX = 8
"""The side of the square of pixels that one latent of every autoencoder stands for."""

DEFAULT_BPP = 0.03
"""The rate that a save without `bpp` and `max_bytes` asks for, in bits a pixel."""


@dataclass(frozen=True)
class Grid:
    """One grid of codes: one index for every square of `pixels_per_index` x `pixels_per_index` pixels."""

    pixels_per_index: int
    codebook_size: int

    def shape(self, width_px: int, height_px: int) -> tuple[int, int]:
        """Rows and columns of the grid for a picture of this size; partial squares count as whole ones."""
        return -(-height_px // self.pixels_per_index), -(-width_px // self.pixels_per_index)

    @property
    def bits_per_pixel(self) -> float:
        """log2(codebook_size) / pixels_per_index**2."""
        return math.log2(self.codebook_size) / self.pixels_per_index**2


@dataclass(frozen=True)
class RatePoint:
    """A point on a model's rate axis: its grids, coarse to fine, and the name that users give it (`bpp`)."""

    bpp: float
    grids: tuple[Grid, ...]

    def shapes(self, width_px: int, height_px: int) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of every grid for a picture of this size, coarse to fine."""
        return tuple(grid.shape(width_px, height_px) for grid in self.grids)

    def count(self, width_px: int, height_px: int) -> int:
        """How many indices a picture of this size has in all."""
        return sum(rows * columns for rows, columns in self.shapes(width_px, height_px))


def ladder(*grids: Grid, bpp: Sequence[float] = ()) -> tuple[RatePoint, ...]:
    """The rate points of a ladder: point k holds the first k + 1 grids.

    bpp: their names; none: the sums of the grids' uniform rates.
    """
    sums = [round(sum(grid.bits_per_pixel for grid in grids[: k + 1]), 4) for k in range(len(grids))]
    return tuple(RatePoint(name, grids[: k + 1]) for k, name in enumerate(bpp or sums))


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, of Python's or of numpy's kind; True and False are none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:  # an integer of hundreds of digits
        return False


def nearest(points: Sequence[RatePoint], bpp: float | None = None) -> int:
    """The index of the rate point whose nominal rate is nearest to `bpp`; None: to DEFAULT_BPP.

    Raises ValueError unless `bpp` is a positive finite number.
    """
    if bpp is None:
        bpp = DEFAULT_BPP
    if not is_number(bpp) or bpp <= 0:
        raise ValueError(f"bpp must be a positive number of bits a pixel, not {bpp!r:.80}")
    bpp = min(bpp, points[-1].bpp)  # from so many bits, all distances would be rounded to the same
    return min(range(len(points)), key=lambda k: abs(points[k].bpp - bpp))


def chosen(points: Sequence[RatePoint], bpps: Sequence[float]) -> tuple[RatePoint, ...]:
    """The rate points nearest to these rates, each once, lowest first; all where none is named.  Raises ValueError."""
    return tuple(points[k] for k in sorted({nearest(points, bpp) for bpp in bpps} or range(len(points))))


PERCO_SD = tuple(
    RatePoint(bpp, (Grid(REFERENCE_SIDE_PX // side, codebook_size),))
    for bpp, side, codebook_size in (
        (0.0019, 8, 256),
        (0.0024, 8, 1024),
        (0.0098, 16, 1024),
        (0.0313, 32, 256),
        (0.0507, 32, 8196),
        (0.0937, 64, 64),
        (0.1250, 64, 256),
    )
)
"""The seven rate points of PerCo (SD), lowest first.  8196 (not 8192) is what the reference has."""


def of_hyper_encoder(config: Mapping[str, Any]) -> tuple[RatePoint, ...]:
    """The rate points of a hyper-encoder by its configuration, lowest first.

    They are those of a ladder's `grids`, or the one of a design of PerCo (SD), by its published name if it has one.
    """
    if "grids" in config:
        return ladder(*(Grid(int(pixels), int(size)) for pixels, size in config["grids"]), bpp=config.get("bpp", ()))
    grid = Grid(REFERENCE_SIDE_PX // int(config["cfg_ss"]), int(config["cfg_cs"]))
    published = (point for point in PERCO_SD if point.grids == (grid,))
    return (next(published, RatePoint(round(grid.bits_per_pixel, 4), (grid,))),)


EMBEDDED = ladder(
    Grid(64, 256), Grid(32, 256), Grid(16, 512), Grid(16, 512), Grid(8, 256), Grid(8, 256),
    bpp=(0.002, 0.008, 0.03, 0.055, 0.085, 0.13),
)  # fmt: skip
"""The six rate points of the embedded model, named by what files of them take."""
