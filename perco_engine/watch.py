"""A folder that is watched: files are handed out when they are whole.

Looking is done by polling: it works on every file system, network ones included, and whether a file is still being
written has to be asked again and again anyway.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .conversion import PERCO, Request, Source, Task, check_folder, find, is_folder, is_perco
from .conversion import target as target_of
from .printable import printable

POLL_SECONDS = 0.5

REST, MOST_REST_SECONDS = 10, 30.0
"""After a look nobody looks again for so many times as long as it took: a large folder keeps no processor busy."""

SETTLED_SECONDS = 2.0
"""How long a file that nobody has open for writing must have been as it is: some writers close and open again."""

UNKNOWN_SECONDS = 10.0
"""The same where nobody can tell who has it open."""

REMOTE = ("9p", "ceph", "cifs", "fuse", "nfs", "smb")
"""Kinds of file systems, by how their names begin, whose leases say nothing of writers."""

State = tuple[int, int, int]
GONE = (0, 0, 0)
"""The state of a folder that is not there, once that was told."""


def watch(request: Request, existing: str | None = None) -> Iterator[Task]:
    """Tasks for the files of one folder: those that are there and not yet converted, and then every one that comes.

    A file is handed out when it has been the same for some seconds and no process has it open for writing, and again
    when it was changed.  Files that were converted before the watch began are left alone, and so are those of a folder
    that cannot be read for a while, which is told.
    existing: "overwrite" or "skip" targets that are there already; None: the task says that as its problem.  It does
        so always where the target is made of another file.
    Never ends.  Raises ConversionError, at the first task, for a suffix that pictures cannot be written with, and for
    a destination that is no folder.
    """
    suffix = request.suffix() or PERCO
    check_folder(request)
    folder = Path(request.sources[0])
    changing: dict[Path, tuple[State, float]] = {}
    handed_out: dict[Path, State] = {}
    made_of: dict[Path, Path] = {}
    first, overwrite = True, existing == "overwrite"
    while True:
        start = time.monotonic()
        found = [one for one in _look(folder, request) if one.problem or is_perco(one.path) != (suffix == PERCO)]
        unread = {one.path for one in found if one.problem}
        for gone in handed_out.keys() - {one.path for one in found}:
            if unread.isdisjoint(gone.parents):  # else it may be there still
                del handed_out[gone]
        for one in found:
            target = target_of(one, request, suffix)
            state = _state(one.path)
            if state is None and one.path == folder and one.path not in handed_out:
                handed_out[one.path] = GONE
                yield Task(one.path, target, one.problem)
            if state is None or handed_out.get(one.path) == state:
                continue
            if first and _is_there(target) and not overwrite:
                handed_out[one.path], made_of[target] = state, one.path
            elif _is_settled(one, state, changing):
                handed_out[one.path] = state
                owner = made_of.setdefault(target, one.path)
                if existing == "skip" and owner == one.path and _is_there(target):
                    continue
                yield Task(one.path, target, one.problem or _problem(target, owner, one.path, overwrite))
                start = time.monotonic()  # who took the task may have waited for room
        first = False
        time.sleep(min(max(POLL_SECONDS, REST * (time.monotonic() - start)), MOST_REST_SECONDS))


def _look(folder: Path, request: Request) -> list[Source]:
    """The files of the folder, as `find` has them; where the folder is gone, itself with that as its problem."""
    found = list(find(request)) if is_folder(folder) else []
    if is_folder(folder):  # still: from a drive that goes meanwhile files are missing
        return found
    return [Source(folder, Path(folder.name or "folder"), True, "this folder cannot be read: it is not there")]


def _is_settled(one: Source, state: State, changing: dict[Path, tuple[State, float]]) -> bool:
    """Whether a file has been as it is for long enough; `changing` keeps since when."""
    known, since = changing.get(one.path, (None, 0.0))
    if known != state:
        changing[one.path] = state, time.monotonic()
        return False
    writing = is_being_written(one.path)
    if writing or time.monotonic() - since < (UNKNOWN_SECONDS if writing is None else SETTLED_SECONDS):
        return False
    del changing[one.path]
    return _state(one.path) == state


def _problem(target: Path, owner: Path, source: Path, overwrite: bool) -> str:
    """Why a file is not to be converted to this target, or ""."""
    if owner != source and _is_there(owner):
        return f"it would become the same file as {printable(owner)}: rename one of them"
    if _is_there(target) and not overwrite:
        return f"{printable(target)} is there already: --overwrite replaces it"
    return ""


def _is_there(path: Path) -> bool:
    """Whether there is such a file; no error where the name is longer than one can be, as Path.exists has it."""
    return os.path.exists(path)  # noqa: PTH110


def _state(path: Path) -> State | None:
    """What changes when a file is written; None where it is gone."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns


def is_being_written(path: Path) -> bool | None:
    """Whether any process has a file open for writing; None where the system does not tell.

    Linux tells by refusing a read lease (fcntl(2), F_SETLEASE) to the owner of the file, or root.
    """
    if sys.platform != "linux":
        return None
    import fcntl
    import signal

    try:
        if _kind_of_file_system(path).startswith(REMOTE):
            return None
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # A writer that comes just now is announced by a signal, which by default would end this process.
        fcntl.fcntl(handle, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
    return False


def _kind_of_file_system(path: Path) -> str:
    """As the kernel names it, for the device of a file: "ext4", "nfs4", ...; "" where it is not listed."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.split()[2] == wanted:
            return line.partition(" - ")[2].split()[0]
    return ""
