"""The parts of training that need no photos and no hours."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from perco_engine.training import photos
from perco_engine.training.embedded import new_unet
from perco_engine.training.stage import Stage, pace


def test_the_manifest_keeps_held_out_photos_out(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (8, 8)).save(folder / name)
    assert [path.name for path in photos.manifest(folder, "train")] == ["a.jpg", "b.jpg"]
    (tmp_path / "train_manifest.csv").write_text("file,split\na.jpg,held-out\nb.jpg,train\n")
    assert [path.name for path in photos.manifest(folder, "train")] == ["b.jpg"]


def test_every_photo_comes_once_before_any_comes_again() -> None:
    flat = [Image.new("RGB", (90, 70), (k * 20, 0, 0)) for k in range(6)]
    crops = photos.batches(flat, side=16, size=2, seed=1)
    seen = [round((float(crop[0].mean()) + 1) * 127.5) for _ in range(3) for crop in next(crops)]
    assert sorted(seen) == [0, 20, 40, 60, 80, 100]
    again = photos.batches(flat, side=16, size=2, seed=1)
    fresh = photos.batches(flat, side=16, size=2, seed=1)
    assert all(torch.equal(next(again), next(fresh)) for _ in range(5))


def train(folder: Path, steps: int) -> list[float]:
    """The weights of a tiny stage after each of so many more steps."""
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    stage = Stage(folder, "tiny", minutes=10, modules={"unet": module}, lr=0.01)
    weights = []
    for step in stage.steps():
        torch.manual_seed(step)
        stage.update(module(torch.randn(4, 3)).pow(2).mean())
        weights.append(module.weight.sum().item())
        if len(weights) == steps:
            stage.step += 1
            stage.save()
            return weights
    raise AssertionError("the minutes are over")


def test_a_stage_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 0.0)  # the learning rate follows the clock
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir()
    halves.mkdir()
    assert train(halves, 3) + train(halves, 4) == pytest.approx(train(whole, 7))


def test_paces() -> None:
    names = ("ladder.levels.0.encoder.0.weight", "vae.encoder.1.weight", "unet.conv_out.bias")
    assert [pace(name) for name in names] == [0.35, 1.0, 2.0]


@torch.no_grad()
def test_a_new_unet_adds_nothing_to_the_estimate() -> None:
    local = torch.randn(1, 17, 6, 5)
    output = new_unet()(torch.randn(1, 16, 6, 5), 999, None, local_features=local).sample
    assert torch.equal(output, local[:, :16])
