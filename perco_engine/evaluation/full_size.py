"""PerCo (SD) at its full size on random weights: what encoding and decoding cost on this machine.

    python -m perco_engine.evaluation.full_size --size 768x512 1920x1080 --batch 1 4 --json figures.json

The architecture is that of the published checkpoints (Stable Diffusion 2.1 with the ELIC-style hyper-encoder of the
lowest rate); time and memory do not depend on what the weights are.  There is no tokenizer: random token ids stand for
captions.  Times are medians in seconds after runs that are not counted.  Memory is the peak of what CUDA's allocator
held (on the CPU: of the whole process, from its start on).

    --estimate   counts the tensors' bytes without computing anything, so that it takes seconds and no GPU
    --parity     also holds the GPU's numbers against the CPU's, from the same weights
"""

import argparse
import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel

from ..devices import best_device
from ..memory import GIB, Placement, is_out_of_memory
from ..models.hyper_encoder import ElicHyperEncoder
from ..models.unet import UNet2DConditionModel
from ..pipeline import PercoPipeline
from ..sampling import denoise, draw_noise, predict
from .allocations import Allocations
from .results import write_result

Config = dict[str, Any]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Architecture:
    """Configurations of the networks, in the words of their classes."""

    unet: Config
    vae: Config
    text_encoder: Config
    hyper_enc: Config


FULL = Architecture(
    unet={
        "sample_size": 96,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "upcast_attention": True,
        "local_features_channels": 320,
    },
    vae={
        "sample_size": 768,
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    },
    text_encoder={
        "vocab_size": 49408,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 512,
    },
    hyper_enc={"cfg_ss": 8, "cfg_cs": 256, "N": 192, "M": 320, "codebook_dim": 32},
)
"""866.8, 83.7, 340.4 and 5.9 million parameters."""

TINY = Architecture(
    unet={**FULL.unet, "block_out_channels": (32, 32, 32, 32), "attention_head_dim": 4, "cross_attention_dim": 16}
    | {"layers_per_block": 1, "local_features_channels": 8},
    vae={**FULL.vae, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
    text_encoder={**FULL.text_encoder, "vocab_size": 99, "hidden_size": 16, "intermediate_size": 16}
    | {"num_hidden_layers": 1, "num_attention_heads": 2, "bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 98},
    hyper_enc={**FULL.hyper_enc, "N": 8, "M": 8, "codebook_dim": 4},
)
"""The same with next to no weights, to try this module."""


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """A context in which networks come to be on the device and in the dtype, without a copy elsewhere before."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def build(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> PercoPipeline:
    """The pipeline on random weights, its text encoder without a tokenizer."""
    torch.manual_seed(0)
    with made_on(device, dtype):
        unet = UNet2DConditionModel(**architecture.unet)
        vae = AutoencoderKL(**architecture.vae)
        text_encoder = CLIPTextModel(CLIPTextConfig(**architecture.text_encoder))
        hyper_enc = ElicHyperEncoder(**architecture.hyper_enc)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        set_alpha_to_one=False, steps_offset=1, clip_sample=False,
    )  # fmt: skip
    pipeline = PercoPipeline(vae, hyper_enc, unet, scheduler)
    pipeline.register_modules(text_encoder=text_encoder)
    for network in pipeline.networks.values():
        network.eval()
    return pipeline


def random_codes(pipeline: PercoPipeline, batch: int, width: int, height: int) -> tuple[Tensor, ...]:
    """Indices of pictures of noise."""
    (grid,) = pipeline.hyper_enc.rate_points[0].grids
    return (torch.randint(grid.codebook_size, (batch, *grid.shape(width, height))),)


@torch.no_grad()
def embed(pipeline: PercoPipeline, batch: int) -> Tensor:
    """Text embeddings of captions of random tokens."""
    config = pipeline.text_encoder.config
    tokens = torch.randint(config.vocab_size, (batch, config.max_position_embeddings))
    embeddings: Tensor = pipeline.text_encoder(tokens.to(pipeline._execution_device))[0]
    return embeddings.to(pipeline.unet.dtype)


@torch.no_grad()
def decode(pipeline: PercoPipeline, size: tuple[int, int], batch: int, steps: int, lap: Callable[[str], None]) -> None:
    """Decodes `batch` pictures of (width, height) pixels with guidance; calls `lap` with the name of each part done."""
    width, height = size
    shape = (batch, pipeline.unet.config.in_channels, *pipeline.latent_size(height, width))
    text, without_text = embed(pipeline, batch), embed(pipeline, batch)
    lap("text encoder")
    features = pipeline.local_features(random_codes(pipeline, batch, width, height), height, width)
    latents = denoise(pipeline, draw_noise(shape), features.to(pipeline.unet.dtype), text, without_text, steps, 3.0)
    lap("denoising")
    pipeline.decode_latents(latents, height, width)
    lap("VAE decoder")
    pipeline.maybe_free_model_hooks()


def measure(
    pipeline: PercoPipeline, size: tuple[int, int], batch: int, steps: int, times: int, warm_up: int
) -> dict[str, Any]:
    """Median seconds of encoding and of the parts of decoding, and the peak of memory in GiB."""
    device = pipeline._execution_device
    laps: dict[str, list[float]] = {}
    start = 0.0

    def lap(name: str) -> None:
        nonlocal start
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        laps.setdefault(name, []).append(now - start)
        start = now

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    for run in range(warm_up + times):
        if run == warm_up:
            laps.clear()
        picture = torch.rand(batch, 3, size[1], size[0]) * 2 - 1
        start = time.perf_counter()
        pipeline.encode_image(picture)
        lap("encode")
        decode(pipeline, size, batch, steps, lap)
    seconds = {f"{name} (s)": statistics.median(values) for name, values in laps.items()}
    decoding = sum(value for name, value in seconds.items() if not name.startswith("encode"))
    return seconds | {"decode (s)": decoding, "decode, a picture (s)": decoding / batch, "memory (GiB)": peak(device)}


def peak(device: torch.device) -> float:
    """The peak of memory in GiB: what CUDA's allocator reserved, or what the process held since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held * (1 if sys.platform == "darwin" else 1024) / GIB


def estimate(pipeline: PercoPipeline, size: tuple[int, int], batch: int) -> dict[str, Any]:
    """GiB of the weights, and of the tensors of each part (the hyper-encoder's are few), for fake tensors."""
    width, height = size
    weights = [
        tensor for network in pipeline.networks.values() for tensor in (*network.parameters(), *network.buffers())
    ]
    held = sum(weight.nbytes for weight in weights)
    rows, columns = pipeline.latent_size(height, width)
    unet = pipeline.unet
    sample = torch.empty(2 * batch, unet.config.in_channels, rows, columns, dtype=unet.dtype)
    grid = pipeline.hyper_enc.rate_points[0].grids[0].shape(width, height)
    features = torch.empty(2 * batch, unet.config.local_features_channels, *grid, dtype=unet.dtype)
    parts: dict[str, Callable[[], object]] = {
        "encode": lambda: pipeline.encode_latents(torch.empty(batch, 3, height, width)),
        "text encoder": lambda: embed(pipeline, batch),
        "U-Net": lambda: predict(pipeline, sample, torch.tensor(1), features, embed(pipeline, 2 * batch)),
        "VAE decoder": lambda: pipeline.decode_latents(sample[:batch], height, width),
    }
    figures = {}
    for name, part in parts.items():
        with Allocations(weights) as allocations, torch.no_grad():
            part()
        figures[f"{name} (GiB)"] = allocations.peak_bytes / GIB
    return {"weights (GiB)": held / GIB, **figures, "memory (GiB)": held / GIB + max(figures.values())}


@torch.no_grad()
def parity(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """How far numbers on the device are from those of float32 on the CPU: largest difference over the deviation.

    Nothing is set for it, so that float32 on a GPU is what torch makes of it there (by default TF32 in convolutions).
    """
    pipeline = build(architecture, torch.device("cpu"), torch.float32)
    sample, text = draw_noise((1, 4, 32, 32)), embed(pipeline, 1)
    features = draw_noise((1, pipeline.unet.config.local_features_channels, 4, 4))

    def outputs() -> dict[str, Tensor]:
        place = pipeline._execution_device, pipeline.unet.dtype
        predicted = predict(
            pipeline, sample.to(*place), torch.tensor(500, device=place[0]), features.to(*place), text.to(*place)
        )
        return {"U-Net": predicted.cpu(), "VAE decoder": pipeline.decode_latents(sample, 256, 256).cpu()}

    expected = outputs()
    figures = {}
    for name in ("float32", str(dtype).removeprefix("torch.")):
        for network in pipeline.networks.values():
            nn.Module.to(network, device, DTYPES[name])  # diffusers' own `to` warns about what its models do not have
        for part, values in outputs().items():
            figures[f"{part}, {name}"] = float((values - expected[part]).abs().max() / expected[part].std())
    return figures


def size(text: str) -> tuple[int, int]:
    """Width and height of a size that is written as 768x512.  Raises ValueError for what is none."""
    width, height = (int(side) for side in text.split("x"))
    if min(width, height) < 1:
        raise ValueError(text)
    return width, height


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of figures under their names, aligned."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([shown(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(names))]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in cells)


def shown(value: object) -> str:
    """A figure with three digits, or a text as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the options ask for, one case after the other; what is done is told and written as it comes."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    architecture = TINY if options.tiny else FULL
    result: dict[str, Any] = {
        "architecture": "tiny" if options.tiny else "full",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "torch": torch.__version__,
        **{name: getattr(options, name) for name in ("dtype", "steps", "times", "compile", "offload", "estimate")},
    }
    if options.parity:
        result["parity"] = parity(architecture, device, dtype)
    if options.estimate:
        with FakeTensorMode():
            pipeline = build(architecture, torch.device("cpu"), dtype)
            result["cases"] = [
                {"size": f"{width}x{height}", "batch": batch, **estimate(pipeline, (width, height), batch)}
                for width, height in options.size
                for batch in options.batch
            ]
        return result
    placement = Placement(options.compile, options.offload)
    pipeline = build(architecture, torch.device("cpu") if placement.offload else device, dtype)
    for network in pipeline.networks.values():
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    placement.put(pipeline, device)
    result["parameters"] = {
        name: sum(weight.numel() for weight in part.parameters()) for name, part in pipeline.networks.items()
    }
    result["cases"] = []
    for width, height in options.size:
        for batch in options.batch:
            case: dict[str, Any] = {"size": f"{width}x{height}", "batch": batch}
            try:
                case |= measure(pipeline, (width, height), batch, options.steps, options.times, options.warm_up)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                case["memory (GiB)"] = "not enough"
            gc.collect()
            result["cases"].append(case)
            print(json.dumps(case), file=sys.stderr, flush=True)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m perco_engine.evaluation.full_size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", type=size, nargs="+", default=[(768, 512)], help="of the pictures, as 768x512")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="pictures that are decoded together")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    parser.add_argument("--times", type=int, default=3, help="runs of which the median is taken (default: 3)")
    parser.add_argument("--warm-up", type=int, default=1, help="runs before, not counted (default: 1)")
    parser.add_argument("--device", default=str(best_device()), help="cuda, cpu, ... (default: the fastest there is)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of all networks (default: bfloat16)")
    parser.add_argument("--compile", action="store_true", help="translate the networks with torch.compile")
    parser.add_argument("--offload", action="store_true", help="keep networks on the device only while at work")
    parser.add_argument("--parity", action="store_true", help="compare the device's numbers with the CPU's first")
    parser.add_argument("--estimate", action="store_true", help="count memory without computing; prints no times")
    parser.add_argument("--tiny", action="store_true", help="take an architecture with next to no weights")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    if min(*options.batch, options.steps, options.times) < 1 or options.warm_up < 0:
        parser.error("--batch, --steps and --times are 1 at least, --warm-up 0")
    result = run(options)
    print(table(result["cases"]))
    if "parity" in result:
        print(table([result["parity"]]))
    if options.json:
        write_result(options.json, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
