"""The networks of PerCo's training: where they come from, which of their weights learn, and the model in the end."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from diffusers.utils import logging
from torch import nn

from ..errors import InvalidModel, InvalidSettings, ModelUnavailable
from ..files import new_folder
from ..model_files import is_null, read_json
from ..model_folder import load_component, progress_bars_off
from ..models.hyper_encoder import ElicHyperEncoder, HificHyperEncoder, HyperEncoder
from ..models.unet import UNet2DConditionModel
from ..pipeline import PercoPipeline
from ..rates import PERCO_SD, REFERENCE_SIDE_PX
from ..store.component_files import bring
from ..store.download import download
from .settings import HyperEncoderStart, Learn, Model

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
"""The layers that get low-rank additions."""

FROZEN = ("vae", "text_encoder", "tokenizer")


def check_base(model: Model) -> None:
    """Raises InvalidSettings unless the base is a model folder, or named like a repository."""
    folder = Path(model.base)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise InvalidSettings(f"model.base: {folder} is no model folder, which has a model_index.json")
    elif model.base.count("/") != 1 or model.base.startswith(("/", ".")):
        raise InvalidSettings(f"model.base: there is no folder {model.base}, and it is no repository OWNER/NAME")


def base_folder(model: Model) -> Path:
    """The folder of the model that training starts from.  Raises InvalidSettings, ModelUnavailable."""
    check_base(model)
    if Path(model.base).is_dir():
        return Path(model.base)
    try:
        return download(model.base, components=(*FROZEN, "unet", "hyper_enc", "scheduler")).folder
    except ModelUnavailable as error:
        raise ModelUnavailable(f"model.base: {error}; or name a folder that is on this machine") from error


def load(folder: Path, start: HyperEncoderStart | None, prediction: str) -> PercoPipeline:
    """All networks, in float32, the scheduler for this prediction, and the hyper-encoder, fresh or the folder's.

    The U-Net of a folder that is not PerCo's yet gets its extended first layer, with the weights that it had in it.

    Raises InvalidModel for a folder that is not one, InvalidSettings where it has no hyper-encoder to go on with.
    """
    entries = read_json(folder / "model_index.json")
    if is_null(entries.get("vae")):
        raise InvalidModel(f"{folder} names no vae")
    with progress_bars_off():
        parts = {name: load_component(folder, name, entries.get(name), torch.float32) for name in FROZEN}
    if start is not None:
        hyper_enc = fresh_hyper_encoder(start, parts["vae"].config.latent_channels)
    elif is_null(entries.get("hyper_enc")):
        raise InvalidSettings(
            "model.hyper_encoder is missing: the base has no hyper-encoder, so say what a fresh one is to be like"
        )
    else:
        hyper_enc = load_component(folder, "hyper_enc", entries["hyper_enc"], torch.float32)
    if not isinstance(hyper_enc, HyperEncoder):
        raise InvalidSettings("model.base: the hyper-encoder is a ladder, which the recipe embedded trains")
    unet = load_unet(folder / "unet", hyper_enc.quantizer.dim)
    return PercoPipeline(hyper_enc=hyper_enc, unet=unet, scheduler=load_scheduler(folder, prediction), **parts)


def fresh_hyper_encoder(start: HyperEncoderStart, latent_channels: int) -> HyperEncoder:
    """A hyper-encoder with random weights."""
    grid = next(point for point in PERCO_SD if point.bpp == start.bpp).grids[0]
    common = {
        "cfg_ss": REFERENCE_SIDE_PX // grid.pixels_per_index, "cfg_cs": grid.codebook_size,
        "in_channels": latent_channels, "codebook_dim": start.codebook_dim,
    }  # fmt: skip
    if start.design == "elic":
        elic: HyperEncoder = ElicHyperEncoder(**common, N=start.width, M=start.local_features)
        return elic
    hific: HyperEncoder = HificHyperEncoder(
        **common, num_filters_base=start.width, num_filters_out=start.local_features
    )
    return hific


def load_unet(path: Path, local_features_channels: int) -> UNet2DConditionModel:
    """Stable Diffusion's U-Net, or PerCo's, with an extended first layer.  Raises InvalidModel."""
    unet: UNet2DConditionModel
    try:
        with progress_bars_off(), quiet():
            unet, info = UNet2DConditionModel.from_pretrained(
                path,
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=False,  # so that layers which the folder lacks have memory
                output_loading_info=True,
                local_features_channels=local_features_channels,
            )
    except Exception as error:  # the library raises whatever a wrong file leads it to
        raise InvalidModel(f"cannot load {path}: {error}") from error
    new = {f"conv_in_extended.{name}" for name in ("weight", "bias")}
    missing = set(info["missing_keys"])
    if (missing and missing != new) or info["unexpected_keys"] or info["mismatched_keys"]:
        wrong = sorted(missing - new) + list(info["unexpected_keys"]) + list(info["mismatched_keys"])
        raise InvalidModel(f"the weights in {path} do not fit its configuration: {wrong[0]}")
    if missing:
        extend(unet)
    return unet


def frozen_mark(pipeline: PercoPipeline) -> str:
    """A mark of the networks that never learn, which a run that goes on takes from the base again."""
    digest = hashlib.sha256()
    for name, network in pipeline.networks.items():
        for parameter in network.parameters() if name in FROZEN else ():
            digest.update(parameter.detach().reshape(-1).numpy().data)
    return digest.hexdigest()[:12]


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps diffusers from warning of what is as it should be: layers that a folder lacks, casts of whole networks."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@torch.no_grad()
def extend(unet: UNet2DConditionModel) -> None:
    """Copies conv_in into the channels of conv_in_extended that see the noisy latents; the others become random."""
    unet.conv_in_extended.reset_parameters()  # diffusers leaves what a folder lacks as the memory happens to be
    unet.conv_in_extended.weight[:, : unet.config.in_channels] = unet.conv_in.weight
    if unet.conv_in_extended.bias is not None and unet.conv_in.bias is not None:
        unet.conv_in_extended.bias.copy_(unet.conv_in.bias)


def load_scheduler(folder: Path, prediction: str) -> DDIMScheduler:
    """DDIM on the base's noise levels, with this prediction."""
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    return DDIMScheduler.from_config(config, prediction_type=prediction, clip_sample=False, thresholding=False)


def choose_weights(pipeline: PercoPipeline, learn: Learn) -> None:
    """Sets which weights learn: the hyper-encoder's and those of the U-Net that the settings say; no others."""
    for network in pipeline.networks.values():
        network.requires_grad_(False)
    unet: UNet2DConditionModel = pipeline.unet
    pipeline.hyper_enc.requires_grad_(True)
    if learn.scope == "all":
        unet.requires_grad_(True)
        unet.conv_in.requires_grad_(False)  # kept for its weights, and not in use
    elif learn.scope == "linear":
        for module in unet.modules():
            if isinstance(module, nn.Linear):
                module.requires_grad_(True)
    else:
        from peft import LoraConfig

        unet.add_adapter(LoraConfig(r=learn.lora_rank, lora_alpha=learn.lora_alpha, target_modules=ATTENTION))
    unet.conv_in_extended.requires_grad_(True)


def merge(pipeline: PercoPipeline, learn: Learn) -> None:
    """Adds low-rank additions to the weights that they belong to, so that the U-Net is one like any other."""
    if learn.scope == "lora":
        pipeline.unet.fuse_lora()
        pipeline.unet.unload_lora()


def write_model(pipeline: PercoPipeline, base: Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes the model, whole or not at all: what was trained in this dtype, the rest as it is in the base's folder."""
    if dtype is not torch.float32:
        with quiet():
            for name in ("unet", "hyper_enc"):
                pipeline.networks[name].to(dtype)
    with new_folder(folder) as partial:
        pipeline.save_pretrained(partial)
        for name in FROZEN:
            if getattr(pipeline, name) is not None:
                shutil.rmtree(partial / name)
                bring(base / name, partial / name, name, link=False)
