"""Photos that are known by name from the start: a folder tree, Open Images by its list, tensorflow_datasets."""

import csv
import hashlib
import posixpath
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from .. import pixels
from ..errors import InvalidSettings
from ..picture_files import UNREADABLE, readable_suffixes, sidecar_caption
from .settings import FolderData, Listed, OpenImagesData, TfdsData

SPLITS = ("train", "held-out")


class Source(Protocol):
    """Photos by number, each with a name that stays the same wherever the photos lie."""

    names: Sequence[str]

    def read(self, number: int) -> Image.Image:
        """A photo upright, in sRGB, mode RGB.  Raises UNREADABLE."""

    def sidecar(self, number: int) -> str | None:
        """The text that comes with a photo, if one does."""


class Files:
    """Photos that are files: names are their paths in the folder, with forward slashes."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.names = names

    def read(self, number: int) -> Image.Image:
        with Image.open(self.folder / self.names[number]) as photo:
            return pixels.to_rgb(pixels.as_seen(photo))

    def sidecar(self, number: int) -> str | None:
        return sidecar_caption(self.folder / self.names[number])


class Tfds:
    """A random-access data source of tensorflow_datasets: dictionaries of numpy arrays."""

    def __init__(self, data: Any, numbers: Sequence[int], names: Sequence[str], image: str) -> None:
        self.data, self.numbers, self.names, self.image = data, numbers, names, image

    def read(self, number: int) -> Image.Image:
        try:
            array = self.data[self.numbers[number]][self.image]
            return pixels.to_rgb(Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array))
        except UNREADABLE:
            raise
        except Exception as error:  # the library raises whatever a damaged record leads it to
            raise ValueError(f"cannot be read: {error}") from error

    def sidecar(self, number: int) -> str | None:
        return None


class InMemory:
    """Another source's photos, each of which is decoded once."""

    def __init__(self, source: Source) -> None:
        self.source, self.names = source, source.names
        self.photos: dict[int, Image.Image] = {}

    def read(self, number: int) -> Image.Image:
        if number not in self.photos:
            self.photos[number] = self.source.read(number)
        return self.photos[number]

    def sidecar(self, number: int) -> str | None:
        return self.source.sidecar(number)


def open_source(data: FolderData | OpenImagesData | TfdsData, split: str) -> Source:
    """The photos of one split ("train" or "held-out") that the settings name.

    Raises InvalidSettings where there are none, or where a list, a manifest or a package is missing.
    """
    source = _tfds(data, split) if isinstance(data, TfdsData) else _files(data, split)
    if not source.names:
        raise InvalidSettings(
            f"data: there is no {split} photo: check the paths, and what data.exclude"
            f"{' and data.held_out leave' if split == 'train' else ' leaves and data.held_out keeps back'}"
        )
    return InMemory(source) if data.in_memory else source


def _files(data: FolderData | OpenImagesData, split: str) -> Source:
    if not data.folder.is_dir():
        raise InvalidSettings(f"data.folder: there is no folder {data.folder}")
    if isinstance(data, OpenImagesData):
        names = _open_images(data)
    elif data.manifest is not None:
        rows = list(read_table(data.manifest, "data.manifest", ("file", "split")))
        if unknown := {kind for _, kind in rows} - set(SPLITS):
            raise InvalidSettings(f"data.manifest: split must be {' or '.join(SPLITS)}, not {min(unknown)!r}")
        return Files(data.folder, _chosen([name for name, kind in rows if kind == split], data, None))
    else:
        kinds = readable_suffixes()
        paths = sorted(path for path in data.folder.rglob("*") if path.suffix.lower() in kinds and path.is_file())
        names = [path.relative_to(data.folder).as_posix() for path in paths]
    return Files(data.folder, _chosen(names, data, split))


def _open_images(data: OpenImagesData) -> list[str]:
    """The files of an image list: of a table with the column ImageID, or of lines SPLIT/ID; without them, ID."""
    path, key = data.image_list, "data.image_list"
    header = next(_lines(path, key), "").strip().split(",")
    if "ImageID" in header:
        columns = [column for column in ("Subset", "ImageID") if column in header]
        listed = ["/".join(filter(None, row)) for row in read_table(path, key, columns)]
    else:
        listed = read_text(path, key).split()
    # One look at the folder tells the layout; nine million photos are not looked for one by one.
    nested = any((data.folder / name.split("/")[0]).is_dir() for name in listed[:1] if "/" in name)
    excluded = _excluded(data)  # by the names of the list here, and by those of the files in _chosen
    kept = (name for name in dict.fromkeys(listed) if excluded.isdisjoint((name, f"{name}.jpg")))
    return [f"{name if nested else name.rsplit('/', 1)[-1]}.jpg" for name in kept]


def _tfds(data: TfdsData, split: str) -> Source:
    if find_spec("tensorflow_datasets") is None:
        raise InvalidSettings(
            'data.source: "tfds" needs packages: pip install tensorflow-datasets array_record; or take another source'
        )
    import tensorflow_datasets

    try:
        found = tensorflow_datasets.data_source(data.name, split=data.split, data_dir=data.data_dir)
    except Exception as error:  # the library raises whatever a wrong name leads it to
        raise InvalidSettings(f"data.name: tensorflow_datasets cannot open {data.name!r}: {error}") from error
    names = [str(number) for number in range(len(found))]
    if data.label is not None:
        names = [
            label.decode() if isinstance(label, bytes) else str(label) for label in (one[data.label] for one in found)
        ]
    numbers = {name: number for number, name in enumerate(names)}
    if len(numbers) < len(names):
        raise InvalidSettings(
            f"data.label: several photos have the same {data.label}: name a feature that tells them apart"
        )
    kept = _chosen(names, data, split)
    return Tfds(found, [numbers[name] for name in kept], kept, data.image)


def _chosen(names: Sequence[str], data: Listed, split: str | None) -> list[str]:
    """Those of the names that are not excluded, and of the split; None: of any."""
    excluded = _excluded(data)
    return [
        name
        for name in names
        if excluded.isdisjoint(forms(name)) and (split is None or split == SPLITS[is_held_out(name, data.held_out)])
    ]


def _excluded(data: Listed) -> set[str]:
    """The names of photos that are left out.  Raises InvalidSettings."""
    if data.exclude is None:
        return set()
    return {line.strip() for line in read_text(data.exclude, "data.exclude").splitlines()}


def forms(name: str) -> tuple[str, str, str, str]:
    """A photo's name as lists and tables have it: as it is, without suffix, without folders, without both."""
    last = name.rsplit("/", 1)[-1]
    return name, posixpath.splitext(name)[0], last, posixpath.splitext(last)[0]


def is_held_out(name: str, share: float) -> bool:
    """Whether a photo is one of those that are never trained on: the same answer on every machine."""
    encoded = name.encode("utf-8", "surrogatepass")  # also a file's name that is not in UTF-8
    return int.from_bytes(hashlib.sha256(encoded).digest()[:8], "big") < share * 2**64


def read_text(path: Path, key: str) -> str:
    """The text of a file that the setting `key` names.  Raises InvalidSettings."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InvalidSettings(f"{key}: cannot read {path}: {error}") from error


def _lines(path: Path, key: str) -> Iterator[str]:
    """The lines of a file that the setting `key` names, with their ends, one at a time.  Raises InvalidSettings."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except (OSError, ValueError) as error:
        raise InvalidSettings(f"{key}: cannot read {path}: {error}") from error


def read_table(path: Path, key: str, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """These columns of each row of a CSV or Parquet file that the setting `key` names, one row of CSV at a time.

    Raises InvalidSettings for missing columns.
    """
    if path.suffix == ".parquet":
        yield from _read_parquet(path, key, columns)
        return
    try:
        rows = csv.reader(_lines(path, key))
        places = _places(columns, next(rows, []), path, key)
        for row in rows:
            if row:  # and not an empty line
                yield tuple(row[place] if place < len(row) else "" for place in places)
    except csv.Error as error:
        raise InvalidSettings(f"{key}: cannot read {path}: {error}") from error


def _places(columns: Sequence[str], found: list[str], path: Path, key: str) -> list[int]:
    """Where the columns are among those that a file has."""
    if missing := [column for column in columns if column not in found]:
        raise InvalidSettings(f"{key}: {path} has no column {missing[0]!r}; it has {', '.join(found)}")
    return [found.index(column) for column in columns]


def _read_parquet(path: Path, key: str, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """These columns of each row of a Parquet file."""
    if find_spec("pyarrow") is None:
        raise InvalidSettings(f"{key}: {path.name} needs the package: pip install pyarrow; or name a .csv file")
    from pyarrow import parquet

    try:
        found: list[str] = parquet.read_schema(path).names
        table = parquet.read_table(path, columns=[column for column in columns if column in found])
    except (OSError, ValueError) as error:
        raise InvalidSettings(f"{key}: cannot read {path}: {error}") from error
    _places(columns, found, path, key)
    yield from zip(*(table[column].to_pylist() for column in columns), strict=True)
