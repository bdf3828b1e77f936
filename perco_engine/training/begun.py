"""What a run, or a stage of one, was begun with, in a file of its folder: it goes on with the same, or not at all.

There are no paths in it, since a run's folder may be copied to go on elsewhere.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InvalidSettings
from ..files import write_beside

BEGUN = "begun.json"


def keep(folder: Path, now: Mapping[str, Any]) -> None:
    """Writes down what a run, or a stage, begins with."""
    folder.mkdir(parents=True, exist_ok=True)
    write_beside(folder / BEGUN, json.dumps(now, indent=1, default=_name).encode())


def differing(folder: Path, now: Mapping[str, Any], since: Collection[str] = ()) -> str:
    """What is other now than a run, or a stage, was begun with, for people; "" for nothing, and for one of before.

    since: what runs of before have no note of, while they have one of the rest.
    """
    path = folder / BEGUN
    if not path.exists():
        return ""
    there, here = json.loads(path.read_bytes()), json.loads(json.dumps(now, default=_name))
    return ", ".join(
        f"{name} {there.get(name)!r} there, {value!r} now"
        for name, value in here.items()
        if there.get(name) != value and (name in there or name not in since)
    )


def check(run: Path, now: Mapping[str, Any], since: Collection[str] = ()) -> None:
    """Raises InvalidSettings where a run was begun with other settings.  since: see `differing`."""
    if told := differing(run, now, since):
        raise InvalidSettings(
            f"run: {run} was begun with other settings ({told}): put them back, or name another folder in run"
        )


def names_mark(names: Sequence[str]) -> str:
    """How many names there are, and a mark of them."""
    return f"{len(names)} names, {hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()[:12]}"


def networks_mark(folder: Path) -> str | None:
    """A mark of the networks in a folder; None where there are none."""
    digest = hashlib.sha256()
    paths = sorted(folder.glob("*/*.safetensors"))
    for path in paths:
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12] if paths else None


def _name(path: Path) -> str:
    """A path without the folders above it."""
    return path.name
