"""Convolutions and what goes with them, in numpy: enough to run the ladder's decoder where there is no torch.

Arrays are (rows, columns, channels) float32; what torch calls (out, in, 3, 3) is a matrix (9 * in, out) here.
"""

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

Array = NDArray[np.float32]

STRIP_BYTES = 16 << 20
"""Memory for the patches of a convolution; what needs more is computed in strips of rows."""


def as_matrix(weight: NDArray[np.floating]) -> Array:
    """A torch weight (out, in, 3, 3) as the matrix (9 * in, out) that `convolve` takes."""
    return np.ascontiguousarray(weight.transpose(2, 3, 1, 0).reshape(-1, len(weight)), np.float32)


def pad(x: Array, mode: str = "constant") -> Array:
    """One more row and column on every side: of zeros, or with mode "edge" those of the border again."""
    if mode == "edge":
        return np.pad(x, ((1, 1), (1, 1), (0, 0)), "edge")
    padded = np.zeros((x.shape[0] + 2, x.shape[1] + 2, x.shape[2]), np.float32)
    padded[1:-1, 1:-1] = x
    return padded


def convolve(padded: Array, matrix: Array, bias: Array) -> Array:
    """A 3x3 convolution of an array that `pad` made: (rows + 2, columns + 2, in) to (rows, columns, out)."""
    rows, columns, channels = padded.shape[0] - 2, padded.shape[1] - 2, padded.shape[2]
    result = np.empty((rows, columns, matrix.shape[1]), np.float32)
    strip = max(1, STRIP_BYTES // (36 * columns * channels))
    patches = np.empty((min(strip, rows), columns, 3, 3 * channels), np.float32)
    down, right, _ = padded.strides
    for top in range(0, rows, strip):
        height = min(strip, rows - top)
        # A row of a patch is contiguous in memory: three copies of 3 * channels numbers, and not nine.
        patches[:height] = as_strided(
            padded[top:], (height, columns, 3, 3 * channels), (down, right, down, padded.itemsize)
        )
        np.matmul(
            patches[:height].reshape(height * columns, -1), matrix,
            out=result[top : top + height].reshape(height * columns, -1),
        )  # fmt: skip
    result += bias
    return result


def silu(x: Array) -> Array:
    """x / (1 + exp(-x)), in x's own memory: give it an array that nobody else needs."""
    gate = np.negative(x)
    with np.errstate(over="ignore"):  # exp(-x) is infinite for large -x, and the quotient zero, as it should be
        np.exp(gate, out=gate)
    gate += 1
    return np.divide(x, gate, out=x)


def pool(x: Array, times: int) -> Array:
    """The mean of each square of 2**times cells, partial squares at the border included."""
    for axis in (0, 1) if times else ():
        starts = np.arange(0, x.shape[axis], 1 << times)
        counts = np.minimum(x.shape[axis] - starts, 1 << times).astype(np.float32)
        x = np.add.reduceat(x, starts, axis) / np.expand_dims(counts, tuple({0, 1, 2} - {axis}))
    return x


def repeat(x: Array, rows: int, columns: int) -> Array:
    """Every cell twice in both directions, cut to rows x columns."""
    return x.repeat(2, 0)[:rows].repeat(2, 1)[:, :columns]


def interpolate(x: Array, scale: int, rows: int, columns: int) -> Array:
    """`scale` times larger, bilinear between the middles of cells, cut to rows x columns."""
    for axis, size in ((0, rows), (1, columns)):
        place = np.maximum((np.arange(size, dtype=np.float32) + np.float32(0.5)) / scale - np.float32(0.5), 0)
        first = place.astype(np.intp)
        second = np.minimum(first + 1, x.shape[axis] - 1)
        weight = np.expand_dims(place - first, tuple({0, 1, 2} - {axis}))
        before = x.take(first, axis)
        x = before + (x.take(second, axis) - before) * weight
    return x


def shuffle(x: Array, side: int) -> Array:
    """Channels (3 * side**2, as torch's pixel_shuffle orders them) to pixels: (rows * side, columns * side, 3)."""
    rows, columns, channels = x.shape
    cells = x.reshape(rows, columns, channels // side**2, side, side)
    return cells.transpose(0, 3, 1, 4, 2).reshape(rows * side, columns * side, -1)
