"""A colour for each code of a model, fitted when it is imported: previews that need neither its U-Net nor torch.

    random latents ─┬─> vae.decode ─> colours        a linear map from a latent to its colour, by least squares
                    └─> hyper_enc ─> codes           a linear map from a codebook vector to the mean latent of its cell

Both maps in a row, on every vector of the codebook.  Photos are not at hand, so the latents are noise with the spectrum
of photos: power that falls with the square of the frequency.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..model_folder import load_component
from ..preview import COLOURS

SIDE = 64
"""Latents a side of the noise: of a picture of 512x512."""

DECODED = 2
"""How many pieces of SIDE/2 are decoded: the autoencoder takes seconds for each."""

ENCODED = 16
RIDGE = 1e-3


def write(folder: Path, entries: dict[str, Any]) -> None:
    """Fits the colours of the model in a folder, and writes them into it, as the file COLOURS.

    entries: of its model_index.json, [module, class] by component.  Raises InvalidModel.
    """
    vae = load_component(folder, "vae", entries["vae"], torch.float32)
    hyper_enc = load_component(folder, "hyper_enc", entries["hyper_enc"], torch.float32)
    levels = (fit(vae, hyper_enc) * 255).round().to(torch.uint8).numpy()
    np.save(folder / COLOURS, levels)


@torch.no_grad()
def fit(vae: Any, hyper_enc: Any) -> Tensor:
    """The colours (codebook size, 3) in 0..1 of a HyperEncoder's codes, with an AutoencoderKL."""
    noise = photo_like(ENCODED, vae.config.latent_channels, SIDE)
    pieces = noise[:DECODED, :, : SIDE // 2, : SIDE // 2]
    decoded = vae.decode(pieces / vae.config.scaling_factor).sample
    to_colour = least_squares(_rows(pieces), _rows(F.avg_pool2d(decoded / 2 + 0.5, decoded.shape[-1] // (SIDE // 2))))
    z_hat = torch.cat([hyper_enc(part).z_hat for part in noise.split(4)])
    to_latent = least_squares(_rows(z_hat), _rows(F.avg_pool2d(noise, SIDE // z_hat.shape[-1])))
    every = torch.arange(hyper_enc.config.cfg_cs).view(1, 1, -1)
    vectors = _rows(hyper_enc.local_features((every,), (1, len(every))))
    colours: Tensor = to_colour(to_latent(vectors)).clamp(0, 1)
    return colours


def photo_like(count: int, channels: int, side: int) -> Tensor:
    """Noise (count, channels, side, side) with a photo's spectrum, and the unit variance of scaled latents."""
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(count, channels, side, side, generator=generator)
    down, across = torch.meshgrid(torch.fft.fftfreq(side), torch.fft.rfftfreq(side), indexing="ij")
    falling = 1 / (down.square() + across.square()).sqrt().clamp_min(0.5 / side)
    noise = torch.fft.irfft2(torch.fft.rfft2(white) * falling, s=(side, side))
    shaped: Tensor = noise / noise.std((0, 2, 3), keepdim=True)
    return shaped


def least_squares(x: Tensor, y: Tensor) -> Any:
    """The affine map that takes the rows of x to those of y at best: a function."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x.double() - mean_x
    gram = centred.T @ centred / len(x)
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, centred.T @ (y.double() - mean_y) / len(x)).float()
    return lambda rows: (rows - mean_x) @ weight + mean_y


def _rows(maps: Tensor) -> Tensor:
    """(b, c, rows, columns) to (b * rows * columns, c)."""
    return maps.movedim(1, -1).flatten(0, -2)
