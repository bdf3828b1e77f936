"""Files that are there whole or not at all, and how much of one is read."""

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .codes import MAX_FILE_BYTES
from .printable import printable

BLOCK_BYTES = 1 << 20
"""What is read at once."""

_unfinished: set[Path] = set()
"""What is being written at this moment."""


def read_perco(file: IO[bytes]) -> bytes:
    """The bytes of a .perco file, without memory for more.  Raises OSError, for more than any file needs, too."""
    blocks, left = [], MAX_FILE_BYTES + 1
    while left > 0 and (block := file.read(min(left, BLOCK_BYTES))):
        blocks.append(block)
        left -= len(block)
    if left <= 0:
        raise OSError(f"the file is larger than {MAX_FILE_BYTES} bytes, which no .perco file needs to be")
    return b"".join(blocks)


def read_perco_file(path: Path) -> bytes:
    """The bytes of the .perco file of this name; see `read_perco`."""
    with path.open("rb") as file:
        return read_perco(file)


def place(path: str | bytes | os.PathLike[str]) -> tuple[Path, int | None]:
    """A path that is to be written to, and the mode of what is there, if anything is.

    Raises OSError where that is a folder or write-protected, or there is no folder to write it in.
    """
    named = Path(os.fsdecode(path))
    try:
        there = named.stat().st_mode
    except FileNotFoundError:
        if not named.resolve().parent.is_dir():
            raise
        return named, None
    if stat.S_ISDIR(there):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(named))
    if stat.S_ISREG(there) and not may_write(named):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(named))
    return named, there


def write_beside(
    path: str | bytes | os.PathLike[str],
    data: bytes,
    *,
    mode: int | None = None,
    sync: bool = True,
    new: bool = False,
) -> None:
    """Writes a file whole or not at all: beside its place first, then renamed.

    A file that was there keeps its permissions, and a link its place: what it points to is replaced.  What is no file
    (a device, a pipe) is not replaced, but written to.  What is write-protected stays as it is.
    mode: the permissions of the file; None: those that it had, or what the umask leaves of 0666.
    sync: wait until the data are on the disk, so that not even a power cut leaves less than the whole file.
    new: whatever is in its place stays, even if it comes at the last moment: that raises FileExistsError.

    Raises OSError.
    """
    named, there = (Path(os.fsdecode(path)), None) if new else place(path)
    if there is not None:
        if not stat.S_ISREG(there):
            named.write_bytes(data)
            return
        mode = stat.S_IMODE(there) if mode is None else mode
    target = named if new else named.resolve()
    # Not the target's own name with something added: that might be longer than a name can be.
    beside = target.parent / f".perco-{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(beside, flags, 0o666 if mode is None else mode)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(target)) from error
    _unfinished.add(beside)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        if mode is not None:
            beside.chmod(mode)
        if new:
            _publish(beside, target)
        else:
            beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    finally:
        _unfinished.discard(beside)


def _publish(beside: Path, target: Path) -> None:
    """Renames a file, as `beside.replace` does, unless something has the name: that raises FileExistsError."""
    try:
        target.hardlink_to(beside)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:  # a file system without hard links: an empty file keeps the place for a moment
        target.touch(exist_ok=False)
        try:
            beside.replace(target)
        except BaseException:
            target.unlink()
            raise
    else:
        beside.unlink(missing_ok=True)


def make_place(path: Path) -> None:
    """Makes the folder, where it is missing, of a file that `write_beside` is to write after long work.

    Raises OSError where that is known to fail: the folder, or what is there, is write-protected, or a name too long.
    """
    asked = path
    try:
        try:
            _, there = place(path)
        except FileNotFoundError:
            path.resolve().parent.mkdir(parents=True, exist_ok=True)
            _, there = place(path)
        if there is None or stat.S_ISREG(there):  # and no device, which is not replaced
            asked = path.resolve().parent
            if not may_write(asked):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise OSError(f"{printable(asked)} cannot be written to: {error.strerror}") from error


def may_write(path: Path) -> bool:
    """Whether this process may write to a file, or make files in a folder."""
    mode = os.W_OK | os.X_OK if path.is_dir() else os.W_OK
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` at the end: whole or not at all.  Raises OSError."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


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
