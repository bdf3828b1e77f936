"""The choice of codes by distance and bits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import fill
from numpy.typing import NDArray
from PIL import Image

from perco_engine import bitstream, get_engine
from perco_engine.bitstream.entropy import CDF
from perco_engine.bitstream.prior import Prior
from perco_engine.choice import choose
from perco_engine.models.ladder import HyperLadder
from perco_engine.rates import Grid
from perco_engine.tensors import to_tensor
from perco_engine.training.prior import PriorNetwork

BATCH, ROWS, COLUMNS = 2, 9, 13


def made(*prior_weights: float) -> tuple[HyperLadder, Prior, torch.Tensor]:
    """A ladder, a prior that expects some codes more than others, and latents."""
    torch.manual_seed(0)
    grids = ((32, 16), (16, 16), (8, 16))
    ladder = HyperLadder(latent_channels=4, grids=grids, width=8, prior_weights=prior_weights).eval()
    fill(ladder)
    for level in ladder.levels:
        torch.nn.init.normal_(level.leave[-1].weight, std=0.05)
    network = PriorNetwork([Grid(*grid) for grid in grids])
    for level in network.levels:
        level["out.bias"].data.normal_(std=3)
        level["out.weight"].data.mul_(20)
    return ladder, Prior(network.integers()), torch.randn(BATCH, 4, ROWS, COLUMNS)


def bits_of_all(prior: Prior, ladder: HyperLadder, grids: list[NDArray[np.int32]]) -> list[NDArray[np.float64]]:
    """What each code of each cell, (rows, columns, size), would cost, given the indices before it in the stream."""
    costs = [
        np.zeros((*grid.shape, len(rung.quantizer.codebook))) for grid, rung in zip(grids, ladder.levels, strict=True)
    ]

    def told(level: int, cells: tuple[slice, slice], cdf: CDF) -> NDArray[np.int32]:
        costs[level][cells] = -np.log2(np.diff(cdf, axis=1) / 65536).reshape(costs[level][cells].shape)
        return grids[level][cells].ravel()

    list(prior.walk(ladder.rate_points[len(grids) - 1], COLUMNS * 8, ROWS * 8, told))
    return costs


@torch.no_grad()
def test_each_code_is_the_cheapest_given_those_before_it() -> None:
    weights = (0.7, 0.2)
    ladder, prior, latents = made(*weights)
    chosen = choose(ladder, prior, latents, None)
    assert [tuple(grid.shape) for grid in chosen] == [(BATCH, 3, 4), (BATCH, 5, 7), (BATCH, ROWS, COLUMNS)]
    changed = 0
    for k in range(BATCH):
        bits = bits_of_all(prior, ladder, [grid[k].numpy().astype(np.int32) for grid in chosen])
        estimate = torch.zeros(1, 4, ROWS, COLUMNS)
        for level, rung in enumerate(ladder.levels):
            codes = rung.encode(latents[k : k + 1], estimate)[0].movedim(0, -1)
            squares = (codes[:, :, None] - rung.quantizer.codebook).square().sum(-1)
            weight = weights[level] if level < 2 else 0.0  # the last one chooses alone
            cheapest = (squares + weight * torch.from_numpy(bits[level])).argmin(-1)
            assert torch.equal(chosen[level][k], cheapest)
            changed += int((cheapest != squares.argmin(-1)).sum())
            estimate = rung.decode(rung.look_up(chosen[level][k : k + 1]), estimate)
    assert changed > 5


@torch.no_grad()
@pytest.mark.parametrize("level", [0, 1, 2])
def test_without_weights_or_without_a_prior_the_ladder_chooses_alone(level: int) -> None:
    for weights, with_prior in (((), True), ((0.5, 0.5), False)):
        ladder, prior, latents = made(*weights)
        alone = ladder(latents, level).indices
        assert len(alone) == level + 1
        chosen = choose(ladder, prior if with_prior else None, latents, level)
        assert all(torch.equal(a, b) for a, b in zip(chosen, alone, strict=True))


@torch.no_grad()
def test_a_lower_rate_point_is_a_prefix_of_a_higher_one() -> None:
    ladder, prior, latents = made(0.7, 0.2)
    low, high = choose(ladder, prior, latents, 0), choose(ladder, prior, latents, 2)
    assert len(low) == 1 and torch.equal(low[0], high[0])


def test_files_of_the_lowest_rate_are_shorter_than_with_the_nearest_codes(photo: Image.Image) -> None:
    engine, image = get_engine(), photo.resize((768, 512))
    data = engine.encode(image, bpp=0.002)
    (nearest,) = engine.pipeline.encode_image(to_tensor([image]), 0)
    codes = replace(engine.codes(data), indices=(nearest[0].numpy().astype(np.int32),))
    assert len(data) < len(bitstream.pack(codes, engine.rate_points, prior=engine.prior))
