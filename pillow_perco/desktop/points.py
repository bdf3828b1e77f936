"""The desktop points: what files each consists of, and where they go."""

import json
import os
import shlex
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from perco_engine.version import __version__

from .manifest import Manifest

ASSETS = next(
    folder
    for folder in (Path(__file__).parents[1] / "integrations", Path(__file__).parents[2] / "integrations")
    if folder.is_dir()
)
"""The folder integrations/: in the installed package, or in a checkout beside it."""

RATES = (
    ("tiny", "0.002"),
    ("small", "0.008"),
    ("medium", "0.03"),
    ("fine", "0.13"),
)
"""What the menus offer: a label, and the embedded model's rate point that it stands for, in bits a pixel."""

SYSTEM_PREFIX = Path("/usr/local")

KIND = "mime/packages/pillow-perco.xml"
VIEWER, THUMBNAILER = "applications/pillow-perco.desktop", "thumbnailers/pillow-perco.thumbnailer"
"""Files of an installation, below its `Place.data`, that are looked at once more."""


@dataclass(frozen=True)
class Place:
    """Where the files of the points go, for one user or for the system.

    data: of applications, as XDG_DATA_HOME.  config: as XDG_CONFIG_HOME.  state: the folder of the manifest.
    perco: the command line that the menus run.  thumbnailer: the path of perco-thumbnailer, as file managers see it.
    root: what stands for / while a package is built.
    """

    data: Path
    config: Path
    state: Path
    perco: tuple[str, ...]
    thumbnailer: Path
    is_system: bool = False
    root: Path = Path("/")

    @property
    def manifest(self) -> Path:
        """The file that says what was installed here, and what was there before."""
        return self.state / "desktop.json"


def user_place() -> Place:
    """Where files of this user go.  Raises OSError for a user without a home, or with another user's."""
    data, config = _xdg("XDG_DATA_HOME", ".local/share"), _xdg("XDG_CONFIG_HOME", ".config")
    for folder in (data, config):
        there = next(one for one in (folder, *folder.parents) if one.exists())
        if os.geteuid() == 0 and there.stat().st_uid != 0:  # as with sudo, which may leave another user's home
            raise PermissionError(f"{there} is not this user's own: run it as its owner, or use --system")
    system = system_place()
    shared = current_manifest(system) is not None and os.access(system.thumbnailer, os.X_OK)
    thumbnailer = system.thumbnailer if shared else script("perco-thumbnailer")
    return Place(data, config, data / "pillow-perco", (str(script("perco")),), thumbnailer)


def system_place(prefix: Path | None = None, destination: Path | None = None) -> Place:
    """Where files of the system go: below `prefix`, and the one of Thunar's in /etc/xdg.

    prefix: SYSTEM_PREFIX where none is given.
    destination: a folder that stands for / while a package is built (DESTDIR); the files name their places without it.
    """
    prefix, root = prefix or SYSTEM_PREFIX, destination or Path("/")
    inside = root / prefix.relative_to("/")
    helper = prefix / "bin" / "perco-thumbnailer"
    state = inside / "lib" / "pillow-perco"
    perco = (str(script("perco")),)
    return Place(inside / "share", root / "etc" / "xdg", state, perco, helper, is_system=True, root=root)


def current_manifest(system: Place) -> Manifest | None:
    """The manifest of a system-wide installation of this release: another one's previews are not of its files."""
    try:
        found = Manifest.read(system.manifest)
    except ValueError:  # damaged, which `check` tells
        return None
    return found if found.version == __version__ else None


def _xdg(variable: str, default: str) -> Path:
    """A folder of the user's, as the XDG Base Directory Specification finds it."""
    named = Path(os.environ.get(variable, ""))
    if named.is_absolute():
        return named
    try:
        home = Path.home()
    except RuntimeError:  # a process without a user
        home = Path("/")
    if home == home.parent or not home.is_dir():
        raise NotADirectoryError("this user has no home folder to install into: use --system")
    return home / default


def script(name: str) -> Path:
    """The full path of a command of this package."""
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.exists() else shutil.which(name)
    return Path(found) if found else beside


def files(place: Place) -> dict[Path, tuple[bytes, int]]:
    """The files of all points but Thunar's: path to contents and permissions."""
    perco = _in_exec(shlex.join(place.perco))
    values = {
        "PERCO": perco,
        "PERCO_FILE": place.perco[0],
        "PERCO_ARGUMENTS": json.dumps(place.perco),
        "RATES": json.dumps([(f"{label.capitalize()} ({bpp} bits a pixel)", bpp) for label, bpp in RATES]),
        "THUMBNAILER_FILE": str(place.thumbnailer),
        "THUMBNAILER": _in_exec(shlex.quote(str(place.thumbnailer))),
        "ACTION_NAMES": "".join(f"{label};" for label, _ in RATES),
        "ACTIONS": "".join(
            f"\n[Desktop Action {label}]\nName={label.capitalize()} ({bpp} bits a pixel)\nIcon=image-x-generic\n"
            f"Exec={perco} desktop convert --bpp {bpp} -- %F\n"
            for label, bpp in RATES
        ),
    }
    made: dict[Path, tuple[bytes, int]] = {}
    for asset, target, mode in (
        ("mime/pillow-perco.xml", KIND, 0o644),
        ("thumbnailer/pillow-perco.thumbnailer", THUMBNAILER, 0o644),
        ("open-with/pillow-perco.desktop", VIEWER, 0o644),
        ("nautilus/pillow_perco_menu.py", "nautilus-python/extensions/pillow_perco_menu.py", 0o644),
        ("nemo/to-png.nemo_action", "nemo/actions/pillow-perco-to-png.nemo_action", 0o644),
        ("kde/pillow-perco-encode.desktop", "kio/servicemenus/pillow-perco-encode.desktop", 0o755),
        ("kde/pillow-perco-decode.desktop", "kio/servicemenus/pillow-perco-decode.desktop", 0o755),
    ):
        made[place.data / target] = _filled(asset, values), mode
    if not place.is_system:
        # Caja's extensions are those of Nautilus by another name.  It reads the user's, and none in /usr/local.
        menu = _filled("nautilus/pillow_perco_menu.py", values).replace(b"Nautilus", b"Caja")
        made[place.data / "caja-python/extensions/pillow_perco_menu.py"] = menu, 0o644
    for label, bpp in RATES:
        target = f"nemo/actions/pillow-perco-{label}.nemo_action"
        made[place.data / target] = _filled("nemo/to-perco.nemo_action", values | {"LABEL": label, "BPP": bpp}), 0o644
    return made


def thunar_actions(place: Place) -> str:
    """Thunar's actions, as they stand in its file."""
    to_perco, end, to_png = (ASSETS / "thunar" / "actions.xml").read_text(encoding="utf-8").partition("</action>\n")
    many = [_replaced(to_perco + end, {"LABEL": label, "BPP": bpp}) for label, bpp in RATES]
    return _replaced("".join(many) + to_png, {"PERCO_XML": escape(_in_exec(shlex.join(place.perco)))})


def _in_exec(command: str) -> str:
    """A command as the Exec key has it, where a percent sign begins a code."""
    return command.replace("%", "%%")


def _filled(asset: str, values: dict[str, str]) -> bytes:
    return _replaced((ASSETS / asset).read_text(encoding="utf-8"), values).encode()


def _replaced(text: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text
