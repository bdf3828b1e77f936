"""The small autoencoder of the embedded model: linear algebra first, a network for what that leaves.

Both halves are the sum of a linear map of 8x8 patches and a convolutional network.  The linear maps are solved, not
trained (`fit_analysis`: whitened principal components; `fit_synthesis`: least squares over 3x3 patches), so that the
network starts from a picture instead of from noise, and so that a preview at 1/8, 1/4 or 1/2 size is one small
convolution (`decode_preview`).  All heavy layers work at 1/8 and 1/4 of the picture's size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..rates import LATENT_PX

RIDGE = 1e-4
"""What is added to the diagonal in the least squares of `fit_synthesis`."""

TILE = 192
"""Latents a side, margins included, that are encoded or decoded at once; larger pictures go tile by tile."""

MARGIN = 16
"""Latents around a tile that are computed and thrown away: more than the networks see, so that tiles leave no seam."""


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))), 3x3; no normalisation, so that what a pixel becomes is its neighbours' matter."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = zero_conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.conv2(F.silu(self.conv1(F.silu(x))))
        return x + change


def zero_conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3x3 convolution that starts at zero, so that a branch that ends in it adds nothing at first."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


def tiles_with_margins(
    rows: int, columns: int, side: int, margin: int
) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Tiles of side x side cells at most, margins included: (rows, columns) of each, and of what is kept of it.

    What is kept covers every cell once; a grid of no more than side**2 cells is one tile.
    """
    if rows * columns <= side**2:
        whole = slice(0, rows), slice(0, columns)
        yield whole, whole
        return
    core = side - 2 * margin
    for top in range(0, rows, core):
        for left in range(0, columns, core):
            bottom, right = min(top + core, rows), min(left + core, columns)
            outer = (
                slice(max(top - margin, 0), min(bottom + margin, rows)),
                slice(max(left - margin, 0), min(right + margin, columns)),
            )
            yield outer, (slice(top, bottom), slice(left, right))


def scaled(side: slice, factor: int, origin: int = 0) -> slice:
    """A stretch of cells, counted from `origin`, as one of what each has `factor` of."""
    return slice((side.start - origin) * factor, (side.stop - origin) * factor)


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, cell_in: int, cell_out: int) -> Tensor:
    """function(x), computed tile by tile where x is large: the same up to rounding, in bounded memory.

    x: (b, c, rows * cell_in, columns * cell_in); the result has cell_out pixels for each of these cells and side.
    """
    rows, columns = x.shape[-2] // cell_in, x.shape[-1] // cell_in
    if rows * columns <= TILE**2:
        return function(x)
    result: Tensor | None = None
    for (top, left), (inner_top, inner_left) in tiles_with_margins(rows, columns, TILE, MARGIN):
        tile = function(x[..., scaled(top, cell_in), scaled(left, cell_in)])
        if result is None:
            result = tile.new_empty((*tile.shape[:2], rows * cell_out, columns * cell_out))
        own = tile[..., scaled(inner_top, cell_out, top.start), scaled(inner_left, cell_out, left.start)]
        result[..., scaled(inner_top, cell_out), scaled(inner_left, cell_out)] = own
    assert result is not None
    return result


@dataclass
class AutoencoderOutput(BaseOutput):
    """What `encode` returns: `latents` (b, latent_channels, h/8, w/8), about unit variance a channel."""

    latents: Tensor


@dataclass
class DecoderOutput(BaseOutput):
    """What `decode` returns: `sample` (b, 3, h, w), about -1..1."""

    sample: Tensor


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Autoencoder with a downsampling factor of 8.

    latent_channels: channels of the latents.
    width: channels of the network at 1/8 of the size; it has 2/5 of them at 1/4.
    depth: residual blocks of the decoder at each of the two sizes; the encoder has two thirds of them.
    scaling_factor: kept for the pipeline; the latents have unit variance by construction.
    """

    @register_to_config
    def __init__(
        self, latent_channels: int = 16, width: int = 160, depth: int = 3, scaling_factor: float = 1.0
    ) -> None:
        super().__init__()
        fine = width * 2 // 5
        encoder_depth = max(1, depth * 2 // 3)
        self.analysis = nn.Conv2d(3, latent_channels, LATENT_PX, stride=LATENT_PX)
        self.synthesis = nn.Conv2d(latent_channels, 3 * LATENT_PX**2, 3, padding=1, padding_mode="replicate")
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, fine, 3, padding=1),
            *(ResidualBlock(fine) for _ in range(encoder_depth)),
            nn.Conv2d(fine, width, 3, stride=2, padding=1),
            *(ResidualBlock(width) for _ in range(encoder_depth)),
            nn.SiLU(),
            zero_conv(width, latent_channels),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            *(ResidualBlock(width) for _ in range(depth)),
            nn.Conv2d(width, 4 * fine, 3, padding=1),
            nn.PixelShuffle(2),
            *(ResidualBlock(fine) for _ in range(depth)),
            nn.Conv2d(fine, 4 * 24, 3, padding=1),
            nn.PixelShuffle(2),
            ResidualBlock(24),
            nn.Conv2d(24, 4 * 8, 3, padding=1),
            nn.PixelShuffle(2),
            nn.SiLU(),
            zero_conv(8, 3),
        )

    @apply_forward_hook
    def encode(self, x: Tensor) -> AutoencoderOutput:
        """Picture (b, 3, h, w) in -1..1, h and w multiples of 8, to latents (b, latent_channels, h/8, w/8)."""
        return AutoencoderOutput(
            latents=in_tiles(lambda part: self.analysis(part) + self.encoder(part), x, LATENT_PX, 1)
        )

    @apply_forward_hook
    def decode(self, z: Tensor) -> DecoderOutput:
        """Latents (b, latent_channels, h/8, w/8) to a picture (b, 3, h, w), about -1..1."""
        return DecoderOutput(
            sample=in_tiles(
                lambda part: F.pixel_shuffle(self.synthesis(part), LATENT_PX) + self.decoder(part), z, 1, LATENT_PX
            )
        )

    @apply_forward_hook
    def decode_preview(self, z: Tensor, reduction: int) -> Tensor:
        """The linear part alone, at 1/reduction of the full size (reduction: 1, 2, 4 or 8).

        Latents (b, latent_channels, h/8, w/8) to (b, 3, h/reduction, w/reduction).  Averaging a linear map's output
        is averaging its weights, so a smaller preview costs less, not more.
        """
        side = LATENT_PX // reduction
        weight = self.synthesis.weight.unflatten(0, (3, side, reduction, side, reduction)).mean((2, 4)).flatten(0, 2)
        bias = self.synthesis.bias
        assert bias is not None
        bias = bias.unflatten(0, (3, side, reduction, side, reduction)).mean((2, 4)).flatten()
        return F.pixel_shuffle(F.conv2d(F.pad(z, (1, 1, 1, 1), mode="replicate"), weight, bias), side)

    @torch.no_grad()
    def fit_analysis(self, patches: Tensor) -> Tensor:
        """Sets the encoder's linear map to the whitened principal components of `patches` (n, 3, 8, 8) in -1..1.

        Returns the standard deviation of each component, (latent_channels,), largest first.
        """
        flat = patches.flatten(1).double()
        mean = flat.mean(0)
        values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
        order = values.argsort(descending=True)[: self.config.latent_channels]
        deviation = values[order].sqrt()
        weight = (vectors[:, order] / deviation).T
        self.analysis.weight.copy_(weight.view_as(self.analysis.weight))
        assert self.analysis.bias is not None
        self.analysis.bias.copy_(-weight @ mean)
        spread: Tensor = deviation.float()
        return spread

    @torch.no_grad()
    def fit_synthesis(self, latents: Tensor, pictures: Tensor) -> None:
        """Sets the decoder's linear map to the least-squares one from 3x3 latents to the 8x8 pixels in their middle.

        latents: (b, latent_channels, h/8, w/8); pictures: (b, 3, h, w) in -1..1.
        """
        inputs = F.unfold(F.pad(latents, (1, 1, 1, 1), mode="replicate"), 3)  # (b, 9 c, h/8 w/8)
        x = inputs.transpose(1, 2).flatten(0, 1).double()
        y = F.pixel_unshuffle(pictures, LATENT_PX).flatten(2).transpose(1, 2).flatten(0, 1).double()
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        gram = x.T @ x / len(x)
        gram += RIDGE * torch.eye(len(gram), dtype=gram.dtype)
        solution = torch.linalg.solve(gram, x.T @ y / len(x)).T
        self.synthesis.weight.copy_(solution[:, :-1].reshape(self.synthesis.weight.shape))
        assert self.synthesis.bias is not None
        self.synthesis.bias.copy_(solution[:, -1])
