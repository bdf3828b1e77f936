"""The files of a model's component: which of a published folder's are taken, and pickled weights as safetensors."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import InvalidModel, first_line
from ..model_files import WEIGHT_FILES, read_json

WEIGHTLESS = ("scheduler", "tokenizer")
"""Components that are configuration alone."""

SAFETENSORS, PICKLE, INDEX = ".safetensors", ".bin", ".index.json"
SETTINGS_SUFFIXES = (".json", ".txt")


DOCUMENTS = ("license*", "licence*", "copying*", "notice*", "readme*", "model[-_ ]card*", "modelcard*", "*policy*")
"""Of a licence or a card, whatever their case."""

MAX_DOCUMENT_BYTES = 1 << 20

MOST_SHARED = 4
"""How many times as large as what is stored the tensors of a pickle may be, each of which is written for itself."""

BASE_DOCUMENTS = "base"
"""Where, in an installed model, the documents of the base model lie."""


def is_document(name: str) -> bool:
    """Whether a path in an installed model is of a licence or a card, which no network depends on."""
    parent, _, file_name = name.rpartition("/")
    return parent in ("", BASE_DOCUMENTS) and any(fnmatchcase(file_name.lower(), one) for one in DOCUMENTS)


def bring_documents(source: Path, target: Path) -> None:
    """Copies the licence and the card of the model in the folder `source`, where it has them, into `target`."""
    for file in sorted(source.iterdir()):
        if is_document(file.name) and file.is_file() and file.stat().st_size <= MAX_DOCUMENT_BYTES:
            target.mkdir(exist_ok=True)
            shutil.copyfile(file, target / file.name)


def stems(name: str) -> tuple[str, str]:
    """What a component's weights are called, without the suffix: in safetensors, and pickled."""
    stem = WEIGHT_FILES[name].removesuffix(SAFETENSORS)
    return stem, "pytorch_model" if name == "text_encoder" else stem


def is_there(folder: Path, name: str) -> bool:
    """Whether a model folder has a component: its settings, and its weights if it is to have any."""
    path = folder / name
    return any(path.glob("*.json")) and (name in WEIGHTLESS or bool(weight_files(path, name)))


def weight_files(path: Path, name: str) -> list[Path]:
    """The files with the weights of a component in the folder `path`; [] where there are none.

    The plain ones rather than those of a variant (.fp16), safetensors rather than pickles; of one file and shards those
    that the folder itself is loaded from (weights.fingerprint).  An index of shards goes before its shards.

    Raises InvalidModel for an index that is damaged or names files elsewhere.
    """
    for stem, suffix in zip(stems(name), (SAFETENSORS, PICKLE), strict=True):
        index = path / f"{stem}{suffix}{INDEX}"
        for file in (path / f"{stem}{suffix}", path / f"{stem}.fp16{suffix}"):
            if index.is_file() and not (name == "text_encoder" and file.is_file()):
                return [index, *_shards(index)]
            if file.is_file():
                return [file]
    return []


def _shards(index: Path) -> list[Path]:
    """The files that an index of shards names."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InvalidModel(f"{index} has no weight_map from keys to files")
    shards = [index.parent / name for name in sorted(set(names.values()))]
    for shard in shards:
        if shard.parent != index.parent or not shard.is_file():
            raise InvalidModel(f"{index} names {shard.name}, which does not lie beside it")
        if shard.suffix != Path(index.name.removesuffix(INDEX)).suffix:
            raise InvalidModel(f"{index} names {shard.name}, which is of another kind")
    return shards


def bring(source: Path, target: Path, name: str, *, link: bool) -> None:
    """Puts the files of a component from the folder `source` into the new folder `target`; the source stays as it is.

    Weights get their plain names and come out as safetensors.
    link: share the bytes of safetensors with the source by hard links where the file system can; only for a source that
        nobody writes into, such as the hub's cache.

    Raises InvalidModel for pickled weights that want more than tensors.
    """
    target.mkdir()
    for file in sorted(source.iterdir()):
        if file.suffix in SETTINGS_SUFFIXES and not file.name.endswith(INDEX) and file.is_file():
            shutil.copyfile(file, target / file.name)
    if name in WEIGHTLESS:
        return
    for file in weight_files(source, name):
        if file.name.endswith(INDEX):
            index = read_json(file)
            renamed = {key: _plain_name(shard, name) for key, shard in index["weight_map"].items()}
            plain = target / (_plain_name(file.name.removesuffix(INDEX), name) + INDEX)
            plain.write_text(json.dumps(index | {"weight_map": renamed}, indent=1) + "\n", encoding="utf-8")
        elif file.suffix == PICKLE:
            convert_pickle(file, target / _plain_name(file.name, name))
        else:
            _copy(file, target / _plain_name(file.name, name), link=link)


def _plain_name(file_name: str, name: str) -> str:
    """What a file of a component's weights is called as safetensors and not as a variant."""
    stem, pickle_stem = stems(name)
    if file_name.endswith(PICKLE):
        file_name = stem + file_name.removeprefix(pickle_stem).removesuffix(PICKLE) + SAFETENSORS
    return file_name.replace(".fp16", "")


def _copy(source: Path, target: Path, *, link: bool) -> None:
    if link:
        try:
            os.link(source.resolve(), target)
        except OSError:  # another file system, or one without hard links
            pass
        else:
            return
    shutil.copyfile(source, target)


def convert_pickle(source: Path, target: Path) -> None:
    """Writes pickled weights as safetensors: the same keys, shapes, dtypes and values; nothing in the pickle is run.

    Tensors that share memory in the pickle (tied weights) are written once for each key.

    Raises InvalidModel for a pickle that names anything but tensors, that is no dictionary of them, or whose tensors
    are larger than what it stores.
    """
    try:
        state = _load_tensors(source)
    except Exception as error:  # torch raises whatever a wrong file leads it to
        raise InvalidModel(
            f"{source} is not opened: it is damaged, or a pickle that wants more than tensors and could run anything. "
            f"Ask its authors for safetensors. ({_reason(error)})"
        ) from error
    if not (
        isinstance(state, Mapping)
        and state
        and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items())
    ):
        raise InvalidModel(f"{source} is no dictionary from names to tensors, as the weights of a component are")
    for key, value in state.items():
        # A stride of 0 makes terabytes of one stored number, and sparse or quantized tensors are no weights of ours.
        plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not plain or value.nbytes > value.untyped_storage().nbytes():
            raise InvalidModel(f"{source}: {key} is no plain tensor, stored in full, as weights are")
    storages_bytes = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in state.values()}
    if sum(one.nbytes for one in state.values()) > MOST_SHARED * sum(storages_bytes.values()):
        raise InvalidModel(f"{source} has the same numbers under many names, which weights have under few")
    owned: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for key, value in state.items():
        tensor = value.detach().contiguous()
        address = tensor.untyped_storage().data_ptr()
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        owned[key] = tensor if whole and address not in storages else tensor.clone()
        storages.add(address)
    target.touch()
    mode = target.stat().st_mode  # what the umask leaves; safetensors' own is for this user alone
    try:
        save_file(owned, target, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {target}: {error}") from error
    target.chmod(mode)


def _reason(error: Exception) -> str:
    """Why a pickle was not opened; without torch's advice to open it all the same."""
    if isinstance(error, pickle.UnpicklingError):
        refused = re.search(r"GLOBAL (\S+)", str(error))
        return f"it wants {refused[1]}" if refused else type(error).__name__
    return first_line(error)


def _load_tensors(source: Path) -> Any:
    """The contents of a pickle of tensors, mapped into memory where it is of the kind that can be."""
    import zipfile

    return torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
