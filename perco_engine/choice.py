"""The choice of codes with the prior at hand: squared distance + weight x bits, as the prior counts them.

A ladder by itself knows how often a code is chosen anywhere (`LadderLevel.bits`); the prior knows what is expected
here, but only once the indices before are known.  So the coarsest levels are chosen as the stream is written: level by
level, phase by phase, each index the cheapest given those before (Chou, Lookabaugh & Gray, 1989, with the bits of an
adaptive model).  Any choice is a valid file; decoders do not know of it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .bitstream.entropy import CDF
from .bitstream.prior import Prior
from .models.hyper_encoder import HyperEncoder
from .models.ladder import HyperLadder
from .rates import LATENT_PX
from .sampling import check_finite


@torch.no_grad()
def choose(
    hyper_enc: HyperEncoder | HyperLadder,
    prior: Prior | None,
    latents: Tensor,
    level: int | None,
    shifts: Sequence[Tensor] = (),
    thrift: float = 1.0,
) -> tuple[Tensor, ...]:
    """The indices of latents (b, c, h/8, w/8): grids (b, rows, columns) int64, coarse to fine.

    prior: what the stream is going to be written with; without it, or for no ladder, the hyper-encoder chooses alone.
    level: the rate point, 0..len(rate_points)-1; None is the highest.
    shifts: for a ladder, what is added to the codes of each grid before they are chosen, (b, c, rows, columns).
    thrift: how many times as much as usual a bit of a ladder's codes costs.

    Raises NotFinite where the hyper-encoder makes numbers that are none.
    """
    if not isinstance(hyper_enc, HyperLadder):
        output = hyper_enc(latents, level)
        check_finite(output.z, "hyper-encoder", hyper_enc)
        indices = output.indices
        return indices if isinstance(indices, tuple) else (indices,)
    level = len(hyper_enc.levels) - 1 if level is None else level
    estimate, grids = torch.zeros_like(latents), list[Tensor]()
    if prior is not None:
        chosen = [
            _coarsest(hyper_enc, prior, latents[k : k + 1], level, [s[k : k + 1] for s in shifts], thrift)
            for k in range(len(latents))
        ]
        estimate = torch.cat([estimate for estimate, _ in chosen])
        grids = [torch.cat(grid) for grid in zip(*(grids for _, grids in chosen), strict=True)]
    for k, rung in enumerate(hyper_enc.levels[len(grids) : level + 1], len(grids)):
        costs = rung.distances(_codes(hyper_enc, k, latents, estimate, shifts))
        grids.append((costs + thrift * rung.rate_weight * rung.bits).argmin(-1))
        estimate = rung.decode(rung.look_up(grids[-1]), estimate)
    return tuple(grids)


def _coarsest(
    ladder: HyperLadder, prior: Prior, latents: Tensor, level: int, shifts: Sequence[Tensor], thrift: float
) -> tuple[Tensor, list[Tensor]]:
    """The estimate, and the grids, of the levels that have a weight, of one picture."""
    distances: NDArray[np.float32]  # of the level at hand, in bits

    def cheapest(_: int, cells: tuple[slice, slice], cdf: CDF) -> NDArray[np.int32]:
        shares = np.diff(cdf, axis=1) / cdf[:, -1:]
        indices: NDArray[np.intp] = (distances[cells].reshape(shares.shape) - np.log2(shares)).argmin(1)
        return indices.astype(np.int32)

    rows, columns = latents.shape[-2:]
    walk = prior.walk(ladder.rate_points[level], columns * LATENT_PX, rows * LATENT_PX, cheapest)
    estimate, grids = torch.zeros_like(latents), list[Tensor]()
    for k, (weight, rung) in enumerate(zip(ladder.config.prior_weights, ladder.levels[: level + 1], strict=False)):
        codes = _codes(ladder, k, latents, estimate, shifts)
        distances = (rung.distances(codes)[0] / (weight * thrift)).cpu().numpy()
        indices = torch.from_numpy(next(walk)).long()[None].to(latents.device)
        estimate = rung.decode(rung.look_up(indices), estimate)
        grids.append(indices)
    return estimate, grids


def _codes(ladder: HyperLadder, level: int, latents: Tensor, estimate: Tensor, shifts: Sequence[Tensor]) -> Tensor:
    """Continuous codes of a level, moved by what its shifts say, if there are any.  Raises NotFinite."""
    codes = ladder.levels[level].encode(latents, estimate)
    check_finite(codes, "hyper-encoder", ladder)  # to what is no number the first code would be the nearest
    return codes + shifts[level] if shifts else codes
