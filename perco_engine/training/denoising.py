"""What the stages with a U-Net share: its scheduler, its walk from pure noise, and the losses of what it finds."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..models.autoencoder import PatchAutoencoder
from ..models.perceptual import FeatureDistance
from ..rates import LATENT_PX
from .embedded_settings import StageName
from .stage import Run

WALK = tuple(range(999, 0, -50))
"""The timesteps of decoding in twenty steps; the first alone is decoding in one."""

FURTHER_STEPS = (0, 0, 0, 0, 1, 1, 2, 3)
"""How many more of them than the first a training step draws from."""

WINDOWS = (8, 8, 6, 5)
"""The sides of the windows that texture is compared in (`texture_error`), in positions of the features."""

GRID_SHARE = 0.09
"""The share of photos' fine contrast that recurs in the next squares of 8 pixels (`grid_excess`)."""


def some_timesteps(rng: random.Random) -> list[int]:
    """The timesteps of a walk: the first of WALK and up to three others, so that any number is learnt."""
    further = rng.sample(WALK[1:], rng.choice(FURTHER_STEPS))
    return [WALK[0], *sorted(further, reverse=True)]


def similarity(output: Tensor, target: Tensor) -> Tensor:
    """SSIM (Wang et al., 2004), the mean over the full, half, quarter and eighth size of pictures in -1..1.

    A mean, where MS-SSIM is a product of powers: their slope has no bound where a scale has next to no structure left.
    """
    from pytorch_msssim import ssim

    scales = []
    with torch.autocast(output.device.type, enabled=False):  # differences of squares need float32
        for _ in range(4):
            scales.append(ssim(output / 2 + 0.5, target / 2 + 0.5, data_range=1.0))
            output, target = F.avg_pool2d(output, 2), F.avg_pool2d(target, 2)
    return torch.stack(scales).mean()


def grid_excess(pictures: Tensor) -> Tensor:
    """How much more of the fine contrast of pictures recurs in the next squares of 8 pixels than in photos: a scalar.

    pictures: (b, 3, h, w), h and w multiples of 8 and at least 32.  Fine contrast is what the mean of 9x9 pixels
    leaves; what recurs is its mean over 4x4 squares.  0 for photos, up to 1 - GRID_SHARE.  The features of a classifier
    take a dotted grid for texture, and people do not (LOG.md, q).
    """
    fine = _fine_contrast(pictures)
    squares = F.avg_pool2d(F.pixel_unshuffle(fine, LATENT_PX), 4, stride=2).unflatten(1, (3, LATENT_PX**2))
    recurring = (squares - squares.mean(2, keepdim=True)).square().mean((1, 2, 3, 4))
    excess: Tensor = (recurring / (fine.square().mean((1, 2, 3)) + 1e-6) - GRID_SHARE).relu().mean()
    return excess


def _fine_contrast(pictures: Tensor) -> Tensor:
    """What the mean of 9x9 pixels leaves of pictures, float32."""
    pictures = pictures.float()
    return pictures - F.avg_pool2d(F.pad(pictures, (4, 4, 4, 4), mode="reflect"), 9, 1)


def spectrum_excess(output: Tensor, target: Tensor) -> Tensor:
    """The share of pictures' fine contrast that is at frequencies where the targets have less: a scalar, 0 to 1.

    Pictures (b, 3, h, w), sides from 32 on.  Fine contrast is that of grey within 9x9 pixels; its power spectrum is the
    mean over windows of 32x32.  A weave of dots of whatever pitch stands out in it, where places have it in common.
    """
    excess: Tensor = (_spectrum(output) - _spectrum(target)).relu().sum((1, 2)).mean()
    return excess


def _spectrum(pictures: Tensor) -> Tensor:
    """(b, 32, 17), of the sum 1."""
    with torch.autocast(pictures.device.type, enabled=False):  # there are no transforms of 16 bits
        fine = _fine_contrast(pictures.float().mean(1, keepdim=True))
        hann = torch.hann_window(32, device=pictures.device)
        windows = fine[:, 0].unfold(1, 32, 16).unfold(2, 32, 16) * hann * hann[:, None]
        power = torch.fft.rfft2(windows).abs().square().mean((1, 2))
        share: Tensor = power / (power.sum((1, 2), keepdim=True) + 1e-6)
        return share


def texture_error(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """How far the local standard deviations of features are from the target's: a scalar, 0 for equal ones, 1 for flat.

    ours, theirs: of `FeatureDistance.features`; the first four, which are of lines and textures, are compared, in
    windows of WINDOWS of their positions.  The part of Wasserstein distortion (Qiu et al., 2023, arXiv 2310.03629) that
    asks for as much texture and not for the same: squared errors alone are least where texture is blurred.
    """
    errors = []
    for a, b, window in zip(ours, theirs, WINDOWS, strict=False):
        own, due = _deviation(a, window), _deviation(b, window)
        errors.append(((own - due).square().mean((0, 2, 3)) / (due.square().mean((0, 2, 3)) + 1e-3)).mean())
    return torch.stack(errors).mean()


def _deviation(features: Tensor, window: int) -> Tensor:
    """The standard deviation in windows that overlap by half."""
    features = features.float()
    mean, square = (F.avg_pool2d(values, window, window // 2) for values in (features, features.square()))
    return (square - mean.square()).clamp(min=0).add(1e-4).sqrt()


def picture_loss(
    distance: FeatureDistance, output: Tensor, target: Tensor, weight: float = 0.12, texture_weight: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """What is to become less: a picture's distance from its target, blur, and dots.

    L1 + 2 x squared error + 0.5 x (1 - SSIM of four scales) + weight x feature distance + texture_weight x error of
    texture + 3 x excess of the grid + 2 x excess of the spectrum.

    Returns the loss, and its figures by name.  Pictures in -1..1, sides multiples of 8 from 96 on.  The features are
    those of a place drawn anew each time, up to 7 pixels into the pictures: a network of strides must not see the
    decoder's 8x8 squares always in the same phase.
    """
    output = output.float()
    mse, ssim = F.mse_loss(output, target), similarity(output, target)
    top, left = torch.randint(0, 8, (2,)).tolist()
    inside = (..., slice(top, output.shape[-2] - 8 + top), slice(left, output.shape[-1] - 8 + left))
    with torch.no_grad():
        theirs = distance.features(target[inside])
    ours = distance.features(output[inside])
    features = distance.between(ours, theirs)
    texture = texture_error(ours if texture_weight else [each.detach() for each in ours], theirs)
    grid, spectrum = grid_excess(output), spectrum_excess(output, target)
    loss = F.l1_loss(output, target) + 2 * mse + 0.5 * (1 - ssim) + weight * features + texture_weight * texture
    psnr = -10 * torch.log10(mse / 4)
    figures = {"features": features, "texture": texture, "psnr": psnr, "ssim": ssim, "grid": grid, "spectrum": spectrum}
    return loss + 3 * grid + 2 * spectrum, figures


def pixel_deviation(vae: PatchAutoencoder) -> Tensor:
    """How much a unit of each latent channel moves the pixels: root mean square of its response, (c, 1, 1)."""
    response = vae.synthesis.weight.detach().float().pow(2).sum((2, 3)).mean(0).sqrt()
    return (response / response.mean()).view(-1, 1, 1)


def autoencoder(run: Run, *stages: StageName) -> tuple[PatchAutoencoder, Tensor]:
    """The autoencoder of the first of these stages that is done, frozen, on the device, and its `pixel_deviation`."""
    vae: PatchAutoencoder = run.begun(stages, "vae")
    return vae.to(run.accelerator.device), pixel_deviation(vae).to(run.accelerator.device)


def latent_error(estimate: Tensor, latents: Tensor, deviation: Tensor) -> Tensor:
    """Mean squared error of latents, mostly in pixels' units (`pixel_deviation`): these alone would neglect detail."""
    return ((deviation.pow(2) + 0.2) * (estimate.float() - latents).pow(2)).mean()


def new_scheduler() -> Any:
    """DDIM with zero terminal SNR, trailing steps (Lin et al., 2024), and a network that predicts the latents."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="sample",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def walk(
    unet: nn.Module, scheduler: Any, noise: Tensor, local: Tensor, timesteps: Sequence[int], text: Tensor | None
) -> Tensor:
    """Latents as DDIM finds them in these timesteps from pure noise, with a gradient through the last one alone.

    text: embeddings of the captions (b, tokens, width); None for a U-Net without text.
    """
    guess = noise
    for k, timestep in enumerate(timesteps):
        t = torch.full((len(noise),), timestep, device=noise.device)
        with torch.set_grad_enabled(k == len(timesteps) - 1):
            noisy = scheduler.add_noise(guess, noise, t)
            guess = unet(noisy, t, text, local_features=local).sample.float()
        share = scheduler.alphas_cumprod[timestep]
        noise = ((noisy - share.sqrt() * guess) / (1 - share).sqrt()).detach()  # that DDIM goes on with
    return guess


def diffusion_error(
    unet: nn.Module,
    scheduler: Any,
    latents: Tensor,
    noise: Tensor,
    local: Tensor,
    text: Tensor | None,
    deviation: Tensor,
) -> Tensor:
    """The plain loss of diffusion, `latent_error` at noise levels drawn from all, so that more steps stay valid.

    The arguments are those of `walk` and `latent_error`; no gradient reaches the local features.
    """
    t = torch.randint(0, WALK[0] + 1, (len(latents),), device=latents.device)
    noisy = scheduler.add_noise(latents, noise, t)
    return latent_error(unet(noisy, t, text, local_features=local.detach()).sample, latents, deviation)
