"""The networks' part of a batch: which pictures go through them together, and how.

Importing this leaves torch alone; the first batch imports it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from . import heap, thumbnails
from .codes import Metadata
from .conversion import Task

if TYPE_CHECKING:
    from .captioner import Captioner
    from .engine import Engine
    from .family import FamilyEngine

MOST_IN_BATCH = 32
"""Small pictures are not kept back for longer than that."""

MOST_IN_BATCH_CPU = 4
"""A CPU gains nothing from more, which only take memory."""


RELEASE_PIXELS = 4 << 20
"""After so many pixels what the networks have freed goes back to the system: often enough for memory to stay flat, and
seldom enough to take a few hundredths of the time at most."""


@dataclass(frozen=True)
class Settings:
    """How files are converted.  What is None is the model's, or the file's.

    bpp, max_bytes, captioner, effort, model: of encoding, as `Engine.encode_batch` takes them.
    caption: of every picture; None: the text of a .txt file beside the photo, if `sidecars`.
    steps, guidance_scale: of decoding.  seed: of both.
    keep_metadata: EXIF and XMP travel along.
    overwrite: replace files that are there; else a task fails whose target is there when it is to be written, or,
        with skip_existing, is skipped.
    delete_source: remove a source when the written file was read back and found good.
    thumbnails: of written .perco files, into the desktop's cache, when nothing else is to do; None: if the model
        decodes in one step.
    """

    model: str = "embedded"
    bpp: float | None = None
    max_bytes: int | None = None
    caption: str | None = None
    sidecars: bool = True
    captioner: str | None = None
    effort: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    keep_metadata: bool = False
    overwrite: bool = False
    skip_existing: bool = False
    delete_source: bool = False
    thumbnails: bool | None = None


@dataclass
class Item:
    """A task on its way: what was read, and then what is to be written."""

    task: Task
    pixels: int
    size: tuple[int, int]
    state: os.stat_result
    key: tuple[Any, ...]
    image: Image.Image | None = None
    data: bytes = b""
    caption: str | None = None
    metadata: Metadata = field(default_factory=Metadata)


class Networks:
    """The engine, imported and loaded by the thread that runs it, so that reading does not wait for these seconds."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._engine: Engine | FamilyEngine | None = None
        self._captioner: Captioner | None = None
        self._loaded = False
        self._pixels = 0
        self.make_thumbnails = False

    def load(self, batch: Sequence[Item]) -> None:
        """Loads, once, what a batch needs that no file is to blame for: the model, and what writes captions."""
        from .captioner import get_captioner
        from .engine import get_engine
        from .weights import find

        settings = self._settings
        if not self._loaded:
            if batch[0].task.encodes:
                self._engine = get_engine(settings.model)
                self.make_thumbnails = thumbnails.is_wanted(settings.thumbnails, self._engine)
            elif settings.model != "embedded":
                find(settings.model)
            self._loaded = True
        if self._engine is not None and self._captioner is None and any(item.caption is None for item in batch):
            self._captioner = get_captioner(settings.captioner, self._engine.device)

    def run(self, batch: Sequence[Item]) -> None:
        """Files of pictures of one size, or pictures of files of one size and model, each into its item."""
        self._run(batch)
        self._pixels += sum(item.pixels for item in batch)
        if self._pixels >= RELEASE_PIXELS:
            heap.release()
            self._pixels = 0

    def _run(self, batch: Sequence[Item]) -> None:
        from .engine import engine_of_file

        settings = self._settings
        if self._engine is not None:
            encoded = self._engine.encode_batch(
                [item.image for item in batch if item.image is not None],
                bpp=settings.bpp,
                max_bytes=settings.max_bytes,
                caption=[item.caption for item in batch],
                captioner=self._captioner,
                seed=settings.seed,
                effort=settings.effort,
                metadata=[item.metadata for item in batch],
            )
            for item, data in zip(batch, encoded, strict=True):
                item.data, item.image = data, None
            return
        decoded = engine_of_file(batch[0].data).decode_batch(
            [item.data for item in batch],
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed,
        )
        for item, picture in zip(batch, decoded, strict=True):
            item.image = picture

    def check(self, data: bytes) -> None:
        """Raises BitstreamError unless these bytes are a whole file of the model for encoding."""
        assert self._engine is not None
        self._engine.codes(data)


def most_in_batch(pixels: int) -> int:
    """How many pictures of so many pixels go through the networks together."""
    from .devices import best_device
    from .engine import BATCH_PIXELS

    most = MOST_IN_BATCH_CPU if best_device().type == "cpu" else MOST_IN_BATCH
    return min(most, max(1, BATCH_PIXELS // pixels))


def next_batch(waiting: dict[tuple[Any, ...], list[Item]]) -> list[Item]:
    """Takes the next batch out of the pictures that wait: those of the size that has waited longest."""
    key, items = next(iter(waiting.items()))
    most = most_in_batch(items[0].pixels)
    del waiting[key]
    if len(items) > most:
        waiting[key] = items[most:]
    return items[:most]
