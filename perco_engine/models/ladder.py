"""The embedded model's hyper-encoder: a ladder of residual vector quantizers, coarse to fine.

    latents z ──┬────────────────────┬─────────────────── ...
                ▼                    ▼
    0 = y_0 ─> [ level 1: h/64 ] ─> y_1 ─> [ level 2: h/32 ] ─> y_2 ─> ...
                │                    │
                indices              indices

Level k encodes what y_{k-1} misses into one grid of indices and decodes them to y_k, a better estimate of z.  Any first
k grids are a complete picture, so one set of weights serves every rate point, and a truncated file still opens.  Each
level is a linear map (mean pooling one way, bilinear interpolation the other, a fixed weight for each latent channel)
plus a convolutional network that starts at zero; the codebooks start by k-means on the linear part alone.
The residual quantization is that of van den Oord et al., 2017, and Zeghidour et al., 2021, over grids that grow; the
choice of a code is entropy-constrained (Chou, Lookabaugh & Gray, 1989): squared distance + weight x bits by its use, so
that codebooks can be large, and bits go where the detail is.
"""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from vector_quantize_pytorch import VectorQuantize

from ..rates import LATENT_PX, RatePoint, of_hyper_encoder
from .autoencoder import ResidualBlock, zero_conv
from .hyper_encoder import HyperEncoderOutput


def halved(size: tuple[int, int], times: int) -> tuple[int, int]:
    """(rows, columns) after so many stride-2 steps; a partial cell counts as a whole one."""
    return -(-size[0] >> times), -(-size[1] >> times)


def pool(x: Tensor, times: int) -> Tensor:
    """The mean of each square of 2**times cells, partial squares at the border included."""
    return F.avg_pool2d(x, 2**times, ceil_mode=True, count_include_pad=False) if times else x


class LadderLevel(nn.Module):
    """One rung: what the estimate misses -> codes -> a better estimate.

    halvings: how many times smaller than the latents the grid of codes is, as a power of two.
    rate_weight: what a bit costs in the choice of a code, in squared distance; 0: the nearest code is chosen.

    Attribute frozen_codebook: leave the codes and their shares as they are while all else learns.
    """

    metric: Tensor

    def __init__(
        self, latent_channels: int, width: int, halvings: int, codebook_size: int, rate_weight: float = 0.0
    ) -> None:
        super().__init__()
        self.halvings = halvings
        self.rate_weight = rate_weight
        self.frozen_codebook = False
        self.encoder = nn.Sequential(
            nn.Conv2d(2 * latent_channels, width, 3, padding=1),
            ResidualBlock(width),
            *(
                layer
                for _ in range(halvings)
                for layer in (nn.Conv2d(width, width, 3, stride=2, padding=1), ResidualBlock(width))
            ),
            nn.SiLU(),
            zero_conv(width, latent_channels),
        )
        self.quantizer = VectorQuantize(
            dim=latent_channels,
            codebook_size=codebook_size,
            decay=0.99,
            kmeans_init=True,
            threshold_ema_dead_code=1,  # switches restarts on; training sets the number to suit its batches
            accept_image_fmap=True,
            rotation_trick=False,
        )
        self.quantizer._codebook.gumbel_sample = self.cheapest  # how it chooses
        self.enter = nn.Conv2d(2 * latent_channels, width, 3, padding=1)
        self.grow = nn.ModuleList(ResidualBlock(width) for _ in range(halvings + 1))
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(halvings))
        self.leave = nn.Sequential(
            nn.Conv2d(width + latent_channels, width, 3, padding=1), nn.SiLU(), zero_conv(width, latent_channels)
        )
        self.register_buffer("metric", torch.ones(latent_channels, 1, 1))

    def encode(self, latents: Tensor, estimate: Tensor) -> Tensor:
        """Continuous codes (b, c, rows, columns) of what `estimate` misses of `latents`, both (b, c, h/8, w/8)."""
        linear = pool(latents - estimate, self.halvings) * self.metric
        codes: Tensor = linear + self.encoder(torch.cat([latents, estimate], 1))
        return codes

    def decode(self, codes: Tensor, estimate: Tensor) -> Tensor:
        """The better estimate (b, c, h/8, w/8), from quantized codes (b, c, rows, columns) and the estimate before."""
        size = (estimate.shape[-2], estimate.shape[-1])
        linear = codes / self.metric
        x = self.grow[0](self.enter(torch.cat([linear, pool(estimate, self.halvings)], 1)))
        for k, (smooth, block) in enumerate(zip(self.smooth, self.grow[1:], strict=True)):
            rows, columns = halved(size, self.halvings - 1 - k)
            x = block(smooth(F.interpolate(x, scale_factor=2.0)[..., :rows, :columns]))
        if self.halvings:
            scale = 2**self.halvings
            linear = F.interpolate(linear, scale_factor=scale, mode="bilinear")[..., : size[0], : size[1]]
        change: Tensor = linear + self.leave(torch.cat([x, estimate], 1))
        return estimate + change

    def cheapest(self, nearness: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        """The codes to choose, (..., n) int64 and one-hot (..., n, size), from negative distances (..., n, size)."""
        indices = (nearness.square() + self.rate_weight * self.bits).argmin(-1)
        return indices, F.one_hot(indices, nearness.shape[-1]).to(nearness.dtype)

    @property
    def bits(self) -> Tensor:
        """What each code costs by its share in what was chosen so far, a moving average: (n,) float32."""
        uses: Tensor = self.quantizer._codebook.cluster_size[0].float()
        return (uses.sum() / uses.clamp(min=torch.finfo(torch.float16).tiny)).log2()

    def distances(self, codes: Tensor) -> Tensor:
        """Squared distances (b, rows, columns, n) float32 of codes (b, c, rows, columns) to all n of the codebook."""
        places = codes.float().movedim(1, -1)
        squares: Tensor = torch.cdist(places.flatten(0, 2), self.quantizer.codebook.float()).square()
        return squares.view(*places.shape[:3], -1)

    def quantize(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes to (quantized codes, indices (b, rows, columns) int64, commitment loss ())."""
        with torch.autocast(codes.device.type, enabled=False):
            quantized, indices, loss = self.quantizer(codes.float(), freeze_codebook=self.frozen_codebook)
        return quantized, indices, loss.sum()

    def look_up(self, indices: Tensor) -> Tensor:
        """Indices (b, rows, columns) to quantized codes (b, c, rows, columns)."""
        return F.embedding(indices.long(), self.quantizer.codebook).movedim(-1, 1)


class HyperLadder(ModelMixin, ConfigMixin):
    """A hyper-encoder with one rate point for each of its grids.

    latent_channels: channels of the autoencoder's latents.
    grids: (pixels per index, codebook size) of each level, coarse to fine.
    width: channels of the networks.
    rate_weights: `LadderLevel.rate_weight` of each level; none: 0.
    bpp: what files of each rate point take, in bits a pixel: its name; none: the sum of uniform rates.
    prior_weights: of the coarsest levels, above 0: what a bit costs where the prior counts the bits (choice.py).
    """

    downsampling_factor = 1
    """Of the local features, which are as large as the latents."""

    @register_to_config
    def __init__(
        self,
        latent_channels: int,
        grids: Sequence[Sequence[int]],
        width: int = 64,
        rate_weights: Sequence[float] = (),
        bpp: Sequence[float] = (),
        prior_weights: Sequence[float] = (),
    ) -> None:
        super().__init__()
        weights = rate_weights or [0.0] * len(grids)
        self.levels: Sequence[LadderLevel] = nn.ModuleList(  # type: ignore[assignment]
            LadderLevel(latent_channels, width, (pixels // LATENT_PX).bit_length() - 1, codebook_size, weight)
            for (pixels, codebook_size), weight in zip(grids, weights, strict=True)
        )

    @property
    def rate_points(self) -> tuple[RatePoint, ...]:
        """The rate points that this model offers, lowest first."""
        return of_hyper_encoder(self.config)

    @torch.no_grad()
    def weigh_rates(self, shares: Sequence[float]) -> None:
        """Sets each level's `rate_weight` to a share of the variance of the codes that it chose so far."""
        weights = []
        for rung, share in zip(self.levels, shares, strict=True):
            codebook = rung.quantizer._codebook
            uses = codebook.cluster_size[0, :, None] / codebook.cluster_size.sum()
            mean = (uses * codebook.embed[0]).sum(0)
            weights.append(share * float((uses * (codebook.embed[0] - mean).square()).sum()))
        self.set_rate_weights(weights)

    def set_rate_weights(self, weights: Sequence[float]) -> None:
        """Sets each level's `rate_weight`; they are stored in the configuration, and not among the weights."""
        for rung, weight in zip(self.levels, weights, strict=True):
            rung.rate_weight = weight
        self.register_to_config(rate_weights=list(weights))

    def climb(self, latents: Tensor, level: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Levels 0..level on latents (b, c, h/8, w/8): their estimates, indices, and sum of commitment losses."""
        estimate = torch.zeros_like(latents)
        estimates, grids, loss = [], [], latents.new_zeros((), dtype=torch.float32)
        for rung in self.levels[: level + 1]:
            quantized, indices, commitment = rung.quantize(rung.encode(latents, estimate))
            estimate = rung.decode(quantized, estimate)
            estimates.append(estimate)
            grids.append(indices)
            loss = loss + commitment
        return estimates, grids, loss

    def forward(self, latents: Tensor, level: int | None = None) -> HyperEncoderOutput:
        """Latents (b, c, h/8, w/8) -> z (the latents), z_hat (the local features), indices (a tuple of grids).

        level: the rate point, 0..len(rate_points)-1; None is the highest.
        """
        level = len(self.levels) - 1 if level is None else level
        estimates, indices, _ = self.climb(latents, level)
        return HyperEncoderOutput(z=latents, z_hat=self.with_level(estimates[-1], level), indices=tuple(indices))

    def local_features(self, indices: tuple[Tensor, ...], latent_size: tuple[int, int]) -> Tensor:
        """Indices, (b, rows, columns) a grid, to local features (b, c + 1, h/8, w/8) of the size `latent_size`."""
        first = self.levels[0]
        shape = (len(indices[0]), self.config.latent_channels, *latent_size)
        estimate = torch.zeros(shape, dtype=first.metric.dtype, device=first.metric.device)
        for rung, grid in zip(self.levels, indices, strict=False):
            estimate = rung.decode(rung.look_up(grid), estimate)
        return self.with_level(estimate, len(indices) - 1)

    def with_level(self, estimate: Tensor, level: int) -> Tensor:
        """The local features: the estimate and, as one more channel, its level, counted from 1, in fifths."""
        mark = estimate.new_full((len(estimate), 1, *estimate.shape[2:]), (level + 1) / 5)
        return torch.cat([estimate, mark], 1)
