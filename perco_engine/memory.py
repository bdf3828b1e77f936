"""Memory on the device: what a model needs there, whether it fits, and what to say when it did not."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from diffusers.utils import is_accelerate_available

from .devices import weights_bytes
from .errors import NotEnoughMemory, OffloadUnavailable
from .latent_tiles import LATENTS_AT_ONCE
from .models.autoencoder import PatchAutoencoder
from .pipeline import PercoPipeline
from .rates import LATENT_PX

GIB = 1 << 30

WORKSPACE_BYTES = GIB // 2
"""What is left for kernels' own needs; an allowance, not a measurement."""

UNET_ACTIVATIONS = 27
VAE_ACTIVATIONS = 6.1
"""Activations alive at once in Stable Diffusion's U-Net for each latent, and in AutoencoderKL for each pixel, in units
of the first block's channels, as `python -m perco_engine.evaluation.full_size --estimate` counts them for tiles."""


@dataclass(frozen=True)
class Placement:
    """How the networks of a model lie on their device.

    compile: translate the U-Net and the autoencoder's decoder with torch.compile; the first pictures of a size take
        minutes, later ones less than without.
    offload: keep each network on the device only while it is at work (needs the package accelerate).  None: where the
        weights and what works on them do not fit the memory that a CUDA device has left, and nothing is compiled.

    Raises ValueError where both are asked for.
    """

    compile: bool = False
    offload: bool | None = None

    def __post_init__(self) -> None:
        if self.compile and self.offload:
            raise ValueError("compile and offload exclude each other: compiled networks stay on the device")

    def put(self, pipeline: PercoPipeline, device: torch.device) -> None:
        """Brings the networks to the device.  Raises OffloadUnavailable, NotEnoughMemory."""
        offload = self.offload
        if offload and not is_accelerate_available():
            raise OffloadUnavailable("offload needs a package that is not installed: pip install accelerate")
        if offload is None and device.type == "cuda" and not self.compile and is_accelerate_available():
            offload = needs_offload(
                weights_bytes(*pipeline.networks.values()), working_bytes(pipeline), free_bytes(device)
            )
        if offload:
            pipeline.enable_model_cpu_offload(device=device)
        else:
            with _out_of_memory("load the model", pipeline, device):
                pipeline.to(device)
        if self.compile:
            pipeline.unet.compile()
            pipeline.vae.decoder.compile()


def working_bytes(pipeline: PercoPipeline) -> int:
    """Memory, besides the weights, that one picture of any size takes at most while it goes through in tiles.

    The picture itself, and the PatchAutoencoder, whose activations are small, are not counted.
    """
    activations = UNET_ACTIVATIONS * LATENTS_AT_ONCE * int(pipeline.unet.config.block_out_channels[0])
    if not isinstance(pipeline.vae, PatchAutoencoder):
        pixels = (pipeline.vae_tile_latents * LATENT_PX) ** 2
        activations = max(activations, int(VAE_ACTIVATIONS * pixels * pipeline.vae.config.block_out_channels[0]))
    return activations * int(pipeline.unet.dtype.itemsize) + WORKSPACE_BYTES


def is_offloaded(pipeline: PercoPipeline) -> bool:
    """Whether networks are on the device only while they are at work."""
    return bool(getattr(pipeline, "_all_hooks", None))


def needs_offload(weights: int, working: int, free: int) -> bool:
    """Whether the networks must wait in the machine's memory for their turns on the device.

    weights, working, free: bytes of all weights, of what works on them, and of what the device has left.
    """
    return weights + working > free


def free_bytes(device: torch.device) -> int:
    """What a CUDA device has left for this process: what is free, and what torch holds and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: Python's own, or torch's on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # On the CPU, on MPS, and in CUDA's libraries torch has no class for it.
    signs = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")
    # oneDNN says what it could not do, and never why; "a primitive descriptor" is of what it does not know how to do.
    failed = ("could not create a memory object", "could not create a primitive", "could not execute a primitive")
    text = str(error)
    return isinstance(error, RuntimeError) and (text in failed or any(sign in text for sign in signs))


def explained(doing: str, pipeline: PercoPipeline, count: int, size: tuple[int, int]) -> AbstractContextManager[None]:
    """A context that raises NotEnoughMemory, which says what takes less, where its block runs out of memory.

    doing: "encode", "search" where better codes are searched for, "decode", or "preview" where a picture is decoded on
        a shorter way.
    count, size: how many pictures, and their width and height in pixels.
    """
    smaller = ["fewer pictures at once"] if count > 1 else []
    if doing == "search":
        smaller.append("effort=0")
    if doing in ("encode", "search"):
        smaller.append("a smaller picture")
    elif doing == "decode" and isinstance(pipeline.vae, PatchAutoencoder) and max(size) > 1:
        half = max(size) // 2
        smaller.append(f"decoding it smaller (max_size_px={half}; perco decode --max-size {half})")
    pictures = f"{count} picture{'s' if count > 1 else ''} of {size[0]}x{size[1]} pixels"
    task = f"{'search for codes of' if doing == 'search' else doing} {pictures}"
    return _out_of_memory(task, pipeline, pipeline._execution_device, *smaller, may_offload=doing != "search")


@contextmanager
def _out_of_memory(
    task: str, pipeline: PercoPipeline, device: torch.device, *smaller: str, may_offload: bool = True
) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        ways = list(smaller)
        if may_offload and device.type == "cuda" and not is_offloaded(pipeline):
            ways.append("get_engine(..., offload=True)" + ("" if is_accelerate_available() else " (with accelerate)"))
        if pipeline.unet.dtype == torch.float32:
            ways.append("get_engine(..., dtype=torch.bfloat16)")
        if device.type != "cpu":
            ways.append('device="cpu"')
        left = f", which has {free_bytes(device) / GIB:.1f} GiB left" if device.type == "cuda" else ""
        raise NotEnoughMemory(
            f"not enough memory to {task} on {device}{left}: try {', or '.join(ways) or 'a smaller model'}"
        ) from error
