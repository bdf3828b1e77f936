"""PerCo's loss: denoising, given the local features of the hyper-latent and the caption.

    latents ─> hyper_enc ─> local features ──────────────┐
    latents + noise at level t ─> unet(noisy, t, text, local features) ─> prediction ─> squared error
                                                                └─> one-step estimate ─> vae ─> LPIPS

Source: Careil et al., ICLR 2024 (arXiv 2310.10325), section 4; Körber et al., arXiv 2409.20255.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from .settings import Objective

Picture = Callable[[Tensor], Tensor]
Distance = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Draws:
    """What is random about a batch, each crop's from a seed of its own, so that it is the same in any company.

    noise, perturbation: (b, c, h, w); offset: (b, c, 1, 1); all standard normal.
    level, text: (b,) uniform in 0..1, float64, for the noise level and for leaving the caption out; on the CPU.
    """

    noise: Tensor
    perturbation: Tensor
    offset: Tensor
    level: Tensor
    text: Tensor

    def to(self, device: torch.device) -> "Draws":
        """The same with the noise on another device."""
        noise, perturbation, offset = (one.to(device) for one in (self.noise, self.perturbation, self.offset))
        return Draws(noise, perturbation, offset, self.level, self.text)


def draw(seeds: Sequence[int], shape: Sequence[int]) -> Draws:
    """The draws of crops with these seeds, whose latents have the shape (c, h, w).  On the CPU: the same everywhere."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(
            [
                torch.randn(tuple(shape), generator=generator),
                torch.randn(tuple(shape), generator=generator),
                torch.randn((shape[0], 1, 1), generator=generator),
                torch.rand((), generator=generator, dtype=torch.float64),
                torch.rand((), generator=generator, dtype=torch.float64),
            ]
        )
    return Draws(*(torch.stack(column) for column in zip(*rows, strict=True)))


class PercoObjective(nn.Module):
    """The loss of a batch; its submodules are what learns.

    scheduler: DDIM, whose prediction_type is that of the settings.
    decode: scaled latents (b, c, h, w) to pictures (b, 3, 8 h, 8 w) in -1..1; distance: of such pictures.  Both None:
        no LPIPS.
    """

    def __init__(
        self, unet: nn.Module, hyper_enc: nn.Module, scheduler: Any, settings: Objective,
        decode: Picture | None = None, distance: Distance | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.unet, self.hyper_enc = unet, hyper_enc
        self.scheduler, self.settings = scheduler, settings
        self._decode, self._distance = (decode,), (distance,)  # in tuples, so that they are no submodules
        self.levels = noise_levels(scheduler, settings.timestep_grid)

    def forward(
        self, latents: Tensor, text: Tensor | None, draws: Draws, pixels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (), and figures by name.

        latents: (b, c, h, w), scaled.  text: (b, tokens, dim) embeddings.  pixels: (b, 3, 8 h, 8 w) in -1..1.
        """
        settings = self.settings
        with torch.autocast(latents.device.type, enabled=False):  # it is small, and its codes decide all the rest
            encoded = self.hyper_enc(latents.float())
        t = self.levels[(draws.level * len(self.levels)).long()].to(latents.device)
        noise = draws.noise + settings.noise_offset * draws.offset
        noisy = self.scheduler.add_noise(latents, noise + settings.input_perturbation * draws.perturbation, t)
        prediction = self.unet(noisy, t, text, local_features=encoded.z_hat).sample.float()
        velocity = settings.prediction == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, t) if velocity else noise
        errors: Tensor = (prediction - target).pow(2).mean((1, 2, 3))
        figures = {"diffusion": errors.mean(), "commitment": encoded.commitment_loss}
        loss = (errors * self.weights(t)).mean()
        if settings.commitment_weight:
            loss = loss + settings.commitment_weight * encoded.commitment_loss
        (decode,), (distance,) = self._decode, self._distance
        if decode is not None and distance is not None:
            figures["lpips"] = distance(decode(self.one_step(noisy, prediction, t)).float(), pixels)
            loss = loss + settings.lpips_weight * figures["lpips"]
        return loss, {"loss": loss.detach(), **{name: value.detach() for name, value in figures.items()}}

    def weights(self, t: Tensor) -> Tensor:
        """What each noise level weighs: 1, or by min-SNR (Hang et al., ICCV 2023, section 3.4).  (b,) -> (b,)."""
        if self.settings.min_snr_gamma is None:
            return torch.ones_like(t, dtype=torch.float32)
        snr: Tensor = compute_snr(self.scheduler, t)
        clipped = snr.clamp(max=self.settings.min_snr_gamma)
        # The limit for SNR = 0, at the last level of a schedule that ends in pure noise, is 1 for the noise.
        return clipped / (snr + 1) if self.settings.prediction == "v_prediction" else (clipped / snr).nan_to_num(1.0)

    def one_step(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean latents that a prediction at level t implies, (b, c, h, w)."""
        alpha: Tensor = self.scheduler.alphas_cumprod.to(noisy.device)[t].view(-1, 1, 1, 1)
        if self.settings.prediction == "v_prediction":
            return alpha.sqrt() * noisy - (1 - alpha).sqrt() * prediction
        return (noisy - (1 - alpha).sqrt() * prediction) / alpha.sqrt()


def noise_levels(scheduler: Any, grid: int | None) -> Tensor:
    """The levels that training draws from, (n,) int64: all, or those of so many sampling steps (section 4 of PerCo)."""
    if grid is None:
        return torch.arange(scheduler.config.num_train_timesteps)
    sampler = type(scheduler).from_config(scheduler.config)
    sampler.set_timesteps(grid)
    levels: Tensor = sampler.timesteps.long().cpu()
    # Stable Diffusion's steps_offset takes a grid of all levels one beyond the last.
    last = scheduler.config.num_train_timesteps - 1
    shifted: Tensor = levels - max(0, int(levels.max()) - last)
    return shifted
