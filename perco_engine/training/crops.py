"""Crops of photos by their position in the run, so that what a step sees follows from its number and the seed alone.

Whatever is random about position n (which photo, which crop, which noise) is drawn from (seed, n).  So a run that goes
on sees what it would have seen, and two processes see together what one would.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..errors import TrainingError, first_line
from ..picture_files import UNREADABLE
from ..tensors import to_tensor
from .sources import Source

Cut = Callable[[Image.Image, int, random.Random], Image.Image]
"""(photo, side, rng) -> a square of `side` pixels."""

Crop = dict[str, Any]
"""pixels (3, side, side) float32 in -1..1; name; key (unlike names, of one photo); sidecar (a text or None); seed
(of the crop's noise); skipped: the names of photos that could not be read, and why; places: of a stream, how many
samples its reader has read by now."""

ATTEMPTS = 100
"""So many photos in a row that cannot be read are no accident."""


def generator(seed: int, position: int) -> random.Random:
    """The random numbers of a position: the same on every machine."""
    return random.Random(f"{seed}/{position}")


class Crops(Dataset[Crop]):
    """`count` crops of a source's photos, every photo once before any comes again, in an order that changes.

    A photo that cannot be read is replaced by another one, and told about.  Raises TrainingError where none of 100 can.
    """

    def __init__(self, source: Source, cut: Cut, side: int, seed: int, count: int) -> None:
        self.source, self.cut, self.side, self.seed, self.count = source, cut, side, seed, count
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> Crop:
        rng = generator(self.seed, position)
        seed = rng.getrandbits(63)
        number, skipped = self._number(position), dict[str, str]()
        for _ in range(ATTEMPTS):
            name = self.source.names[number]
            try:
                photo = self.source.read(number)
                (crop,) = to_tensor([self.cut(photo, self.side, rng)])
                sidecar = self.source.sidecar(number)
                return {
                    "pixels": crop, "name": name, "key": name, "sidecar": sidecar, "seed": seed, "skipped": skipped,
                    "places": {},
                }  # fmt: skip
            except UNREADABLE as error:
                skipped[name] = first_line(error)
                number = rng.randrange(len(self.source.names))
        raise TrainingError(f"{ATTEMPTS} photos in a row cannot be read, the last one, {name}: {skipped[name]}")

    def _number(self, position: int) -> int:
        """Which photo a position shows."""
        epoch, place = divmod(position, len(self.source.names))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.source.names))
        return int(self._order[1][place])


def collate(crops: Sequence[Crop]) -> Crop:
    """A batch: pixels (b, 3, side, side), lists of the rest, and all that was skipped."""
    return {
        "pixels": torch.stack([crop["pixels"] for crop in crops]),
        **{key: [crop[key] for crop in crops] for key in ("name", "key", "sidecar", "seed")},
        **{key: dict(pair for crop in crops for pair in crop[key].items()) for key in ("skipped", "places")},
    }
