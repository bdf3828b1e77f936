"""What an evaluation has found so far, on disk: JSON lines that outlive a break, and the settings they belong to."""

import json
import os
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

from .. import files
from ..errors import EvaluationError

Line = dict[str, Any]


def write_result(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, and makes the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_beside(path, data)


class Lines:
    """A file of JSON lines of which the last one with a key counts.

    A last line that a break cut off is removed.  Raises EvaluationError if another line is no JSON object.
    """

    def __init__(self, path: Path, key: Callable[[Line], Hashable]) -> None:
        self.path = path
        self._key = key
        self._found: dict[Hashable, Line] = {}
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            write_result(path, whole)
        for number, text in enumerate(whole.splitlines(), 1):
            try:
                line = json.loads(text)
                self._found[key(line)] = line
            except (ValueError, TypeError, KeyError) as error:
                raise EvaluationError(
                    f"line {number} of {path} is not one of an evaluation ({error}): remove this line; what it "
                    f"said is measured again, and the other lines are kept"
                ) from error

    def __iter__(self) -> Iterator[Line]:
        return iter(self._found.values())

    def get(self, key: Hashable) -> Line | None:
        """The last line with this key, if there is one."""
        return self._found.get(key)

    def append(self, *lines: Line) -> None:
        """Adds lines, on disk before this returns."""
        self._found.update((self._key(line), line) for line in lines)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())


def claim(out: Path, settings: Line) -> None:
    """Makes `out` the folder of an evaluation with these settings, or goes on in it if it is that already.

    Raises EvaluationError if its results are of other settings: then they must not be mixed.
    """
    path = out / "run.json"
    if not path.exists():
        write_result(path, json.dumps(settings, indent=1).encode())
        return
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise EvaluationError(f"{path} is damaged ({error}): choose another folder with --out") from error
    differing = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
    if differing:
        told = ", ".join(f"{name} {found.get(name)!r} there, {settings.get(name)!r} now" for name in differing)
        raise EvaluationError(
            f"{out} holds the results of another run ({told}): they are not mixed; choose another folder with --out"
        )
