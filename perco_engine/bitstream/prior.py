"""The prior: how probable each index of a hyper-latent is, given the indices before it (FORMAT.md, "The prior").

A small network with integer weights and activations, one part a level.  A level's grid is taken in four phases, so that
most cells know their neighbours on all sides:

    phase   0 2 0 2         state of the level below ─> upsampled ─> 3x3 ─> u ─┐
            3 1 3 1                                                            ├─> a ─> a ─> logits ─> CDF
            0 2 0 2         embedded indices of the phases before ─> 5x5 ──────┘
            3 1 3 1         cat[u, embedded indices] ─> 3x3 ─> state of this level

All numbers are integers, held in float32: weights, embeddings and activations are at most 127 and no sum has more than
576 of their products, so that every partial sum stays below 2**24 and comes out exactly, in whatever order the machine
adds.  The phases are those of checkerboard context models (He et al., CVPR 2021), with two boards; training is in
perco_engine/training/prior.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from math import isqrt
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perco_engine.bitstream.entropy import CDF, PRECISION_BITS
from perco_engine.errors import InvalidModel
from perco_engine.rates import RatePoint

PHASES = ((0, 0), (1, 1), (0, 1), (1, 0))
"""(row, column) of the cells of each phase, modulo 2."""

LARGEST = 127
"""Of weights, embeddings and activations."""

LARGEST_BIAS = 2**21

MOST_PRODUCTS = 576
"""In one sum: 576 * 127 * 127 + 2**21 < 2**24."""

ACTIVATION_SHIFT = 7
"""Weights count 1/128, activations and embeddings 1/32: a sum counts 1/4096 and is brought back to 1/32."""

LOGIT_SHIFT = 4
"""Logits are sums, in 1/4096 of a bit, brought to 1/256."""

FLOOR = 2
"""The least frequency of an index, of 65536: what is improbable can still be coded."""

SMALLEST_CODEBOOK = 16
"""With the floor, no index of such a codebook is for nothing: `most_grids`."""

LARGEST_CODEBOOK = 2**15 - 1
"""Above it the floors would leave nothing to share."""

CELLS_AT_ONCE = 2048
"""Whose logits are computed together: 60 MB of memory."""

Array = NDArray[np.float32]

Code = Callable[[int, tuple[slice, slice], CDF], NDArray[np.int32]]
"""code(level, cells, cdf): codes the indices of these cells of the level's grid, (n, codebook size + 1) CDFs, and gives
them, as a flat array."""


def _power_table() -> NDArray[np.int64]:
    """floor(2**(16 - j/256)) for j = 0..255, by integer square roots: the 256th root is eight of them."""
    powers = []
    for j in range(256):
        power = 1 << 16 * 256 - j
        for _ in range(8):
            power = isqrt(power)
        powers.append(power)
    return np.array(powers, dtype=np.int64)


POWERS = _power_table()

WEIGHTS = np.array([int(POWERS[below & 255]) >> (below >> 8) for below in range(17 << 8)], dtype=np.int32)
"""The weight of a logit so far below the largest, in 1/256 of a bit; the last is 0, as all further ones are."""


def frequencies(logits: NDArray[np.int64]) -> CDF:
    """Logits (n, codebook size) in 1/256 of a bit to CDFs (n, codebook size + 1) from 0 to 65536."""
    size = logits.shape[1]
    below = logits.max(axis=1, keepdims=True) - logits
    # Sums are below 2**31.  Float64 is exact: products are below 2**47, and the floor of such a quotient is right.
    sums = np.cumsum(WEIGHTS.take(below, mode="clip"), axis=1, dtype=np.int32)
    shares = sums * float((1 << PRECISION_BITS) - FLOOR * size)
    shares /= sums[:, -1:]
    cdf = np.zeros((len(logits), size + 1), dtype=np.int32)
    cdf[:, 1:] = FLOOR * np.arange(1, size + 1) + np.floor(shares, out=shares)
    return cdf


def most_grids(point: RatePoint, width_px: int, height_px: int, stream_bytes: int) -> int:
    """How many grids of a picture, coarse to fine, so many bytes could hold, however probable the indices are.

    An index of a codebook of N costs at least (N - 1) * FLOOR / 65536 * log2(e) bits, as the others have their floor,
    less 2**-12 bit of rounding; log2(e) is taken as 1.44.
    """
    left = 8 * stream_bytes * 65536 * 100
    for k, (grid, (rows, columns)) in enumerate(zip(point.grids, point.shapes(width_px, height_px), strict=True)):
        left -= rows * columns * ((grid.codebook_size - 1) * FLOOR * 144 - 1600)
        if left < 0:
            return k
    return len(point.grids)


PRIOR_FILE = "prior/prior.safetensors"
"""Where a model folder has its prior."""


class Prior:
    """The prior of one model.

    tensors: int8 and int32, by the names and of the shapes of FORMAT.md's table.

    Raises InvalidModel where a tensor is missing, of another type or shape, or too large to be computed exactly.
    """

    def __init__(self, tensors: Mapping[str, NDArray[np.generic]]) -> None:
        due = _shapes(tensors)
        if set(due) != set(tensors):
            raise InvalidModel(f"the prior has not the tensors of a prior: {sorted(set(due) ^ set(tensors))[:3]}")
        self._tensors: dict[str, Array] = {}
        for name, shape in due.items():
            tensor = tensors[name]
            kind, largest = (np.int32, LARGEST_BIAS) if name.endswith("bias") else (np.int8, LARGEST)
            if tensor.shape != shape or tensor.dtype != kind or np.abs(tensor.astype(np.int64)).max() > largest:
                raise InvalidModel(f"{name} of the prior must be {shape} {kind.__name__}, at most {largest}")
            self._tensors[name] = tensor.reshape(len(tensor), -1).astype(np.float32)

    @classmethod
    def load(cls, folder: Path) -> Prior | None:
        """The prior of a model folder, PRIOR_FILE, or None where it has none.  Raises InvalidModel."""
        path = folder / PRIOR_FILE
        if not path.exists():
            return None
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return cls(load_file(path))
        except (OSError, SafetensorError, ValueError, IndexError, TypeError, KeyError) as error:
            raise InvalidModel(f"cannot read {path}: {error}") from error

    def check(self, point: RatePoint) -> None:
        """Raises InvalidModel unless this prior is of the codebooks of a rate point, and the grids' squares nest."""
        sizes = [grid.codebook_size for grid in point.grids]
        if sizes != [len(self._tensors.get(f"{k}.embedding", ())) for k in range(len(sizes))]:
            raise InvalidModel(f"the prior of this model is not one for codebooks of {sizes}")
        sides = [grid.pixels_per_index for grid in point.grids]
        if any(coarser % finer for coarser, finer in pairwise(sides)):
            raise InvalidModel(f"a prior is for grids of which each side divides the one before, not {sides} pixels")

    def walk(self, point: RatePoint, width_px: int, height_px: int, code: Code) -> Iterator[NDArray[np.int32]]:
        """The grids of indices of a picture, (rows, columns) int32, coarse to fine, as `code` gives them part by part.

        Raises InvalidModel where the rate point is of another ladder than the prior.
        """
        self.check(point)
        state: Array | None = None
        coarser = 0
        for level, (grid_of, (rows, columns)) in enumerate(
            zip(point.grids, point.shapes(width_px, height_px), strict=True)
        ):
            if state is not None:
                factor = coarser // grid_of.pixels_per_index
                state = state.repeat(factor, axis=1).repeat(factor, axis=2)[:, :rows, :columns]
            coarser = grid_of.pixels_per_index
            context = self._context(level, state, rows, columns)
            embedding = self._tensors[f"{level}.embedding"]
            grid = np.zeros((rows, columns), dtype=np.int32)
            padded = np.zeros((embedding.shape[1], rows + 4, columns + 4), dtype=np.float32)
            embedded = padded[:, 2:-2, 2:-2]
            for phase, (row, column) in enumerate(PHASES):
                across = len(range(column, columns, 2))
                step = 2 * max(1, CELLS_AT_ONCE // max(1, across))
                parts = [
                    (slice(top, min(top + step, rows), 2), slice(column, columns, 2)) for top in range(row, rows, step)
                ]
                coded = []
                for cells in parts if across else ():
                    logits = self._logits(level, phase, context, padded, cells)
                    coded.append((cells, code(level, cells, frequencies(logits))))
                for cells, indices in coded:
                    grid[cells] = indices.reshape(grid[cells].shape)
                    embedded[:, *cells] = embedding[grid[cells]].transpose(2, 0, 1)
            yield grid
            if level + 1 < len(point.grids):
                state = self._convolve(f"{level}.state", np.concatenate([context, embedded]))

    def _context(self, level: int, state: Array | None, rows: int, columns: int) -> Array:
        """u of a level, (s, rows, columns): what the levels below say of its cells."""
        if state is None:
            bias = self._tensors[f"{level}.enter.bias"]
            return np.broadcast_to(_activation(bias)[:, :, None], (len(bias), rows, columns))
        return self._convolve(f"{level}.enter", state)

    def _convolve(self, name: str, x: Array) -> Array:
        """The activations of a 3x3 convolution, zeros around."""
        weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]
        result = np.empty((len(weight), *x.shape[1:]), dtype=np.float32)
        step = max(1, CELLS_AT_ONCE // x.shape[2])
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        for top in range(0, x.shape[1], step):
            cells = (slice(top, min(top + step, x.shape[1])), slice(0, x.shape[2]))
            result[:, cells[0]] = _activation(weight @ _surroundings(padded, cells, 3) + bias).reshape(
                len(weight), -1, x.shape[2]
            )
        return result

    def _logits(
        self, level: int, phase: int, context: Array, padded: Array, cells: tuple[slice, slice]
    ) -> NDArray[np.int64]:
        """Logits (n, codebook size) of cells, in 1/256 of a bit; padded: the embedded indices, two zeros around."""
        part = {name: self._tensors[f"{level}.{name}"] for name in ("near.weight", "context.weight", "middle.weight")}
        hidden = part["near.weight"] @ _surroundings(padded, cells, 5)
        hidden += part["context.weight"] @ context[:, *cells].reshape(len(context), -1)
        hidden = _activation(hidden + self._tensors[f"{level}.near.bias"][phase][:, None])
        hidden = _activation(part["middle.weight"] @ hidden + self._tensors[f"{level}.middle.bias"])
        sums = self._tensors[f"{level}.out.weight"] @ hidden + self._tensors[f"{level}.out.bias"]
        return sums.T.astype(np.int64) >> LOGIT_SHIFT


def _shapes(tensors: Mapping[str, NDArray[np.generic]]) -> dict[str, tuple[int, ...]]:
    """The tensors that a prior of these codebooks and widths has.  Raises InvalidModel for impossible ones."""
    try:
        hidden, state = tensors["0.context.weight"].shape
        _, embedded = tensors["0.embedding"].shape
        sizes = [len(tensors[f"{k}.embedding"]) for k in range(sum(name.endswith(".embedding") for name in tensors))]
    except (KeyError, ValueError, TypeError) as error:
        raise InvalidModel("the prior lacks 0.context.weight, or the embedding of a level") from error
    if min(sizes) < SMALLEST_CODEBOOK or max(sizes) > LARGEST_CODEBOOK:
        raise InvalidModel(f"the prior has a codebook of less than {SMALLEST_CODEBOOK} or more than {LARGEST_CODEBOOK}")
    if max(25 * embedded + state, 9 * (state + embedded), hidden) > MOST_PRODUCTS:
        raise InvalidModel("the prior sums more products than come out exactly")
    shapes: dict[str, tuple[int, ...]] = {}
    for k, size in enumerate(sizes):
        shapes |= {
            f"{k}.embedding": (size, embedded),
            f"{k}.enter.weight": (state, state, 3, 3),
            f"{k}.enter.bias": (state,),
            f"{k}.near.weight": (hidden, embedded, 5, 5),
            f"{k}.near.bias": (len(PHASES), hidden),
            f"{k}.context.weight": (hidden, state),
            f"{k}.middle.weight": (hidden, hidden),
            f"{k}.middle.bias": (hidden,),
            f"{k}.out.weight": (size, hidden),
            f"{k}.out.bias": (size,),
            f"{k}.state.weight": (state, state + embedded, 3, 3),
            f"{k}.state.bias": (state,),
        }
    last = len(sizes) - 1
    del shapes["0.enter.weight"], shapes[f"{last}.state.weight"], shapes[f"{last}.state.bias"]
    return shapes


def _activation(sums: Array) -> Array:
    """Sums to activations: (sum + 64) >> 7, held between 0 and 127."""
    half = float(1 << ACTIVATION_SHIFT - 1)
    activations: Array = np.clip(np.floor((sums + half) / (2 * half)), 0, LARGEST)
    return activations


def _surroundings(padded: Array, cells: tuple[slice, slice], side: int) -> Array:
    """(c * side * side, n): the side x side squares around cells of a map (c, rows, columns) padded by side // 2."""
    rows, columns = cells
    squares = [
        padded[:, rows.start + y : rows.stop + y : rows.step, columns.start + x : columns.stop + x : columns.step]
        for y in range(side)
        for x in range(side)
    ]
    stacked: Array = np.stack(squares, axis=1).reshape(len(padded) * side * side, -1)
    return stacked
