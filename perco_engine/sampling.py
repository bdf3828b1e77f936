"""Sampling: from noise to clean latents in a few denoising steps, with classifier-free guidance.

    noise ─> latents ─> U-Net, in tiles where they are large ─> guidance ─> scheduler ─> latents ─> ... ─> clean latents
                          ^ local features, text, timestep

Sources: DDIM, Song et al., ICLR 2021 (arXiv 2010.02502); guidance, Ho and Salimans, 2022 (arXiv 2207.12598).
"""

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import NotFinite
from .latent_tiles import LATENTS_AT_ONCE, LatentTiles
from .options import whole_number

if TYPE_CHECKING:
    from .pipeline import PercoPipeline


def denoise(
    pipeline: "PercoPipeline",
    noise: Tensor,
    local_features: Tensor,
    text: Tensor | None,
    without_text: Tensor | None,
    steps: int,
    guidance_scale: float,
) -> Tensor:
    """Noise (b, c, rows, columns) to clean latents of the same shape, float32, in `steps` >= 1 steps.

    local_features: (b, channels, r, c) in the U-Net's dtype.
    text, without_text: embeddings (b, tokens, cross_attention_dim) of the captions, and of as many empty ones;
        None for a U-Net without text, or without guidance, which puts both branches through the U-Net in one batch.
    """
    device, dtype = pipeline._execution_device, pipeline.unet.dtype
    guided = without_text is not None
    if text is not None and without_text is not None:
        text = torch.cat([without_text, text])
        local_features = torch.cat([local_features, local_features])
    scheduler = copy.deepcopy(pipeline.scheduler)  # it keeps the state of one walk
    scheduler.set_timesteps(steps, device=device)
    # The latents stay in float32 between the steps, so that a half-precision U-Net does not round them each time.
    latents: Tensor = noise.to(device, torch.float32) * scheduler.init_noise_sigma
    for timestep in pipeline.progress_bar(scheduler.timesteps):
        sample = torch.cat([latents, latents]) if guided else latents
        sample = scheduler.scale_model_input(sample, timestep).to(dtype)
        prediction = predict(pipeline, sample, timestep, local_features, text)
        if timestep == scheduler.timesteps[0]:  # later on it may be the guidance
            check_finite(prediction, "U-Net", pipeline.unet)
        if guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    if guided and not _is_finite(latents):
        raise NotFinite(f"a guidance scale of {guidance_scale:g} leads out of the range of numbers: take a smaller one")
    return latents


def predict(
    pipeline: "PercoPipeline", sample: Tensor, timestep: Tensor, local_features: Tensor, text: Tensor | None
) -> Tensor:
    """What the U-Net says of noisy latents (b, c, rows, columns), float32, in tiles where they are large.

    The arguments are the U-Net's own, the text embeddings b or none.
    """
    multiple = sample.shape[-1] // local_features.shape[-1]
    tiles = LatentTiles(sample.shape[-2], sample.shape[-1], pipeline.tile_latents, pipeline.overlap_latents, multiple)
    at_once = max(1, LATENTS_AT_ONCE // (len(sample) * tiles.height * tiles.width))

    def one(sample: Tensor, features: Tensor) -> Tensor:
        repeated = None if text is None else text.repeat(len(sample) // len(text), 1, 1)
        prediction: Tensor = pipeline.unet(sample, timestep, repeated, local_features=features).sample
        return prediction.float()

    return tiles.blend(one, sample, local_features, at_once=at_once)


def check_finite(values: Tensor, what: str, network: Any) -> None:
    """Raises NotFinite if a network made numbers that are none, which would be shown as black."""
    if not _is_finite(values):
        remedy = "" if network.dtype == torch.float32 else "take dtype=torch.float32, or "
        raise NotFinite(
            f"the {what} went out of the range of {network.dtype}: {remedy}install the model's weights again"
        )


def _is_finite(values: Tensor) -> bool:
    return all(math.isfinite(end.item()) for end in torch.aminmax(values))


def check_steps(steps: int, unet: Any, scheduler: Any) -> int:
    """The number of denoising steps.  Raises ValueError unless the model can decode in so many."""
    most = scheduler.config.num_train_timesteps - scheduler.config.get("steps_offset", 0)
    steps = whole_number("the number of denoising steps", steps, 0, most)
    if steps == 0 and not unet.config.add_local_features:
        raise ValueError("this model's local features hold no estimate of the picture: take at least 1 denoising step")
    return steps


def draw_noise(shape: tuple[int, ...], generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
    """Standard normal noise of this shape, float32, drawn on the CPU so that every device gets the same.

    generator: one for the whole batch, or one for each of its entries.  Raises ValueError for another number of them.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} pictures")
    return torch.cat([draw_noise((1, *shape[1:]), one) for one in generator])
