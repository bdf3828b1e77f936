"""Photos and captions: every source, the split, what is damaged, and that a position decides all that is random."""

import csv
import io
import random
import re
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import peak_bytes
from PIL import Image
from torch.utils.data import DataLoader

from perco_engine.errors import InvalidSettings, TrainingError
from perco_engine.training import photos
from perco_engine.training.captions import Captioned
from perco_engine.training.crops import Crop, Crops, collate
from perco_engine.training.settings import Captions, FolderData, OpenImagesData, TfdsData, WebdatasetData
from perco_engine.training.shards import ShardCrops, open_shards
from perco_engine.training.sources import is_held_out, open_source, read_table


def flat(path: Path, level: int, size: tuple[int, int] = (90, 70)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, 0, 0)).save(path)


def levels(crop: torch.Tensor) -> int:
    """The red of a flat crop."""
    return round((float(crop[0].mean()) + 1) * 127.5)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Six photos of one colour each, in a tree, one of them damaged."""
    folder = tmp_path / "photos"
    for k in range(6):
        flat(folder / ("deep" if k % 2 else ".") / f"{k}.png", 20 * k)
    (folder / "0.txt").write_text("a caption\n")
    (folder / "deep" / "5.png").write_bytes(b"no picture")
    (folder / "notes.md").write_text("not a picture")
    return folder


def test_a_folder_tree(tree: Path) -> None:
    source = open_source(FolderData(source="folder", folder=tree), "train")
    assert list(source.names) == ["0.png", "2.png", "4.png", "deep/1.png", "deep/3.png", "deep/5.png"]
    assert (source.sidecar(0), source.sidecar(1)) == ("a caption", None)
    assert source.read(3).getpixel((0, 0)) == (20, 0, 0)


def test_excluded_names_and_both_ways_to_split(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "corrupt.txt").write_text("deep/5.png \n 4\n")
    data = FolderData(source="folder", folder=tree, exclude=tmp_path / "corrupt.txt", held_out=0.1)
    train, held_out = (set(open_source(data, split).names) for split in ("train", "held-out"))
    assert train == {"2.png", "deep/1.png"} and held_out == {"0.png", "deep/3.png"}  # for good, on every machine
    assert sum(is_held_out(f"{k}.jpg", 0.1) for k in range(2000)) == pytest.approx(200, abs=50)
    (tmp_path / "manifest.csv").write_text("file,split\n0.png,held-out\n2.png,train\n")
    manifest = FolderData(source="folder", folder=tree, manifest=tmp_path / "manifest.csv")
    assert [list(open_source(manifest, split).names) for split in ("train", "held-out")] == [["2.png"], ["0.png"]]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"folder": "nothing"}, "data.folder: there is no folder"),
        ({"exclude": "nothing"}, "data.exclude: cannot read"),
        ({"manifest": "wrong.csv"}, "data.manifest: .* has no column 'split'; it has file, kind"),
        ({"manifest": "odd.csv"}, "data.manifest: split must be train or held-out, not 'test'"),
        ({"exclude": "all.txt"}, "there is no train photo"),
    ],
)
def test_what_is_told_of_a_folder(data: dict[str, str], told: str, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong.csv").write_text("file,kind\n")
    (tmp_path / "odd.csv").write_text("file,split\n0.png,test\n")
    (tmp_path / "all.txt").write_text("\n".join(map(str, range(6))))
    given = {"folder": tree} | {key: tmp_path / name for key, name in data.items()}
    with pytest.raises(InvalidSettings, match=told):
        open_source(FolderData(source="folder", **given), "train")


def test_the_split_of_names_that_are_not_in_utf_8(tmp_path: Path) -> None:
    assert isinstance(is_held_out("caf\udce9.png", 0.5), bool)
    assert [is_held_out(f"{name}.png", 0.5) for name in ("a", "d", "é")] == [True, False, True]  # as ever


@pytest.mark.parametrize("excluded", ["bb", "bb.jpg", "train/bb", "train/bb.jpg"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("table", [True, False])
def test_open_images_by_its_list(nested: bool, table: bool, excluded: str, tmp_path: Path) -> None:
    for name in ("aa", "bb", "cc"):
        flat(tmp_path / ("oi/train" if nested else "oi") / f"{name}.jpg", 9)
    if table:
        (tmp_path / "list.csv").write_text("ImageID,Subset,OriginalURL\naa,train,x\nbb,train,y\ncc,train,z\n")
    else:
        (tmp_path / "list.csv").write_text("train/aa\ntrain/bb\ntrain/cc\n")
    (tmp_path / "corrupt.txt").write_text(f"{excluded}\n")
    data = OpenImagesData(
        source="open-images", folder=tmp_path / "oi", image_list=tmp_path / "list.csv", exclude=tmp_path / "corrupt.txt"
    )
    source = open_source(data, "train")
    assert list(source.names) == [f"{'train/' if nested else ''}{name}.jpg" for name in ("aa", "cc")]
    assert source.read(1).size == (90, 70)


def test_tensorflow_datasets_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in has its interface: data_source(name, split, data_dir) with len and numbers to dictionaries."""
    data = TfdsData(source="tfds", name="photos", label="file_name")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InvalidSettings, match="pip install tensorflow-datasets"):
        open_source(data, "train")
    pictures: list[dict[str, Any]] = [
        {"image": np.full((8, 9, channels), 7, np.uint8), "file_name": f"{channels}.jpg".encode()}
        for channels in (3, 1)
    ]
    stand_in: Any = ModuleType("tensorflow_datasets")
    stand_in.__spec__ = __spec__
    stand_in.data_source = lambda name, split, data_dir: pictures
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", stand_in)
    source = open_source(data, "train")
    assert list(source.names) == ["3.jpg", "1.jpg"]
    assert [source.read(k).size for k in range(2)] == [(9, 8), (9, 8)] and source.read(1).mode == "RGB"
    pictures[1]["file_name"] = pictures[0]["file_name"]
    with pytest.raises(InvalidSettings, match=r"data\.label: several photos have the same file_name"):
        open_source(data, "train")


def crops(tree: Path, count: int = 24, **data: Any) -> Crops:
    source = open_source(FolderData(source="folder", folder=tree, **data), "train")
    return Crops(source, photos.random_crop, 16, 3, count)


def test_every_photo_comes_once_before_any_comes_again(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "corrupt.txt").write_text("deep/5.png\n")
    found = crops(tree, exclude=tmp_path / "corrupt.txt", in_memory=True)
    names = [found[k]["name"] for k in range(10)]
    assert sorted(names[:5]) == sorted(names[5:]) == sorted(set(names)) and names[:5] != names[5:]
    assert sorted(levels(found[k]["pixels"]) for k in range(5)) == [0, 20, 40, 60, 80]


def test_a_position_decides_all_that_is_random(tree: Path) -> None:
    one, other = crops(tree), crops(tree)
    backwards = {k: other[k] for k in reversed(range(24))}
    for k in range(24):
        assert torch.equal(one[k]["pixels"], backwards[k]["pixels"]) and one[k]["seed"] == backwards[k]["seed"]
    assert len({one[k]["seed"] for k in range(24)}) == 24


def test_a_damaged_photo_is_replaced_and_told(tree: Path) -> None:
    batch = collate([crops(tree)[k] for k in range(6)])
    assert batch["pixels"].shape == (6, 3, 16, 16) and "deep/5.png" not in batch["name"]
    assert list(batch["skipped"]) == ["deep/5.png"] and "cannot identify" in batch["skipped"]["deep/5.png"]


def test_nothing_but_damaged_photos(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(TrainingError, match=r"100 photos in a row cannot be read, the last one, a\.jpg"):
        crops(tmp_path)[0]


def test_squares_of_photos() -> None:
    photo = Image.new("RGB", (300, 100))
    photo.paste("white", (100, 0, 200, 100))
    middle = photos.middle(photo, 50)
    assert middle.size == (50, 50) and middle.resize((1, 1)).getpixel((0, 0)) == (255, 255, 255)
    seen = {photos.short_side_crop(photo, 20, random.Random(k)).size for k in range(20)}
    assert seen == {(20, 20)}


def ramp(width: int, height: int) -> Image.Image:
    """A photo whose red is the column, and whose green is the row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=2).astype(np.uint8))


def test_random_crops_are_as_they_are_or_reduced_mirrored_or_not() -> None:
    photo, scales, mirrored, places = ramp(200, 150), [], 0, set()
    for seed in range(400):
        crop = np.asarray(photos.random_crop(photo, 40, random.Random(seed)))[:, :, :2].astype(float)
        across, down = crop[20, 35, 0] - crop[20, 5, 0], crop[35, 20, 1] - crop[5, 20, 1]
        assert abs(abs(across) - down) <= 3  # squares stay squares
        scales.append(down / 30)
        mirrored += across < 0
        places.add((int(crop[20, 20, 0]) // 40, int(crop[20, 20, 1]) // 40))
    unscaled = sum(scale == 1 for scale in scales)
    assert 160 < unscaled < 260 and 160 < mirrored < 240
    assert min(scales) >= 1 and 2.3 < max(scales) < 1 / 0.35 + 0.1
    assert len(places) >= 12


def test_crops_of_the_short_side() -> None:
    photo, seen = ramp(200, 100), set()
    for seed in range(60):
        crop = np.asarray(photos.short_side_crop(photo, 50, random.Random(seed)))[:, :, :2].astype(float)
        assert abs(crop[45, 25, 1] - crop[5, 25, 1] - 80) <= 2  # all of the height
        seen.add((crop[25, 45, 0] > crop[25, 5, 0], int(crop[25, 25, 0]) // 25))
    assert len({mirrored for mirrored, _ in seen}) == 2 and len({place for _, place in seen}) >= 4


NAMES, NONE = ["deep/1.png", "0.png"], [None, None]
PIXELS = torch.stack([torch.full((3, 8, 8), -1.0), torch.full((3, 8, 8), 1.0)])


def test_captions_from_beside_the_photos_and_none(tmp_path: Path) -> None:
    assert Captioned(Captions(source="sidecar"), tmp_path)(NAMES, ["a", None], PIXELS, NAMES) == ["a", ""]
    assert Captioned(Captions(source="none"), tmp_path)(NAMES, ["a", None], PIXELS, NAMES) == ["", ""]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_captions_from_a_table(kind: str, tmp_path: Path) -> None:
    rows = [{"id": "1", "text": "one, two"}, {"id": "other", "text": "three"}]
    path = tmp_path / f"captions.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    settings = Captions(source="table", table=path, name_column="id", caption_column="text")
    assert Captioned(settings, tmp_path)(NAMES, NONE, PIXELS, NAMES) == ["one, two", ""]
    with pytest.raises(InvalidSettings, match="has no column 'caption'; it has id, text"):
        Captioned(Captions(source="table", table=path, name_column="id"), tmp_path)


def test_cells_of_a_caption_that_are_no_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    settings = Captions(source="table", table=tmp_path / "x.parquet")
    for value in (["one", "two"], float("nan"), 3, b"K\xe4uzchen"):
        parquet.write_table(pyarrow.Table.from_pylist([{"file": "0", "caption": value}]), tmp_path / "x.parquet")
        with pytest.raises(InvalidSettings, match=f"'caption' of .* of type {type(value).__name__}"):
            Captioned(settings, tmp_path)
    rows = [{"file": "1", "caption": "Käuzchen".encode()}, {"file": "0", "caption": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert Captioned(settings, tmp_path)(NAMES, NONE, PIXELS, NAMES) == ["Käuzchen", ""]


def test_captions_are_made_once_and_kept(tmp_path: Path) -> None:
    seen: list[int] = []

    def captioner(pictures: Any) -> list[str]:
        seen.extend(picture.getpixel((0, 0))[0] for picture in pictures)
        return [f"level {picture.getpixel((0, 0))[0]}" for picture in pictures]

    def captions() -> Captioned:
        return Captioned(Captions(source="captioner", captioner=captioner), tmp_path)  # type: ignore[arg-type]

    assert captions()(NAMES, NONE, PIXELS, NAMES) == ["level 0", "level 255"]
    with (tmp_path / "captions.0.jsonl").open("a") as file:
        file.write('{"name": "torn')
    assert captions()(NAMES, NONE, PIXELS, NAMES) == ["level 0", "level 255"] and seen == [0, 255]
    assert captions()(NAMES, NONE, PIXELS, ["1.tar/0", "2.tar/0"]) == ["level 0", "level 255"]  # behind the torn line
    assert captions()(NAMES, NONE, PIXELS, ["2.tar/0", "1.tar/0"]) == ["level 255", "level 0"] and len(seen) == 4
    text = (tmp_path / "captions.0.jsonl").read_text()
    (tmp_path / "captions.0.jsonl").write_text(re.sub('"captioner": "[^"]*"', '"captioner": "another"', text))
    captions()(NAMES, NONE, PIXELS, NAMES)
    assert len(seen) == 6
    (tmp_path / "captions.0.jsonl").write_text('{"name": "0.png", "caption": "of a run of before"}\n')
    assert captions()(NAMES[1:], NONE[1:], PIXELS[1:], NAMES[1:]) == ["of a run of before"]


def shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path: Path) -> WebdatasetData:
    """Two shards of six photos, one of which is damaged; and one shard that is."""
    pytest.importorskip("webdataset")
    for number in range(2):
        members = {}
        for k in range(6):
            data = io.BytesIO()
            Image.new("RGB", (40, 30), (10 * (6 * number + k), 0, 0)).save(data, "PNG")
            members |= {f"{number}{k}.png": data.getvalue(), f"{number}{k}.txt": f"photo {number}{k}".encode()}
        members["03.png" if number == 0 else "x.png"] = b"damaged"
        shard(tmp_path / f"{number}.tar", members)
    (tmp_path / "2.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:520])
    return WebdatasetData(source="webdataset", shards=(str(tmp_path / "{0..2}.tar"),), workers=0, shuffle=4)


def stream(data: WebdatasetData, **options: Any) -> ShardCrops:
    given = {"rank": 0, "processes": 1} | options
    return ShardCrops(data, open_shards(data), photos.random_crop, 16, 5, **given)


def take(crops: ShardCrops, count: int) -> list[Crop]:
    return [crop for crop, _ in zip(crops, range(count), strict=False)]


def test_a_webdataset(shards: WebdatasetData) -> None:
    found = take(stream(shards), 11)
    assert {crop["name"] for crop in found} == {f"{n}{k}" for n in range(2) for k in range(6)} - {"03"}
    for crop in found:
        number, k = map(int, crop["name"])
        assert levels(crop["pixels"]) == 10 * (6 * number + k) and crop["sidecar"] == f"photo {crop['name']}"
    assert {"03", "x"} <= {name for crop in take(stream(shards), 22) for name in crop["skipped"]}
    assert any(name.endswith("2.tar") for crop in take(stream(shards), 22) for name in crop["skipped"])


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_was(workers: int, shards: WebdatasetData) -> None:
    data = WebdatasetData(source="webdataset", shards=shards.shards, workers=workers, shuffle=4)

    def batches(crops: ShardCrops, count: int) -> list[Crop]:
        loader = DataLoader(crops, batch_size=2, num_workers=workers, collate_fn=collate)
        return [batch for batch, _ in zip(loader, range(count), strict=False)]

    whole = batches(stream(data), 9)
    places: dict[int, int] = {}
    for batch in whole[:5]:
        places |= batch["places"]
    again = stream(data)
    again.resume(5, places)
    for one, other in zip(whole[5:], batches(again, 4), strict=True):
        assert one["name"] == other["name"] and one["seed"] == other["seed"]
        assert torch.equal(one["pixels"], other["pixels"])


def test_processes_read_shards_of_their_own(shards: WebdatasetData) -> None:
    pair = [{crop["name"] for crop in take(stream(shards, rank=rank, processes=2), 5)} for rank in range(2)]
    assert not pair[0] & pair[1]
    with pytest.raises(InvalidSettings, match="3 shards are too few for 4 readers"):
        stream(shards, processes=4)


def test_what_is_told_of_shards(shards: WebdatasetData, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"data\.shards: there is no file .*3\.tar"):
        open_shards(WebdatasetData(source="webdataset", shards=(str(tmp_path / "{0..3}.tar"),)))
    damaged = WebdatasetData(source="webdataset", shards=(str(tmp_path / "2.tar"),), workers=0)
    with pytest.raises(TrainingError, match="there is no photo in the shards of a reader"):
        take(stream(damaged), 1)


def test_a_stream_without_any_picture_ends(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    shard(tmp_path / "0.tar", {f"{number}.gif": b"GIF8" for number in range(3)})
    with pytest.raises(TrainingError, match=r"100 photos in a row cannot be read, the last one, .: no picture"):
        take(stream(WebdatasetData(source="webdataset", shards=(str(tmp_path / "0.tar"),), workers=0)), 1)


def test_names_with_dots_in_shards_are_told(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    shard(tmp_path / "0.tar", {f"a.{number}.jpg": b"" for number in range(2)} | {"a.txt": b"an owl"})
    with pytest.raises(TrainingError, match=r"but \.0\.jpg, \.1\.jpg, \.txt; a suffix begins at the first dot"):
        take(stream(WebdatasetData(source="webdataset", shards=(str(tmp_path / "0.tar"),), workers=0)), 1)


def test_cells_of_several_lines(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('file,caption\na,"a dog on\nthe grass"\nb,one\u2028two\n', encoding="utf-8")
    rows = read_table(tmp_path / "x.csv", "captions.table", ("file", "caption"))
    assert [caption for _, caption in rows] == ["a dog on\nthe grass", "one\u2028two"]


def test_rows_that_are_short_or_empty(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("\ufefffile,kind,caption\na,b,c\n\nd\n", encoding="utf-8")
    assert list(read_table(tmp_path / "x.csv", "captions.table", ("caption", "file"))) == [("c", "a"), ("", "d")]


def test_a_long_list_is_not_held_in_memory(tmp_path: Path) -> None:
    """Open Images' has nine million rows, most of which are addresses."""
    address = "x" * 1000
    with (tmp_path / "list.csv").open("w") as file:
        file.write("ImageID,Subset,OriginalURL\n")
        file.writelines(f"{number:016x},train,{address}\n" for number in range(4000))
    data = OpenImagesData(source="open-images", folder=tmp_path, image_list=tmp_path / "list.csv")
    names: list[str] = []
    assert peak_bytes(lambda: names.extend(open_source(data, "train").names)) < 2_000_000
    assert len(names) == 4000 and names[10] == "000000000000000a.jpg"


@pytest.mark.parametrize("written", ["deep/a.png", "deep/a", "a.png", "a"])
def test_names_in_tables(written: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f"file,caption\n{written},an owl\n")
    captions = Captioned(Captions(source="table", table=tmp_path / "x.csv"), tmp_path)
    assert captions(["deep/a.png", "deep/b.png"], [None, None], PIXELS, ["1", "2"]) == ["an owl", ""]
    assert captions.count(["deep/a.png", "deep/b.png"]) == 1
    with pytest.raises(
        InvalidSettings, match=f"has no caption of any photo: its names are like '{written}', .*'b.png'"
    ):
        captions.count(["b.png"])


def test_a_shard_that_breaks_off_is_left_out(shards: WebdatasetData, tmp_path: Path) -> None:
    """As curl does where a connection is lost: after a part of the shard the program fails."""
    broken = f"pipe:head -c 2500 {tmp_path / '1.tar'}; exit 56"
    data = WebdatasetData(source="webdataset", shards=(broken, str(tmp_path / "0.tar")), workers=0, shuffle=1)
    found = take(stream(data), 30)
    assert len(found) == 30 and {f"0{k}" for k in (0, 1, 2, 4, 5)} <= {crop["name"] for crop in found}
    assert broken in {name for crop in found for name in crop["skipped"]}
