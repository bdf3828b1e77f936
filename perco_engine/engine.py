"""The engine: pictures to .perco bytes and back, on a model that is loaded once and kept.

encode   images -> RGB tensors -> PercoPipeline -> Codes -> container.pack -> bytes
decode   bytes -> container.unpack -> Codes -> PercoPipeline -> images
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

import torch
from PIL import Image

from . import bitstream, pixels, rates, weights
from .codes import DEFAULT_SEED, Codes, Metadata, ModelReference
from .errors import BudgetTooSmall, LimitExceeded, UnsupportedRatePoint
from .family import FamilyEngine
from .pipeline import PercoPipeline
from .torchac_backend import AutomaticCoder

MAX_PIXELS = 178_956_970
"""The largest picture that is decoded: what Pillow by default refuses as a decompression bomb."""

CODER = AutomaticCoder()

BATCH_PIXELS = 4 * 1024 * 1024
"""How many pixels go through the networks together in a batch of pictures of one size."""


class EncodeOptions(TypedDict, total=False):
    """What `Engine.encode` and `Engine.encode_batch` take by name; the latter says what each means."""

    bpp: float | None
    max_bytes: int | None
    caption: str | None
    seed: int | None
    alpha: bool
    metadata: Metadata | None


class DecodeOptions(TypedDict, total=False):
    """What `Engine.decode` and `Engine.decode_batch` take by name; the latter says what each means."""

    steps: int | None
    guidance_scale: float | None
    seed: int | None
    max_size_px: int | None
    allow_truncated: bool


@dataclass(frozen=True)
class _Job:
    """A file that is to be decoded: its codes, and 1/reduction of its size."""

    codes: Codes
    seed: int
    reduction: int


class Engine:
    """A loaded model.  Get one with `get_engine`; its methods may be called from several threads.

    model: where it lies and how files name it.  device, dtype: of the networks.  size_bytes: memory of the weights.
    """

    def __init__(self, model: weights.Model, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype
        self.pipeline: PercoPipeline = PercoPipeline.from_pretrained(model.folder, dtype).to(device)
        modules = [part for part in self.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        for module in modules:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.size_bytes = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
        self._lock = threading.Lock()

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
    def _file_rate_points(self) -> tuple[rates.RatePoint, ...]:
        """What the rate point of a file counts: of a family all, whichever are at hand."""
        spec = weights.registered(self.model.registry_id)
        return spec.rate_points if spec else self.pipeline.hyper_enc.rate_points

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
        caption: str | None = None,
        seed: int | None = None,
        alpha: bool = True,
        metadata: Metadata | None = None,
    ) -> list[bytes]:
        """Pictures as the bytes of .perco files; those of one size go through the networks together.

        bpp: nominal bits a pixel of the hyper-latent; the nearest rate point is taken (default: 0.03, or whatever is
            best within max_bytes).
        max_bytes: hard limit on the whole file: the highest rate point (up to bpp, if given) that fits.
        caption: text stored with the picture, at most 4096 bytes of UTF-8; None or "": none.
        seed: of the noise that decoding starts from, 0..2**32-1; None: the default, which costs no bytes.
        alpha: keep opacity, as a coarse mask, where there is any; False drops it.
        metadata: EXIF, ICC and XMP blocks, stored as they are.

        Raises ValueError for values outside of these, and BudgetTooSmall (a ValueError) if nothing fits.
        """
        points = self.rate_points
        level = len(points) - 1 if bpp is None else rates.nearest(points, bpp)
        if bpp is None and max_bytes is None:
            level = rates.nearest(points, rates.DEFAULT_BPP)
        rates.check_max_bytes(max_bytes)
        for image in images:
            if not 1 <= min(image.size) <= max(image.size) <= 65535:
                raise ValueError(f"a .perco picture has 1 to 65535 pixels a side, not {image.width}x{image.height}")
        grids: list[tuple[Any, ...]] = [()] * len(images)
        for group in _groups([image.size for image in images]):
            with self._lock, torch.inference_mode():
                batch = pixels.to_tensor([pixels.to_rgb(images[k]) for k in group])
                encoded = self.pipeline.encode_image(batch, level)
            for row, k in enumerate(group):
                grids[k] = tuple(grid[row].to(torch.int32).cpu().numpy() for grid in encoded)
        return [
            self._fit(
                Codes(
                    model=self.reference,
                    width_px=image.width,
                    height_px=image.height,
                    rate_point=level if self.model.rate_point is None else self.model.rate_point,
                    indices=indices,
                    caption=caption or "",
                    seed=DEFAULT_SEED if seed is None else seed,
                    alpha=pixels.alpha_mask(image) if alpha else None,
                    metadata=metadata or Metadata(),
                ),
                image,
                max_bytes,
            )
            for image, indices in zip(images, grids, strict=True)
        ]

    def _fit(self, codes: Codes, image: Image.Image, max_bytes: int | None) -> bytes:
        """The codes as bytes: whole, or as many levels and as fine an opacity mask as max_bytes allows."""
        data = bitstream.pack(codes, self._file_rate_points, coder=CODER)
        smallest = len(data)
        while max_bytes is not None and len(data) > max_bytes:
            if len(codes.indices) > 1:
                codes = replace(codes, rate_point=codes.rate_point - 1, indices=codes.indices[:-1])
            elif codes.alpha is not None and codes.alpha.log2_scale < pixels.ALPHA_LOG2_SCALES[-1]:
                codes = replace(codes, alpha=pixels.alpha_mask(image, codes.alpha.log2_scale + 1))
            else:
                raise BudgetTooSmall(
                    f"a {image.width}x{image.height} picture with what is to be stored beside it takes at least "
                    f"{smallest} bytes, more than max_bytes={max_bytes}: allow more, store less (caption, metadata, "
                    f"opacity), or reduce the picture"
                )
            data = bitstream.pack(codes, self._file_rate_points, coder=CODER)
            smallest = min(smallest, len(data))
        return data

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
        seed: int | None = None,
        max_size_px: int | None = None,
        allow_truncated: bool = False,
    ) -> list[Image.Image]:
        """The pictures in the bytes of .perco files; those of one size go through the networks together.

        A file that names another model than this engine's is decoded by that one.

        steps: denoising steps (default: the model's); 0 shows the hyper-latent's own estimate, where there is one.
        guidance_scale: of classifier-free guidance (default: the model's), where the model reads captions.
        seed: of the noise, instead of the file's.
        max_size_px: the longer side of the result at most; much smaller ones are decoded on a shorter way.
        allow_truncated: show what the complete levels of a truncated file still give.

        The same file gives the same pixels on the same machine, alone or in a batch, up to rounding (1 level of 256).
        Raises BitstreamError, ModelUnavailable, LimitExceeded.
        """
        for name, value, least in (("steps", steps, 0), ("max_size_px", max_size_px, 1), ("seed", seed, 0)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
        jobs: list[tuple[Engine, _Job]] = []
        for data in files:
            header = bitstream.read_header(data, allow_truncated=allow_truncated)
            engine = self
            if header.model != self.reference:
                engine = get_engine_for(header.model, self.device, rate_point=header.rate_point)
            if header.width_px * header.height_px > MAX_PIXELS:
                raise LimitExceeded(
                    f"the picture has {header.width_px}x{header.height_px} pixels, more than {MAX_PIXELS}: "
                    f"raise perco_engine.engine.MAX_PIXELS if you trust the file"
                )
            codes = engine.codes(data, allow_truncated=allow_truncated)
            reduction = _reduction(codes.width_px, codes.height_px, max_size_px)
            jobs.append((engine, _Job(codes, codes.seed if seed is None else seed, reduction)))
        images: list[Image.Image | None] = [None] * len(jobs)
        keys = [(e, j.reduction, j.codes.rate_point, j.codes.width_px, j.codes.height_px) for e, j in jobs]
        for group in _groups([key[-2:] for key in keys], keys):
            engine = jobs[group[0]][0]
            decoded = engine._decode([jobs[k][1] for k in group], steps, guidance_scale)
            for k, image in zip(group, decoded, strict=True):
                images[k] = _finish(image, jobs[k][1].codes, max_size_px)
        return [image for image in images if image is not None]

    def codes(self, data: bytes, *, allow_truncated: bool = False) -> Codes:
        """What the bytes of a file of this model say.  Raises BitstreamError, UnsupportedRatePoint."""
        header = bitstream.read_header(data, allow_truncated=allow_truncated)
        points = self._file_rate_points
        if header.rate_point >= len(points):
            raise UnsupportedRatePoint(
                f"the file names rate point {header.rate_point}, and {self.model.name!r} has {len(points)}: "
                f"update pillow-perco, or the file is damaged"
            )
        if self.model.rate_point not in (None, header.rate_point):
            raise UnsupportedRatePoint(
                f"the file is of {points[header.rate_point].bpp} bpp, and the weights that it names, "
                f"{self.model.name!r}, are of {self.rate_points[0].bpp}: the file is damaged"
            )
        return (bitstream.unpack_partial if allow_truncated else bitstream.unpack)(data, points, coder=CODER)

    def _decode(self, jobs: list[_Job], steps: int | None, guidance_scale: float | None) -> list[Image.Image]:
        """The pictures of jobs of one size and rate point, at 1/reduction of their size."""
        first = jobs[0]
        with self._lock, torch.inference_mode():
            indices = tuple(
                torch.stack([torch.from_numpy(job.codes.indices[k]) for job in jobs]).to(self.device)
                for k in range(len(first.codes.indices))
            )
            size = first.codes.height_px, first.codes.width_px
            if first.reduction > 1:
                return pixels.to_images(self.pipeline.decode_preview(indices, *size, first.reduction))
            output = self.pipeline.decode_indices(
                indices,
                *size,
                prompt=[job.codes.caption for job in jobs],
                generator=[torch.Generator().manual_seed(job.seed) for job in jobs],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                output_type="pt",
            )
            return pixels.to_images(output)


def _groups(sizes: list[tuple[int, int]], keys: list[Any] | None = None) -> list[list[int]]:
    """Positions of equal keys (default: equal sizes) together, in groups of at most BATCH_PIXELS."""
    gathered: dict[Any, list[int]] = {}
    for k, key in enumerate(sizes if keys is None else keys):
        gathered.setdefault(key, []).append(k)
    groups = []
    for members in gathered.values():
        width, height = sizes[members[0]]
        most = max(1, BATCH_PIXELS // (width * height))
        groups += [members[k : k + most] for k in range(0, len(members), most)]
    return groups


def _reduction(width_px: int, height_px: int, max_size_px: int | None) -> int:
    """The largest of 8, 4, 2, 1 that leaves at least max_size_px on the longer side."""
    if max_size_px is None:
        return 1
    longer = max(width_px, height_px)
    return next((r for r in (8, 4, 2) if longer >= r * max_size_px), 1)


def _finish(image: Image.Image, codes: Codes, max_size_px: int | None) -> Image.Image:
    """The decoded picture with its opacity, within max_size_px."""
    if codes.alpha is not None:
        image.putalpha(pixels.opacity(codes.alpha, codes.width_px, codes.height_px).resize(image.size))
    if max_size_px is not None and max(image.size) > max_size_px:
        scale = max_size_px / max(codes.width_px, codes.height_px)
        size = max(1, round(codes.width_px * scale)), max(1, round(codes.height_px * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return image


def best_device() -> torch.device:
    """CUDA or MPS where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def best_dtype(device: torch.device) -> torch.dtype:
    """bf16 or fp16 on a GPU, float32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


class EngineCache:
    """Loaded engines, at most `budget_bytes` of weights; the one that was not used for longest goes first."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._engines: OrderedDict[tuple[str, str, str], Engine] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, model: weights.Model, device: torch.device, dtype: torch.dtype) -> Engine:
        """The engine for this model, device and dtype, loaded on first use."""
        key = (f"{model.folder.resolve()} {model.fingerprint.hex()}", str(device), str(dtype))
        with self._lock:
            if key not in self._engines:
                self._engines[key] = Engine(model, device, dtype)
            self._engines.move_to_end(key)
            while len(self._engines) > 1 and self.size_bytes > self.budget_bytes:
                self._engines.popitem(last=False)
            return self._engines[key]

    @property
    def size_bytes(self) -> int:
        """Memory that the weights of all loaded engines take."""
        return sum(engine.size_bytes for engine in self._engines.values())

    def clear(self) -> None:
        """Forgets every engine; those in use go when their last user is done."""
        with self._lock:
            self._engines.clear()


cache = EngineCache(int(os.environ.get("PERCO_MEMORY_BUDGET", 16 << 30)))
"""The process-wide cache.  PERCO_MEMORY_BUDGET is its limit in bytes of weights (default 16 GiB)."""


def get_engine(
    model: str | os.PathLike[str] = "embedded",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Engine | FamilyEngine:
    """The engine for a model (a registered or installed name, or a folder), loaded once per process and kept.

    For a family, an engine that loads the checkpoint of the rate that is asked for.
    device: default CUDA or MPS where there is one, else the CPU.  dtype: default what is fast there.
    Raises ModelUnavailable, InvalidModel.
    """
    chosen = torch.device(device) if device is not None else best_device()
    dtype = dtype or best_dtype(chosen)
    spec = weights.named(model) if isinstance(model, str) else None
    if spec is not None and spec.is_family:
        return FamilyEngine(spec, weights.checkpoints(spec), cache.get, chosen, dtype)
    return cache.get(weights.find(model), chosen, dtype)


def get_engine_for(
    model: ModelReference, device: str | torch.device | None = None, *, rate_point: int | None = None
) -> Engine:
    """The engine that decodes files which name this model.

    rate_point: of the file; an error then says which rate of a family is missing.
    Raises ModelUnavailable, InvalidModel.
    """
    chosen = torch.device(device) if device is not None else best_device()
    return cache.get(weights.find_for_file(model, rate_point), chosen, best_dtype(chosen))
