"""The U-Net with local features, against the reference and without text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perco_engine.models.unet import UNet2DConditionModel

PARITY = Path(__file__).parent / "parity" / "pipeline_tiny"


def textless(**options: Any) -> UNet2DConditionModel:
    """A tiny U-Net as the embedded model's: no cross-attention, the estimate added to the output."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
        "mid_block_type": "UNetMidBlock2D",
        "local_features_channels": 5,
        "add_local_features": True,
    }
    unet: UNet2DConditionModel = UNet2DConditionModel(**{**defaults, **options}).eval()
    return unet


@torch.no_grad()
def test_equals_the_reference() -> None:
    unet = UNet2DConditionModel.from_pretrained(PARITY / "pipeline" / "unet", low_cpu_mem_usage=False)
    io = load_file(PARITY / "io.safetensors")
    output = unet(io["unet_sample"], io["unet_timestep"], io["unet_text"], local_features=io["unet_local"])
    torch.testing.assert_close(output.sample, io["unet_out"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("mid_block_type", ["UNetMidBlock2D", None])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (12, 8), (1, 9)])
@torch.no_grad()
def test_any_size_without_text(size: tuple[int, int], mid_block_type: str | None) -> None:
    unet = textless(mid_block_type=mid_block_type)
    output = unet(torch.randn(2, 4, *size), torch.tensor([3, 999]), local_features=torch.randn(2, 5, *size))
    assert output.sample.shape == (2, 4, *size)


@torch.no_grad()
def test_zero_last_layer_predicts_the_estimate() -> None:
    unet = textless()
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    features = torch.randn(1, 5, 2, 3)
    (output,) = unet(torch.randn(1, 4, 4, 6), 999, local_features=features, return_dict=False)
    assert torch.equal(output, features[:, :4].repeat_interleave(2, 2).repeat_interleave(2, 3))


@torch.no_grad()
def test_old_first_layer_is_unused_but_kept(tmp_path: Path) -> None:
    unet = textless()
    inputs = (torch.randn(1, 4, 4, 4), 7)
    features = torch.randn(1, 5, 4, 4)
    before = unet(*inputs, local_features=features).sample
    torch.nn.init.normal_(unet.conv_in.weight)
    assert torch.equal(unet(*inputs, local_features=features).sample, before)
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert torch.equal(again.conv_in.weight, unet.conv_in.weight)
    torch.testing.assert_close(again(*inputs, local_features=features).sample, before)
    assert (again.config.local_features_channels, again.config.add_local_features) == (5, True)
    assert again.config.block_out_channels == [8, 16, 16]


def test_gradients_reach_all_but_the_old_first_layer() -> None:
    unet = textless().train()
    unet.enable_gradient_checkpointing()
    unet(torch.randn(1, 4, 4, 4), 7, local_features=torch.randn(1, 5, 4, 4)).sample.sum().backward()
    without = {name for name, parameter in unet.named_parameters() if parameter.grad is None}
    assert without == {"conv_in.weight", "conv_in.bias"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"center_input_sample": True}, "center_input_sample"), ({"conv_in_kernel": 2}, "odd"),
        ({"local_features_channels": 3}, "at least 4"),
    ],
)  # fmt: skip
def test_configurations_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        textless(**options)
