"""Photos in memory, and random crops of them at random scales."""

import csv
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def manifest(folder: Path, split: str) -> list[Path]:
    """The files of `folder` that its manifest (columns file, split) assigns to `split`; without one, all of them."""
    table = folder.parent / "train_manifest.csv"
    if not table.exists():
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in Image.registered_extensions())
    with table.open(newline="") as lines:
        return [folder / row["file"] for row in csv.DictReader(lines) if row["split"] == split]


def load(paths: list[Path]) -> list[Image.Image]:
    """Every photo decoded once, as RGB."""
    photos = []
    for path in paths:
        with Image.open(path) as photo:
            photos.append(photo.convert("RGB"))
    return photos


def to_tensor(photo: Image.Image) -> Tensor:
    """A picture as (3, h, w) float32 in -1..1."""
    return torch.from_numpy(np.asarray(photo.convert("RGB")).copy()).permute(2, 0, 1).float() / 127.5 - 1


def random_crop(photo: Image.Image, side: int, rng: random.Random) -> Image.Image:
    """A random square, maybe mirrored: as it is in half of the cases, else reduced to `side` from up to 1/0.35 of it.

    Codecs meet photos at their own scale first of all; crops that are mostly reduced teach too much fine detail.
    """
    if rng.random() < 0.5 and min(photo.size) >= side:
        left, top = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
        crop = photo.crop((left, top, left + side, top + side))
    else:
        largest = min(side / 0.35, *photo.size)
        source = rng.uniform(min(side, largest), largest)
        x, y = rng.uniform(0, photo.width - source), rng.uniform(0, photo.height - source)
        crop = photo.resize((side, side), Image.Resampling.BICUBIC, (x, y, x + source, y + source), 2.0)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def batches(photos: list[Image.Image], side: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches (size, 3, side, side) of random crops in -1..1; every photo once before any comes again."""
    rng = random.Random(seed)
    queue: list[Image.Image] = []
    while True:
        while len(queue) < size:
            queue = rng.sample(photos, len(photos)) + queue
        yield torch.stack([to_tensor(random_crop(queue.pop(), side, rng)) for _ in range(size)])
