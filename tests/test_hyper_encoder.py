"""The hyper-encoders against the reference, and their interface."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from perco_engine.errors import UnsupportedRatePoint
from perco_engine.models.hyper_encoder import ElicHyperEncoder, HificHyperEncoder, HyperEncoder
from perco_engine.rates import PERCO_SD, Grid, RatePoint

PARITY = Path(__file__).parent / "parity"
DESIGNS: dict[str, type[ElicHyperEncoder] | type[HificHyperEncoder]] = {
    "elic": ElicHyperEncoder,
    "hific": HificHyperEncoder,
}
SIDES = (64, 32, 16, 8)


def load(design: str, side: int) -> HyperEncoder:
    model: HyperEncoder = DESIGNS[design].from_pretrained(
        PARITY / f"hyper_encoder_{design}_{side}", low_cpu_mem_usage=False
    )
    return model


def full_size(design: str, side: int, codebook_size: int) -> HyperEncoder:
    """The published architecture, without memory for its weights."""
    with torch.device("meta"):
        model: HyperEncoder = DESIGNS[design](cfg_ss=side, cfg_cs=codebook_size)
    return model


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("design", DESIGNS)
@torch.no_grad()
def test_equals_the_reference(design: str, side: int) -> None:
    model = load(design, side)
    expected = load_file(PARITY / f"hyper_encoder_{design}_{side}" / "io.safetensors")
    stride = max(1, side // 16)
    output = model(expected["latents"])
    assert torch.equal(output.indices, expected["indices"].long())
    close(output.z[..., ::stride, ::stride], expected["z"])
    close(output.z_hat[..., ::stride, ::stride], expected["z_hat"])
    close(model.local_features((output.indices,), (64, 96)), output.z_hat)


@pytest.mark.parametrize("design", DESIGNS)
def test_full_size_keys_and_shapes_are_those_of_the_checkpoints(design: str) -> None:
    expected = json.loads((PARITY / f"{design}_8_256_full_keys.json").read_text())
    assert {key: list(value.shape) for key, value in full_size(design, 8, 256).state_dict().items()} == expected


@pytest.mark.parametrize(
    ("design", "side", "parameters"),
    [
        ("elic", 64, 4_100_960), ("elic", 32, 4_985_696), ("elic", 16, 5_870_432), ("elic", 8, 5_888_864),
        ("hific", 64, 6_072_424), ("hific", 32, 6_798_568), ("hific", 16, 9_577_960), ("hific", 8, 20_445_160),
    ],
)  # fmt: skip
def test_full_size_parameters(design: str, side: int, parameters: int) -> None:
    assert sum(p.numel() for p in full_size(design, side, 256).parameters()) == parameters


@pytest.mark.parametrize("point", PERCO_SD, ids=lambda point: str(point.bpp))
def test_published_rate_points_have_their_published_names(point: RatePoint) -> None:
    grid = point.grids[0]
    assert full_size("elic", 512 // grid.pixels_per_index, grid.codebook_size).rate_points == (point,)


def test_unpublished_rate_point_is_named_by_its_rate() -> None:
    assert full_size("elic", 32, 64).rate_points == (RatePoint(0.0234, (Grid(16, 64),)),)


@pytest.mark.parametrize("rows_columns", [(1, 1), (3, 5), (8, 9), (17, 2)])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("design", DESIGNS)
@torch.no_grad()
def test_any_size_gives_the_grid_of_the_rate_point(design: str, side: int, rows_columns: tuple[int, int]) -> None:
    model = load(design, side)
    rows, columns = rows_columns
    output = model(torch.randn(2, 4, rows, columns, generator=torch.Generator().manual_seed(0)))
    assert tuple(output.indices.shape[1:]) == model.rate_points[0].grids[0].shape(columns * 8, rows * 8)
    close(model.local_features((output.indices,), rows_columns), output.z_hat)


@pytest.mark.parametrize("design", DESIGNS)
@torch.no_grad()
def test_round_trip_through_a_folder(design: str, tmp_path: Path) -> None:
    model = load(design, 16)
    model.save_pretrained(tmp_path)
    again = DESIGNS[design].from_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    assert dict(again.config)["cfg_cs"] == model.config["cfg_cs"]
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_training_reaches_the_network_and_reports_the_commitment_loss() -> None:
    model = load("elic", 16).train()
    output = model(torch.randn(1, 4, 8, 8))
    output.z_hat.sum().backward()
    assert model.get_parameter("backbone.0.weight").grad is not None
    assert output.commitment_loss > 0


def test_other_rate_points_are_refused() -> None:
    model = load("elic", 16)
    with pytest.raises(UnsupportedRatePoint, match="level"):
        model(torch.zeros(1, 4, 8, 8), level=1)
    with pytest.raises(UnsupportedRatePoint, match="2"):
        model.local_features((torch.zeros(1, 2, 2), torch.zeros(1, 4, 4)), (8, 8))
    with pytest.raises(ValueError, match="cfg_ss"):
        full_size("elic", 24, 256)
