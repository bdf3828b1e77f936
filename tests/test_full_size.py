"""The full-size architecture: its sizes without its weights, and its measurements on next to no weights."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F  # noqa: N812

from perco_engine.devices import weights_bytes
from perco_engine.evaluation import full_size
from perco_engine.evaluation.allocations import Allocations
from perco_engine.memory import GIB, WORKSPACE_BYTES, working_bytes


def test_the_architecture_has_the_published_sizes_and_1080p_fits_the_estimate() -> None:
    """Stable Diffusion 2.1: 865,910,724 parameters and a first layer of 4 + 320 channels more; no numbers are held."""
    with FakeTensorMode():
        pipeline = full_size.build(full_size.FULL, torch.device("cpu"), torch.bfloat16)
        counts = {
            name: sum(weight.numel() for weight in part.parameters())
            for name, part in pipeline.components.items()
            if isinstance(part, nn.Module)
        }
        figures = full_size.estimate(pipeline, (1920, 1080), 1)
    assert counts == {
        "unet": 865_910_724 + 324 * 320 * 9 + 320,
        "vae": 83_653_863,
        "text_encoder": 340_387_840,
        "hyper_enc": 5_888_864,
    }
    assert weights_bytes(*pipeline.networks.values()) == 2 * sum(counts.values())
    working = max(figures["U-Net (GiB)"], figures["VAE decoder (GiB)"], figures["encode (GiB)"])
    assert working == pytest.approx((working_bytes(pipeline) - WORKSPACE_BYTES) / GIB, rel=0.1)
    assert figures["memory (GiB)"] == pytest.approx(figures["weights (GiB)"] + working)
    assert figures["memory (GiB)"] < 12 - WORKSPACE_BYTES / GIB


def test_memory_stays_where_it_is_for_larger_pictures_and_more_of_them() -> None:
    """Twice the pixels would take twice the memory, or four times where attention is not fused."""
    with FakeTensorMode():
        pipeline = full_size.build(full_size.TINY, torch.device("cpu"), torch.bfloat16)
        small, large = (full_size.estimate(pipeline, size, 1) for size in ((1280, 1280), (1792, 1792)))
        one, four = (full_size.estimate(pipeline, (256, 192), batch) for batch in (1, 4))
    assert large["U-Net (GiB)"] < 1.3 * small["U-Net (GiB)"]
    copies = 3 * (3 * 1792 * 1792 * 4) / GIB  # of the picture itself, in float32
    assert large["VAE decoder (GiB)"] < small["VAE decoder (GiB)"] + copies
    assert large["encode (GiB)"] < small["encode (GiB)"] + copies
    assert four["VAE decoder (GiB)"] < 1.5 * one["VAE decoder (GiB)"]
    assert four["encode (GiB)"] < 1.5 * one["encode (GiB)"]


def test_allocations_are_counted_as_worked_out_by_hand() -> None:
    x = torch.zeros(1000)
    with Allocations([x]) as allocations:
        y = x + 1  # 4000 bytes
        z = y.view(10, 100).sum(0)  # 400 more
        del y
        z = F.pad(z, (0, 400)).double()  # 2000, then 4000 more, beside the 400
        del z
        x.add_(1)
    assert allocations.peak_bytes == 400 + 2000 + 4000
    assert allocations.live_bytes == 0


def test_measurements_on_next_to_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tiny", "--device", "cpu", "--size", "64x48", "1024x8", "--batch", "2", "--steps", "1"]
    full_size.main([*options, "--times", "1", "--warm-up", "0", "--parity", "--json", str(tmp_path / "figures.json")])
    result = json.loads((tmp_path / "figures.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    assert (result["architecture"], result["device"], result["dtype"]) == ("tiny", "cpu", "bfloat16")
    assert [(case["size"], case["batch"]) for case in result["cases"]] == [("64x48", 2), ("1024x8", 2)]
    for case in result["cases"]:
        parts = [case[f"{part} (s)"] for part in ("text encoder", "denoising", "VAE decoder")]
        assert all(part > 0 for part in [*parts, case["encode (s)"], case["memory (GiB)"]])
        assert (
            case["decode (s)"]
            == pytest.approx(sum(parts))
            == pytest.approx(case["decode, a picture (s)"] * case["batch"])
        )
    assert result["parity"]["U-Net, float32"] == result["parity"]["VAE decoder, float32"] == 0
    assert 0 < result["parity"]["U-Net, bfloat16"] < 0.5
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:2] == ["size", "batch"]
    assert len({len(line) for line in printed[:3]}) == 1


def test_estimates_on_next_to_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    full_size.main(["--tiny", "--estimate", "--size", "64x64"])
    assert "U-Net (GiB)" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--size", "64"], ["--size", "0x5"], ["--batch", "0"], ["--dtype", "int8"]])
def test_wrong_options_end_in_a_message(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        full_size.main(["--tiny", *wrong])
    assert "error:" in capsys.readouterr().err
