"""Files of models: which weights are loaded, settings that are nested too deeply, downloads without room."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from perco_engine import weights
from perco_engine.errors import InvalidModel, ModelUnavailable
from perco_engine.model_files import read_json
from perco_engine.store import checkpoint, component_files, download, install, resume

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_what_lies_beside_a_model_changes_no_fingerprint(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "mine"))
    for name in ("checkpoint-10/unet", "text_encoder", "safety_checker"):
        shutil.copytree(tiny_model / "unet", folder / name)
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "vae/model.safetensors", "prior.safetensors"):
        shutil.copyfile(tiny_model / "unet" / WEIGHTS, folder / name)
    assert weights.fingerprint(folder) == weights.fingerprint(tiny_model)
    monkeypatch.setenv("PERCO_HOME", str(tmp_path / "home"))
    assert install.import_folder(folder).fingerprint == weights.fingerprint(folder)
    (folder / "prior").mkdir()
    (folder / "prior" / "prior.safetensors").write_bytes(b"a prior")
    assert weights.fingerprint(folder) != weights.fingerprint(tiny_model)


def test_the_fingerprint_is_that_of_the_format(tmp_path: Path) -> None:
    """Of one file and shards, diffusers takes the shards, and transformers the file."""
    files = {
        "text_encoder/model.safetensors": b"text",
        "unet/b.safetensors": b"second",
        "unet/diffusion_pytorch_model-1.safetensors": b"first",
        "vae/diffusion_pytorch_model.safetensors": b"autoencoder",
    }
    left_out = {f"unet/{WEIGHTS}": b"u", "text_encoder/c.safetensors": b"t", f"hyper_enc/{WEIGHTS}": b"h"}
    index = {"weight_map": {"1": "diffusion_pytorch_model-1.safetensors", "2": "b.safetensors", "3": "b.safetensors"}}
    settings = {
        f"unet/{WEIGHTS}.index.json": index,
        "text_encoder/model.safetensors.index.json": {"weight_map": {"1": "c.safetensors"}},
        "model_index.json": {name: ["a", "b"] for name in ("vae", "unet", "text_encoder")} | {"hyper_enc": [None] * 2},
    }
    for name, data in (files | left_out | {name: json.dumps(one).encode() for name, one in settings.items()}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    whole = b"".join(f"{name} {len(data)}\n".encode() + data for name, data in files.items())
    assert weights.fingerprint(tmp_path) == hashlib.sha256(whole).digest()[:8]
    taken = [component_files.weight_files(tmp_path / name, name) for name in ("text_encoder", "unet", "vae")]
    names = {path.relative_to(tmp_path).as_posix() for paths in taken for path in paths}
    assert names - {f"unet/{WEIGHTS}.index.json"} == set(files)


@pytest.mark.parametrize("text", ["{", "[]", '{"a":' * 100_000])
def test_a_damaged_folder_has_a_fingerprint_and_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(text)
    (tmp_path / "perco.json").write_text(text)
    assert weights.fingerprint(tmp_path) == hashlib.sha256().digest()[:8]
    with pytest.raises(InvalidModel, match=r"model_index\.json"):
        read_json(tmp_path / "model_index.json")
    with pytest.raises(InvalidModel, match="is damaged"):
        checkpoint.read(tmp_path)


@pytest.mark.parametrize(
    ("code", "place", "named"),
    [
        (errno.EACCES, "home/downloading", "home (PERCO_HOME) is full"),
        (errno.EROFS, "cache/blobs", "cache (HF_HOME) is full"),
        (errno.ENOSPC, None, "cache (HF_HOME) is full"),
        (errno.ECONNRESET, None, "check the network"),
    ],
)
def test_a_folder_that_cannot_be_written_is_not_the_network(
    code: int, place: str | None, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, "no", *([str(tmp_path / place)] if place else []))

    monkeypatch.setenv("PERCO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "fetch_large_files", fail)
    with pytest.raises(ModelUnavailable, match="cannot be downloaded") as caught:
        download.download("somebody/model")
    assert named in str(caught.value)
    assert str(caught.value).count("_HOME) ") == (2 if code == errno.ENOSPC else code != errno.ECONNRESET)


def test_beginnings_that_nobody_goes_on_with_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import file_download

    def get(url: str, file: BinaryIO, **options: Any) -> None:
        assert options["resume_size"] == 2
        file.write(b"ole")

    monkeypatch.setattr(file_download, "http_get", get)
    monkeypatch.setenv("PERCO_HOME", str(tmp_path / "home"))
    sha, folder = hashlib.sha256(b"whole").hexdigest(), tmp_path / "home" / "downloading"
    folder.mkdir(parents=True)
    for name, data in ((sha, b"wh"), ("forgotten", b"x"), ("recent", b"x")):
        (folder / name).write_bytes(data)
    for name in (sha, "forgotten"):
        os.utime(folder / name, (0, 0))
    resume._fetch("https://x", "file", sha, 5, tmp_path / "blobs" / "file")
    assert (tmp_path / "blobs" / "file").read_bytes() == b"whole"
    assert [path.name for path in folder.iterdir()] == ["recent"]
