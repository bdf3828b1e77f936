"""Overlapping tiles of a picture's latents, each computed alone and blended into one.

A U-Net with attention is at home at the size that it was trained on, its work grows with the square of the latents,
and its memory with every one of them.  Large pictures therefore go through it in tiles, and in every denoising step the
predictions of all tiles are averaged, with weights that fall towards the tiles' borders, so that the scheduler steps
once, on the whole picture: what two tiles share, they agree on, and no seam grows.  The autoencoder's tiles are blended
the same way.

Source: MultiDiffusion, Bar-Tal et al., ICML 2023 (arXiv 2302.08113), with weights that are products of two ramps; it
averages the latents after the step, which for a step that is linear in the prediction is the same.
"""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

ATTENTION_TILE = 96
"""Latents a side of a tile for networks with attention: 768 pixels, what Stable Diffusion 2.1 was trained on."""

CONVOLUTION_TILE = 512
"""Latents a side of a tile for a U-Net without attention, which needs tiles for the sake of memory alone."""

OVERLAP = 32
"""Latents that neighbouring tiles share at least."""

LATENTS_AT_ONCE = 8 * ATTENTION_TILE**2
"""Latents that go through the U-Net together when there are tiles: four of them, with and without text."""


class LatentTiles:
    """Tiles of equal size that cover a grid of rows x columns latents.

    side: rows and columns of a tile; a smaller grid is one tile.
    overlap: what neighbours share at least, 1..side - 1; they are spread evenly, so that none is thinner than others.
    multiple: tiles start at multiples of it and their sides are such, so that coarser local features are cut between
        their cells; side, overlap, and the grid's rows and columns must be multiples too.

    Raises ValueError for other numbers.
    """

    def __init__(self, rows: int, columns: int, side: int, overlap: int, multiple: int = 1) -> None:
        if min(rows, columns, multiple) < 1 or not 0 < overlap < side:
            raise ValueError(f"tiles overlap by 1 latent at least and by less than their side, not {overlap} of {side}")
        if any(number % multiple for number in (rows, columns, side, overlap)):
            raise ValueError(
                f"{rows}x{columns} latents cannot be cut into tiles of {side} that overlap by {overlap}: all four "
                f"must be multiples of {multiple}, the latents that one code stands for"
            )
        self.rows, self.columns, self.overlap, self.multiple = rows, columns, overlap, multiple
        self.height, self.width = min(side, rows), min(side, columns)
        self.tops = _starts(rows, self.height, overlap, multiple)
        self.lefts = _starts(columns, self.width, overlap, multiple)

    def __len__(self) -> int:
        """How many tiles there are."""
        return len(self.tops) * len(self.lefts)

    def weights(self, scale: int = 1) -> tuple[Tensor, Tensor]:
        """What tiles count for, along rows and along columns, float32; at every place of the grid they sum to one.

        scale: entries of the weights for each latent.

        Returns (len(tops), height * scale) and (len(lefts), width * scale); a tile's weights are the outer product.
        """
        return (
            _ramps(self.tops, self.rows, self.height, self.overlap, scale),
            _ramps(self.lefts, self.columns, self.width, self.overlap, scale),
        )

    def blend(self, function: Callable[..., Tensor], *inputs: Tensor, at_once: int = 1) -> Tensor:
        """function(*inputs), computed tile by tile and blended; a single tile is the function itself.

        function: takes tiles of the inputs, (n * b, c, ...) with one tile of all b pictures after the other, and
            returns (n * b, c', height * scale, width * scale) for any whole scale.
        inputs: (b, c, rows * q / multiple, columns * q / multiple) for any whole q, each its own.
        at_once: tiles that go through the function together at most.

        Returns (b, c', rows * scale, columns * scale) of the function's dtype; sums are kept in float32.
        Raises ValueError for inputs that cannot be cut between their cells.
        """
        for x in inputs:
            if x.shape[-2] * self.multiple % self.rows or x.shape[-1] * self.multiple % self.columns:
                raise ValueError(
                    f"{x.shape[-2]}x{x.shape[-1]} cells cannot be cut along with {self.rows}x{self.columns} latents"
                )
        if len(self) == 1:
            return function(*inputs)
        corners = list(product(enumerate(self.tops), enumerate(self.lefts)))
        result: Tensor | None = None
        for first in range(0, len(corners), at_once):
            some = corners[first : first + at_once]
            tiles = function(*(torch.cat([self._cut(x, top, left) for (_, top), (_, left) in some]) for x in inputs))
            scale = tiles.shape[-2] // self.height
            if result is None:
                size = self.rows * scale, self.columns * scale
                result = tiles.new_zeros((len(tiles) // len(some), tiles.shape[1], *size), dtype=torch.float32)
                down, across = (ramps.to(tiles.device) for ramps in self.weights(scale))
            for ((row, top), (column, left)), tile in zip(some, tiles.chunk(len(some)), strict=True):
                weighted = tile.float() * down[row, :, None] * across[column]
                self._cut(result, top, left).add_(weighted)
        assert result is not None
        return result.to(tiles.dtype)

    def _cut(self, x: Tensor, top: int, left: int) -> Tensor:
        """The part of x (..., rows * p, columns * p) under one tile, for any p that keeps cells whole."""
        rows, columns = x.shape[-2:]
        return x[
            ...,
            top * rows // self.rows : (top + self.height) * rows // self.rows,
            left * columns // self.columns : (left + self.width) * columns // self.columns,
        ]


def _starts(length: int, side: int, overlap: int, multiple: int) -> list[int]:
    """Where tiles of `side` start on an axis of `length`: evenly, at multiples, from end to end."""
    if length <= side:
        return [0]
    last = -(-(length - overlap) // (side - overlap)) - 1
    return [k * ((length - side) // multiple) // last * multiple for k in range(last + 1)]


def _ramps(starts: list[int], length: int, side: int, overlap: int, scale: int) -> Tensor:
    """(len(starts), side * scale) float32: weights that rise over the overlap, and sum to one wherever tiles lie."""
    side *= scale
    middles = torch.arange(side, dtype=torch.float64) + 0.5
    rise = torch.minimum(middles, side - middles).clamp(max=overlap * scale)
    total = torch.zeros(length * scale, dtype=torch.float64)
    for start in starts:
        total[start * scale : start * scale + side] += rise
    return torch.stack([rise / total[start * scale : start * scale + side] for start in starts]).float()
