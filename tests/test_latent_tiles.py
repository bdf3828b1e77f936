"""Tiles of latents: where they lie, what they count for, and that blending them leaves no seam."""

from itertools import pairwise

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from perco_engine import get_engine, tensors
from perco_engine.latent_tiles import LatentTiles
from perco_engine.models.unet import UNet2DConditionModel

GRIDS = [(135, 240, 96, 32, 1), (136, 240, 96, 32, 8), (97, 5, 96, 32, 1), (104, 104, 96, 32, 8), (50, 81, 16, 15, 1)]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_tiles_of_a_1080p_picture_lie_evenly() -> None:
    tiles = LatentTiles(135, 240, 96, 32)
    assert (tiles.height, tiles.width, tiles.tops, tiles.lefts) == (96, 96, [0, 39], [0, 48, 96, 144])
    assert len(tiles) == 8
    assert LatentTiles(136, 240, 96, 32, 8).tops == [0, 40]
    assert LatentTiles(136, 256, 96, 32, 8).lefts == [0, 48, 104, 160]


def test_weights_are_those_worked_out_by_hand() -> None:
    """Two tiles of 4 on 6 latents: distances from the border .5, 1.5, 1.5, .5, over their sums .5 1.5 2 2 1.5 .5."""
    down, across = LatentTiles(6, 3, 4, 2).weights()
    assert down.tolist() == [[1, 1, 0.75, 0.25], [0.25, 0.75, 1, 1]]
    assert across.tolist() == [[1, 1, 1]]
    finer, _ = LatentTiles(6, 3, 4, 2).weights(scale=2)
    assert finer[0].tolist() == [1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125]


@pytest.mark.parametrize("grid", GRIDS)
def test_tiles_cover_the_grid_overlap_and_sum_to_one(grid: tuple[int, int, int, int, int]) -> None:
    rows, columns, side, overlap, multiple = grid
    tiles = LatentTiles(*grid)
    for starts, length, tile in ((tiles.tops, rows, tiles.height), (tiles.lefts, columns, tiles.width)):
        assert starts[0] == 0
        assert starts[-1] + tile == length
        assert all(start % multiple == 0 for start in starts)
        assert all(0 < b - a <= side - overlap for a, b in pairwise(starts))
    down, across = tiles.weights()
    total = torch.zeros(rows, columns)
    for row, top in enumerate(tiles.tops):
        for column, left in enumerate(tiles.lefts):
            total[top : top + tiles.height, left : left + tiles.width] += down[row, :, None] * across[column]
    torch.testing.assert_close(total, torch.ones(rows, columns), rtol=0, atol=1e-5)
    assert min(down.min(), across.min()) > 0


def test_what_does_not_depend_on_the_tile_comes_back_as_it_was() -> None:
    tiles = LatentTiles(21, 34, 8, 3)
    x = noise(2, 3, 21, 34)
    torch.testing.assert_close(tiles.blend(lambda tile: tile, x, at_once=3), x, rtol=0, atol=1e-5)
    enlarged = tiles.blend(lambda tile: F.interpolate(tile, scale_factor=8.0), x)
    torch.testing.assert_close(enlarged, F.interpolate(x, scale_factor=8.0), rtol=0, atol=1e-5)
    reduced = tiles.blend(lambda tile: F.avg_pool2d(tile, 8), F.interpolate(x, scale_factor=8.0))
    torch.testing.assert_close(reduced, x, rtol=0, atol=1e-5)


def test_a_disagreement_of_tiles_becomes_a_slope() -> None:
    """Tiles that say 0, 1, 2, ...: the blend may step by no more than a ramp over the overlap allows."""
    said = iter(range(100))
    blended = LatentTiles(8, 72, 24, 8).blend(lambda tile: torch.full_like(tile, next(said)), torch.zeros(1, 1, 8, 72))
    row = blended[0, 0, 0]
    assert (row[0], row[-1]) == (0, 3)
    assert row.diff().min() >= 0
    assert row.diff().max() <= 1 / 8 + 1e-6


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_coarse_local_features_stay_on_their_squares(factor: int) -> None:
    tiles = LatentTiles(5 * factor, 9 * factor, 2 * factor, factor, factor)
    latents, features = noise(1, 2, 5 * factor, 9 * factor), noise(1, 3, 5, 9)

    def upsampled(sample: Tensor, coarse: Tensor) -> Tensor:
        assert coarse.shape[-2:] == (2, 2)
        return F.interpolate(coarse, size=sample.shape[-2:])

    whole = F.interpolate(features, scale_factor=float(factor))
    torch.testing.assert_close(tiles.blend(upsampled, latents, features, at_once=4), whole, rtol=0, atol=1e-5)


def test_numbers_that_do_not_fit() -> None:
    for numbers in ((8, 8, 4, 4), (8, 8, 4, 0), (0, 8, 4, 2), (8, 8, 4, 2, 0)):
        with pytest.raises(ValueError, match=r"overlap by 1 latent at least.*not \d of \d"):
            LatentTiles(*numbers)
    for numbers in ((12, 16, 8, 4, 8), (16, 16, 12, 8, 8), (16, 16, 16, 4, 8)):
        with pytest.raises(ValueError, match="multiples of 8"):
            LatentTiles(*numbers)
    with pytest.raises(ValueError, match="3x5 cells cannot be cut along with 16x24 latents"):
        LatentTiles(16, 24, 16, 8, 8).blend(lambda sample, features: sample, noise(1, 1, 16, 24), noise(1, 1, 3, 5))


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """A U-Net with attention, of random weights."""
    torch.manual_seed(0)
    model: UNet2DConditionModel = UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2, local_features_channels=6,
    ).eval()  # fmt: skip
    return model


@torch.no_grad()
def test_a_u_net_s_tiles(unet: UNet2DConditionModel) -> None:
    """One tile is the network itself; many are each what the network says of them alone, however many go together."""
    sample, features, text = noise(2, 4, 24, 40), noise(2, 6, 6, 10), noise(2, 3, 8)

    def predict(sample: Tensor, features: Tensor) -> Tensor:
        output = unet(sample, 500, text.repeat(len(sample) // 2, 1, 1), local_features=features)
        return torch.as_tensor(output.sample)

    whole = predict(sample, features)
    assert torch.equal(LatentTiles(24, 40, 40, 16, 4).blend(predict, sample, features), whole)
    tiles = LatentTiles(24, 40, 16, 8, 4)
    one, three, all_at_once = (tiles.blend(predict, sample, features, at_once=n) for n in (1, 3, 100))
    torch.testing.assert_close(three, one, rtol=0, atol=1e-5)
    torch.testing.assert_close(all_at_once, one, rtol=0, atol=1e-5)
    corner = predict(sample[..., :16, :16], features[..., :4, :4])
    torch.testing.assert_close(one[..., :8, :8], corner[..., :8, :8], rtol=0, atol=1e-5)  # no other tile reaches there
    assert not torch.allclose(one, whole, atol=1e-3)


def test_the_embedded_model_s_tiles_leave_no_seam(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its picture in tiles is its picture, and where tiles end the difference jumps no more than it does elsewhere."""
    pipeline = get_engine(device="cpu").pipeline
    picture = tensors.to_tensor([photo.resize((768, 512))])
    indices = pipeline.encode_image(picture, 1)
    decoded = []
    for side in (pipeline.tile_latents, 48):
        monkeypatch.setattr(pipeline, "tile_latents", side)
        noise_source = torch.Generator().manual_seed(0)
        decoded.append(pipeline.decode_indices(indices, 512, 768, generator=noise_source, output_type="pt"))
    error = decoded[1] - decoded[0]
    assert error.abs().mean() < 1 / 255
    assert error.abs().max() > 0
    tiles = LatentTiles(64, 96, 48, 32)
    for axis, starts, end in ((2, tiles.tops, 64), (3, tiles.lefts, 96)):
        jumps = error.diff(dim=axis).abs().mean([k for k in range(4) if k != axis])
        borders = sorted({8 * line - 1 for start in starts for line in (start, start + 48)} - {-1, 8 * end - 1})
        assert len(borders) >= 2
        assert jumps[borders].mean() < jumps.quantile(0.99)
