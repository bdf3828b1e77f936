"""Large files from the hub that outlive a download which was broken off: what is there is kept, and not fetched again.

huggingface_hub goes on after a lost connection as long as its process lives; when that ends, it drops what it has of a
file (since release 1.0), and a U-Net has 3.5 GB.  So these files are fetched here, by the same library's function for
it, into PERCO_HOME, and moved into the hub's cache when they are whole and have the hash that the hub has for them.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import Any

from .. import weights
from ..errors import InvalidModel

FOLDER = "downloading"
"""Where, in PERCO_HOME, the beginnings of files lie, under their hashes."""

_STALE_S = 30 * 86400
"""A beginning that was not added to for so long is dropped when another file is fetched."""


def fetch_large_files(repository: str, revision: str | None, patterns: Sequence[str]) -> None:
    """Fetches what a repository has of these patterns in Git LFS into the hub's cache, and goes on with what is there.

    Does nothing where the hub does not answer: huggingface_hub, which is asked next, has a cache and words for that.

    Raises what huggingface_hub raises while it downloads, and InvalidModel for a file that has not the hash that the
    hub has for it.
    """
    import huggingface_hub
    from huggingface_hub import constants, file_download

    try:
        about = huggingface_hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
    except Exception:  # whatever the network and its library come up with
        return
    folder = file_download.repo_folder_name(repo_id=repository, repo_type="model")
    blobs = Path(constants.HF_HUB_CACHE, folder, "blobs")
    wanted = {file.rfilename: file.lfs for file in about.siblings or [] if file.lfs is not None}
    for name, lfs in wanted.items():
        if any(fnmatch(name, pattern) for pattern in patterns) and not (blobs / lfs.sha256).exists():
            url = huggingface_hub.hf_hub_url(repository, name, revision=about.sha)
            _fetch(url, name, lfs.sha256, lfs.size, blobs / lfs.sha256)


def _fetch(url: str, name: str, sha256: str, size: int, target: Path) -> None:
    """Fetches one file to `target`, by way of its beginning in PERCO_HOME, unless another process does."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    begun = weights.home() / FOLDER / sha256
    begun.parent.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(f"{begun.parent}.lock"):  # processes that train together all want it
        if not target.exists():
            for left in begun.parent.iterdir():
                if left != begun and left.stat().st_mtime < time.time() - _STALE_S:
                    left.unlink()
            _fetch_alone(url, name, sha256, size, begun, target)


def _fetch_alone(url: str, name: str, sha256: str, size: int, begun: Path, target: Path) -> None:
    from huggingface_hub import file_download
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    with begun.open("ab") as file:
        there = file.tell()
        options: dict[str, Any] = {"resume_size": there, "expected_size": size, "displayed_filename": name}
        if there < size:
            file_download.http_get(url, file, headers=build_hf_headers(), **options)
    with begun.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        begun.unlink()
        raise InvalidModel(f"{name} did not arrive as the hub has it: run the command again, which fetches it anew")
    part = target.with_name(f"{target.name}.{os.getpid()}.perco")  # the cache may be on another file system
    try:
        shutil.move(begun, part)
        part.replace(target)
    except BaseException:
        if begun.exists():  # else it is the only copy of what has arrived
            part.unlink(missing_ok=True)
        raise
