"""PerCo's training on tiny networks: what is computed, what is learnt, and that a broken-off run goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models import modeling_utils
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from perco_engine import weights
from perco_engine.errors import InvalidModel, InvalidSettings, NotFinite, TrainingError
from perco_engine.pipeline import PercoPipeline
from perco_engine.store import install
from perco_engine.training import checkpoints, lpips, networks, perco_sd
from perco_engine.training.journal import Journal, read_log
from perco_engine.training.objective import PercoObjective, draw, noise_levels
from perco_engine.training.settings import CheckpointSettings, HyperEncoderStart, Learn, Objective, PercoSd
from perco_engine.training.settings_file import read
from perco_engine.training.train import check, train

BASE = Path(__file__).parent / "parity" / "pipeline_tiny" / "pipeline"


@pytest.fixture(scope="session")
def eight(tmp_path_factory: pytest.TempPathFactory, photo: Image.Image) -> Path:
    """The folder of eight photos of 48 pixels, with captions beside them."""
    folder = tmp_path_factory.mktemp("eight")
    for k in range(8):
        left, top = 48 * (k % 4), 64 * (k // 4)
        photo.crop((left, top, left + 48, top + 48)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"a photo, number {k}")
    return folder


def write_settings(folder: Path, base: Path, photos: Path, text: str = "", **tables: Any) -> Path:
    """A settings file for a run on tiny networks."""
    given: dict[str, dict[str, Any]] = {
        "data": {"source": "folder", "folder": str(photos), "workers": 0, "in_memory": True},
        "model": {"base": str(base)},
        "model.hyper_encoder": {"bpp": 0.0313, "width": 8, "local_features": 8, "codebook_dim": 8},
        "optimizer": {"steps": 4, "batch_size": 2, "learning_rate": 1e-3},
    }
    for name, table in tables.items():
        given[name] = given.get(name, {}) | table
    lines = ['recipe = "perco-sd"', 'run = "run"', "resolution = 64", text]
    for name, table in given.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text("\n".join(lines) + "\n")
    return folder / "config.toml"


def losses(folder: Path) -> list[float]:
    """The losses of a run, a step each."""
    log = read_log(folder / "run")
    assert [line["step"] for line in log] == list(range(1, len(log) + 1))
    return [line["loss"] for line in log]


def start(bpp: float = 0.0313) -> HyperEncoderStart:
    return HyperEncoderStart(bpp=bpp, width=8, local_features=8, codebook_dim=8)


# What is computed.


class Telling(nn.Module):
    """A U-Net that predicts nothing, and keeps what it was given."""

    def forward(self, noisy: Any, t: Any, text: Any, local_features: Any) -> Any:
        self.given = noisy, t, text, local_features
        return type("Output", (), {"sample": torch.zeros_like(noisy)})


class Codes(nn.Module):
    """A hyper-encoder that stands for any."""

    def forward(self, latents: Any) -> Any:
        return type("Output", (), {"z_hat": latents[:, :, ::2, ::2], "commitment_loss": torch.tensor(0.5)})


def scheduler(prediction: str, **changes: Any) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction, steps_offset=1,
        **changes,
    )  # fmt: skip


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_by_its_formulas(prediction: Any, gamma: float | None) -> None:
    settings = Objective(
        prediction=prediction, min_snr_gamma=gamma, noise_offset=0.1, input_perturbation=0.2, commitment_weight=0.25
    )
    unet, latents = Telling(), torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    objective = PercoObjective(unet, Codes(), scheduler(prediction), settings)
    draws = draw([1, 2, 3], (4, 8, 8))
    loss, figures = objective(latents, None, draws, torch.zeros(3, 3, 64, 64))
    t = (draws.level * 1000).long()
    alpha = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[t].view(3, 1, 1, 1)
    noise = draws.noise + 0.1 * draws.offset
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * (noise + 0.2 * draws.perturbation)
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    target = velocity if prediction == "v_prediction" else noise
    snr = (alpha / (1 - alpha)).flatten()
    weight = torch.ones(3)
    if gamma is not None:
        weight = snr.clamp(max=gamma) / (snr + 1 if prediction == "v_prediction" else snr)
    errors = target.pow(2).mean((1, 2, 3))
    torch.testing.assert_close(unet.given[0], noisy)
    assert torch.equal(unet.given[1], t)
    torch.testing.assert_close(loss, (weight * errors).mean() + 0.125)
    torch.testing.assert_close(figures["diffusion"], errors.mean())
    truth = velocity if prediction == "v_prediction" else noise
    clean = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    torch.testing.assert_close(objective.one_step(clean, truth, t), latents, atol=1e-4, rtol=1e-4)


def test_draws_belong_to_the_crop_and_not_to_the_batch() -> None:
    whole, half = draw([4, 5], (4, 2, 2)), draw([5], (4, 2, 2))
    for name in ("noise", "perturbation", "offset", "level", "text"):
        assert torch.equal(getattr(whole, name)[1:], getattr(half, name))
    many = draw(list(range(2000)), (1, 1, 1))
    assert float((many.text < 0.1).float().mean()) == pytest.approx(0.1, abs=0.02)
    assert float(many.level.mean()) == pytest.approx(0.5, abs=0.02)


def test_draws_go_where_there_are_no_double_numbers() -> None:
    """As on Apple's GPUs: what is drawn in float64 stays on the CPU."""
    draws = draw([1, 2], (4, 8, 8)).to(torch.device("meta"))
    assert [one.device.type for one in (draws.noise, draws.perturbation, draws.offset)] == ["meta"] * 3
    assert draws.level.device.type == draws.text.device.type == "cpu"


def test_a_grid_of_all_levels_has_none_beyond_the_last() -> None:
    """Stable Diffusion's schedulers begin at 1."""
    levels = noise_levels(DDIMScheduler(num_train_timesteps=1000, steps_offset=1, timestep_spacing="leading"), 1000)
    assert sorted(levels.tolist()) == list(range(1000))


def test_the_grid_of_noise_levels() -> None:
    assert noise_levels(scheduler("epsilon"), None).tolist() == list(range(1000))
    assert noise_levels(scheduler("epsilon"), 50).tolist() == list(range(981, 0, -20))


def test_min_snr_where_there_is_no_signal() -> None:
    levels = torch.tensor([999])
    for prediction, weight in (("v_prediction", 0.0), ("epsilon", 1.0)):
        zero = scheduler(prediction, rescale_betas_zero_snr=True)
        objective = PercoObjective(Telling(), Codes(), zero, Objective(prediction=prediction, min_snr_gamma=5.0))  # type: ignore[arg-type]
        assert objective.weights(levels).item() == pytest.approx(weight, abs=1e-6)


# Where training starts, and what learns.


def test_conv_in_is_copied(latent_diffusion: Path) -> None:
    pipeline = networks.load(latent_diffusion, start(), "v_prediction")
    stored = load_file(latent_diffusion / "unet" / "diffusion_pytorch_model.safetensors")
    extended = pipeline.unet.conv_in_extended
    assert extended.weight.shape[1] == 4 + 8
    assert torch.equal(extended.weight[:, :4], stored["conv_in.weight"])
    assert torch.equal(extended.bias, stored["conv_in.bias"])
    assert extended.weight[:, 4:].abs().max() > 0


def test_a_perco_model_goes_on_learning() -> None:
    pipeline = networks.load(BASE, None, "v_prediction")
    stored = load_file(BASE / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(pipeline.unet.conv_in_extended.weight, stored["conv_in_extended.weight"].float())


def test_what_a_base_must_have(latent_diffusion: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"model\.hyper_encoder is missing"):
        networks.load(latent_diffusion, None, "epsilon")
    with pytest.raises(InvalidSettings, match="which the recipe embedded trains"):
        networks.load(tiny_model, None, "epsilon")
    with pytest.raises(InvalidModel, match="size mismatch for conv_in_extended"):
        networks.load(BASE, start(), "epsilon")


@pytest.mark.parametrize("design", ["elic", "hific"])
def test_fresh_hyper_encoders(design: Any) -> None:
    fresh = networks.fresh_hyper_encoder(
        HyperEncoderStart(bpp=0.0098, design=design, width=8, local_features=12, codebook_dim=8), 4
    )
    assert fresh.rate_points[0].bpp == 0.0098 and fresh.quantizer.codebook.shape == (1024, 8)
    assert fresh(torch.randn(1, 4, 8, 8)).z_hat.shape == (1, 12, 2, 2)


def test_casts_are_silent(latent_diffusion: Path, eight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(write_settings(tmp_path, latent_diffusion, eight, compute={"mixed_precision": "bf16"}))
    assert isinstance(settings, PercoSd)
    pipeline = networks.load(latent_diffusion, start(), "v_prediction")
    monkeypatch.setattr(modeling_utils.logger, "_log", lambda level, text, *_, **__: pytest.fail(text))
    perco_sd.place(pipeline, settings, torch.device("cpu"))
    networks.write_model(pipeline, latent_diffusion, tmp_path / "model", torch.bfloat16)
    assert pipeline.vae.dtype == pipeline.unet.dtype == torch.bfloat16


@pytest.mark.parametrize("scope", ["all", "linear", "lora"])
def test_what_learns(scope: Any, latent_diffusion: Path) -> None:
    pipeline = networks.load(latent_diffusion, start(), "v_prediction")
    networks.choose_weights(pipeline, Learn(scope=scope, lora_rank=2))
    learning = {name for name, weight in pipeline.unet.named_parameters() if weight.requires_grad}
    assert all(weight.requires_grad for weight in pipeline.hyper_enc.parameters())
    assert not any(w.requires_grad for part in (pipeline.vae, pipeline.text_encoder) for w in part.parameters())
    assert {"conv_in_extended.weight", "conv_in_extended.bias"} <= learning and "conv_in.weight" not in learning
    rest = learning - {"conv_in_extended.weight", "conv_in_extended.bias"}
    every = {name for name, _ in pipeline.unet.named_parameters()}
    if scope == "all":
        assert learning == every - {"conv_in.weight", "conv_in.bias"}
    elif scope == "linear":
        linear = {name for name, module in pipeline.unet.named_modules() if isinstance(module, nn.Linear)}
        assert {name.rsplit(".", 1)[0] for name in rest} == linear
    else:
        assert rest and all(".lora_" in name and ".attn" in name for name in rest)


def test_low_rank_additions_are_merged(latent_diffusion: Path, tmp_path: Path) -> None:
    pipeline, learn = networks.load(latent_diffusion, start(), "v_prediction"), Learn(scope="lora", lora_rank=2)
    networks.choose_weights(pipeline, learn)
    for name, weight in pipeline.unet.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(weight, std=0.1)
    inputs = torch.randn(1, 4, 8, 8), 500, torch.randn(1, 5, 32)
    features = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        before = pipeline.unet(*inputs, local_features=features).sample
        networks.merge(pipeline, learn)
        networks.write_model(pipeline, latent_diffusion, tmp_path / "model", torch.float32)
        loaded = PercoPipeline.from_pretrained(tmp_path / "model")
        torch.testing.assert_close(loaded.unet(*inputs, local_features=features).sample, before, atol=1e-5, rtol=1e-4)
    stored = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert not [key for key in stored if "lora" in key or "base_layer" in key]


# Runs.


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, latent_diffusion: Path, eight: Path) -> Path:
    """A finished run of six steps that was never broken off, with everything switched on."""
    folder = tmp_path_factory.mktemp("whole")
    train(write_everything(folder, latent_diffusion, eight), lambda text: None)
    return folder


def write_everything(folder: Path, base: Path, photos: Path, **optimizer: Any) -> Path:
    return write_settings(
        folder, base, photos, "seed = 3",
        optimizer={"steps": 6, "batch_size": 4, "micro_batch_size": 2, "warmup_steps": 3, "schedule": "cosine"}
        | optimizer,
        objective={
            "min_snr_gamma": 5.0, "noise_offset": 0.1, "input_perturbation": 0.1, "text_dropout": 0.5,
            "commitment_weight": 0.1, "timestep_grid": 50,
        },
        compute={"ema_decay": 0.9, "gradient_checkpointing": True},
        checkpoints={"every_steps": 2, "keep": 2},
        validation={"every_steps": 3, "photos": 2, "folder": str(photos), "inference_steps": 2},
    )  # fmt: skip


def test_the_log_and_the_checkpoints(whole: Path) -> None:
    log = read_log(whole / "run")
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in log if "validation" in line] == [3, 6]
    assert {"psnr", "diffusion"} == set(log[-1]["validation"])
    rates = [line["learning_rate"] for line in log if "loss" in line]
    assert rates[:4] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3]) and rates[3] > rates[4] > rates[5]
    kept = sorted(path.name for path in (whole / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]


def test_curves_and_images_of_tensorboard(whole: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "run" / "curves" / "train"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("validation/psnr")] == [3, 6]
    (first, _) = events.Images("validation/0")
    assert (first.width, first.height) == (128, 64)


def test_the_model_is_one_like_any_other(
    whole: Path, latent_diffusion: Path, photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERCO_HOME", str(tmp_path))  # other tests have no such checkpoint
    checkpoint = install.import_folder(whole / "run" / "model")
    assert (checkpoint.name, checkpoint.family, checkpoint.bpp) == ("perco-sd-0.0313", "perco-sd", 0.0313)
    assert "_name_or_path" not in "".join(f.read_text() for f in (whole / "run" / "model").rglob("*.json"))
    pipeline = PercoPipeline.from_pretrained(weights.models_folder() / checkpoint.name)
    small = torch.from_numpy(np.asarray(photo.resize((64, 64))).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    (indices,) = pipeline.encode_image(small)
    assert indices.shape == (1, 4, 4)
    assert pipeline.decode_indices([indices], 64, 64, num_inference_steps=1, prompt="x")[0].size == (64, 64)
    for part in ("vae", "text_encoder"):
        stored = "diffusion_pytorch_model" if part == "vae" else "model"
        old, new = (
            (place / part / f"{stored}.safetensors").read_bytes() for place in (latent_diffusion, whole / "run/model")
        )
        assert old == new


KILLED = """
import os, signal, sys
from pathlib import Path
from perco_engine.training.objective import PercoObjective
from perco_engine.training.train import train

forward = PercoObjective.forward

def killed(*given):
    if Path(sys.argv[2]).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(*given)

PercoObjective.forward = killed
train(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(
    whole: Path, latent_diffusion: Path, eight: Path, tmp_path: Path
) -> None:
    """Killed after the checkpoint of step 4, while it computes, so that a half-written log is there as well."""
    config = write_everything(tmp_path, latent_diffusion, eight)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    process = subprocess.run([sys.executable, "-c", KILLED, str(config), str(checkpoint)], capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert not (tmp_path / "run" / "model").exists()
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "loss": 7}\n{"step": 6, "lo')
    told: list[str] = []
    train(config, told.append)
    assert "goes on after step 4" in told
    assert read_log(tmp_path / "run") == read_log(whole / "run")
    for part in ("unet", "hyper_enc"):
        name = f"run/model/{part}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_that_is_told_to_stop_goes_on_as_if_it_had_not_been(
    whole: Path, latent_diffusion: Path, eight: Path, tmp_path: Path
) -> None:
    config = write_everything(tmp_path, latent_diffusion, eight)
    told: list[str] = []
    # The signal must come while the run watches for it: in a step.
    forward = PercoObjective.forward

    def interrupted(*given: Any) -> Any:
        patch.setattr(PercoObjective, "forward", forward)  # a second signal would be the end
        os.kill(os.getpid(), signal.SIGTERM)
        return forward(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PercoObjective, "forward", interrupted)
        with pytest.raises(TrainingError, match="stopped after step 1, which is saved"):
            train(config, told.append)
    train(config, told.append)
    assert "goes on after step 1" in told and read_log(tmp_path / "run") == read_log(whole / "run")
    train(config, told.append)
    assert "goes on after step 6" in told and read_log(tmp_path / "run") == read_log(whole / "run")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_adamw_in_8_bits_learns_and_goes_on_as_if_it_had_not_stopped(
    latent_diffusion: Path, eight: Path, tmp_path: Path
) -> None:
    """Runs where bitsandbytes is installed; its CPU build does."""
    pytest.importorskip("bitsandbytes")
    tables: dict[str, Any] = {
        "optimizer": {"kind": "adamw-8bit", "steps": 4},
        "checkpoints": {"every_steps": 2, "keep": 9},
    }
    train(write_settings(tmp_path / "whole", latent_diffusion, eight, **tables), lambda text: None)
    config = write_settings(tmp_path / "stopped", latent_diffusion, eight, **tables)
    shutil.copytree(tmp_path / "whole" / "run", tmp_path / "stopped" / "run")
    shutil.rmtree(tmp_path / "stopped" / "run" / "model")
    shutil.rmtree(tmp_path / "stopped" / "run" / "checkpoints" / "step-00000004")
    told: list[str] = []
    train(config, told.append)
    assert "goes on after step 2" in told
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    name = "run/model/unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_damaged_checkpoint_is_told(latent_diffusion: Path, eight: Path, tmp_path: Path) -> None:
    config = write_settings(tmp_path, latent_diffusion, eight, optimizer={"steps": 1})
    train(config, lambda text: None)
    (tmp_path / "run" / "checkpoints" / "step-00000001" / "unet.safetensors").write_bytes(b"x")
    with pytest.raises(TrainingError, match=r"step-00000001 cannot be read, .* delete its folder"):
        train(config, lambda text: None)


def test_damaged_photos_are_counted(latent_diffusion: Path, eight: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for path in eight.glob("[0-2].png"):
        (tmp_path / "photos" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"no picture")
    config = write_settings(tmp_path, latent_diffusion, tmp_path / "photos", optimizer={"steps": 3})
    told: list[str] = []
    train(config, told.append)
    assert any(text.startswith("1 photos could not be read and were left out") for text in told)
    assert list(json.loads((tmp_path / "run" / "skipped.json").read_text())) == ["bad.jpg"]


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"optimizer": {"kind": "adamw-8bit"}}, 'optimizer.kind: "adamw-8bit" needs the package'),
        ({"model": {"base": "nowhere"}}, "model.base: there is no folder nowhere"),
        ({"model": {"base": "."}}, "is no model folder, which has a model_index.json"),
        ({"data": {"held_out": 0.0}, "validation": {}}, "validation: data: there is no held-out photo"),
        ({"validation": {"folder": "nowhere"}}, "validation.folder: there is no folder"),
    ],
)
def test_what_cannot_be_had_is_told(
    tables: dict[str, Any],
    told: str,
    latent_diffusion: Path,
    eight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)  # as if it was not installed
    config = write_settings(tmp_path, latent_diffusion, eight, **tables)
    monkeypatch.setattr(networks, "load", lambda *_: pytest.fail("the base was loaded before that was seen"))
    with pytest.raises(InvalidSettings) as error:
        train(config, lambda text: None)
    assert told in str(error.value)


def test_figures_may_be_of_any_device(tmp_path: Path) -> None:
    accelerator: Any = SimpleNamespace(device=torch.device("meta"), is_main_process=False, log_with=[])
    journal = Journal(accelerator, tmp_path, 1, print)
    journal.add({"loss": torch.zeros(()), "learning_rate": 1e-3})
    assert {value.device.type for values in journal.sums.values() for value in values} == {"meta"}


def test_checkpoints_are_the_folders_that_a_run_names(tmp_path: Path) -> None:
    for name in ("step-00000300", "step-00000500", "step-00000300-good", "step-00000500.bak", "step-00000600.partial"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints.found(tmp_path)] == ["step-00000300", "step-00000500"]


def saving(folder: Path, save_state: Any) -> checkpoints.Checkpoints:
    """Checkpoints of a run after its first step, with an accelerator that only has this to write."""
    accelerator: Any = SimpleNamespace(
        is_main_process=True, wait_for_everyone=lambda: None, save_state=save_state,
        register_save_state_pre_hook=lambda hook: None, register_load_state_pre_hook=lambda hook: None,
    )  # fmt: skip
    return checkpoints.Checkpoints(
        accelerator, folder, CheckpointSettings(every_steps=1), {}, checkpoints.Progress(step=1)
    )


def test_what_was_left_of_a_checkpoint_is_removed(tmp_path: Path) -> None:
    for name in ("step-00000000.partial", "step-00000001.partial", "step-00000000", "mine.partial"):
        (tmp_path / name).mkdir()
    saving(tmp_path, lambda folder: (Path(folder) / "progress.0.json").touch()).save()
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000000", "step-00000001", "mine.partial"}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("failed writing file"), SafetensorError("I/O error")]
)
def test_a_checkpoint_that_cannot_be_written_is_told(error: Exception, tmp_path: Path) -> None:
    def full(folder: str) -> None:
        raise error

    told = f"cannot write {tmp_path / 'step-00000001'} ({error}): make room; the same command goes on"
    with pytest.raises(TrainingError, match=re.escape(told)):
        saving(tmp_path, full).save()


def test_a_full_disk_ends_a_run_that_goes_on(latent_diffusion: Path, eight: Path, tmp_path: Path) -> None:
    """Files that may not grow stand for it: while a checkpoint is written, and the model."""
    resource = pytest.importorskip("resource")
    config = write_settings(tmp_path, latent_diffusion, eight, optimizer={"steps": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for what in ("checkpoints", "model"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(TrainingError, match=rf"cannot write .*{what}.*: make room; the same command goes on"):
                train(config, lambda text: None)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if what == "checkpoints":
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(networks, "write_model", interrupted)
                train(config, lambda text: None)
    train(config, lambda text: None)
    assert (tmp_path / "run" / "model" / "model_index.json").is_file()


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_captions_of_a_table_are_counted(latent_diffusion: Path, eight: Path, tmp_path: Path) -> None:
    captions = {"source": "table", "table": str(tmp_path / "captions.csv")}
    config, told = write_settings(tmp_path, latent_diffusion, eight, captions=captions), list[str]()
    (tmp_path / "captions.csv").write_text("file,caption\n0.png,hello\n1,\n2,an owl\n")
    check(config, told.append)
    assert told == [f"2 of 8 photos have a caption in {tmp_path / 'captions.csv'}"]
    (tmp_path / "captions.csv").write_text("file,caption\nphotos/0.gif,hello\n")
    with pytest.raises(
        InvalidSettings, match=r"its names are like 'photos/0\.gif', and those of the photos like '0\.png'"
    ):
        check(config)


def test_a_run_goes_on_with_its_base(latent_diffusion: Path, eight: Path, tmp_path: Path) -> None:
    """Of which it takes what does not learn anew; runs of before have no note of it."""
    base = shutil.copytree(latent_diffusion, tmp_path / "base")
    config = write_settings(tmp_path, base, eight, optimizer={"steps": 1})
    train(config, lambda text: None)
    path = base / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({key: value * 1.01 for key, value in load_file(path).items()}, path)
    with pytest.raises(InvalidSettings, match=r"begun with other settings \(model\.base '.*' there, '.*' now\): put"):
        train(config, lambda text: None)
    note = tmp_path / "run" / "begun.json"
    note.write_text(json.dumps({k: v for k, v in json.loads(note.read_text()).items() if k != "model.base"}))
    train(config, lambda text: None)


def test_what_is_set_anew_holds_when_a_run_goes_on(latent_diffusion: Path, eight: Path, tmp_path: Path) -> None:
    """The rate, which a checkpoint's schedule has; how many batches make a step, which accelerate counts; the mean."""
    options: dict[str, Any] = {"steps": 3, "batch_size": 6, "micro_batch_size": 2}
    compute = {"ema_decay": 0.9}
    train(write_settings(tmp_path, latent_diffusion, eight, optimizer=options, compute=compute), lambda text: None)
    options |= {"steps": 5, "micro_batch_size": 1, "learning_rate": 1e-5, "weight_decay": 0.0}
    config = write_settings(tmp_path, latent_diffusion, eight, optimizer=options, compute={"ema_decay": 0.01})
    seen: list[tuple[float, float, int]] = []
    decays: list[float] = []
    step, count = torch.optim.AdamW.step, 0

    def watched(self: Any, *given: Any, **named: Any) -> Any:
        seen.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"], count))
        return step(self, *given, **named)

    def averaged(self: Any, weights: Any) -> None:
        follow(self, weights)
        decays.append(self.cur_decay_value)

    forward, follow = PercoObjective.forward, EMAModel.step

    def counted(*given: Any) -> Any:
        nonlocal count
        count += 1
        return forward(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        patch.setattr(PercoObjective, "forward", counted)
        patch.setattr(EMAModel, "step", averaged)
        train(config, lambda text: None)
    assert seen == [(1e-5, 0.0, 6), (1e-5, 0.0, 12)]
    assert decays == [0.01, 0.01]


@pytest.mark.parametrize(
    ("text", "tables", "told"),
    [
        ("seed = 3", {"objective": {"prediction": "epsilon"}}, "objective.prediction 'v_prediction' there, 'epsilon'"),
        ("seed = 3", {"learn": {"scope": "linear"}}, "learn {'scope': 'all', "),
        ("seed = 3", {"model.hyper_encoder": {"bpp": 0.0098}}, "model.hyper_encoder {'bpp': 0.0313, "),
        ("seed = 3", {"data": {"held_out": 0.5}}, "data '8 names, "),
        ("seed = 4", {}, "(seed 3 there, 4 now): put them back, or name another folder in run"),
        ("seed = 3", {}, "nothing is other"),
    ],
)
def test_a_run_goes_on_with_what_it_was_begun_with(
    text: str, tables: dict[str, Any], told: str, whole: Path, latent_diffusion: Path, eight: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Wherever its folder and the photos lie; other things than these may change; a run of before notes none."""

    def load(*_: Any) -> None:
        raise InvalidSettings("nothing is other")

    monkeypatch.setattr(networks, "load", load)
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    note = Path(shutil.copy(whole / "run" / "begun.json", tmp_path / "run"))
    photos = shutil.copytree(eight, tmp_path / "elsewhere")
    config = write_settings(tmp_path, latent_diffusion, photos, text, optimizer={"learning_rate": 1.0}, **tables)
    with pytest.raises(InvalidSettings, match=re.escape(told)):
        train(config, lambda text: None)
    note.unlink()
    with pytest.raises(InvalidSettings, match="nothing is other"):
        train(config, lambda text: None)


def test_a_run_of_before_goes_on_without_a_note(latent_diffusion: Path, eight: Path, tmp_path: Path) -> None:
    """Which could be one of settings that are wrong."""
    config = write_settings(tmp_path, latent_diffusion, eight, optimizer={"steps": 1})
    train(config, lambda text: None)
    (tmp_path / "run" / "begun.json").unlink()
    train(config, lambda text: None)
    assert not (tmp_path / "run" / "begun.json").exists()


def test_a_gradient_that_is_not_finite_spoils_no_checkpoint(
    latent_diffusion: Path, eight: Path, tmp_path: Path
) -> None:
    config = write_settings(tmp_path, latent_diffusion, eight, checkpoints={"every_steps": 1, "keep": 1})
    forward, calls = PercoObjective.forward, list[int]()

    def spoilt(*given: Any) -> Any:
        calls.append(1)
        loss, figures = forward(*given)
        return loss * (float("inf") if len(calls) == 3 else 1), figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PercoObjective, "forward", spoilt)
        with pytest.raises(TrainingError, match="the gradient after step 2 is not finite"):
            train(config, lambda text: None)
    (kept,) = checkpoints.found(tmp_path / "run" / "checkpoints")
    assert kept.name == "step-00000002"
    assert all(value.isfinite().all() for value in load_file(kept / "unet.safetensors").values())
    train(config, lambda text: None)
    assert losses(tmp_path)[-1] < float("inf")


def test_validation_that_cannot_be_coded_ends_no_run(
    latent_diffusion: Path, eight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise NotFinite("the picture has values that are no numbers")

    monkeypatch.setattr(PercoPipeline, "decode_indices", fails)
    validation = {"every_steps": 2, "photos": 1, "folder": str(eight), "inference_steps": 1}
    told: list[str] = []
    train(write_settings(tmp_path, latent_diffusion, eight, validation=validation), told.append)
    assert "step 2: the photos of validation were not coded (the picture has values that are no numbers)" in told
    assert len(losses(tmp_path)) == 4


# LPIPS.


def random_vgg() -> tuple[dict[str, Any], dict[str, Any]]:
    """Random weights under the names that torchvision and lpips give theirs."""
    torch.manual_seed(0)
    widths = [
        (3, 64),
        (64, 64),
        (64, 128),
        (128, 128),
        (128, 256),
        (256, 256),
        (256, 256),
        (256, 512),
        *[(512, 512)] * 5,
    ]
    places = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    vgg = {}
    for place, (narrow, wide) in zip(places, widths, strict=True):
        vgg[f"features.{place}.weight"] = torch.randn(wide, narrow, 3, 3) * (2 / (9 * narrow)) ** 0.5
        vgg[f"features.{place}.bias"] = torch.randn(wide) * 0.1
    linear = {f"lin{k}.model.1.weight": torch.rand(1, n, 1, 1) for k, n in enumerate((64, 128, 256, 512, 512))}
    return vgg, linear


def test_lpips_by_its_definition_and_its_slope_at_zero() -> None:
    vgg, linear = random_vgg()
    x, y = torch.rand(2, 3, 32, 48) * 2 - 1, torch.rand(2, 3, 32, 48) * 2 - 1
    mean, deviation = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = ((z - mean.view(3, 1, 1)) / deviation.view(3, 1, 1) for z in (x, y))
    expected, taps = torch.zeros(()), {2: 0, 7: 1, 14: 2, 21: 3, 28: 4}
    for place in range(31):
        if f"features.{place}.weight" in vgg:
            given = vgg[f"features.{place}.weight"], vgg[f"features.{place}.bias"]
            a, b = (torch.relu(nn.functional.conv2d(z, *given, padding=1)) for z in (a, b))
            if place in taps:
                unit = [z / (z.pow(2).sum(1, keepdim=True) + 1e-8).sqrt() for z in (a, b)]
                weight = linear[f"lin{taps[place]}.model.1.weight"]
                expected = expected + nn.functional.conv2d((unit[0] - unit[1]) ** 2, weight).mean()
        elif place in (4, 9, 16, 23):
            a, b = (nn.functional.max_pool2d(z, 2) for z in (a, b))
    distance = lpips.VggLpips(vgg, linear)
    torch.testing.assert_close(distance(x, y), expected)
    dark = torch.full((1, 3, 32, 32), -1.0, requires_grad=True)
    distance(dark, dark.detach()).backward()
    assert dark.grad is not None and dark.grad.isfinite().all()


def with_package(folder: Path, patch: pytest.MonkeyPatch, linear: dict[str, Any]) -> None:
    """Puts LPIPS' own weights where the package lpips, whether or not it is installed, is found to be."""
    (folder / "weights" / "v0.1").mkdir(parents=True)
    torch.save(linear, folder / "weights" / "v0.1" / "vgg.pth")
    patch.setattr(lpips, "find_spec", lambda name: SimpleNamespace(origin=str(folder / "__init__.py")))


def test_lpips_weights_that_were_saved_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those in the package are; and what is said of damaged ones."""
    vgg, linear = random_vgg()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: vgg)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        with_package(tmp_path / "lpips", monkeypatch, linear)
    found = lpips.load(None)
    assert found.linear0.device.type == "cpu" and torch.equal(found.linear4, linear["lin4.model.1.weight"])
    (tmp_path / "lpips" / "weights" / "v0.1" / "vgg.pth").write_bytes(b"damaged")
    with pytest.raises(
        InvalidSettings, match=r"(?s)vgg\.pth does not hold LPIPS' weights .*: install the package anew"
    ):
        lpips.load(None)


@pytest.mark.slow
def test_lpips_is_in_the_loss_of_high_rates_and_its_weights_are_asked_for(
    latent_diffusion: Path, eight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.hub, "load_state_dict_from_url", lambda *_, **__: (_ for _ in ()).throw(OSError("no net"))
    )
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # where no weights of VGG-16 are kept
    monkeypatch.setattr(lpips, "find_spec", lambda name: None)
    high = {"bpp": 0.0937}
    config = write_settings(tmp_path, latent_diffusion, eight, **{"model.hyper_encoder": high})
    missing = r"objective\.lpips_weight: LPIPS is not available.*{}.*lpips_weight = 0"
    with pytest.raises(InvalidSettings, match=missing.format("pip install --no-deps lpips")):
        train(config, lambda text: None)
    vgg, linear = random_vgg()
    torch.save(vgg, tmp_path / "vgg.pth")
    with_package(tmp_path / "lpips", monkeypatch, linear)
    with pytest.raises(InvalidSettings, match=missing.format("no net")):
        train(config, lambda text: None)
    config = write_settings(
        tmp_path, latent_diffusion, eight, **{"model.hyper_encoder": high},
        objective={"lpips_vgg": str(tmp_path / "vgg.pth")}, optimizer={"steps": 2},
    )  # fmt: skip
    train(config, lambda text: None)
    for line in read_log(tmp_path / "run"):
        assert line["lpips"] > 0 and line["loss"] == pytest.approx(line["diffusion"] + 0.1 * line["lpips"], rel=1e-5)


# What takes longer.


@pytest.mark.slow
def test_eight_photos_are_learnt_by_heart(latent_diffusion: Path, eight: Path, tmp_path: Path) -> None:
    config = write_settings(
        tmp_path, latent_diffusion, eight, optimizer={"steps": 250, "batch_size": 8, "learning_rate": 2e-3}
    )
    train(config, lambda text: None)
    found = losses(tmp_path)
    assert np.mean(found[-10:]) < np.mean(found[:10]) / 10


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["linear", "lora"])
def test_the_smaller_scopes_learn_too(scope: str, latent_diffusion: Path, eight: Path, tmp_path: Path) -> None:
    config = write_settings(
        tmp_path, latent_diffusion, eight, learn={"scope": scope},
        optimizer={"steps": 60, "batch_size": 8, "learning_rate": 5e-3}, compute={"mixed_precision": "bf16"},
    )  # fmt: skip
    model = train(config, lambda text: None)
    found = losses(tmp_path)
    assert np.mean(found[-10:]) < np.mean(found[:10]) / 1.4
    assert PercoPipeline.from_pretrained(model).hyper_enc.rate_points[0].bpp == 0.0313


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(latent_diffusion: Path, eight: Path, tmp_path: Path) -> None:
    """Through the command itself; after the first step of plain AdamW weights would tell the signs only."""
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        config = write_settings(
            folder, latent_diffusion, eight, optimizer={"steps": 3, "batch_size": 4, "epsilon": 1.0},
            objective={"commitment_weight": 0.1},
        )  # fmt: skip
        command = [sys.executable, "-m", "pillow_perco.cli", "train", str(config), "--processes", str(processes)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("done; install it with") == 1
    np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=1e-5)
    states = [
        torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("*/run/checkpoints/*/optimizer.bin"))
    ]
    one, two = (state["state"] for state in states)
    for key, value in one.items():  # the mean of the gradients
        scale = value["exp_avg"].abs().max()
        torch.testing.assert_close(two[key]["exp_avg"], value["exp_avg"], rtol=1e-4, atol=float(1e-5 * scale + 1e-9))
    for part in ("unet", "hyper_enc"):
        files = [tmp_path / str(n) / f"run/model/{part}/diffusion_pytorch_model.safetensors" for n in (1, 2)]
        first, second = (load_file(file) for file in files)
        for key, value in first.items():
            torch.testing.assert_close(second[key], value, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.slow
def test_several_processes_that_are_told_to_stop_write_a_checkpoint(
    latent_diffusion: Path, eight: Path, tmp_path: Path
) -> None:
    config = write_settings(
        tmp_path, latent_diffusion, eight, optimizer={"steps": 10_000, "batch_size": 4},
        checkpoints={"every_minutes": 60},
    )  # fmt: skip
    command = [sys.executable, "-m", "pillow_perco.cli", "train", str(config), "--processes", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 3  # torch's launcher is one of them
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "stopped: the same command goes on" in told
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/optimizer.bin"))
    assert psutil.wait_procs(workers, timeout=10)[1] == []
