"""An installed checkpoint: a model folder in the store, and the record that `perco models import` writes beside it."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..bitstream.header import FINGERPRINT_BYTES
from ..errors import InvalidModel

RECORD = "perco.json"


@dataclass(frozen=True)
class Checkpoint:
    """What the store knows of a model folder.

    name: that of its folder in the store.
    family, bpp: the family that it belongs to, and which of the family's rate points it is; both None outside of one.
    fingerprint: 8 bytes, as weights.fingerprint makes them.
    source, revision: the folder or repository that it came from, and the commit of the latter ("" for a folder).
    base: where the components come from that the source did not have ("" where it had all).
    version: the release of this package that imported it.
    files: SHA-256, in hexadecimal, of every file but the record, by its path in the folder with forward slashes.
    """

    name: str
    folder: Path
    family: str | None
    bpp: float | None
    fingerprint: bytes
    source: str
    revision: str = ""
    base: str = ""
    version: str = ""
    files: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def size_bytes(self) -> int:
        """Bytes of those of its files that are there."""
        paths = (self.folder / name for name in self.files)
        return sum(path.stat().st_size for path in paths if path.is_file())

    @property
    def missing(self) -> list[str]:
        """Which of its files are not there."""
        return [name for name in self.files if not (self.folder / name).is_file()]

    def write(self) -> None:
        """Writes the record into the folder.  The folder is not yet in the store when this is called."""
        record: dict[str, Any] = asdict(self)
        del record["name"], record["folder"]
        record["fingerprint"] = self.fingerprint.hex()
        (self.folder / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read(folder: Path) -> Checkpoint:
    """The checkpoint in a folder of the store.  Raises InvalidModel where its record is missing or damaged."""
    damaged = (
        f"the record of the model {folder.name!r} is damaged: perco models remove {folder.name}, and import it again"
    )
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        found = Checkpoint(folder.name, folder, **(record | {"fingerprint": bytes.fromhex(record["fingerprint"])}))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InvalidModel(f"{damaged} ({error})") from error
    texts = (found.source, found.revision, found.base, found.version, found.family or "")
    if not (
        len(found.fingerprint) == FINGERPRINT_BYTES
        and all(isinstance(text, str) for text in texts)
        and isinstance(found.bpp, int | float | None)
        and (found.family is None) == (found.bpp is None)
        and isinstance(found.files, dict)
        and all(isinstance(text, str) for pair in found.files.items() for text in pair)
    ):
        raise InvalidModel(damaged)
    return found


def installed(models: Path) -> Iterator[Checkpoint]:
    """The checkpoints in the store's folder, in name order; those with a damaged record are left out."""
    for record in sorted(models.glob(f"*/{RECORD}")):
        try:
            yield read(record.parent)
        except InvalidModel:
            continue
