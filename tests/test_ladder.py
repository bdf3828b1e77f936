"""The ladder of residual quantizers."""

from pathlib import Path

import pytest
import torch
from conftest import fill

from perco_engine.models.ladder import HyperLadder
from perco_engine.rates import Grid, RatePoint

GRIDS = ((32, 16), (16, 16), (8, 8))


@pytest.fixture
def ladder() -> HyperLadder:
    torch.manual_seed(0)
    model = HyperLadder(latent_channels=4, grids=GRIDS, width=8).eval()
    fill(model)
    for level in model.levels:
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
        assert (output.z_hat[:, -1] == (level + 1) / 5).all()
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


@torch.no_grad()
def test_a_code_that_costs_less_is_chosen_where_it_is_nearly_as_near(ladder: HyperLadder) -> None:
    rung = ladder.levels[0]
    rung.rate_weight = 0.5
    codebook = rung.quantizer._codebook
    codebook.embed.copy_(torch.arange(16.0)[None, :, None].expand(1, 16, 4))
    codebook.cluster_size.fill_(1).view(-1)[3] = 49  # 0.39 bits, and 6 of each other one
    # Code 3 is nearer than code 4 up to 3.5 by distance (4 channels: 4 x distance^2), and up to x where
    # 4 (x - 3)^2 + 0.5 x 0.39 = 4 (4 - x)^2 + 0.5 x 6, by cost: 3.5 + (3.0 - 0.1926) / 8 = 3.8509
    codes = torch.tensor([3.4, 3.6, 3.84, 3.86, 5.0]).expand(1, 4, 5).unsqueeze(2)
    assert rung.quantize(codes)[1].flatten().tolist() == [3, 3, 3, 4, 5]


def test_rate_weights_are_shares_of_the_variance_of_codes(ladder: HyperLadder, tmp_path: Path) -> None:
    codebook = ladder.levels[1].quantizer._codebook
    codebook.embed.zero_()
    codebook.embed[0, :2, 0] = torch.tensor([1.0, -1.0])
    codebook.cluster_size.zero_()[0, :3] = torch.tensor([3.0, 1.0, 4.0])  # mean 0.25, variance 4/8 - 0.0625
    ladder.weigh_rates((0.0, 0.1, 0.0))
    assert ladder.config.rate_weights == pytest.approx([0, 0.04375, 0])
    ladder.save_pretrained(tmp_path)
    again = HyperLadder.from_pretrained(tmp_path)
    assert [rung.rate_weight for rung in again.levels] == pytest.approx([0, 0.04375, 0])


def test_rate_points_may_have_names() -> None:
    model = HyperLadder(latent_channels=4, grids=GRIDS, width=8, bpp=(0.002, 0.01, 0.05))
    assert [point.bpp for point in model.rate_points] == [0.002, 0.01, 0.05]
