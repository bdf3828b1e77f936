"""A model folder, component by component: which classes it may name, and how their weights are loaded."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import is_accelerate_available
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from .devices import BUILDING
from .errors import InvalidModel
from .model_files import check_entry, is_null, read_json

COMPONENT_CLASSES = {
    "vae": {
        "AutoencoderKL": "diffusers.models.autoencoders.autoencoder_kl",
        "PatchAutoencoder": "perco_engine.models.autoencoder",
    },
    "hyper_enc": {
        "ElicHyperEncoder": "perco_engine.models.hyper_encoder",
        "HificHyperEncoder": "perco_engine.models.hyper_encoder",
        "HyperLadder": "perco_engine.models.ladder",
    },
    "unet": {"UNet2DConditionModel": "perco_engine.models.unet"},
    "scheduler": {
        "DDIMScheduler": "diffusers.schedulers.scheduling_ddim",
        "PNDMScheduler": "diffusers.schedulers.scheduling_pndm",
    },
    "text_encoder": {"CLIPTextModel": "transformers"},
    "tokenizer": {"CLIPTokenizer": "transformers"},
}
"""Every class that a model folder may name, and the module that it is imported from; those the folder names are not."""


OPTIONAL = ("text_encoder", "tokenizer")
"""Components that a model may have null for."""

DEFAULTS = ("default_num_inference_steps", "default_guidance_scale")
"""What model_index.json says besides the components."""

OUR_PIPELINE = "PercoPipeline"
"""The pipeline class of our own folders in model_index.json; published ones name another."""


def load_folder(folder: Path, torch_dtype: torch.dtype) -> dict[str, Any]:
    """The components of a model folder, and its DEFAULTS, by the names that PercoPipeline takes them by.

    Raises InvalidModel, as `load_component` does, and where the folder names too little.
    """
    index = read_json(folder / "model_index.json")
    named = {name: index.get(name) for name in COMPONENT_CLASSES}
    missing = [name for name, entry in named.items() if is_null(entry) and name not in OPTIONAL]
    if missing:
        raise InvalidModel(f"{folder} names no {', '.join(missing)}; it is not a complete PerCo model")
    with progress_bars_off():
        loaded = {name: load_component(folder, name, entry, torch_dtype) for name, entry in named.items()}
    if index.get("_class_name") != OUR_PIPELINE:
        loaded["scheduler"] = with_v_prediction(loaded["scheduler"])
    return loaded | {name: index[name] for name in DEFAULTS if name in index}


def component_class(folder: Path, name: str, class_name: str) -> Any:
    """The class that loads a component.

    Raises InvalidModel for a class that is not in COMPONENT_CLASSES.
    """
    if name == "hyper_enc" and class_name == "HyperEncoder":  # what the reference calls both designs
        config = read_json(folder / name / "config.json")
        class_name = "HificHyperEncoder" if "num_residual_blocks" in config else "ElicHyperEncoder"
    if class_name not in COMPONENT_CLASSES[name]:
        known = ", ".join(COMPONENT_CLASSES[name])
        raise InvalidModel(f"{folder}: {name} is a {class_name}, which this release does not know (it knows {known})")
    return getattr(importlib.import_module(COMPONENT_CLASSES[name][class_name]), class_name)


def load_component(folder: Path, name: str, entry: Any, torch_dtype: torch.dtype) -> Any:
    """One component of a model folder, or None where model_index.json has null for it or does not name it.

    entry: its line in model_index.json, [module, class].

    Raises InvalidModel where it is not there, of an unknown class, pickled, or does not fit its own configuration.
    """
    if is_null(entry):
        return None
    check_entry(folder, name, entry)
    path = folder / name
    if not path.is_dir():
        raise InvalidModel(f"{folder} has no folder {name}, which its model_index.json names")
    kind = component_class(folder, name, entry[1])
    if name in ("scheduler", "tokenizer"):
        options: dict[str, Any] = {}
    else:
        if not list(path.glob("*.safetensors")):
            raise InvalidModel(f"{path} has no weights in safetensors; pickled weights (.bin, .pt) are not opened")
        for index in path.glob("*.safetensors.index.json"):  # the libraries open whatever it names
            named = read_json(index).get("weight_map")
            if not isinstance(named, dict) or not all(str(one).endswith(".safetensors") for one in named.values()):
                raise InvalidModel(f"{index} names weights that are not in safetensors, which are not opened")
        options = {"use_safetensors": True, "output_loading_info": True}
        if name == "text_encoder":
            if "transformers_weights" in read_json(path / "config.json") or (path / "adapter_config.json").exists():
                raise InvalidModel(
                    f"{path} has its weights elsewhere, or an adapter: merge it, and save it as one model"
                )
            options["dtype"] = torch_dtype
        else:
            options |= {"torch_dtype": torch_dtype, "low_cpu_mem_usage": is_accelerate_available()}
    try:
        with BUILDING:
            loaded = kind.from_pretrained(path, local_files_only=True, **options)
    except Exception as error:  # the libraries raise whatever a wrong file leads them to
        raise InvalidModel(f"cannot load {path}: {error}") from error
    if not options:
        return loaded
    component, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            some = ", ".join(str(key) for key in list(info[problem])[:3])
            raise InvalidModel(f"the weights in {path} do not fit its configuration: {problem} {some}")
    return component.eval()


def with_v_prediction(scheduler: Any) -> Any:
    """The scheduler, predicting velocities: the reference trains so on any base, and leaves the base's file as it was.

    Stable Diffusion 1.x's configurations are those of networks that predict the noise.
    """
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler
    return type(scheduler).from_config(scheduler.config, prediction_type="v_prediction")


@contextmanager
def progress_bars_off() -> Iterator[None]:
    """Keeps diffusers and transformers from drawing progress bars while weights are read or written.

    One thread at a time (BUILDING), since that is said to the libraries for the whole process.
    """
    with BUILDING:
        drawing = [one for one in (diffusers_logging, transformers_logging) if one.is_progress_bar_enabled()]
        for library in drawing:
            library.disable_progress_bar()
        try:
            yield
        finally:
            for library in drawing:
                library.enable_progress_bar()
