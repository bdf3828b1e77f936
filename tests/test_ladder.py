"""The ladder of residual quantizers."""

import pytest
import torch

from perco_engine.models.ladder import HyperLadder
from perco_engine.rates import Grid, RatePoint

GRIDS = ((32, 16), (16, 16), (8, 8))


@pytest.fixture
def ladder() -> HyperLadder:
    torch.manual_seed(0)
    model = HyperLadder(latent_channels=4, grids=GRIDS, width=8).eval()
    for level in model.levels:
        level.quantizer._codebook.embed.normal_()
        level.quantizer._codebook.initted.fill_(1)
        torch.nn.init.normal_(level.leave[-1].weight, std=0.05)
    return model


def test_rate_points(ladder: HyperLadder) -> None:
    grids = tuple(Grid(*grid) for grid in GRIDS)
    assert ladder.rate_points == (
        RatePoint(0.0039, grids[:1]), RatePoint(0.0195, grids[:2]), RatePoint(0.0664, grids[:3]),
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 12), (7, 5), (1, 1), (1, 9)])
def test_indices_decode_to_the_local_features_that_encoding_saw(ladder: HyperLadder, size: tuple[int, int]) -> None:
    latents = torch.randn(2, 4, *size)
    for level in range(3):
        output = ladder(latents, level)
        shapes = [grid.shape(size[1] * 8, size[0] * 8) for grid in ladder.rate_points[level].grids]
        assert [tuple(grid.shape[1:]) for grid in output.indices] == shapes
        assert output.z_hat.shape == (2, 5, *size)
        assert (output.z_hat[:, -1] == (level + 1) / 3).all()
        torch.testing.assert_close(ladder.local_features(output.indices, size), output.z_hat, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_lower_rate_point_is_a_prefix_of_a_higher_one(ladder: HyperLadder) -> None:
    latents = torch.randn(1, 4, 8, 8)
    low, high = ladder(latents, 0).indices, ladder(latents).indices
    assert len(low) == 1 and len(high) == 3
    assert torch.equal(low[0], high[0])


@torch.no_grad()
def test_each_code_is_the_nearest_of_its_codebook(ladder: HyperLadder) -> None:
    rung = ladder.levels[0]
    codes = rung.encode(torch.randn(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    quantized, indices, _ = rung.quantize(codes)
    distances = (codes[0].flatten(1).T[:, None] - rung.quantizer.codebook[None]).pow(2).sum(-1)
    assert torch.equal(indices.flatten(), distances.argmin(1))
    torch.testing.assert_close(quantized, rung.look_up(indices))
