"""A caption for each photo: from beside it, from a table, or made by a captioner and kept."""

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from PIL import Image
from torch import Tensor

from ..captioner import caption_pictures, get_captioner
from ..tensors import to_images
from .settings import Captions
from .sources import read_table


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
            self.known = {str(name): str(caption or "") for name, caption in rows}
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
        return [next((self.known[form] for form in _forms(name) if form in self.known), "") for name in names]

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


def _forms(name: str) -> tuple[str, str, str]:
    """A name as tables have it: as it is, without suffix, without folders and suffix."""
    path = PurePosixPath(name)
    return name, str(path.with_suffix("")), path.stem
