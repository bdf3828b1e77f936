"""Codes that are searched for: chosen by what the decoded picture lacks, and not by the encoder alone.

    latents ─> codes + shifts ─> choice ─> indices ─> estimate ─> U-Net, one step ─> decoder ─> picture
                        ^                                                                          │
                        └──────── gradient with respect to the codes <──── distance to the photo <─┘

An encoder network sees a picture once, and is right on average.  Here the decoder is asked: how would the picture come
nearer if a code were another one?  The answer is the gradient at the codes that are chosen; `shifts` collect it, and
the codes are chosen anew, each as near as it can be to where its shift points.  The encoder looks on: what a coarse
code changes, the finer ones make up for.  Distance is that of pixels, and of the features that the model was trained
with.  Files of it are like any other, and their size is kept by making bits dearer.

Sources: the gap between encoders and searches, Cremer et al., 2018 (arXiv 1801.03558); closed by gradients, for
compression, Campos et al., 2019 (arXiv 1906.01223), Yang et al., 2020 (arXiv 2006.04240).
"""

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .bitstream.prior import Prior
from .choice import choose
from .devices import half_precision
from .lite0 import lite0
from .models.autoencoder import scaled, tiles_with_margins
from .models.ladder import HyperLadder
from .models.perceptual import FeatureDistance
from .pipeline import PercoPipeline
from .rates import LATENT_PX
from .sampling import denoise, draw_noise
from .tensors import to_tensor

MOST_STEPS = 100
"""How many steps a search may have."""

USUAL_STEPS, LOWEST_STEPS, USUAL_PIXELS = 4, 8, 2**20
"""The steps of a search that nobody asked for, at the lowest rate, and of how many pixels: seconds on two CPU cores.

Larger pictures have fewer, so that none takes longer.
"""

LEAST_SIDE = 32
"""Pixels a side that the features need: smaller pictures are enlarged for them."""

REACH = 0.675
"""How far a typical shift may go in all steps, in standard deviations of its codebook: farther, colours go astray."""

MOMENTUM = 0.6
"""The share of a step that is the direction of those before."""

THRIFT = 1.3
"""How many times as much as usual a bit costs, so that nearer pictures take no more of them."""

THRIFTS = (THRIFT, 1.6, 2.0, 2.5, 3.2, 4.0, 5.0)
"""The same for codes that the shifts lead to: as it was while searching, and for budgets that these exceed."""

COLOURS = 20.0
"""The weight of the squared error of means of 16x16 pixels in -1..1: features hardly mind colours, and people do."""

HUES = 100.0
"""At the lowest rate, besides, that of how these means differ from their grey: so few codes bought shapes with them."""

TILE, MARGIN = 96, 8
"""Latents a side that are searched at once, and those around them, of larger pictures, whose shifts are thrown away."""


def usual_steps(pipeline: PercoPipeline, level: int, width: int, height: int) -> int:
    """How many steps to take where nobody says: none where one takes long, or for a model without a ladder.

    At the lowest rate four steps bring little, and eight the right colours.  Narrow pictures count as enlarged.
    """
    if not isinstance(pipeline.hyper_enc, HyperLadder):
        return 0
    steps = USUAL_STEPS if level > 0 else LOWEST_STEPS
    return min(steps, steps * USUAL_PIXELS // (max(width, LEAST_SIDE) * max(height, LEAST_SIDE)))


def search(
    pipeline: PercoPipeline, prior: Prior | None, image: Image.Image, level: int, caption: str, steps: int
) -> Iterator[tuple[Tensor, ...]]:
    """The indices of a picture that so many steps find, first to last for each of THRIFTS.

    They are grids (1, rows, columns) int64, coarse to fine.
    image: in mode RGB.  level: the rate point.  prior: as `choose` takes it.
    caption: what the decoder is going to be told.  steps: 1..MOST_STEPS, each a decode and the way back through it.

    Raises ValueError for a model without a ladder.
    """
    ladder = pipeline.hyper_enc
    if not isinstance(ladder, HyperLadder):
        raise ValueError("effort is for models with a ladder of codes, such as the embedded one: leave it out")
    device = pipeline._execution_device
    distance = lite0(device)
    photo = pipeline.pad(to_tensor([image]).to(device))
    latents = pipeline.encode_latents(photo).to(device, ladder.dtype)
    text = None if pipeline.text_encoder is None else pipeline.encode_prompt([caption])
    rungs = ladder.levels[: level + 1]
    rows, columns = latents.shape[-2:]
    shifts = _unmoved(ladder, latents, level)
    for outer, inner in _tiles(rows, columns, 2 ** rungs[0].halvings):
        (top, left), (inner_top, inner_left) = outer, inner
        cut = photo[..., scaled(top, LATENT_PX), scaled(left, LATENT_PX)], latents[..., top, left]
        found = _search_tile(pipeline, prior, distance, *cut, level, text, steps)
        for rung, whole, tile in zip(rungs, shifts, found, strict=True):
            halvings = rung.halvings
            own = tile[..., _cells(inner_top, halvings, top.start), _cells(inner_left, halvings, left.start)]
            whole[..., _cells(inner_top, halvings), _cells(inner_left, halvings)] = own
    for thrift in THRIFTS:
        yield choose(ladder, prior, latents, level, shifts, thrift)


def _search_tile(
    pipeline: PercoPipeline,
    prior: Prior | None,
    distance: FeatureDistance,
    photo: Tensor,
    latents: Tensor,
    level: int,
    text: Tensor | None,
    steps: int,
) -> list[Tensor]:
    """The shifts of a picture's codes, (1, c, rows, columns) float32 each, after so many steps.

    At the lowest rate they are those of the nearest picture on the way.
    """
    ladder: HyperLadder = pipeline.hyper_enc
    rungs = ladder.levels[: level + 1]
    shifts, moves = _unmoved(ladder, latents, level), _unmoved(ladder, latents, level)
    units: list[Tensor] = []
    noise = draw_noise(tuple(latents.shape), torch.Generator().manual_seed(0))
    with torch.no_grad():
        target = distance.features(_enlarged(photo))

    def chosen() -> list[Tensor]:
        grids = choose(ladder, prior, latents, level, shifts, THRIFT)
        return [rung.look_up(grid).detach() for rung, grid in zip(rungs, grids, strict=True)]

    def lost(codes: list[Tensor]) -> Tensor:
        estimate = torch.zeros_like(latents)
        with half_precision(latents.device):
            for rung, code in zip(rungs, codes, strict=True):
                estimate = rung.decode(code, estimate)
            features = ladder.with_level(estimate, level).to(pipeline.unet.dtype)
            decoded = denoise(pipeline, noise, features, text, None, 1, 1.0)
            picture = 2 * pipeline.decode_latents(decoded, *photo.shape[-2:]) - 1
        loss = F.l1_loss(picture, photo) + 2 * F.mse_loss(picture, photo)
        loss = loss + COLOURS * F.mse_loss(_means(picture), _means(photo))
        if level == 0:
            loss = loss + HUES * F.mse_loss(_hues(picture), _hues(photo))
        return loss + distance.between(distance.features(_enlarged(picture)), target)

    seen: list[tuple[float, list[Tensor]]] = []
    for step in range(steps):
        with torch.enable_grad():
            codes = [code.requires_grad_() for code in chosen()]
            loss = lost(codes)
            # of all latents, so that no gradient is below what 16 bits can hold
            slopes = torch.autograd.grad(loss * latents[0, 0].numel(), codes)
        if level == 0:
            seen.append((float(loss.detach()), [shift.clone() for shift in shifts]))
        if not units:
            units = [
                rung.quantizer.codebook.float().std() / slope.float().square().mean().sqrt().clamp(min=1e-12)
                for rung, slope in zip(rungs, slopes, strict=True)
            ]
        pace = REACH * 2 * (steps - step) / (steps * (steps + 1))  # in all, REACH
        for shift, move, slope, unit in zip(shifts, moves, slopes, units, strict=True):
            move.lerp_(slope.float(), 1 - MOMENTUM)
            shift.sub_(move * (unit * pace))
    if level > 0:
        return shifts
    # Where every code is of many pixels, a step may lead astray: the nearest picture of all counts, not the last one.
    with torch.no_grad():
        seen.append((float(lost(chosen())), shifts))
    return min(seen, key=lambda one: one[0])[1]


def _unmoved(ladder: HyperLadder, latents: Tensor, level: int) -> list[Tensor]:
    """Shifts of nothing for the codes of a picture, (1, c, rows, columns) float32 for each grid."""
    rows, columns = latents.shape[-2:]
    shapes = ladder.rate_points[level].shapes(columns * LATENT_PX, rows * LATENT_PX)
    return [torch.zeros(1, latents.shape[1], *shape, device=latents.device, dtype=torch.float32) for shape in shapes]


def _means(picture: Tensor) -> Tensor:
    """The means of 16x16 pixels, at the border of fewer."""
    return F.avg_pool2d(picture, 16, ceil_mode=True, count_include_pad=False)


def _hues(picture: Tensor) -> Tensor:
    """How the channels of these means differ from the mean of all three."""
    means = _means(picture)
    return means - means.mean(1, keepdim=True)


def _enlarged(picture: Tensor) -> Tensor:
    """Pictures of at least LEAST_SIDE pixels a side, their last row and column repeated."""
    height, width = picture.shape[-2:]
    return F.pad(picture, (0, max(0, LEAST_SIDE - width), 0, max(0, LEAST_SIDE - height)), mode="replicate")


def _cells(side: slice, halvings: int, origin: int = 0) -> slice:
    """A stretch of latents as one of cells of 2**halvings latents, counted from `origin`; both start between cells."""
    return slice((side.start - origin) >> halvings, -((origin - side.stop) >> halvings))


def _tiles(rows: int, columns: int, multiple: int) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """(rows, columns) of latents that are searched at once, and of those whose shifts are kept, at such multiples."""
    margin = -(-MARGIN // multiple) * multiple
    side = max(TILE // multiple * multiple, 2 * margin + multiple)
    yield from tiles_with_margins(rows, columns, side, margin)
