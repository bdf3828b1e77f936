"""The store of models beside the embedded one: a folder with one folder, and one record, for each.

    PERCO_HOME/models/NAME/   model_index.json, vae/, unet/, ...   and the record, perco.json
    PERCO_HOME/models/.importing/   what is not finished yet

`install` fills it; what is here needs no torch.
"""

import hashlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .. import weights
from ..errors import InvalidModel, ModelUnavailable
from . import checkpoint
from .checkpoint import RECORD, Checkpoint

_STALE_S = 86400
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@contextmanager
def staging() -> Iterator[Path]:
    """A new folder in the store, so that it is of its file system, that is gone afterwards unless it was moved away.

    What a killed process left here is removed a day later.
    """
    parent = weights.models_folder() / ".importing"
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.iterdir():
        with suppress(FileNotFoundError):  # another process may be at it
            if left.stat().st_mtime < time.time() - _STALE_S:
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        inner = folder / "model"  # with the permissions that the user's folders have, which mkdtemp's has not
        inner.mkdir()
        yield inner
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256, in hexadecimal, of every file below `folder` but the record, by its path with forward slashes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != RECORD:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def problems(installed: Checkpoint) -> list[str]:
    """Reads every file of an installed model: what differs from its record, a line each; [] where nothing does."""
    found = hashes(installed.folder)
    return [
        *(f"{name} is missing" for name in installed.files if name not in found),
        *(f"{name} has changed" for name, digest in installed.files.items() if found.get(name, digest) != digest),
        *(f"{name} does not belong there" for name in found if name not in installed.files),
    ]


@dataclass(frozen=True)
class Listed:
    """A line of the list of models.  rate_points: nominal bpp of each; state: "" where all is well."""

    name: str
    family: str | None
    rate_points: tuple[float, ...]
    size_bytes: int
    state: str
    folder: Path


def list_models() -> list[Listed]:
    """Every model on this machine: those of this package, then what is in the store, by name, damaged ones too."""
    found = []
    for spec in weights.REGISTRY:
        if spec.folder is not None:
            points = tuple(point.bpp for point in spec.rate_points)
            found.append(Listed(spec.name, None, points, _size_bytes(Path(spec.folder)), "", Path(spec.folder)))
    store = weights.models_folder()
    for folder in sorted(store.iterdir()) if store.is_dir() else []:
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        family, points, state = None, (), ""
        if not (folder / RECORD).exists():
            state = "put here by hand, not checked"
        else:
            try:
                one = checkpoint.read(folder)
            except InvalidModel as error:
                state = str(error)
            else:
                family, points = one.family, (one.bpp,) if one.bpp is not None else ()
                state = f"incomplete: {', '.join(one.missing)} missing" if one.missing else ""
        found.append(Listed(folder.name, family, points, _size_bytes(folder), state, folder))
    return found


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def installed_names(name: str) -> list[str]:
    """The installed models that a name stands for: of a family all its checkpoints, else the one model.

    Raises ModelUnavailable, with what to do.
    """
    spec = weights.named(name)
    if spec is None:
        return [_installed_folder(name).name]
    if spec.is_family:
        return [model.name for model in weights.checkpoints(spec)]
    raise ModelUnavailable(f"{name!r} is part of this package, and not of what is installed beside it")


def verify(folder: Path) -> list[str]:
    """Reads every file of a model's folder in the store: see `problems`; a damaged record is one."""
    if not (folder / RECORD).exists():
        advice = "perco models import its folder, with another --name, makes a copy that has one"
        return [f"was put here by hand, and has no record to be compared with: {advice}"]
    try:
        return problems(checkpoint.read(folder))
    except InvalidModel as error:
        return [str(error)]


def remove(name: str) -> None:
    """Deletes an installed model.  Raises ModelUnavailable for one that is not installed."""
    folder = _installed_folder(name)
    with staging() as trash:  # out of the store at once, so that no half of it is ever found there
        folder.rename(trash / "removed")


def paths(name: str) -> list[Path]:
    """The folders of what a name stands for: an installed model, a family's checkpoints, or a model of this package.

    Raises ModelUnavailable, with what to do.
    """
    spec = weights.named(name)
    if spec is not None and spec.folder is not None:
        return [Path(spec.folder)]
    return [_installed_folder(one) for one in installed_names(name)]


def _installed_folder(name: str) -> Path:
    folder = weights.models_folder() / name
    is_one = bool(name) and Path(name).name == name and not name.startswith(".")  # put there by hand, of any name
    if not is_one or not folder.is_dir():
        there = ", ".join(one.name for one in list_models() if one.folder.parent == weights.models_folder())
        raise ModelUnavailable(f"no model {name!r} is installed: {f'there are {there}' if there else 'there is none'}")
    return folder
