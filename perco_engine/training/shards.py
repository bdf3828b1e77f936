"""A webdataset: tar shards, on this machine or another one, read as a stream (package webdataset)."""

import io
import itertools
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from .. import pixels
from ..errors import InvalidSettings, TrainingError, first_line
from ..picture_files import UNREADABLE
from ..tensors import to_tensor
from .crops import ATTEMPTS, Crop, Cut, generator
from .settings import WebdatasetData

PICTURES = ("jpg", "jpeg", "png", "webp", "avif", "tif", "tiff", "bmp")


def open_shards(data: WebdatasetData) -> list[str]:
    """The shards' addresses, written out.  Raises InvalidSettings where the package, or a file, is missing."""
    if find_spec("webdataset") is None:
        raise InvalidSettings('data.source: "webdataset" needs the package: pip install webdataset')
    from webdataset.shardlists import expand_urls

    addresses: list[str] = [address for pattern in data.shards for address in expand_urls(pattern)]
    for address in addresses:
        if ":" not in address and not Path(address).is_file():
            raise InvalidSettings(f"data.shards: there is no file {address}")
    return addresses


class ShardCrops(IterableDataset[Crop]):
    """An endless stream of crops, each process and each of its workers reading shards of its own.

    rank, processes: this process among those that train.
    What is random is drawn from the seed and the place in the stream, so that a run goes on as it would have, with as
    many processes and workers.  Raises InvalidSettings for fewer shards than readers.
    """

    def __init__(
        self, data: WebdatasetData, shards: list[str], cut: Cut, side: int, seed: int, rank: int, processes: int
    ) -> None:
        self.data, self.shards, self.cut, self.side, self.seed = data, shards, cut, side, seed
        self.rank, self.processes = rank, processes
        self.batches, self.places = 0, dict[int, int]()
        readers = processes * max(1, data.workers)
        if len(shards) < readers:
            raise InvalidSettings(
                f"data.shards: {len(shards)} shards are too few for {readers} readers ({processes} processes with "
                f"{data.workers} workers): cut smaller shards, or lower data.workers"
            )

    def resume(self, batches: int, places: dict[int, int]) -> None:
        """Goes on after so many batches of this process.  places: of its readers, how many samples each has read."""
        self.batches, self.places = batches, places

    def __iter__(self) -> Iterator[Crop]:
        info = get_worker_info()
        workers, worker = (1, 0) if info is None else (info.num_workers, info.id)
        # The loader takes a batch from each worker in turn, the first one first: that stands in for whose turn it is.
        reader = self.rank * workers + (worker + self.batches) % workers
        readers, start, skipped = self.processes * workers, self.places.get(reader, 0), dict[str, str]()
        failed = 0
        for place, sample in enumerate(self._samples(reader, readers, skipped)):
            if place < start:
                skipped.clear()
                continue
            rng = generator(self.seed, place * readers + reader)
            seed = rng.getrandbits(63)
            try:
                photo = _decode(sample)
                (crop,) = to_tensor([self.cut(photo, self.side, rng)])
                sidecar = sample["txt"].decode("utf-8-sig").strip() if "txt" in sample else None
            except UNREADABLE as error:
                skipped[sample["__key__"]] = first_line(error)
                failed += 1
                if failed == ATTEMPTS:
                    raise TrainingError(
                        f"{ATTEMPTS} photos in a row cannot be read, the last one, {sample['__key__']}: "
                        f"{first_line(error)}"
                    ) from error
                continue
            failed = 0
            yield {
                "pixels": crop, "name": sample["__key__"], "key": _key(sample),
                "sidecar": sidecar, "seed": seed, "skipped": dict(skipped), "places": {reader: place + 1},
            }  # fmt: skip
            skipped.clear()

    def _samples(self, reader: int, readers: int, skipped: dict[str, str]) -> Iterator[dict[str, Any]]:
        """What is in the reader's shards, pass after pass.  skipped: takes what of them cannot be read."""
        from webdataset.filters import shuffle
        from webdataset.gopen import gopen
        from webdataset.tariterators import group_by_keys, tar_file_expander

        def skip(error: Exception) -> bool:
            skipped[opened[-1]] = first_line(error)
            return True

        def streams(shards: list[str]) -> Iterator[dict[str, Any]]:
            for shard in shards:
                opened.append(shard)
                try:
                    stream = gopen(shard)
                except UNREADABLE as error:
                    skip(error)
                    continue
                try:
                    yield {"url": shard, "stream": stream}
                finally:
                    try:
                        stream.close()
                    except UNREADABLE as error:  # the program that it comes from has failed
                        skip(error)

        opened: list[str] = []
        for epoch in itertools.count():
            rng = random.Random(f"shards {self.seed}/{epoch}")
            order = rng.sample(self.shards, len(self.shards))
            empty = True
            samples = group_by_keys(tar_file_expander(streams(order[reader::readers]), skip), handler=skip)
            for sample in shuffle(self.data.shuffle, rng=rng)(samples):
                empty = False
                yield sample
            if empty:
                some = "; ".join(f"{shard}: {why}" for shard, why in list(skipped.items())[:3])
                raise TrainingError(f"there is no photo in the shards of a reader: {some or ', '.join(order[:3])}")


def _key(sample: dict[str, Any]) -> str:
    """By which a photo is told apart from those of other shards, wherever these lie."""
    return f"{PurePosixPath(urlsplit(sample['__url__']).path).name}/{sample['__key__']}"


def _decode(sample: dict[str, Any]) -> Image.Image:
    """The picture in a sample.  Raises UNREADABLE."""
    data = next((sample[kind] for kind in PICTURES if kind in sample), None)
    if data is None:
        suffixes = ", ".join(f".{kind}" for kind in sample if not kind.startswith("__"))
        raise ValueError(
            f"no picture ({', '.join(PICTURES)}) under this name, but {suffixes}; a suffix begins at the first dot, so "
            f"that names must have no other one"
        )
    with Image.open(io.BytesIO(data)) as photo:
        return pixels.to_rgb(pixels.as_seen(photo))
