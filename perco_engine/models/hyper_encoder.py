"""The hyper-encoders of PerCo (SD): latents -> z, one vector a square of the picture -> an index into a codebook.

    latents (b, 4, h/8, w/8) ─> analyse ─> z (b, 320, r, c) ─> quantizer ─> indices (b, r, c)
                                                                  └───────> z_hat (b, 320, r, c), the local features

Two designs with one interface, which the embedded model's ladder has too: the ELIC-style one (residual bottlenecks and
attention blocks; the published checkpoints) and the HiFiC-style one (channel norm; the first release).  On disk both
are called "HyperEncoder".  The names of the submodules are those of the checkpoints.

Source: Careil et al., ICLR 2024 (arXiv 2310.10325); Körber et al., arXiv 2409.20255; ELIC: He et al., CVPR 2022;
attention block: Cheng et al., CVPR 2020; HiFiC: Mentzer et al., NeurIPS 2020; quantizer: Yu et al., ICLR 2022.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from ..errors import UnsupportedRatePoint
from ..rates import LATENT_PX, REFERENCE_SIDE_PX, RatePoint, of_hyper_encoder

LATENT_SIDE = REFERENCE_SIDE_PX // LATENT_PX
"""The side of the latents of a picture of that size, whose grid of codes has cfg_ss a side."""


@dataclass
class HyperEncoderOutput(BaseOutput):
    """What a hyper-encoder makes of latents (b, c, h/8, w/8).

    z: what is quantized: (b, M, r, c) before the codebook; a ladder gives the latents.
    z_hat: the local features that the indices stand for: (b, M, r, c); a ladder gives (b, C + 1, h/8, w/8).
    indices: (b, r, c) int64; a ladder gives a tuple of grids, coarse to fine.
    commitment_loss: () float32, how far z is from its codes; zero outside of training, None for a ladder.
    """

    z: Tensor
    z_hat: Tensor
    indices: Tensor | tuple[Tensor, ...]
    commitment_loss: Tensor | None = None


class HyperEncoder(ModelMixin, ConfigMixin):
    """What both designs share: the quantizer, its inverse, and the rate point.

    cfg_ss: rows and columns of the grid of codes for a 512x512 picture: 64, 32, 16 or 8.
    cfg_cs: the size of the codebook.
    """

    def __init__(self, cfg_ss: int, cfg_cs: int, channels: int, codebook_dim: int) -> None:
        super().__init__()
        if cfg_ss not in (64, 32, 16, 8):
            raise ValueError(f"cfg_ss must be 64, 32, 16 or 8, not {cfg_ss!r}")
        self.quantizer = VectorQuantize(
            dim=channels,
            codebook_size=cfg_cs,
            codebook_dim=codebook_dim,
            use_cosine_sim=True,
            accept_image_fmap=True,
            rotation_trick=False,
        )
        # A vector of one on disk; a scalar in newer releases of the library, which reads either.
        self.quantizer._codebook.initted = torch.ones(1)

    @property
    def downsampling_factor(self) -> int:
        """How many latents a side one index stands for: 1, 2, 4 or 8."""
        return LATENT_SIDE // int(self.config.cfg_ss)

    @property
    def rate_points(self) -> tuple[RatePoint, ...]:
        """The one rate point of this model, under its published name where it has one."""
        return of_hyper_encoder(self.config)

    def analyse(self, latents: Tensor) -> Tensor:
        """Latents (b, in_channels, h/8, w/8) to z (b, M, r, c); r and c are h/8 and w/8 over the factor, rounded up."""
        raise NotImplementedError

    def forward(self, latents: Tensor, level: int | None = None) -> HyperEncoderOutput:
        """Latents (b, in_channels, h/8, w/8), any size, to z, z_hat (b, M, r, c) and indices (b, r, c).

        level: the rate point; there is one, so 0 or None.

        Raises UnsupportedRatePoint for another one.
        """
        if level not in (0, None):
            raise UnsupportedRatePoint(f"this hyper-encoder has one rate point, so level must be 0, not {level!r}")
        z = self.analyse(latents)
        z_hat, indices, loss = self.quantizer(z)
        return HyperEncoderOutput(z=z, z_hat=z_hat, indices=indices, commitment_loss=loss.sum())

    def local_features(self, indices: tuple[Tensor, ...], latent_size: tuple[int, int]) -> Tensor:
        """The z_hat that the indices stand for.

        indices: one grid (b, r, c), 0..cfg_cs - 1; latent_size: (h/8, w/8), here unused: the U-Net upsamples.

        Returns (b, M, r, c).  Raises UnsupportedRatePoint for more or fewer grids than one.
        """
        if len(indices) != 1:
            raise UnsupportedRatePoint(f"this hyper-encoder has one grid of codes, not {len(indices)}")
        codes = self.quantizer.codebook[indices[0].long()]
        features: Tensor = self.quantizer.project_out(codes).movedim(-1, 1)
        return features


class ResidualBottleneck(nn.Module):
    """x + (1x1 to half, ReLU, 3x3, ReLU, 1x1 back)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = bottleneck(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        return torch.add(self.layers(x), x)


class ResidualUnit(nn.Module):
    """ReLU(x + (1x1 to half, ReLU, 3x3, ReLU, 1x1 back)): a residual bottleneck of the attention block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = bottleneck(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        return torch.relu(self.conv(x) + x)


class AttentionBlock(nn.Module):
    """x + a(x) * sigmoid(b(x)): a branch and its gate (Cheng et al., CVPR 2020, without the non-local block)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_a = nn.Sequential(*(ResidualUnit(channels) for _ in range(3)))
        self.conv_b = nn.Sequential(*(ResidualUnit(channels) for _ in range(3)), nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        return torch.add(self.conv_a(x) * torch.sigmoid(self.conv_b(x)), x)


def bottleneck(channels: int) -> nn.Sequential:
    """1x1 to half of the channels, ReLU, 3x3, ReLU, 1x1 back."""
    half = channels // 2
    return nn.Sequential(
        nn.Conv2d(channels, half, 1),
        nn.ReLU(),
        nn.Conv2d(half, half, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(half, channels, 1),
    )


class ElicHyperEncoder(HyperEncoder):
    """The ELIC-style hyper-encoder, that of the published checkpoints.

    cfg_ss, cfg_cs: see HyperEncoder.  N, M: channels inside, and of z.  codebook_dim: dimensions of the codebook.
    """

    @register_to_config
    def __init__(
        self,
        cfg_ss: int = 64,
        cfg_cs: int = 256,
        in_channels: int = 4,
        N: int = 192,  # noqa: N803
        M: int = 320,  # noqa: N803
        codebook_dim: int = 32,
    ) -> None:
        super().__init__(cfg_ss, cfg_cs, M, codebook_dim)

        def entry(from_channels: int, halve: bool) -> nn.Conv2d:
            return nn.Conv2d(from_channels, N, 5, stride=2, padding=2) if halve else nn.Conv2d(from_channels, N, 1)

        def bottlenecks() -> list[nn.Module]:
            return [ResidualBottleneck(N) for _ in range(3)]

        self.backbone = nn.Sequential(
            entry(in_channels, cfg_ss == 8),
            *bottlenecks(),
            entry(N, cfg_ss <= 16),
            *bottlenecks(),
            AttentionBlock(N),
            entry(N, cfg_ss <= 32),
            *bottlenecks(),
            nn.Conv2d(N, M, 1),
            AttentionBlock(M),
        )

    def analyse(self, latents: Tensor) -> Tensor:
        """Latents (b, in_channels, h/8, w/8) to z (b, M, r, c)."""
        z: Tensor = self.backbone(latents)
        return z


class ChannelNorm(nn.Module):
    """Normalises every position over its channels, with an unbiased variance (Mentzer et al., NeurIPS 2020)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        variance, mean = torch.var_mean(x, dim=1, keepdim=True)
        return self.gamma * ((x - mean) * torch.rsqrt(variance + 1e-3)) + self.beta


class ResidualBlock(nn.Module):
    """x + (3x3, norm, ReLU, 3x3, norm)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.sequence = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            ChannelNorm(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            ChannelNorm(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        return torch.add(self.sequence(x), x)


class HificHyperEncoder(HyperEncoder):
    """The HiFiC-style hyper-encoder, that of PerCo (SD)'s first release.

    cfg_ss, cfg_cs: see HyperEncoder.  num_filters_base: channels before the first halving, doubled by each.
    num_filters_out: channels of z.  codebook_dim: dimensions of the codebook.
    """

    @register_to_config
    def __init__(
        self,
        cfg_ss: int = 64,
        cfg_cs: int = 256,
        in_channels: int = 4,
        num_filters_base: int = 192,
        num_filters_out: int = 320,
        num_residual_blocks: int = 9,
        codebook_dim: int = 32,
    ) -> None:
        super().__init__(cfg_ss, cfg_cs, num_filters_out, codebook_dim)
        self.proj_in = nn.Sequential(
            ChannelNorm(in_channels),
            nn.Conv2d(in_channels, num_filters_base, 3, padding=1),
            ChannelNorm(num_filters_base),
        )
        self.resid_blocks = nn.Sequential(*(ResidualBlock(num_filters_base) for _ in range(num_residual_blocks)))
        widths = [num_filters_base * 2**k for k in range(int(math.log2(LATENT_SIDE // cfg_ss)) + 1)]
        self.down_blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(narrow, wide, 3, stride=2, padding=1), ChannelNorm(wide), nn.ReLU())
                for narrow, wide in pairwise(widths)
            )
        )
        self.proj_out = nn.Sequential(nn.Conv2d(widths[-1], num_filters_out, 1))

    def analyse(self, latents: Tensor) -> Tensor:
        """Latents (b, in_channels, h/8, w/8) to z (b, num_filters_out, r, c)."""
        x = self.proj_in(latents)
        z: Tensor = self.proj_out(self.down_blocks(self.resid_blocks(x) + x))
        return z
