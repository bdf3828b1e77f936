"""The prior in training computes what the prior in files does."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from perco_engine.bitstream.prior import Prior
from perco_engine.errors import TrainingError
from perco_engine.rates import Grid, ladder
from perco_engine.training.prior import PriorNetwork


@torch.no_grad()
def test_the_trained_network_is_the_integer_one() -> None:
    torch.manual_seed(0)
    point = ladder(Grid(32, 16), Grid(16, 24), Grid(8, 16))[-1]
    network = PriorNetwork(list(point.grids))
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    prior = Prior(network.integers())
    grids = [
        torch.randint(grid.codebook_size, (1, *shape))
        for grid, shape in zip(point.grids, point.shapes(96, 64), strict=True)
    ]
    ideal_bits: list[list[float]] = [[0.0] * 4 for _ in grids]

    def code(level: int, cells: tuple[slice, slice], cdf: NDArray[np.int32]) -> NDArray[np.int32]:
        indices = grids[level][0].numpy()[cells].reshape(-1).astype(np.int32)
        rows = np.arange(len(indices))
        phase = [(0, 0), (1, 1), (0, 1), (1, 0)].index((cells[0].start % 2, cells[1].start % 2))
        ideal_bits[level][phase] = float(np.mean(16 - np.log2(cdf[rows, indices + 1] - cdf[rows, indices])))
        return indices

    assert [grid.shape for grid in prior.walk(point, 96, 64, code)] == list(point.shapes(96, 64))
    for phase in range(4):
        told = [float(bits) for bits in network.bits(grids, [phase] * len(grids))]
        # The floor under the frequencies, and logits in 1/256 of a bit, are all that training leaves out.
        np.testing.assert_allclose([bits[phase] for bits in ideal_bits], told, atol=0.05)


def test_training_goes_on_from_the_integers_of_a_prior() -> None:
    grids = [Grid(64, 16), Grid(32, 32)]
    torch.manual_seed(0)
    first, second = PriorNetwork(grids), PriorNetwork(grids)
    assert not np.array_equal(first.integers()["1.out.weight"], second.integers()["1.out.weight"])
    second.load_integers(first.integers())
    for name, tensor in first.integers().items():
        np.testing.assert_array_equal(second.integers()[name], tensor)
    with pytest.raises(TrainingError, match="of another ladder"):
        PriorNetwork(grids[:1]).load_integers(first.integers())
