"""The files of a model folder: what its weights are called, and what its JSON says; no torch, no numpy."""

import json
from pathlib import Path
from typing import Any

from .errors import InvalidModel

WEIGHT_FILES = {
    "vae": "diffusion_pytorch_model.safetensors",
    "hyper_enc": "diffusion_pytorch_model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
"""What the weights of a component are called, where they are not in shards."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.  Raises InvalidModel where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last where it is nested too deeply
        raise InvalidModel(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise InvalidModel(f"{path} does not hold a JSON object")
    return value


def is_null(entry: Any) -> bool:
    """Whether a line of model_index.json, as in [module, class] or [null, null], says that there is no component."""
    return entry is None or entry == [None, None]


def check_entry(folder: Path, name: str, entry: Any) -> None:
    """Raises InvalidModel for a component's line of model_index.json that is not [module, class]."""
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
        raise InvalidModel(f"{folder / 'model_index.json'}: {name} must be [module, class], not {entry!r}")
