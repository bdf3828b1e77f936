"""What was installed, and what was there before, so that it can be taken out exactly."""

import base64
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from perco_engine.files import write_beside


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def content(path: Path) -> bytes | None:
    """What a file holds; None where there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


@dataclass
class Manifest:
    """written: SHA-256 of each file as it was installed.  before: what it held, in base64, where it was there already.
    folders: those that were made, for databases too, outer ones first.  databases: files that their refreshing made.
    root: what stands for / while a package is built; the names are without it.
    """

    path: Path
    root: Path = Path("/")
    version: str = ""
    written: dict[str, str] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    databases: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, root: Path = Path("/")) -> "Manifest":
        """The manifest in a file; an empty one where there is none.  Raises ValueError for a damaged one."""
        data = content(path)
        if data is None:
            return cls(path, root)
        try:
            return cls(path, root, **json.loads(data))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): move it away, and install again") from error

    def save(self) -> None:
        """Writes it into its file."""
        told = {name: value for name, value in self.__dict__.items() if name not in ("path", "root")}
        write_beside(self.path, (json.dumps(told, indent=1, sort_keys=True) + "\n").encode(), mode=0o644)

    def name(self, path: Path) -> str:
        """What a file or folder is called here."""
        return str("/" / path.relative_to(self.root))

    def place(self, name: str) -> Path:
        """Where what is called so lies."""
        return self.root / Path(name).relative_to("/")

    def is_ours(self, path: Path) -> bool:
        """Whether a file is as it was installed."""
        data = content(path)
        return data is not None and self.written.get(self.name(path)) == digest(data)

    def original(self, path: Path) -> bytes | None:
        """What a file held before; None where it was not there."""
        held = self.before.get(self.name(path))
        return None if held is None else base64.b64decode(held)

    def before_ours(self, path: Path, data: bytes) -> bytes | None:
        """What a file is to hold again once `data` are taken out: nothing of ours, though its manifest was lost."""
        if self.name(path) in self.written:
            return self.original(path)
        there = content(path)
        return None if there == data else there

    def make_folder(self, folder: Path) -> None:
        """Makes a folder and those above it, and remembers which of them were not there."""
        missing = [one for one in (folder, *folder.parents) if not one.is_dir()]
        for one in reversed(missing):
            one.mkdir()
            if self.name(one) not in self.folders:
                self.folders.append(self.name(one))

    def put(self, path: Path, data: bytes, mode: int | None, before: bytes | None) -> None:
        """Writes a file, and remembers what was there `before` (None: nothing)."""
        self.before.pop(self.name(path), None)
        if before is not None:
            self.before[self.name(path)] = base64.b64encode(before).decode()
        self.make_folder(path.parent)
        self.written[self.name(path)] = digest(data)
        self.save()  # before the file itself, so that whatever breaks off now can be taken out
        write_beside(path, data, mode=mode)

    def take_out(self, path: Path) -> bool:
        """Makes a file what it was before.  Returns False, and leaves it, where it was changed since."""
        if not self.is_ours(path):
            return not path.exists()
        held = self.original(path)
        if held is None:
            path.resolve().unlink()  # a link of the user's stays
        else:
            write_beside(path, held, mode=path.stat().st_mode & 0o7777)
        return True

    def forget(self, path: Path) -> None:
        """Has nothing to do with a file any more."""
        self.written.pop(self.name(path), None)
        self.before.pop(self.name(path), None)
