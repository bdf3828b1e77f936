"""The self-contained folder of a system-wide installation: what GNOME's sandbox, which sees only /usr, can run.

    PREFIX/lib/pillow-perco/app     numpy, Pillow and ours for the system's own Python, and the weights of previews
    PREFIX/bin/perco-thumbnailer    that Python on that folder, and on nothing else

There is no torch in it.  The packages are copied from the environment that this runs in where its Python has the same
binary interface; otherwise pip fetches the same versions for the other one.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import perco_engine
from perco_engine import bitstream, preview_networks, rates, weights
from perco_engine.codes import Codes, ModelReference
from perco_engine.errors import PercoError
from perco_engine.preview import COLOURS
from perco_engine.store import checkpoint

from .manifest import Manifest
from .points import Place

PACKAGES = ("numpy", "pillow", "safetensors", "brotli", "platformdirs")
LEFT_OUT = ("tests", "include", "f2py", "bin", "__pycache__")
OURS = ("*.py", "bitstream/*.py", "store/*.py")
MINIMUM = (3, 11)


@dataclass(frozen=True)
class Interpreter:
    """A Python of the system: its path, its version, and the name of its binary interface."""

    path: Path
    version: tuple[int, int]
    abi: str


def interpreter() -> Interpreter:
    """A Python under /usr that this package can run on.  Raises OSError where there is none."""
    ask = "import sys, sysconfig; print(*sys.version_info[:2], sysconfig.get_config_var('SOABI'))"
    own = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    found = [Path(own), Path("/usr/bin/python3"), *sorted(Path("/usr/bin").glob("python3.??"), reverse=True)]
    for path in found:
        if not path.exists():
            continue
        run = subprocess.run([path, "-ISc", ask], capture_output=True, text=True, check=False)
        if run.returncode == 0:
            major, minor, abi = run.stdout.split()
            if (int(major), int(minor)) >= MINIMUM:
                return Interpreter(path, (int(major), int(minor)), abi)
    raise FileNotFoundError(f"there is no Python of {MINIMUM[0]}.{MINIMUM[1]} or newer in /usr/bin: install python3")


def app_folder(place: Place) -> Path:
    """The self-contained folder of an installation."""
    return place.state / "app"


def wrapper(place: Place) -> Path:
    """The command of an installation that file managers run."""
    return place.state.parents[1] / "bin" / "perco-thumbnailer"


def install(place: Place, manifest: Manifest) -> Iterator[str]:
    """Builds the folder, tries it out, puts it in place of the one that was there, and writes the wrapper.

    Raises OSError where the packages cannot be had, or do not run on the system's Python.
    """
    python = interpreter()
    app = app_folder(place)
    with tempfile.TemporaryDirectory(prefix="building-", dir=place.state) as building:
        new = Path(building) / "app"
        new.mkdir()
        _bring_packages(new, python)
        _bring_ours(new)
        is_package = place.root != Path("/")
        models = [] if is_package else _bring_models(new)  # those of whoever builds a package are not for others
        subprocess.run(
            [python.path, "-ISm", "compileall", "-q", "--invalidation-mode", "unchecked-hash", new],
            check=True, capture_output=True,
        )  # fmt: skip
        _try_out(new, python)
        for path in (new, *new.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if app.exists():
            app.rename(Path(building) / "old")
        new.rename(app)
    size_bytes = sum(path.stat().st_size for path in app.rglob("*") if path.is_file())
    yield f"{app}: {size_bytes / 1e6:.0f} MB for {python.path}"
    if not is_package:  # under sudo the folder is root's
        others = f"{', '.join(models) or 'no other'} of {weights.models_folder()}"
        yield f"{app}: previews of the embedded model, and of {others}"
    home = place.thumbnailer.parents[1] / "lib" / "pillow-perco" / "app"
    text = (
        f"#!{python.path} -ISB\n"
        f"import sys\n\n"
        f"sys.path.insert(0, {str(home)!r})\n"
        f"from perco_engine.thumbnailer import main\n\n"
        f"sys.exit(main())\n"
    ).encode()
    command = wrapper(place)
    manifest.put(command, text, 0o755, manifest.before_ours(command, text))
    yield f"{command}"


def uninstall(place: Place) -> Iterator[str]:
    """Removes the folder; the manifest has the wrapper."""
    app = app_folder(place)
    if app.exists():
        shutil.rmtree(app)
        yield f"{app}"


def _bring_packages(app: Path, python: Interpreter) -> None:
    if python.abi == sysconfig.get_config_var("SOABI"):
        for name in PACKAGES:
            _copy_package(name, app)
        return
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES]
    version = ".".join(map(str, python.version))
    run = subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--only-binary=:all:",
            "--python-version", version, "--target", app, *wanted,
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise OSError(f"numpy and Pillow cannot be had for {python.path}: {reason}")


def _copy_package(name: str, app: Path) -> None:
    """Copies an installed package, without what only its developers need."""
    distribution = importlib.metadata.distribution(name)
    for file in distribution.files or ():
        source = Path(str(distribution.locate_file(file)))
        inside = not file.is_absolute() and ".." not in file.parts
        if inside and not set(file.parts) & set(LEFT_OUT) and file.suffix not in (".pyi", ".a") and source.is_file():
            target = app / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def _bring_ours(app: Path) -> None:
    """Copies of perco_engine what runs without torch, and what previews of the embedded model need."""
    source, target = Path(perco_engine.__file__).parent, app / "perco_engine"
    for pattern in OURS:
        for path in source.glob(pattern):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    preview_networks.export(source / "embedded", target / "embedded")


def _bring_models(app: Path) -> list[str]:
    """Copies what previews of the models in this user's store need; returns the names of those that have it."""
    brought = []
    for one in checkpoint.installed(weights.models_folder()):
        folder = app / "store" / "models" / one.name
        try:
            if (one.folder / COLOURS).exists():
                (folder / "hyper_enc").mkdir(parents=True)
                for name in (COLOURS, "hyper_enc/config.json", "model_index.json"):
                    shutil.copyfile(one.folder / name, folder / name)
                if (one.folder / "prior").is_dir():
                    shutil.copytree(one.folder / "prior", folder / "prior")
            else:
                preview_networks.export(one.folder, folder)
        except (OSError, PercoError):
            shutil.rmtree(folder, ignore_errors=True)
        else:
            shutil.copyfile(one.folder / checkpoint.RECORD, folder / checkpoint.RECORD)
            brought.append(one.name)
    return brought


def _try_out(app: Path, python: Interpreter) -> None:
    """Makes a thumbnail with the new folder.  Raises OSError if that fails."""
    shape = rates.EMBEDDED[0].shapes(64, 64)[0]
    spec = weights.named("embedded")
    assert spec is not None
    codes = Codes(ModelReference(spec.registry_id), 64, 64, 0, (np.zeros(shape, np.int32),))
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "x.perco", Path(folder) / "x.png"
        source.write_bytes(bitstream.pack(codes, spec.rate_points))
        program = "import sys; sys.path.insert(0, sys.argv.pop(1)); from perco_engine.thumbnailer import main; main()"
        run = subprocess.run(
            [python.path, "-ISBc", program, app, "-s", "64", source, target],
            capture_output=True, text=True, check=False, env={"PATH": os.defpath},
        )  # fmt: skip
        if not target.exists():
            reason = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise OSError(f"what was put together does not run on {python.path}: {reason}")
