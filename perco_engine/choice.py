"""The choice of codes with the prior at hand: squared distance + weight x bits, as the prior counts them.

A ladder by itself knows how often a code is chosen anywhere (`LadderLevel.cheapest`); the prior knows what is expected
here, but only once the indices before are known.  So the coarsest levels are chosen as the stream is written: level by
level, phase by phase, each index the cheapest given those before (Chou, Lookabaugh & Gray, 1989, with the bits of an
adaptive model).  Any choice is a valid file; decoders do not know of it.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .bitstream.entropy import CDF
from .bitstream.prior import Prior
from .models.autoencoder import PATCH
from .models.hyper_encoder import HyperEncoder
from .models.ladder import HyperLadder


@torch.no_grad()
def choose(
    hyper_enc: HyperEncoder | HyperLadder, prior: Prior | None, latents: Tensor, level: int | None
) -> tuple[Tensor, ...]:
    """The indices of latents (b, c, h/8, w/8): grids (b, rows, columns) int64, coarse to fine.

    prior: what the stream is going to be written with; without it, or for no ladder, the hyper-encoder chooses alone.
    level: the rate point, 0..len(rate_points)-1; None is the highest.
    """
    if not isinstance(hyper_enc, HyperLadder) or prior is None:
        indices = hyper_enc(latents, level).indices
        return indices if isinstance(indices, tuple) else (indices,)
    level = len(hyper_enc.levels) - 1 if level is None else level
    chosen = [_coarsest(hyper_enc, prior, one, level) for one in latents.split(1)]
    estimate = torch.cat([estimate for estimate, _ in chosen])
    coarsest = [torch.cat(grids) for grids in zip(*(grids for _, grids in chosen), strict=True)]
    return *coarsest, *hyper_enc.climb(latents, level, estimate, len(coarsest))[1]


def _coarsest(ladder: HyperLadder, prior: Prior, latents: Tensor, level: int) -> tuple[Tensor, list[Tensor]]:
    """The estimate, and the grids, of the levels that have a weight, of one picture."""
    distances: NDArray[np.float32]  # of the level at hand, in bits

    def cheapest(_: int, cells: tuple[slice, slice], cdf: CDF) -> NDArray[np.int32]:
        shares = np.diff(cdf, axis=1) / cdf[:, -1:]
        indices: NDArray[np.intp] = (distances[cells].reshape(shares.shape) - np.log2(shares)).argmin(1)
        return indices.astype(np.int32)

    rows, columns = latents.shape[-2:]
    walk = prior.walk(ladder.rate_points[level], columns * PATCH, rows * PATCH, cheapest)
    estimate, grids = torch.zeros_like(latents), []
    for weight, rung in zip(ladder.config.prior_weights, ladder.levels[: level + 1], strict=False):
        distances = (rung.distances(rung.encode(latents, estimate))[0] / weight).cpu().numpy()
        indices = torch.from_numpy(next(walk)).long()[None].to(latents.device)
        estimate = rung.decode(rung.look_up(indices), estimate)
        grids.append(indices)
    return estimate, grids
