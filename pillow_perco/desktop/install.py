"""Installing and uninstalling the desktop points."""

import os
import re
import shutil
import subprocess
from collections.abc import Container, Iterator
from pathlib import Path

from PIL import Image

from perco_engine.files import write_beside
from perco_engine.thumbnails import cache_folder
from perco_engine.version import __version__

from . import points, system, thunar
from .manifest import Manifest, content
from .points import Place

MIME_DATABASE = "update-mime-database"
DESKTOP_DATABASE = "update-desktop-database"

RUN_NO_PERCO = (".xml", ".thumbnailer")
"""Files that do not name the command: the kind of files, and the thumbnailer, which has a program of its own."""


def install(place: Place) -> Iterator[str]:
    """Installs or refreshes every point, and tells what was done, a line each.

    Raises OSError where something cannot be written, ValueError where a file of the user's cannot be merged into; where
    that is Thunar's, when all else is done.
    """
    manifest = Manifest.read(place.manifest, place.root)
    manifest.version = __version__
    place.root.mkdir(parents=True, exist_ok=True)
    manifest.make_folder(place.state)
    if place.is_system:
        yield from system.install(place, manifest)
    shared = points.current_manifest(points.system_place())
    files = {path: file for path, file in points.files(place).items() if not is_left_to_system(path, place, shared)}
    for path, (data, mode) in files.items():
        manifest.put(path, data, mode, manifest.before_ours(path, data))
        yield f"{path}"
    yield from _take_out_old(place, manifest, files)
    failed: OSError | ValueError | None = None
    try:
        yield from _merge_thunar(place, manifest)
    except (OSError, ValueError) as error:
        failed = error
    yield from _refresh(place, manifest)
    manifest.save()
    if not place.is_system:
        cleared = clear_failures()
        if cleared:
            yield f"{cleared} notes of failed thumbnails removed"
    if failed is not None:
        raise failed


def _take_out_old(place: Place, manifest: Manifest, files: Container[Path]) -> Iterator[str]:
    """Takes out what was installed and is not among today's `files`: of another release, or left to the system."""
    for path in map(manifest.place, sorted(manifest.written)):
        kept = path in files or path == system.wrapper(place) or path.name == thunar_file(place).name
        if kept:
            continue
        if manifest.take_out(path):
            _remove_compiled(path)
            yield f"{path}, which is not needed any more, removed"
        else:
            yield f"{path} is not needed any more; it was changed since, and stays"
        manifest.forget(path)


def uninstall(place: Place) -> Iterator[str]:
    """Takes out what `install` put in, and tells what was done, a line each.

    Raises OSError, when all else is done, where something cannot be taken out, which is then still known as installed;
    ValueError for a damaged manifest.
    """
    if not place.manifest.exists():
        yield "nothing is installed"
        return
    manifest = Manifest.read(place.manifest, place.root)
    failed: OSError | None = None
    for path in map(manifest.place, sorted(manifest.written)):
        try:
            yield _take_out(path, place, manifest)
        except OSError as error:
            yield f"{path} is still there: {error}"
            failed = error
        else:
            manifest.forget(path)
    try:
        if place.is_system:
            yield from system.uninstall(place)
    except OSError as error:
        failed = error
    _run_databases(place, manifest)
    manifest.save()
    for database in map(manifest.place, manifest.databases):
        if not _others(database, place):
            database.unlink(missing_ok=True)
    _remove_folders(manifest)
    if failed is not None:
        raise failed
    manifest.path.unlink(missing_ok=True)  # the last of all, so that what broke off before can be run again
    _remove_folders(manifest)  # those that it lay in


def _take_out(path: Path, place: Place, manifest: Manifest) -> str:
    """Takes out a file, or what is ours in it, and says so."""
    if manifest.take_out(path):
        _remove_compiled(path)
        return f"{path}"
    if path == thunar_file(place) and (data := _without_our_actions(path)) is not None:
        write_beside(path, data, mode=path.stat().st_mode & 0o7777)
        return f"{path}: our actions"
    return f"{path} was changed since, and stays"


def _without_our_actions(menu: Path) -> bytes | None:
    """Thunar's file without our actions; None where it is none or has none of them, and stays."""
    try:
        data = menu.read_bytes()
        without = thunar.without_actions(data.decode()).encode()
    except (OSError, ValueError):
        return None
    return None if without == data else without


def _remove_compiled(path: Path) -> None:
    """Removes what Python, in Nautilus, has made of a file that is gone."""
    folder = path.parent / "__pycache__"
    ours = list(folder.glob(f"{path.stem}.*.pyc")) if path.suffix == ".py" else []
    for compiled in ours:
        compiled.unlink()
    if ours:
        _remove_if_empty(folder)


def _remove_folders(manifest: Manifest) -> None:
    """Removes the folders that were made, as far as nothing is in them."""
    for folder in map(manifest.place, reversed(manifest.folders)):
        _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def is_left_to_system(path: Path, place: Place, shared: Manifest | None) -> bool:
    """Whether a system-wide installation has a user's file already: two of them would make two menu entries.

    shared: the manifest of that installation, as points.current_manifest gives it.
    """
    if shared is None or place.is_system or not path.is_relative_to(place.data):
        return False
    system_place = points.system_place()
    twin = system_place.data / path.relative_to(place.data)
    if str(twin) not in shared.written or not twin.exists():
        return False
    return path.suffix in RUN_NO_PERCO or _runs_for_this_user(system_place)


def _runs_for_this_user(system_place: Place) -> bool:
    """Whether this user can run what the system's menus run: it may lie in somebody's home."""
    command = installed_command(system_place)
    return command is not None and os.access(command, os.X_OK)


def installed_command(place: Place) -> str | None:
    """The path of the command that the menus of an installation run, if there is one."""
    found = re.search(rb"^TryExec=(.+)$", content(place.data / points.VIEWER) or b"", re.MULTILINE)
    return None if found is None else os.fsdecode(found[1])


def thunar_file(place: Place) -> Path:
    """Thunar's file of custom actions."""
    return place.config / "Thunar" / "uca.xml"


def _merge_thunar(place: Place, manifest: Manifest) -> Iterator[str]:
    path = thunar_file(place)
    was = content(path)
    if was is None and place.is_system:
        yield f"{path} is not there, so Thunar's menu is left to each user"
        return
    # The user's own file hides the system's, so a new one begins with what that has.
    base = was or _shared_actions() or thunar.EMPTY.encode()
    try:
        merged = thunar.with_actions(base.decode(), points.thunar_actions(place)).encode()
        if merged != was or manifest.name(path) not in manifest.written:  # whose manifest may be lost
            if manifest.is_ours(path):
                before = manifest.original(path)
            else:
                before = thunar.without_actions(was.decode()).encode() if was else was
            manifest.put(path, merged, None if was is None else path.stat().st_mode & 0o7777, before)
    except ValueError as error:
        raise ValueError(f"{path} cannot be merged into: {error}; mend it or move it away") from error
    yield f"{path}"


def _shared_actions() -> bytes | None:
    """Thunar's file of custom actions for users who have none: the first of those in XDG_CONFIG_DIRS."""
    folders = map(Path, (os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":"))
    found = (content(folder / "Thunar" / "uca.xml") for folder in folders if folder.is_absolute())
    return next((data for data in found if data is not None), None)


def _refresh(place: Place, manifest: Manifest) -> Iterator[str]:
    """Refreshes the databases."""
    for command in _run_databases(place, manifest):
        package = "shared-mime-info" if command == MIME_DATABASE else "desktop-file-utils"
        yield f"{command} is not installed, so its database is not refreshed: install {package}, and run this again"


def _run_databases(place: Place, manifest: Manifest) -> list[str]:
    """Runs the refreshing commands, and remembers what that made; returns those that this machine lacks.

    Not in a package: each system runs them.
    """
    missing: list[str] = []
    if place.root != Path("/"):
        return missing
    before = {*_database_files(place), *_database_folders(place)}
    for command, folder in ((MIME_DATABASE, place.data / "mime"), (DESKTOP_DATABASE, place.data / "applications")):
        if not folder.is_dir() or (command == MIME_DATABASE and not (folder / "packages").is_dir()):
            continue
        if shutil.which(command) is None:
            missing.append(command)
        else:
            subprocess.run([command, str(folder)], check=False, capture_output=True)
    new = [manifest.name(path) for path in _database_files(place) if path not in before]
    manifest.databases = sorted({*manifest.databases, *new})
    made = [manifest.name(path) for path in _database_folders(place) if path not in before]
    manifest.folders += [name for name in made if name not in manifest.folders]
    return missing


def _database_files(place: Place) -> Iterator[Path]:
    """What the databases consist of at present."""
    mime = place.data / "mime"
    for path in mime.rglob("*") if mime.is_dir() else ():
        if path.is_file() and path.parent != mime / "packages":
            yield path
    cache = place.data / "applications" / "mimeinfo.cache"
    if cache.exists():
        yield cache


def _database_folders(place: Place) -> Iterator[Path]:
    """The folders of the MIME database at present, outer ones first."""
    mime = place.data / "mime"
    yield from (path for path in mime.rglob("*") if path.is_dir()) if mime.is_dir() else ()


def _others(path: Path, place: Place) -> bool:
    """Whether a file of a database serves something else than what was installed here."""
    applications = place.data / "applications"
    if path.parent == applications:
        return any(applications.glob("*.desktop"))
    packages = place.data / "mime" / "packages"
    return packages.is_dir() and any(packages.iterdir())


def clear_failures() -> int:
    """Removes what was noted in this user's cache of failures with .perco files; returns how many there were."""
    folder = cache_folder()
    count = 0
    for entry in (folder / "fail").glob("*/*.png") if folder else ():
        if is_failure_of_ours(entry):
            entry.unlink(missing_ok=True)
            count += 1
    return count


def is_failure_of_ours(entry: Path) -> bool:
    """Whether an entry of the cache is of a .perco file."""
    try:
        with Image.open(entry, formats=["PNG"]) as picture:
            return str(picture.info.get("Thumb::URI", "")).lower().endswith(".perco")
    except (OSError, SyntaxError, ValueError):
        return False
