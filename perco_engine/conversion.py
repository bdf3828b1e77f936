"""What a conversion of many files is to do, decided before anything is written: which files, and their new names.

sources (files, globs, folders) -> Source(path, place in the tree) -> Task(source, target)
"""

import errno
import functools
import glob
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import picture_files
from .errors import ConversionError
from .files import may_write
from .printable import MOST_TOLD, printable, some

PERCO = ".perco"


@dataclass(frozen=True)
class Task:
    """One file to convert: to .perco if that is what the target is called, else from .perco to a picture.

    problem: why it cannot be done, where that is known before.
    """

    source: Path
    target: Path
    problem: str = ""

    @property
    def encodes(self) -> bool:
        """Whether a .perco file is to be written."""
        return is_perco(self.target)


@dataclass(frozen=True)
class Source:
    """A file to convert, and the name, without suffix, that it has below the destination.

    scanned: found in a folder, and not named by the user.
    problem: why it cannot be read, where that is known before.
    """

    path: Path
    place: Path
    scanned: bool
    problem: str = ""


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    sources: paths of files or folders, or globs.  destination: a folder; for a single file also a file.
    to: suffix of what is written, with or without the dot; None: .perco where there are photos, else .png.
    recursive: folders with all that is below them, the tree kept.
    """

    sources: Sequence[str]
    destination: str
    to: str | None = None
    recursive: bool = False

    def suffix(self) -> str | None:
        """`to` as a suffix with its dot.  Raises ConversionError if no picture can be written so."""
        if self.to is None:
            return None
        suffix = "." + self.to.lower().removeprefix(".")
        if suffix != PERCO and picture_files.writable_kind(suffix) is None:
            raise ConversionError(f"pictures cannot be written as {suffix}: name perco, png, jpg, webp, ...")
        return suffix


def is_perco(path: Path) -> bool:
    """Whether a file is a .perco file, by its name."""
    return path.suffix.lower() == PERCO


def is_folder(path: Path) -> bool:
    """Whether this is a folder that one may look into; no error where one may not, or a drive fails, as Path.is_dir."""
    return os.path.isdir(path)  # noqa: PTH112


def _is_picture_name(path: Path) -> bool:
    return is_perco(path) or picture_files.writable_kind(path.suffix) is not None


def plan(request: Request) -> list[Task]:
    """The files to convert, in the order of their sources, each with the file to write.

    Raises ConversionError where nothing is to convert, where two sources would become one file, or where a file that
    is to be converted would be written over.  Whether targets exist is not told, see `existing`; where one could not
    be made, that is its task's problem.
    """
    suffix = request.suffix()
    single = _single_target(request, suffix)
    if single is not None:
        tasks = [single]
    else:
        check_folder(request)
        found = list(find(request))
        if suffix is None:
            suffix = _likely_suffix(found)
        elif suffix == PERCO:
            found = _without_results(found, request)
        tasks = [
            Task(one.path, target(one, request, suffix), one.problem)
            for one in found
            if one.problem or not one.scanned or is_perco(one.path) != (suffix == PERCO)
        ]
        if suffix == PERCO:
            captions = {picture_files.sidecar(task.source) for task in tasks if task.source.suffix != ".txt"}
            tasks = [task for task in tasks if task.source not in captions]
    if not tasks:
        raise ConversionError(f"nothing to convert to {suffix} in {some(request.sources)}")
    _check(tasks)
    nearest = functools.cache(_nearest_folder)
    return [replace(task, problem=task.problem or _target_problem(task.target, nearest)) for task in tasks]


def target(source: Source, request: Request, suffix: str) -> Path:
    """The file that a source becomes, of several."""
    return Path(request.destination, source.place.with_name(source.place.name + suffix))


def check_folder(request: Request) -> None:
    """Raises ConversionError unless the destination is a folder, or may become one."""
    destination = Path(request.destination)
    named_like_a_file = not request.destination.endswith(("/", os.sep)) and _is_picture_name(destination)
    if not is_folder(destination) and (os.path.lexists(destination) or named_like_a_file):
        raise ConversionError(
            f"{printable(destination)} is no folder: several files need one to go to; end a new one's name with /"
        )


def find(request: Request) -> Iterator[Source]:
    """The files that the sources name, sorted within each, and each once.

    A folder is searched for photos and .perco files, hidden ones and what lies below the destination excepted.
    Raises ConversionError for a glob that matches nothing.
    """
    kinds = picture_files.readable_suffixes() | {PERCO}
    real = functools.cache(os.path.realpath)  # of folders, since there may be ten thousand files in one
    out, seen = Path(real(request.destination)), set()
    for text in request.sources:
        for base, path, scanned, problem in _expand(text, request.recursive):
            if scanned and not (problem or path.suffix.lower() in kinds):
                continue
            below, top = Path(real(path.parent)), Path(real(base))
            if scanned and out in (below, *below.parents) and out not in (top, *top.parents):
                continue
            if (below, path.name) not in seen:
                seen.add((below, path.name))
                place = Path(Path(real(path)).name) if scanned and problem else _bare(path.relative_to(base), kinds)
                yield Source(path, place, scanned, problem)


def scan(folder: Path, recursive: bool) -> list[tuple[Path, str]]:
    """The files in a folder, sorted, without hidden ones; with those of all folders below it, links not followed.

    Each with "", and folders that cannot be read with the reason.
    """
    unread: list[OSError] = []
    found = []
    for parent, folders, names in os.walk(folder, onerror=unread.append):
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if recursive else []
        found += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    files = [(path, "") for path in found if _may_be_file(path)]
    return files + [(Path(error.filename), f"this folder cannot be read ({error.strerror})") for error in unread]


def _may_be_file(path: Path) -> bool:
    """Whether this is a file, or nobody may look: then it fails when it is read."""
    try:
        return path.is_file()
    except OSError:
        return True


def existing(tasks: Iterable[Task]) -> list[Task]:
    """The tasks whose target is there already."""
    return [task for task in tasks if not task.problem and os.path.lexists(task.target)]


def _expand(text: str, recursive: bool) -> Iterator[tuple[Path, Path, bool, str]]:
    """The files that one source names: the folder that their place is relative to, the file, whether it was scanned.

    Last, why it cannot be read, or "".
    """
    path = Path(text)
    if is_folder(path):
        yield from ((path, file, True, problem) for file, problem in scan(path, recursive))
    elif os.path.lexists(path) or not glob.has_magic(text):
        yield path.parent, path, False, _problem(path)
    else:
        found = set(_matches(path))
        if text.endswith(("/", os.sep)):  # which Path leaves out
            found = {match for match in found if is_folder(match)}
        if not found:
            raise ConversionError(f"{printable(text)} matches nothing")
        base = _base(path) if "**" in path.parts else None
        for match in sorted(found, key=lambda match: (match.is_symlink(), match)):
            if is_folder(match):
                below = scan(match, True) if recursive else []
                yield from ((base or match.parent, file, True, problem) for file, problem in below)
            else:
                yield base or match.parent, match, False, ""


def _problem(path: Path) -> str:
    """What is wrong with a file that was named, as far as its place tells: it is told with the others that fail."""
    try:
        path.lstat()
    except FileNotFoundError:
        return "there is no such file"
    except OSError:
        pass  # reading it will tell
    return ""


def _matches(pattern: Path) -> Iterator[Path]:
    """What a glob matches.  `**` stands for folders that are not hidden, nor links, which may go round in circles."""
    if "**" not in pattern.parts:
        yield from map(Path, glob.glob(str(pattern)))  # noqa: PTH207
        return
    at = pattern.parts.index("**")
    rest = pattern.parts[at + 1 :]
    for top in _matches(Path(*pattern.parts[:at])):
        if not rest:
            yield top
        for parent, folders, _ in os.walk(top):
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = _matches(Path(glob.escape(parent), *(rest or ("*",))))
            yield from (match for match in below if not (match.is_symlink() and is_folder(match)))


def _base(pattern: Path) -> Path:
    """The part of a glob before its first wildcard."""
    plain = []
    for part in pattern.parts:
        if glob.has_magic(part):
            break
        plain.append(part)
    return Path(*plain)


def _bare(path: Path, kinds: Collection[str]) -> Path:
    """The path without the suffixes of pictures, kinds: a.jpg and a.jpg.perco are both a picture called a."""
    while path.suffix.lower() in kinds:
        path = path.with_suffix("")
    return path


def _single_target(request: Request, suffix: str | None) -> Task | None:
    """The task where one file is to become one file of a name that is given, else None."""
    destination = Path(request.destination)
    if len(request.sources) != 1 or request.destination.endswith(("/", os.sep)) or is_folder(destination):
        return None
    source = Path(request.sources[0])
    is_glob = glob.has_magic(request.sources[0]) and not os.path.lexists(source)
    if is_folder(source) or is_glob or not destination.suffix:
        return None
    if not _is_picture_name(destination):
        raise ConversionError(
            f"{printable(destination)}: no picture format can be written under this name; try .png, or end the name "
            f"of a folder with /"
        )
    if suffix is not None and picture_files.writable_kind(suffix) != picture_files.writable_kind(destination.suffix):
        raise ConversionError(f"{printable(destination)} is to be written, and {suffix} is asked for: name one of them")
    return Task(source, destination, _problem(source))


def _likely_suffix(found: Sequence[Source]) -> str:
    """.perco where there is a photo; .png where there are .perco files only."""
    found = [one for one in found if not (one.scanned and one.problem)]
    photos = [one for one in found if not is_perco(one.path)]
    if photos and any(is_perco(one.path) and not one.scanned for one in found):
        raise ConversionError("there are photos and .perco files among the sources: say which to make, with --to")
    return PERCO if photos or not found else ".png"


def _without_results(found: Sequence[Source], request: Request) -> list[Source]:
    """Without the .perco files that photos of these become: a glob names what an earlier run wrote beside them."""
    photos = (one for one in found if not is_perco(one.path) and not one.problem)
    results = {_identity(target(one, request, PERCO)) for one in photos}
    return [one for one in found if not is_perco(one.path) or _identity(one.path) not in results]


def _check(tasks: Sequence[Task]) -> None:
    """Raises ConversionError where tasks stand in each other's way, or are none of ours."""
    tasks = [task for task in tasks if not task.problem]
    for task in tasks:
        if task.encodes and is_perco(task.source):
            raise ConversionError(f"{printable(task.source)} is a .perco file already")
        if not task.encodes and not is_perco(task.source):
            raise ConversionError(
                f"{printable(task.source)} to {printable(task.target.name)}: one of the two has to be a .perco file"
            )
    sources = {_identity(task.source): task.source for task in tasks}
    targets: dict[str, Task] = {}
    clashes = []
    for task in tasks:
        place = _identity(task.target)
        if place in sources:
            raise ConversionError(f"{printable(sources[place])} is to be converted and would be written over")
        other = targets.setdefault(place, task)
        if other is not task:
            clashes.append(f"{printable(other.source)} and {printable(task.source)} (both {printable(task.target)})")
    if clashes:
        more = f" and {len(clashes) - MOST_TOLD} more such pairs" if len(clashes) > MOST_TOLD else ""
        raise ConversionError(
            f"these would become one file: {'; '.join(clashes[:MOST_TOLD])}{more}. Rename one of them, or convert "
            f"them to different folders"
        )


def _nearest_folder(folder: Path) -> tuple[Path, str]:
    """What is there of a folder and those above it, the nearest; and why nothing can be made in it, or ""."""
    there = next((one for one in (folder, *folder.parents) if os.path.lexists(one)), folder)
    if not is_folder(there):
        return there, f"{printable(there)} is no folder"
    return there, "" if may_write(there) else f"nothing can be written in the folder {printable(there)}"


def _target_problem(target: Path, nearest: Callable[[Path], tuple[Path, str]]) -> str:
    """Why a file that is not there yet cannot be made, as far as its name and the folders above it tell, or ""."""
    if os.path.lexists(target):
        return ""
    folder, problem = nearest(target.parent)
    try:
        (folder / target.name).lstat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return f"{printable(target.name)}: {error.strerror}"
    return problem


def _identity(path: Path) -> str:
    """The same for two names of one file, there or not."""
    return os.path.normcase(os.path.realpath(path))
