"""Files that are there whole or not at all."""

import os
from pathlib import Path

_unfinished: set[Path] = set()
"""What is being written at this moment."""


def write_beside(path: str | os.PathLike[str], data: bytes, *, mode: int | None = None, sync: bool = True) -> None:
    """Writes a file whole or not at all: beside its place first, then renamed.

    mode: the permissions of the file; None: what the umask leaves of 0666.
    sync: wait until the data are on the disk, so that not even a power cut leaves less than the whole file.
    """
    import tempfile

    target = Path(path).absolute()
    # Not the target's own name with something added: that might be longer than a name can be.
    handle, name = tempfile.mkstemp(prefix=".perco-", dir=target.parent)
    beside = Path(name)
    _unfinished.add(beside)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        if mode is None:
            umask = os.umask(0)
            os.umask(umask)
            mode = 0o666 & ~umask
        beside.chmod(mode)
        beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    finally:
        _unfinished.discard(beside)


def discard_unfinished() -> None:
    """Takes back what other threads are writing at this moment, for a process that is about to end without them."""
    for beside in tuple(_unfinished):
        beside.unlink(missing_ok=True)


def make_private(folder: Path) -> None:
    """Makes a folder, and those above it that are missing, for this user alone (0700).  Raises OSError.

    Those that are there already stay as they are.
    """
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for one in reversed(missing):
        one.mkdir(mode=0o700, exist_ok=True)
