"""Whether a model folder's weights are those that its configurations declare, without loading any.

Each component is built on torch's meta device, where tensors have shapes and no memory, and its keys and shapes are
held against the headers of its safetensors files.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import InvalidModel
from ..model_folder import component_class, load_component
from ..models.hyper_encoder import LATENT_SIDE
from ..rates import REFERENCE_SIDE_PX, RatePoint
from .component_files import WEIGHTLESS

Shapes = dict[str, tuple[int, ...]]

REFERENCE_DESIGNS = ("HyperEncoder", "ElicHyperEncoder", "HificHyperEncoder")
"""What a folder of PerCo (SD) calls its hyper-encoder."""

_FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes, as safetensors names them, that networks are loaded from; 8-bit weights need scales that nobody reads."""

_FORMER_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What an autoencoder's attention layers were once called; diffusers renames them as it loads."""


def check_folder(folder: Path, entries: dict[str, Any]) -> dict[str, Any]:
    """Checks every component of a model folder, and that they fit each other; returns them, on the meta device.

    entries: of model_index.json, [module, class] by component; all components lie in the folder.

    Raises InvalidModel where a component is of an unknown class, or its weights miss a key, have one too many or one
    of another shape; where a hyper-encoder's configuration is of another rate than its weights; and where one
    component's outputs are not what the next one takes.
    """
    components = {}
    for name, entry in entries.items():
        if name in WEIGHTLESS:
            components[name] = load_component(folder, name, entry, torch.float32)
        else:
            components[name] = _check_component(folder, name, entry[1])
    _check_widths(folder, components)
    return components


def _check_component(folder: Path, name: str, class_name: str) -> Any:
    path = folder / name
    kind = component_class(folder, name, class_name)
    component = _declared(kind, path)
    entries = stored_entries(path, name)
    stored = {key: shape for key, (_, shape) in entries.items()}
    if problem := difference(shapes(component, name), stored):
        if class_name in REFERENCE_DESIGNS:
            _check_rate(component, stored, path)
        raise InvalidModel(f"the weights in {path} do not fit its configuration: {problem}")
    for key, value in component.state_dict().items():
        dtype, _ = entries[_key(key, name)]
        if value.is_floating_point() and dtype not in _FLOATS:
            raise InvalidModel(
                f"the weights in {path} are quantized: {key} is {dtype}, not one of {', '.join(_FLOATS)}"
            )
    return component


def _declared(kind: Any, path: Path, **changes: Any) -> Any:
    """The component that a configuration declares, without memory."""
    try:
        with torch.device("meta"):
            if hasattr(kind, "config_class"):
                return kind(kind.config_class.from_pretrained(path, local_files_only=True))
            return kind.from_config({**kind.load_config(path, local_files_only=True), **changes})
    except Exception as error:  # the libraries raise whatever a wrong configuration leads them to
        raise InvalidModel(f"the configuration in {path} cannot be built: {error}") from error


def shapes(component: torch.nn.Module, name: str) -> Shapes:
    """The shape of every key of a component's state dict."""
    return {_key(key, name): tuple(value.shape) for key, value in component.state_dict().items()}


def stored_entries(path: Path, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every key in a component's safetensors files, from their headers.  Raises InvalidModel."""
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118  (not a mapping)
                    entry = weights.get_slice(key)
                    stored[_key(key, name)] = entry.get_dtype(), tuple(entry.get_shape())
        except (SafetensorError, OSError) as error:
            raise InvalidModel(f"{file} is damaged or incomplete: {error}") from error
    if name == "text_encoder":  # a table 0, 1, 2, ... that older releases of transformers stored
        stored.pop("embeddings.position_ids", None)
    return stored


def _key(key: str, name: str) -> str:
    """A key under the name that today's libraries give it."""
    if name == "text_encoder":
        return key.removeprefix("text_model.")
    if name == "vae":
        former = "|".join(_FORMER_ATTENTION)
        return re.sub(rf"(\.attentions\.\d+)\.({former})\.", lambda m: f"{m[1]}.{_FORMER_ATTENTION[m[2]]}.", key)
    return key


def difference(declared: Shapes, stored: Shapes) -> str:
    """In which keys and shapes weights differ from those that are declared; "" where they do not."""

    def some(what: str, keys: list[str]) -> list[str]:
        return [f"{what} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"] if keys else []

    other = [
        f"{key} ({_text(stored[key])} instead of {_text(shape)})"
        for key, shape in declared.items()
        if key in stored and (stored[key] or (1,)) != (shape or (1,))  # a scalar is as good as a vector of one
    ]
    return "; ".join(
        some("missing", [key for key in declared if key not in stored])
        + some("unexpected", [key for key in stored if key not in declared])
        + some("of another shape:", other)
    )


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in shape) or "scalar"


def _check_rate(component: Any, stored: Shapes, path: Path) -> None:
    """Raises InvalidModel if the weights are a hyper-encoder's of another rate than the configuration declares."""
    codebook = stored.get("quantizer._codebook.embed", ())
    if len(codebook) != 3:
        return
    for side in (LATENT_SIDE >> k for k in range(4)):
        other = _declared(type(component), path, cfg_ss=side, cfg_cs=codebook[1])
        if not difference(shapes(other, "hyper_enc"), stored):
            raise InvalidModel(
                f"the rates in {path} are mixed up: its configuration is of {rate_text(component.rate_points[0])}, "
                f"its weights are of {rate_text(other.rate_points[0])}"
            )


def rate_text(point: RatePoint) -> str:
    """A rate point of one grid, for people."""
    side = REFERENCE_SIDE_PX // point.grids[0].pixels_per_index
    return f"{point.bpp} bpp ({side}x{side} codes for 512x512 pixels, codebook of {point.grids[0].codebook_size})"


def _check_widths(folder: Path, components: dict[str, Any]) -> None:
    """Raises InvalidModel where one component's outputs have other channels than the next one takes."""
    unet, hyper = components["unet"].config, components["hyper_enc"].config
    latent_channels = components["vae"].config.latent_channels
    joints = [("vae", latent_channels, "unet", unet.in_channels, "latent channels")]
    for width in ("in_channels", "latent_channels"):
        if width in hyper:
            joints.append(("vae", latent_channels, "hyper_enc", hyper[width], "latent channels"))
    if "grids" in hyper:  # a ladder: its estimate, and which level that is of
        taken = unet.local_features_channels
        joints.append(("hyper_enc", hyper["latent_channels"] + 1, "unet", taken, "channels of local features"))
    for width in ("M", "num_filters_out"):
        if width in hyper:
            taken = unet.local_features_channels
            joints.append(("hyper_enc", hyper[width], "unet", taken, "channels of local features"))
    if ("text_encoder" in components) != ("tokenizer" in components):
        raise InvalidModel(f"{folder} has one of text_encoder and tokenizer, which go together")
    if "text_encoder" in components:
        size = components["text_encoder"].config.hidden_size
        joints.append(("text_encoder", size, "unet", unet.cross_attention_dim, "dimensions of text embeddings"))
        given = components["tokenizer"].model_max_length
        if given > (taken := components["text_encoder"].config.max_position_embeddings):
            raise InvalidModel(f"{folder}: the tokenizer gives up to {given} tokens, text_encoder takes {taken}")
    for giver, given, taker, taken, what in joints:
        if given != taken:
            raise InvalidModel(
                f"the components in {folder} do not fit each other: {giver} gives {given} {what}, {taker} takes {taken}"
            )
