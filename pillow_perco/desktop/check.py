"""Whether each desktop point would really work, and the command that mends what would not."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from perco_engine.codes import MIME_TYPE
from perco_engine.thumbnails import cache_folder
from perco_engine.version import __version__

from . import install, points
from .manifest import Manifest
from .points import Place

INSTALL = "perco desktop install"
SUDO_PATH = ("/usr/local/bin", "/usr/bin", "/bin")
"""Where sudo finds commands, whatever the user's own path is."""


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and the command that mends it ("" where nothing is wrong).

    fault: something that was installed does not work for this user; else the command is a hint.
    """

    name: str
    found: str
    mend: str = ""
    fault: bool = True

    @property
    def line(self) -> str:
        """As it is printed."""
        return f"{self.name:<24} {self.found}" + (f": {self.mend}" if self.mend else "")


def install_system() -> str:
    """The command that installs for all users, with the path that sudo would not find by itself."""
    own = points.script("perco")
    return f"sudo {'perco' if str(own.parent) in SUDO_PATH else shlex.quote(str(own))} desktop install --system"


def findings() -> Iterator[Finding]:
    """Everything about the desktop, for this user and the system."""
    try:
        user: Place | None = points.user_place()
    except OSError as error:
        user = None
        yield Finding("desktop, this user", str(error))
    system = points.system_place()
    installed = [place for place in (user, system) if place is not None and place.manifest.exists()]
    for place in (user, system):
        if place is not None:
            yield from _files(place, wanted=place in installed or not installed)
    if not installed:
        return
    yield from _databases(installed)
    yield from _helper(installed)
    yield from _failures()


def _files(place: Place, *, wanted: bool) -> Iterator[Finding]:
    """Whether what was installed is there, and current."""
    name, mend = ("desktop, system", install_system()) if place.is_system else ("desktop, this user", INSTALL)
    if not place.manifest.exists():
        yield Finding(name, "not installed", mend if wanted else "", fault=not place.is_system)
        return
    try:
        manifest = Manifest.read(place.manifest)
    except ValueError as error:
        yield Finding(name, str(error), mend)
        return
    # The system's menus run the command that they were installed with, whichever this user would install with.
    if place.is_system and (command := install.installed_command(place)):
        place = replace(place, perco=(command,))
    menu = install.thunar_file(place)
    changed = [path for path in map(Path, manifest.written) if path != menu and not manifest.is_ours(path)]
    current = points.files(place)
    shared = points.current_manifest(points.system_place())
    old = [
        path
        for path, (data, _) in current.items()
        if path not in changed and _read(path) != data and not install.is_left_to_system(path, place, shared)
    ]
    if changed:
        yield Finding(name, f"{len(changed)} files were changed or removed ({changed[0].name}, ...)", mend)
    elif old:
        yield Finding(name, f"installed by another release or environment ({old[0].name} differs)", mend)
    else:
        yield Finding(name, f"installed, {len(manifest.written)} files")
    has_menu = manifest.name(menu) in manifest.written or menu.exists()
    if has_menu and b"<unique-id>pillow-perco-" not in (_read(menu) or b""):
        yield Finding("menu of Thunar", f"our entries are not in {menu}", mend)
    if not Path(place.perco[0]).exists():
        yield Finding("menu entries", f"{place.perco[0]}, which they run, is not there", mend)
    elif place.is_system and (secret := _unreadable(Path(place.perco[0]))):
        yield Finding("menu entries", f"other users cannot run {place.perco[0]}: {secret} is closed to them")


def _databases(installed: list[Place]) -> Iterator[Finding]:
    """Whether a file is known by its bytes and its name, and what opens it."""
    kind, viewer = re.escape(MIME_TYPE), re.escape(Path(points.VIEWER).name)
    for name, source, cache, known, command, package in (
        ("MIME database", points.KIND, "mime/mime.cache", kind, install.MIME_DATABASE, "shared-mime-info"),
        (
            "double-click", points.VIEWER, "applications/mimeinfo.cache", rf"(?m)^{kind}=(.*;)?{viewer}(;|$)",
            install.DESKTOP_DATABASE, "desktop-file-utils",
        ),
    ):  # fmt: skip
        holder = next((place for place in installed if (place.data / source).exists()), installed[0])
        mend = install_system() if holder.is_system else INSTALL
        if any(re.search(known.encode(), _read(place.data / cache) or b"") for place in installed):
            yield Finding(name, f"knows {MIME_TYPE}")
        elif shutil.which(command) is None:
            yield Finding(name, f"{command} is missing: install {package}, then", mend)
        else:
            yield Finding(name, f"nothing of ours is in {cache}", mend)


def _is_left_to_system(place: Place) -> bool:
    """Whether a user's installation has no thumbnailer of its own, since the system has one."""
    file = place.data / points.THUMBNAILER
    return not file.exists() and install.is_left_to_system(file, place, points.current_manifest(points.system_place()))


def thumbnailer_of(place: Place) -> Path | None:
    """The helper that the installed .thumbnailer file names."""
    text = _read(place.data / points.THUMBNAILER)
    for line in (text or b"").decode(errors="replace").splitlines():
        if line.startswith("TryExec="):
            return Path(line.removeprefix("TryExec="))
    return None


def _helper(installed: list[Place]) -> Iterator[Finding]:
    """Whether file managers can run the thumbnailer, GNOME's sandbox included."""
    for place in installed:
        if _is_left_to_system(place):
            continue
        helper = thumbnailer_of(place)
        mend = install_system() if place.is_system else INSTALL
        name = "thumbnailer, system" if place.is_system else "thumbnailer, this user"
        if helper is None:
            yield Finding(name, "no .thumbnailer file", mend)
        elif not helper.exists():
            yield Finding(name, f"{helper} is not there", mend)
        elif run := _outcome([str(helper), "--version"]):
            yield Finding(name, f"{helper} cannot be used ({run})", mend)
        elif not seen_by_sandbox(helper):
            on_gnome = "GNOME" in os.environ.get("XDG_CURRENT_DESKTOP", "").split(":")
            text = f"{helper} runs, but GNOME's sandbox sees only /usr; for GNOME"
            mend = INSTALL if points.current_manifest(points.system_place()) is not None else install_system()
            yield Finding(name, text, mend, fault=on_gnome)
        else:
            yield Finding(name, f"{helper} runs, in GNOME's sandbox too" + _sandboxed(helper))


def seen_by_sandbox(helper: Path) -> bool:
    """Whether a program, what it is a link to, and its interpreter lie under /usr."""
    files = [helper, helper.resolve()]
    with helper.open("rb") as file:
        first = file.readline(256)
    if first.startswith(b"#!"):
        interpreter = Path(first[2:].split()[0].decode(errors="replace"))
        files += [interpreter, interpreter.resolve()]
    return all(path.is_relative_to("/usr") or path.is_relative_to("/bin") for path in files)


def _sandboxed(helper: Path) -> str:
    """What trying it in such a sandbox shows, where bubblewrap is at hand."""
    if shutil.which("bwrap") is None:
        return " (not tried: bwrap is not installed)"
    links = [arg for name in ("bin", "lib", "lib64", "sbin") for arg in ("--symlink", f"usr/{name}", f"/{name}")]
    command = ["bwrap", "--ro-bind", "/usr", "/usr", *links, "--proc", "/proc", "--dev", "/dev", "--unshare-all"]
    failed = _outcome([*command, "--setenv", "PATH", "/usr/bin", str(helper), "--version"])
    return f" (by its place; trying it failed here: {failed})" if failed else " (tried)"


def _outcome(command: list[str]) -> str:
    """Why a helper that is asked for its version does not run, or is not ours; "" where it is."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if run.returncode:
        return (run.stderr.strip().splitlines() or [f"status {run.returncode}"])[-1]
    version = run.stdout.strip()
    return "" if version == __version__ else f"it is of release {version}, and this is {__version__}"


def _failures() -> Iterator[Finding]:
    """Whether failures of before keep file managers from trying again."""
    folder = cache_folder()
    stale = (
        [entry for entry in (folder / "fail").glob("*/*.png") if install.is_failure_of_ours(entry)] if folder else []
    )
    if stale:
        yield Finding("thumbnail cache", f"{len(stale)} failures are noted, and not tried again", INSTALL, fault=False)
    else:
        yield Finding("thumbnail cache", "no failures noted")


def advice(place: Place) -> Iterator[str]:
    """What a user should know after an installation."""
    helper = thumbnailer_of(place)
    if helper is not None and helper.exists() and not seen_by_sandbox(helper):
        yield f"GNOME runs thumbnailers in a sandbox that does not see {helper}. For GNOME: {install_system()}"
    if place.is_system:
        yield "Whoever has installed it for themselves before: perco desktop install once more, which makes room."
    yield "Open file managers once more, so that they read this (nautilus -q; thunar -q; nemo -q; caja -q)."


def _unreadable(path: Path) -> Path | None:
    """The first folder above a file, or the file, that other users cannot use."""
    for one in (*reversed(path.parents), path):
        if one.exists() and not one.stat().st_mode & 0o001:
            return one
    return None


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
