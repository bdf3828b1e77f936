"""What an encoder tries with a picture's first codes, so that the file fits its budget and its picture is near.

    first codes ─> dearer bits, a coarser opacity mask, fewer levels, until they fit ─> codes that are searched for
                ─> a better seed

What comes later is kept if it fits as well.
"""

import functools
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from . import pixels
from .bitstream import read_header
from .codes import AlphaMask, Codes
from .errors import BudgetTooSmall, NotEnoughMemory
from .memory import is_offloaded
from .models.ladder import HyperLadder
from .search import THRIFTS, search, usual_steps

if TYPE_CHECKING:
    from .engine import Engine

MOST_SAVED = 0.3
"""The share of a stream of indices that dearer bits save, at most, as long as they are worth it."""

MASK_SHARE = 0.75
"""A mask grows coarser for the sake of a level only where it takes more than this share of what the indices take.

At less, coarse opacity costs more than the level gains.
"""

WORTHWHILE = 1.15
"""How many times as large a stream must be as that of a level less, to show a better picture in spite of dear bits."""

Fitted = tuple[Codes, bytes]
"""Codes and the file that they make."""


def fitted(
    engine: "Engine", codes: Codes, image: Image.Image, max_bytes: int | None, effort: int | None, best_of: int
) -> bytes:
    """The file of a picture whose first codes these are; the options are those of `Engine.encode_batch`.

    Raises BudgetTooSmall where nothing fits.
    """
    kept = _reduced(engine, codes, image, max_bytes)
    kept = _first_that_fits(engine, _searched(engine, kept[0], image, effort), max_bytes) or kept
    if max_bytes is None or len(kept[1]) < max_bytes:  # for a seed costs a byte
        kept = _first_that_fits(engine, _seeded(engine, kept[0], image, best_of), max_bytes) or kept
    return kept[1]


def _reduced(engine: "Engine", codes: Codes, image: Image.Image, max_bytes: int | None) -> Fitted:
    """The codes, whole or with as dear bits, as coarse an opacity mask and as few levels as max_bytes asks for."""
    if max_bytes is None:
        return codes, engine.pack(codes)
    sizes = []
    for attempt in _ever_smaller(engine, codes, image, max_bytes):
        if len(attempt[1]) <= max_bytes:
            return attempt
        sizes.append(len(attempt[1]))
    raise BudgetTooSmall(
        f"a {image.width}x{image.height} picture with what is to be stored beside it takes at least {min(sizes)} "
        f"bytes, more than max_bytes={max_bytes}: allow more, store less (caption, metadata, opacity), or reduce the "
        f"picture"
    )


def _ever_coarser(mask: AlphaMask | None, image: Image.Image) -> Iterator[AlphaMask | None]:
    """The opacity mask of the picture, then coarser ones."""
    yield mask
    if mask is not None:
        for scale in range(mask.log2_scale + 1, pixels.ALPHA_LOG2_SCALES.stop):
            yield pixels.alpha_mask(image, scale)


def _ever_smaller(engine: "Engine", codes: Codes, image: Image.Image, max_bytes: int) -> Iterator[Fitted]:
    """The codes, then some of dearer bits that fit, then both with coarser masks, then all with a level less.

    The budget has no say in this order: a larger one gives no lower level, nor at the same level a coarser mask.
    """
    finest = codes.alpha
    while True:
        for mask in _ever_coarser(finest, image):
            codes = replace(codes, alpha=mask)
            data = engine.pack(codes)
            yield codes, data
            if len(codes.indices) == 1:
                continue
            sizes = read_header(data).sizes_bytes
            if len(data) - max_bytes <= MOST_SAVED * sizes["hyper_latent"]:
                dearer = _dearer(engine, codes, image, max_bytes)
                if dearer is not None:
                    yield dearer
            if sizes.get("alpha", 0) <= MASK_SHARE * sizes["hyper_latent"]:
                break
        if len(codes.indices) == 1:
            return
        codes = _a_level_less(codes)


def _a_level_less(codes: Codes) -> Codes:
    """The same codes without their finest grid."""
    return replace(codes, rate_point=codes.rate_point - 1, indices=codes.indices[:-1])


def _dearer(engine: "Engine", codes: Codes, image: Image.Image, max_bytes: int) -> Fitted | None:
    """The codes of a ladder at the same rate point with bits that are dear enough.

    None where none of THRIFTS is, and where a level less shows as good a picture.
    """

    @functools.cache
    def chosen(thrift: float) -> Fitted:
        dearer = replace(codes, indices=engine.indices([image], len(codes.indices) - 1, thrift)[0])
        return dearer, engine.pack(dearer)

    least = bisect_left(THRIFTS, True, key=lambda thrift: len(chosen(thrift)[1]) <= max_bytes)
    if least == len(THRIFTS):
        return None
    found, fewer = chosen(THRIFTS[least]), engine.pack(_a_level_less(codes))
    return found if _stream_bytes(found[1]) >= WORTHWHILE * _stream_bytes(fewer) else None


def _stream_bytes(data: bytes) -> int:
    """What the indices take in a file."""
    return read_header(data).sizes_bytes["hyper_latent"]


def _searched(engine: "Engine", codes: Codes, image: Image.Image, effort: int | None) -> Iterator[Codes]:
    """Better codes for the picture at the same rate point, with ever dearer bits; none where no step is to be taken.

    None either where nobody has asked for them, and the networks are not all on the device or memory runs out.
    """
    level = len(codes.indices) - 1
    steps = usual_steps(engine.pipeline, level, *image.size) if effort is None else effort
    if not steps:
        return
    # The way back of a gradient needs all networks on the device at once.
    if is_offloaded(engine.pipeline) and isinstance(engine.pipeline.hyper_enc, HyperLadder):
        if effort:
            raise ValueError("a search needs all networks on the device: leave effort out, or take offload=False")
        return
    picture = pixels.to_rgb(image)
    found = search(engine.pipeline, engine.prior, picture, level, codes.caption, steps)
    while True:
        try:
            with engine.at_work("search", 1, image.size), torch.inference_mode(False):  # in which are no gradients
                grids = next(found, None)
        except NotEnoughMemory:
            if effort is None:
                return
            raise
        if grids is None:
            return
        yield replace(codes, indices=tuple(grid[0].to(torch.int32).cpu().numpy() for grid in grids))


def _seeded(engine: "Engine", codes: Codes, image: Image.Image, best_of: int) -> Iterator[Codes]:
    """The codes with that of the seeds 0..best_of-1 whose decoded picture has the least squared error in RGB."""
    if best_of == 1:
        return
    original = np.asarray(pixels.to_rgb(image), np.float32)
    pictures = engine.decode_seeds(codes, range(best_of))
    errors = [float(np.square(np.asarray(picture, np.float32) - original).mean()) for picture in pictures]
    yield replace(codes, seed=errors.index(min(errors)))


def _first_that_fits(engine: "Engine", attempts: Iterator[Codes], max_bytes: int | None) -> Fitted | None:
    """The first codes whose file has at most max_bytes; None where none has."""
    for codes in attempts:
        data = engine.pack(codes)
        if max_bytes is None or len(data) <= max_bytes:
            return codes, data
    return None
