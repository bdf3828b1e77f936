"""The engine: pictures to .perco bytes and back, on a model that is loaded once and kept.

encode   images -> RGB tensors -> PercoPipeline -> Codes -> container.pack -> bytes
decode   bytes -> container.unpack -> Codes -> PercoPipeline -> images
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from . import bitstream, installation, pixels, rates, weights  # noqa: F401 (installation must come first)
from .batch_options import DecodeOptions, EncodeOptions, for_each
from .bitstream.prior import Prior
from .captioner import Captioner, choose_captions
from .codes import DEFAULT_SEED, MAX_PIXELS, Codes, Metadata, ModelReference
from .devices import best_dtype, cache, usable_device, weights_bytes
from .errors import InvalidModel, LimitExceeded, ModelUnavailable
from .family import FamilyEngine
from .fitting import fitted
from .locks import Lock
from .memory import Placement, explained
from .opacity import opacity
from .options import check_metadata, check_picture, check_seed, whole_number
from .picture_files import within
from .pipeline import PercoPipeline
from .search import MOST_STEPS
from .tensors import to_images, to_tensor
from .torchac_backend import AutomaticCoder

CODER = AutomaticCoder()

MOST_SEEDS = 129
"""How many seeds an encoder may try: 0 costs no byte, 1 to 128 cost one."""

BATCH_PIXELS = 4 * 1024 * 1024
"""How many pixels go through the networks together in a batch of pictures of one size."""


@dataclass(frozen=True)
class _Job:
    """A file that is to be decoded: its codes, and 1/reduction of its size."""

    codes: Codes
    seed: int
    reduction: int


class Engine:
    """A loaded model.  Get one with `get_engine`; its methods may be called from several threads.

    model: where it lies and how files name it.  device, dtype: of the networks.  prior: of its indices, or None.
    size_bytes: memory of the weights.
    """

    def __init__(
        self, model: weights.Model, device: torch.device, dtype: torch.dtype, placement: Placement | None = None
    ) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype
        self.pipeline: PercoPipeline = PercoPipeline.from_pretrained(model.folder, dtype)
        if model.rate_point is not None and self.pipeline.hyper_enc.rate_points != self.rate_points:
            raise InvalidModel(
                f"{model.folder} is of {self.pipeline.hyper_enc.rate_points[0].bpp} bpp, and was to be of "
                f"{self.rate_points[0].bpp}: the file that names it is damaged, or the record of the model"
            )
        self.prior = Prior.load(model.folder)
        networks = self.pipeline.networks.values()
        for network in networks:
            network.requires_grad_(False)
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.size_bytes = weights_bytes(*networks)
        (placement or Placement()).put(self.pipeline, device)
        self._lock = Lock()

    @contextmanager
    def at_work(self, doing: str, count: int, size: tuple[int, int]) -> Iterator[None]:
        """One thread at a time, in the model's own dtype, whatever a caller's torch.autocast says.

        Where memory runs out, NotEnoughMemory says what for (`memory.explained`).
        """
        own_dtype = torch.autocast(self.device.type, enabled=False)
        with self._lock, own_dtype, explained(doing, self.pipeline, count, size):
            yield

    @property
    def reference(self) -> ModelReference:
        """How files name this model."""
        return self.model.reference

    @property
    def rate_points(self) -> tuple[rates.RatePoint, ...]:
        """What this model offers, lowest first; a checkpoint of a family offers its one rate."""
        k = self.model.rate_point
        return self._file_rate_points if k is None else self._file_rate_points[k : k + 1]

    @property
    def steps(self) -> int:
        """The denoising steps that this model takes by default."""
        return int(self.pipeline.config.default_num_inference_steps)

    @property
    def _file_rate_points(self) -> tuple[rates.RatePoint, ...]:
        """What the rate point of a file counts: of a family all, whichever are at hand."""
        return self.model.file_rate_points(self.pipeline.hyper_enc.rate_points)

    def encode(self, image: Image.Image, **options: Unpack[EncodeOptions]) -> bytes:
        """One picture, of any Pillow mode and of 1..65535 pixels a side, as the bytes of a .perco file.

        The options are those of `encode_batch`.
        """
        return self.encode_batch([image], **options)[0]

    def encode_batch(
        self,
        images: Sequence[Image.Image],
        *,
        bpp: float | None = None,
        max_bytes: int | None = None,
        caption: str | Sequence[str | None] | None = None,
        captioner: str | os.PathLike[str] | Captioner | None = None,
        seed: int | None = None,
        effort: int | None = None,
        best_of: int = 1,
        alpha: bool = True,
        metadata: Metadata | Sequence[Metadata] | None = None,
    ) -> list[bytes]:
        """Pictures as the bytes of .perco files; those of one size go through the networks together.

        bpp: nominal bits a pixel of the hyper-latent; the nearest rate point is taken (default: 0.03, or whatever is
            best within max_bytes).
        max_bytes: hard limit on the whole file: the highest rate point (up to bpp, if given) that fits; of a ladder,
            also with codes that are chosen for fewer bits, as long as they are worth more than the rate below.
        caption: text stored with the picture, at most 4096 bytes of UTF-8; "": none, None: the captioner's, if any.
            One for all pictures, or one for each.
        captioner: writes the captions where `caption` is None: whatever `get_captioner` takes.  A model that it names
            runs on this engine's device; it is not even loaded where `caption` is given.
        seed: of the noise that decoding starts from, 0..2**32-1; None: the default, which costs no bytes.
        effort: search for better codes (search.py) in so many steps, 0..100, each of which takes about two decodes;
            8 brings most of what there is.  For models with a ladder of codes, such as the embedded one.  0: codes as
            the encoder alone chooses them.  None: 4 steps for these models, 8 at their lowest rate, for pictures of up
            to 2**20 pixels, and as many fewer for larger ones as keep the time; for other models, with offloaded
            networks, and where memory does not suffice, 0.
        best_of: decode with so many seeds, 1..129, at the model's default steps, and store the one whose picture has
            the least squared error; the file grows by at most a byte.
        alpha: keep opacity, as a coarse mask, where there is any; False drops it.
        metadata: EXIF, ICC and XMP blocks, stored as they are; those of all pictures, or of each.

        Raises TypeError for what is no picture, ValueError for values outside of these, BudgetTooSmall (a ValueError)
        if nothing fits, ModelUnavailable or InvalidModel for the captioner, NotEnoughMemory, and NotFinite where the
        networks fail.
        """
        level = self._level(bpp, highest=max_bytes is not None)
        if max_bytes is not None:
            max_bytes = whole_number("max_bytes", max_bytes, 1)
        if effort is not None:
            effort = whole_number("effort", effort, 0, MOST_STEPS)
        best_of = whole_number("best_of", best_of, 1, MOST_SEEDS)
        if seed is not None:
            seed = check_seed(seed)
        if best_of > 1 and seed is not None:
            raise ValueError(f"seed={seed} leaves no choice to best_of={best_of}: give one of them")
        if not isinstance(alpha, bool | np.bool_):
            raise ValueError(f"alpha must be of type bool, not {alpha!r:.80}")
        given: list[Metadata | None] = for_each(metadata, len(images), "metadata blocks")
        blocks = [Metadata() if block is None else check_metadata(block) for block in given]
        for image in images:
            check_picture(image)  # which loads it before this engine is at work: a .perco file is decoded by one
        captions = choose_captions(caption, captioner, images, self.device)
        files = []
        for image, indices, text, block in zip(images, self.indices(images, level), captions, blocks, strict=True):
            codes = Codes(
                model=self.reference,
                width_px=image.width,
                height_px=image.height,
                rate_point=level if self.model.rate_point is None else self.model.rate_point,
                indices=indices,
                caption=text,
                seed=DEFAULT_SEED if seed is None else seed,
                alpha=pixels.alpha_mask(image) if alpha else None,
                metadata=block,
            )
            files.append(fitted(self, codes, image, max_bytes, effort, best_of))
        return files

    def _level(self, bpp: float | None, *, highest: bool) -> int:
        """Which of `rate_points` is meant.  highest: the highest one where nothing is said, and not the usual one."""
        points = self.rate_points
        if bpp is None and highest:
            return len(points) - 1
        return rates.nearest(points, bpp)

    def indices(
        self, images: Sequence[Image.Image], level: int, thrift: float = 1.0
    ) -> list[tuple[NDArray[np.int32], ...]]:
        """The indices of pictures, as the encoder chooses them: grids (rows, columns) for each, coarse to fine.

        level: into `rate_points`.  thrift: how many times as much as usual a bit of a ladder's codes costs.
        """
        found: list[tuple[NDArray[np.int32], ...]] = [()] * len(images)
        for group in _groups([image.size for image in images]):
            with self.at_work("encode", len(group), images[group[0]].size):
                batch = to_tensor([pixels.to_rgb(images[k]) for k in group])
                grids = self.pipeline.encode_image(batch, level, self.prior, thrift)
            for row, k in enumerate(group):
                found[k] = tuple(grid[row].to(torch.int32).cpu().numpy() for grid in grids)
        return found

    def pack(self, codes: Codes) -> bytes:
        """The file of these codes."""
        return bitstream.pack(codes, self._file_rate_points, prior=self.prior, coder=CODER)

    def decode(self, data: bytes, **options: Unpack[DecodeOptions]) -> Image.Image:
        """The picture in the bytes of a .perco file, mode RGB, or RGBA where the file holds opacity.

        The options are those of `decode_batch`.
        """
        return self.decode_batch([data], **options)[0]

    def decode_batch(
        self,
        files: Sequence[bytes],
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] | None = None,
        max_size_px: int | None = None,
        allow_truncated: bool = False,
    ) -> list[Image.Image]:
        """The pictures in the bytes of .perco files; those of one size go through the networks together.

        A file that names another model than this engine's is decoded by that one.

        steps: denoising steps (default: the model's); 0 shows the hyper-latent's own estimate, where there is one.
        guidance_scale: of classifier-free guidance (default: the model's), where the model reads captions.
        seed: of the noise, instead of the file's: one for all files, or one for each.
        max_size_px: the longer side of the result at most; much smaller ones are decoded on a shorter way.
        allow_truncated: show what the complete levels of a truncated file still give.

        The same file gives the same pixels on the same machine, alone or in a batch, up to rounding (1 level of 256).
        Raises ValueError for values outside of these, BitstreamError (LimitExceeded for too large a picture),
        ModelUnavailable, InvalidModel or UnsupportedRatePoint for the model that a file names, NotEnoughMemory, and
        NotFinite where the networks fail.
        """
        seeds = [None if one is None else check_seed(one) for one in for_each(seed, len(files), "seeds")]
        if steps is not None:
            steps = whole_number("steps", steps, 0)
        if max_size_px is not None:
            max_size_px = whole_number("max_size_px", max_size_px, 1)
        files = [bytes(memoryview(data)) for data in files]  # a TypeError for what holds no bytes
        jobs: list[tuple[Engine, _Job]] = []
        for data, own in zip(files, seeds, strict=True):
            header = bitstream.read_header(data, allow_truncated=allow_truncated)
            engine = self
            if header.model != self.reference:
                engine = get_engine_for(header.model, self.device, rate_point=header.rate_point)
            if header.width_px * header.height_px > MAX_PIXELS:
                raise LimitExceeded(
                    f"the picture has {header.width_px}x{header.height_px} pixels, more than {MAX_PIXELS}: "
                    f"raise perco_engine.engine.MAX_PIXELS if you trust the file"
                )
            codes = engine._codes(data, allow_truncated)
            reduction = _reduction(codes.width_px, codes.height_px, max_size_px)
            jobs.append((engine, _Job(codes, codes.seed if own is None else own, reduction)))
        images: list[Image.Image | None] = [None] * len(jobs)
        keys = [(e, j.reduction, j.codes.rate_point, j.codes.width_px, j.codes.height_px) for e, j in jobs]
        for group in _groups(keys):
            engine = jobs[group[0]][0]
            decoded = engine._decode([jobs[k][1] for k in group], steps, guidance_scale)
            for k, image in zip(group, decoded, strict=True):
                images[k] = _finish(image, jobs[k][1].codes, max_size_px)
        return [image for image in images if image is not None]

    def codes(self, data: bytes, *, allow_truncated: bool = False) -> Codes:
        """What the bytes of a file of this model say.

        Raises BitstreamError, UnsupportedRatePoint, ModelUnavailable for a file of another model.
        """
        header = bitstream.read_header(data, allow_truncated=allow_truncated)
        if header.model != self.reference:
            other = weights.find_for_file(header.model, header.rate_point)
            raise ModelUnavailable(f"the file is of another model, {other.name!r}: get_engine_for gives its engine")
        return self._codes(data, allow_truncated)

    def _codes(self, data: bytes, allow_truncated: bool) -> Codes:
        """The same, of what is known to be a file of this model."""
        return self.model.codes(
            data, self._file_rate_points, prior=self.prior, coder=CODER, allow_truncated=allow_truncated
        )

    def decode_seeds(self, codes: Codes, seeds: Sequence[int]) -> Iterator[Image.Image]:
        """The picture of the same codes with each of these seeds, without opacity, at the model's default steps."""
        for group in _groups([(codes.width_px, codes.height_px)] * len(seeds)):
            yield from self._decode([_Job(codes, seeds[k], 1) for k in group], None, None)

    def _decode(self, jobs: list[_Job], steps: int | None, guidance_scale: float | None) -> list[Image.Image]:
        """The pictures of jobs of one size and rate point, at 1/reduction of their size."""
        first = jobs[0]
        doing = "decode" if first.reduction == 1 else "preview"
        with self.at_work(doing, len(jobs), (first.codes.width_px, first.codes.height_px)):
            indices = tuple(
                torch.stack([torch.from_numpy(job.codes.indices[k]) for job in jobs]).to(self.device)
                for k in range(len(first.codes.indices))
            )
            size = first.codes.height_px, first.codes.width_px
            options: dict[str, Any] = {
                "prompt": [job.codes.caption for job in jobs],
                "generator": [torch.Generator().manual_seed(job.seed) for job in jobs],
                "num_inference_steps": steps,
                "guidance_scale": guidance_scale,
            }
            if first.reduction > 1:
                return to_images(self.pipeline.decode_preview(indices, *size, first.reduction, **options))
            return to_images(self.pipeline.decode_indices(indices, *size, **options, output_type="pt"))


def _groups(keys: Sequence[tuple[Any, ...]]) -> list[list[int]]:
    """Positions of equal keys together, at most BATCH_PIXELS in a group.  A key ends with width, height in pixels."""
    gathered: dict[tuple[Any, ...], list[int]] = {}
    for k, key in enumerate(keys):
        gathered.setdefault(key, []).append(k)
    groups = []
    for (*_, width, height), members in gathered.items():
        most = max(1, BATCH_PIXELS // (width * height))
        groups += [members[k : k + most] for k in range(0, len(members), most)]
    return groups


def _reduction(width_px: int, height_px: int, max_size_px: int | None) -> int:
    """The largest of 8, 4, 2, 1 that leaves at least max_size_px on the longer side."""
    if max_size_px is None:
        return 1
    longer = max(width_px, height_px)
    return next((r for r in (8, 4, 2) if -(-longer // r) >= max_size_px), 1)


def _finish(image: Image.Image, codes: Codes, max_size_px: int | None) -> Image.Image:
    """The decoded picture with its opacity, within max_size_px."""
    if codes.alpha is not None:
        image.putalpha(opacity(codes.alpha, codes.width_px, codes.height_px, image.size))
    if max_size_px is not None and max(image.size) > max_size_px:
        image = image.resize(within((codes.width_px, codes.height_px), max_size_px), Image.Resampling.LANCZOS)
    return image


def get_engine(
    model: str | os.PathLike[str] = "embedded",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    compile: bool = False,  # noqa: A002
    offload: bool | None = None,
) -> Engine | FamilyEngine:
    """The engine for a model (a registered or installed name, or a folder), loaded once per process and kept.

    For a family, an engine that loads the checkpoint of the rate that is asked for.
    device: default CUDA or MPS where there is one, else the CPU.  dtype: torch.float16, bfloat16, float32
        or float64; default what is fast there.
    compile, offload: see `perco_engine.memory.Placement`.
    Raises ModelUnavailable, InvalidModel, NotEnoughMemory, OffloadUnavailable, and ValueError for compile with offload,
    a device that cannot be used here, or a dtype that is none of them.
    """
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float16, bfloat16, float32 or float64, not {dtype!r}")
    chosen = usable_device(device)
    precision, placement = dtype or best_dtype(chosen), Placement(compile, offload)
    spec = weights.named(model) if isinstance(model, str) else None
    if spec is not None and spec.is_family:
        installed = weights.checkpoints(spec)
        return FamilyEngine(spec, installed, lambda one: load(one, chosen, precision, placement), chosen, precision)
    return load(weights.find(model), chosen, precision, placement)


def get_engine_for(
    model: ModelReference, device: str | torch.device | None = None, *, rate_point: int | None = None
) -> Engine:
    """The engine that decodes files which name this model.

    rate_point: of the file; an error then says which rate of a family is missing.
    Raises ModelUnavailable, InvalidModel, ValueError for a device that cannot be used here.
    """
    chosen = usable_device(device)
    return load(weights.find_for_file(model, rate_point), chosen, best_dtype(chosen))


def engine_of_file(data: bytes, model: str | os.PathLike[str] | None = None) -> Engine:
    """The engine that decodes the bytes of a .perco file.

    model: the folder of its model, where that is not installed; it is remembered for later files.
    Raises BitstreamError, ModelUnavailable, InvalidModel.
    """
    if model is not None:
        weights.find(model)
    header = bitstream.read_header(data)
    return get_engine_for(header.model, rate_point=header.rate_point)


def load(model: weights.Model, device: torch.device, dtype: torch.dtype, placement: Placement | None = None) -> Engine:
    """The engine for this model, device, dtype and placement, from the process-wide cache."""
    key = str(model.folder.resolve()), model.fingerprint, str(device), str(dtype), placement or Placement()
    return cache.get(key, lambda: Engine(model, device, dtype, placement))
