"""Files that are there whole or not at all."""

import errno
import os
import stat
from pathlib import Path


def write_beside(path: str | bytes | os.PathLike[str], data: bytes) -> None:
    """Writes a file whole or not at all: beside its place first, then renamed.

    A file that was there keeps its permissions, and a link its place: what it points to is replaced.
    Raises OSError.
    """
    import tempfile

    target = Path(os.fsdecode(path)).resolve()
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    try:
        handle, name = tempfile.mkstemp(prefix=".perco-", dir=target.parent)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(target)) from error
    beside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.chmod(stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~_umask())
        beside.replace(target)
    except BaseException:
        beside.unlink()
        raise


def _umask() -> int:
    """The permissions that new files do not get; there is no way to read it but to set it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask
