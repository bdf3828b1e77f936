"""A caption for each photo: from beside it, from a table, or made by a captioner and kept."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..captioner import caption_pictures, get_captioner
from ..errors import InvalidSettings
from ..tensors import to_images
from .settings import Captions
from .sources import forms, read_table


class Captioned:
    """Captions of photos by name, as the settings say where from.

    folder: the run's, where captions that are made are kept.  rank: of this process among those that train: each writes
        a file of its own, and reads those of all when it starts.  device: where a captioner runs.

    Raises InvalidSettings for a table that cannot be read, and what `get_captioner` raises.
    """

    def __init__(self, settings: Captions, folder: Path, rank: int = 0, device: str | None = None) -> None:
        self.settings = settings
        self.known: dict[str, str] = {}
        self.captioner = None
        self.kept = folder / f"captions.{rank}.jsonl"
        self._appends = False
        if settings.source == "table":
            assert settings.table is not None
            columns = (settings.name_column, settings.caption_column)
            rows = read_table(settings.table, "captions.table", columns)
            self.known = {str(name): _text(caption, settings) for name, caption in rows}
        elif settings.source == "captioner":
            self.captioner = get_captioner(settings.captioner, device)
            for path in sorted(folder.glob("captions.*.jsonl")):
                self._read(path)

    def _read(self, path: Path) -> None:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                told = json.loads(line)
            except ValueError:  # the line that was being written when the run was broken off
                continue
            own = str(self.settings.captioner)
            if told.get("captioner", own) == own:  # runs of before say neither that nor "key"
                self.known[told.get("key") or told["name"]] = told["caption"]

    def __call__(
        self, names: Sequence[str], sidecars: Sequence[str | None], crops: Tensor, keys: Sequence[str]
    ) -> list[str]:
        """The captions of photos, "" where there is none.

        names: as tables have them.  sidecars: the texts that came with them.  crops: (b, 3, s, s) in -1..1, what a
            captioner is shown of photos that it has not seen.  keys: by which those are told apart.
        """
        if self.settings.source == "none":
            return [""] * len(names)
        if self.settings.source == "sidecar":
            return [text or "" for text in sidecars]
        if self.captioner is not None:
            self._make({key: number for number, key in enumerate(keys) if key not in self.known}, crops)
            return [self.known[key] for key in keys]
        return [self._in_table(name) for name in names]

    def _in_table(self, name: str) -> str:
        return next((self.known[form] for form in forms(name) if form in self.known), "")

    def count(self, names: Sequence[str]) -> int:
        """How many of these photos the table has a caption of.  Raises InvalidSettings for none."""
        count = sum(bool(self._in_table(name)) for name in names)
        if not count:
            raise InvalidSettings(
                f"captions.table: {self.settings.table} has no caption of any photo: its names are like "
                f"{next(iter(self.known), '')!r}, and those of the photos like {names[0]!r}"
            )
        return count

    def _make(self, missing: dict[str, int], crops: Tensor) -> None:
        """Captions the photos that have none yet, and keeps what comes of it."""
        if not missing:
            return
        pictures: list[Image.Image] = to_images((crops[list(missing.values())] / 2 + 0.5).clamp(0, 1))
        made = dict(zip(missing, caption_pictures(self.captioner, pictures), strict=True))
        self.known |= made
        captioner = str(self.settings.captioner)
        lines = (json.dumps({"key": key, "captioner": captioner, "caption": text}) for key, text in made.items())
        with self.kept.open("a", encoding="utf-8") as file:
            if not self._appends:
                file.write("\n")  # where the last line is torn
            self._appends = True
            file.writelines(line + "\n" for line in lines)


def _text(cell: Any, settings: Captions) -> str:
    """A caption as a table has it: text, its bytes in UTF-8, or nothing.  Raises InvalidSettings for another one."""
    if isinstance(cell, bytes):
        with suppress(UnicodeDecodeError):
            cell = cell.decode()
    if not isinstance(cell, str | None):
        raise InvalidSettings(
            f"captions.table: the column {settings.caption_column!r} of {settings.table} must be text in UTF-8, and "
            f"has a value of type {type(cell).__name__}: {cell!r:.60}"
        )
    return cell or ""
