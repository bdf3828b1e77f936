"""perco-thumbnailer -s SIZE INPUT OUTPUT: what file managers run to see a .perco file.

    bytes ─> preview.render ─> PNG in memory ─> OUTPUT, in one go          (--quality full: the engine instead)

A cold process for each file, perhaps in a sandbox with a read-only /usr and nothing else: no torch, no network, no
home, no files but INPUT and OUTPUT.  Whatever the file says, it ends after MOST_SECONDS of work, within MOST_BYTES of
memory; whatever lies below the files, it waits no longer for them than MOST_SECONDS_WAITING.  A file that cannot be
shown leaves no OUTPUT.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from .errors import LimitExceeded, ModelUnavailable, PercoError
from .printable import printable
from .thumbnails import LARGEST_PX, keys, png, thumbnail_name, uri
from .version import __version__

if TYPE_CHECKING:
    from PIL import Image

MOST_SECONDS = 4.0
MOST_SECONDS_WAITING = 4.0
"""For a disk or a pipe, before and after that work.  Of waiting the clock counts; of work, the process's own time."""

MOST_BYTES = 280 << 20
MOST_FILE_BYTES = 32 << 20
"""A larger file is metadata for the most part, all of which would have to be read."""

SYSTEM_STORE = Path(__file__).parent.parent / "store"
"""Previews of further models, in the folder that `perco desktop install --system` makes."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, or 1 with the reason on stderr, or 2 for a wrong command line."""
    parser = argparse.ArgumentParser("perco-thumbnailer", description="Write a PNG thumbnail of a .perco file.")
    parser.add_argument("-s", "--size", type=int, default=256, help="longer side in pixels, 1 to 1024 (default: 256)")
    parser.add_argument(
        "--quality", choices=("fast", "full"), default="fast", help="full: decode with the networks (seconds, torch)"
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("input", help="the .perco file, or its file:// URI")
    parser.add_argument("output", help="where the PNG is written, whatever its name")
    options = parser.parse_args(arguments)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of metadata that are damaged
    if options.size < 1:
        parser.error(f"a thumbnail has at least 1 pixel a side, not {options.size}")
    source, target = Path(_path(options.input)), Path(options.output)
    try:
        if options.quality == "fast":
            limit()
        size_px = min(options.size, LARGEST_PX)
        with waiting(f"{source} cannot be read"):
            data = read(source)
        with turn(source):
            picture = full(data, size_px) if options.quality == "full" else fast(data, size_px)
            with waiting(f"{target} cannot be written"):
                write(source, target, picture)
    except (PercoError, OSError, ValueError) as error:
        print(printable(f"perco-thumbnailer: {error}"), file=sys.stderr)
        return 1
    except MemoryError:
        text = f"perco-thumbnailer: {source} needs more than {MOST_BYTES >> 20} MB of memory"
        print(printable(text), file=sys.stderr)
        return 1
    return 0


def _path(text: str) -> str:
    """The path that an argument names, itself or as a file:// URI."""
    if not text.startswith("file://"):
        return text
    return "/" + os.fsdecode(unquote_to_bytes(os.fsencode(text.removeprefix("file://")))).partition("/")[2]


def limit() -> None:
    """Ends this process after MOST_SECONDS of work, and refuses it memory beyond MOST_BYTES, where the system can."""
    # One thread: file managers run several of these at once, and each thread's buffers would count.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    try:
        import resource
        import signal
    except ImportError:  # Windows
        return
    # The process ends at once, even within a library.  Its own time counts: on a busy machine it only takes longer.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or hard > MOST_BYTES:
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, hard))


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A context that raises TimeoutError after MOST_SECONDS_WAITING by the clock, where the system can.

    what: cannot be done, as the error tells.
    """
    import signal

    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return

    def give_up(*_: object) -> None:
        raise TimeoutError(f"{what}: it takes more than {MOST_SECONDS_WAITING:g} seconds")

    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS_WAITING)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def read(source: Path) -> bytes:
    """The bytes of the file.  Raises OSError, LimitExceeded."""
    if not source.is_file():  # a pipe, say, that never ends
        raise OSError(f"{source} is not there, or no file")
    with source.open("rb") as file:
        data = file.read(MOST_FILE_BYTES + 1)
    if len(data) > MOST_FILE_BYTES:
        raise LimitExceeded(f"{source} has more than {MOST_FILE_BYTES >> 20} MB: it is not looked at")
    return data


@contextmanager
def turn(source: Path) -> Iterator[None]:
    """A context for one process at a time for each file, which waits no longer than MOST_SECONDS_WAITING for its turn.

    Thunar 4.18 asks for a file twice at once, and tumbler 4.18 then loses both pictures if they are ready at once: its
    two threads give the cache's new file the same name.
    """
    try:
        from fcntl import LOCK_EX, flock
    except ImportError:  # Windows
        yield
        return
    with source.open("rb") as file:
        with suppress(OSError), waiting(f"{source} is in use"):  # TimeoutError is one
            flock(file, LOCK_EX)
        yield


def fast(data: bytes, size_px: int) -> "Image.Image":
    """The picture from its codes, without torch (preview.py)."""
    from .preview import render

    try:
        return render(data, size_px)
    except ModelUnavailable:
        if not SYSTEM_STORE.is_dir():
            raise
        os.environ["PERCO_HOME"] = str(SYSTEM_STORE)
        return render(data, size_px)


def full(data: bytes, size_px: int) -> "Image.Image":
    """The picture as its networks decode it: in the warm engine where one runs, else here."""
    from . import service
    from .bitstream import read_header
    from .picture_files import turned

    picture = service.decode(data, max_size_px=size_px)
    if picture is None:
        try:
            from .engine import engine_of_file
        except ImportError as error:
            raise ModelUnavailable(
                f"--quality full needs torch, which is not here ({error}): run perco view first, whose engine stays "
                f"warm, or the perco-thumbnailer of the environment that has torch"
            ) from error

        picture = engine_of_file(data).decode(data, max_size_px=size_px)
    return turned(picture, read_header(data).metadata)[0]


def write(source: Path, target: Path, picture: "Image.Image") -> None:
    """Writes the picture as PNG; with the keys of the thumbnail cache, where the target's name is the one it has there.

    Raises OSError, and then leaves no new file.
    """
    if target.exists() and source.samefile(target):
        raise ValueError(f"{target} is the picture itself: name another file for its thumbnail")
    cached = target.name == thumbnail_name(uri(source))
    data = png(picture, keys(source) if cached else {"Software": "pillow-perco"})
    if cached:
        from .files import write_beside

        write_beside(target, data, mode=0o600, sync=False)
        return
    new = not target.exists()
    try:
        target.write_bytes(data)
    except OSError:
        if new:
            target.unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    sys.exit(main())
