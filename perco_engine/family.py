"""A family of checkpoints as one model: the rate that is asked for picks the weights."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Unpack

import torch
from PIL import Image

from . import bitstream, rates
from .batch_options import DecodeOptions, EncodeOptions, for_each, of_members
from .bitstream.entropy import minimum_bits, uniform_cdf
from .captioner import choose_captions
from .codes import Codes, ModelReference
from .options import whole_number
from .weights import Model, ModelSpec, find_for_file

if TYPE_CHECKING:
    from .engine import Engine


class FamilyEngine:
    """The installed checkpoints of a family behind the methods of an Engine.  Get one with `get_engine`.

    A checkpoint is loaded when it is needed, by `load`, whose cache may drop it again.
    checkpoints: at least one, lowest rate first; of several of one rate, the first encodes.
    device, dtype: of the networks that `load` loads.
    """

    steps: int | None = None
    """The denoising steps that decoding takes by default: each checkpoint has its own."""

    def __init__(
        self,
        family: ModelSpec,
        checkpoints: Sequence[Model],
        load: "Callable[[Model], Engine]",
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self._load = load
        self._checkpoints: dict[rates.RatePoint, Model] = {}
        for checkpoint in checkpoints:
            self._checkpoints.setdefault(family.rate_points[checkpoint.rate_point or 0], checkpoint)

    @property
    def rate_points(self) -> tuple[rates.RatePoint, ...]:
        """What is installed, lowest first."""
        return tuple(self._checkpoints)

    def encode(self, image: Image.Image, **options: Unpack[EncodeOptions]) -> bytes:
        """One picture as the bytes of a .perco file; see `Engine.encode_batch`."""
        return self.encode_batch([image], **options)[0]

    def encode_batch(self, images: Sequence[Image.Image], **options: Unpack[EncodeOptions]) -> list[bytes]:
        """Pictures as the bytes of .perco files; the options and errors are those of `Engine.encode_batch`.

        The installed rate nearest to `bpp` is taken; with `max_bytes`, for each picture the highest (up to `bpp`) that
        fits.  Opacity is kept as fine as it is before the lowest rate is reached, and then grows coarser.
        """
        bpp, max_bytes = options.get("bpp"), options.get("max_bytes")
        if max_bytes is not None:
            max_bytes = whole_number("max_bytes", max_bytes, 1)
        points = self.rate_points
        if max_bytes is None:
            chosen = rates.nearest(points, bpp)
            return self._at(points[chosen]).encode_batch(images, **options)
        captions = choose_captions(options.get("caption"), options.get("captioner"), images, self.device)
        options = {**options, "caption": captions}
        files: dict[int, bytes] = {}
        highest = len(points) - 1 if bpp is None else rates.nearest(points, bpp)
        free: EncodeOptions = {**options, "max_bytes": None, "best_of": 1}
        for point in points[highest:0:-1]:
            tried = [
                k for k, image in enumerate(images) if k not in files and _least_bytes(point, *image.size) <= max_bytes
            ]
            if tried:
                engine = self._at(point)
                encoded = engine.encode_batch([images[k] for k in tried], **of_members(free, tried, len(images)))
                fitting = {k: data for k, data in zip(tried, encoded, strict=True) if len(data) <= max_bytes}
                if fitting and options.get("best_of", 1) != 1:
                    own = of_members(options, list(fitting), len(images))
                    encoded = engine.encode_batch([images[k] for k in fitting], **own)
                    fitting = dict(zip(fitting, encoded, strict=True))
                files |= fitting
        rest = [k for k in range(len(images)) if k not in files]
        if rest:
            engine = self._at(points[0])
            encoded = engine.encode_batch([images[k] for k in rest], **of_members(options, rest, len(images)))
            files |= dict(zip(rest, encoded, strict=True))
        return [files[k] for k in range(len(images))]

    def decode(self, data: bytes, **options: Unpack[DecodeOptions]) -> Image.Image:
        """The picture in the bytes of a .perco file; see `Engine.decode_batch`."""
        return self.decode_batch([data], **options)[0]

    def decode_batch(self, files: Sequence[bytes], **options: Unpack[DecodeOptions]) -> list[Image.Image]:
        """The pictures in the bytes of .perco files; the options and errors are those of `Engine.decode_batch`.

        Files of one checkpoint are decoded together, one checkpoint after the other.
        """
        for_each(options.get("seed"), len(files), "seeds")
        files = [bytes(memoryview(data)) for data in files]
        gathered: dict[ModelReference, list[int]] = {}
        for k, data in enumerate(files):
            header = bitstream.read_header(data, allow_truncated=options.get("allow_truncated", False))
            gathered.setdefault(header.model, []).append(k)
        images: dict[int, Image.Image] = {}
        for members in gathered.values():
            group, own = [files[k] for k in members], of_members(options, members, len(files))
            decoded = self._engine_for(group[0], options.get("allow_truncated", False)).decode_batch(group, **own)
            images |= dict(zip(members, decoded, strict=True))
        return [images[k] for k in range(len(files))]

    def codes(self, data: bytes, *, allow_truncated: bool = False) -> Codes:
        """What the bytes of a file of this family say.  Raises BitstreamError, UnsupportedRatePoint."""
        return self._engine_for(data, allow_truncated).codes(data, allow_truncated=allow_truncated)

    def _engine_for(self, data: bytes, allow_truncated: bool) -> "Engine":
        """The engine of the checkpoint that a file names."""
        header = bitstream.read_header(data, allow_truncated=allow_truncated)
        return self._load(find_for_file(header.model, header.rate_point))

    def _at(self, point: rates.RatePoint) -> "Engine":
        """The engine of the installed checkpoint of this rate."""
        return self._load(self._checkpoints[point])


def _least_bytes(point: rates.RatePoint, width_px: int, height_px: int) -> int:
    """A size that no file of this rate point stays below, so that no checkpoint is loaded in vain."""
    grids = zip(point.grids, point.shapes(width_px, height_px), strict=True)
    return sum(minimum_bits(rows * columns, uniform_cdf(grid.codebook_size)) for grid, (rows, columns) in grids) // 8
