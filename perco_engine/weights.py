"""Where models are: the registry of known ones, the folders of the others, and how a file's model is found.

A model is a folder that `PercoPipeline.from_pretrained` loads.  A file names its model by a registry id, or, for models
that are not in the registry, by a fingerprint of the weights.
"""

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from . import rates
from .bitstream.header import FINGERPRINT_BYTES
from .errors import ModelUnavailable
from .rates import RatePoint


@dataclass(frozen=True)
class ModelSpec:
    """A registered model: the id that files name it by never changes, and is never given to other weights."""

    name: str
    registry_id: int
    rate_points: tuple[RatePoint, ...]
    folder: str | None
    get: str


REGISTRY = (
    ModelSpec(
        "embedded",
        1,
        rates.EMBEDDED,
        str(Path(__file__).parent / "embedded"),
        "it is part of this package: reinstall pillow-perco",
    ),
    ModelSpec(
        "perco-sd",
        2,
        rates.PERCO_SD,
        None,
        "pass the folder of its checkpoint as the model, for example model='/path/to/checkpoint'",
    ),
)


@dataclass(frozen=True)
class Model:
    """A model on this machine: its folder, and how a file names it (id 0: by fingerprint)."""

    name: str
    folder: Path
    registry_id: int
    fingerprint: bytes = b""


def registered(registry_id: int) -> ModelSpec | None:
    """The model with this id in files, or None if this release does not know it."""
    return next((spec for spec in REGISTRY if spec.registry_id == registry_id), None)


def home() -> Path:
    """The folder that holds models beside the embedded one: PERCO_HOME, or the platform's data folder."""
    if chosen := os.environ.get("PERCO_HOME"):
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_data_dir("pillow-perco", appauthor=False))


@functools.cache
def _fingerprint(files: tuple[tuple[str, str, int, int], ...]) -> bytes:
    digest = hashlib.sha256()
    for path, name, size, _ in files:
        digest.update(f"{name} {size}\n".encode())
        with open(path, "rb") as weights:
            for block in iter(lambda: weights.read(1 << 20), b""):
                digest.update(block)
    return digest.digest()[:FINGERPRINT_BYTES]


def fingerprint(folder: Path) -> bytes:
    """The first 8 bytes of the SHA-256 of all .safetensors files below `folder`: names, sizes, bytes, in name order."""
    files = sorted(folder.rglob("*.safetensors"), key=lambda path: path.relative_to(folder).as_posix())
    return _fingerprint(
        tuple(
            (str(path.resolve()), path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
            for path in files
        )
    )


def find(model: str | os.PathLike[str]) -> Model:
    """The model of this name (of the registry), or in this folder.

    Raises ModelUnavailable, with what to do, if it is not on this machine.
    """
    spec = next((spec for spec in REGISTRY if spec.name == str(model)), None)
    if spec is not None:
        if spec.folder is None or not (Path(spec.folder) / "model_index.json").exists():
            raise ModelUnavailable(f"the model {spec.name!r} is not on this machine: {spec.get}")
        return Model(spec.name, Path(spec.folder), spec.registry_id)
    folder = Path(model)
    if not (folder / "model_index.json").exists():
        names = ", ".join(spec.name for spec in REGISTRY)
        raise ModelUnavailable(
            f"{str(model)!r} is neither a registered model ({names}) nor a folder with a model_index.json"
        )
    for spec in REGISTRY:
        if spec.folder and folder.resolve() == Path(spec.folder).resolve():
            return Model(spec.name, Path(spec.folder), spec.registry_id)
    return _remember(Model(folder.name, folder, 0, fingerprint(folder)))


_seen: dict[bytes, Model] = {}


def _remember(model: Model) -> Model:
    _seen[model.fingerprint] = model
    return model


def find_for_file(registry_id: int, mark: bytes = b"") -> Model:
    """The model that a file names: by registry id, or (id 0) by the fingerprint `mark` of its weights.

    A fingerprint is looked for among the folders that this process has used and those below `home()`/models.
    Raises ModelUnavailable, with what to do.
    """
    if registry_id:
        spec = registered(registry_id)
        if spec is None:
            raise ModelUnavailable(
                f"the file needs model number {registry_id}, which this release does not know: update pillow-perco"
            )
        return find(spec.name)
    if mark in _seen:
        return _seen[mark]
    for index in sorted((home() / "models").glob("*/model_index.json")):
        if fingerprint(index.parent) == mark:
            return _remember(Model(index.parent.name, index.parent, 0, mark))
    raise ModelUnavailable(
        f"the file needs an unregistered model with fingerprint {mark.hex()}: name its folder as the model, "
        f"or put the folder into {home() / 'models'}"
    )
