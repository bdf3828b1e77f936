"""The embedded model's stages on tiny networks, each of which goes on where it was, wherever its folder lies."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from PIL import Image
from safetensors.torch import load_file

from perco_engine import sampling
from perco_engine.engine import get_engine
from perco_engine.errors import InvalidSettings, TrainingError
from perco_engine.models.ladder import HyperLadder
from perco_engine.store import install
from perco_engine.training import denoising, embedded
from perco_engine.training.denoising import WALK, grid_excess, some_timesteps, spectrum_excess, texture_error
from perco_engine.training.embedded_settings import STAGES, StageName
from perco_engine.training.journal import read_log
from perco_engine.training.stage import pace
from perco_engine.training.train import train


def test_a_grid_is_found_and_texture_is_none() -> None:
    noise = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    assert grid_excess(noise) == 0  # means of 16 squares keep a sixteenth of what is independent
    dots = torch.zeros(1, 3, 160, 160)
    dots[..., ::4, ::4] = 1
    assert grid_excess(dots).item() == pytest.approx(0.91, abs=0.05)  # all of it recurs, but for borders
    assert 0.2 < grid_excess(dots + 0.2 * noise).item() < 0.8


def test_a_weave_of_any_pitch_is_found() -> None:
    noise, other = torch.randn(2, 1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.meshgrid(torch.arange(160), torch.arange(160), indexing="ij")
    weave = torch.cos(2 * torch.pi * (7 * rows - columns) / 32).expand(1, 3, -1, -1)
    assert spectrum_excess(noise, noise) == 0
    assert spectrum_excess(3 * noise, other).item() < 0.15  # windows are few; how strong it is does not matter
    assert spectrum_excess(weave, noise).item() > 0.9
    assert 0.2 < spectrum_excess(noise + 0.5 * weave, noise).item() < spectrum_excess(noise + weave, noise).item()


def test_texture_is_as_good_as_the_same_and_blur_is_not() -> None:
    drawn = torch.randn(2, 4, 1, 8, 64, 64, generator=torch.Generator().manual_seed(0))
    theirs, others = (list(features) for features in drawn)
    assert texture_error(theirs, theirs) == 0
    same = texture_error(others, theirs).item()
    weak = texture_error([features / 2 for features in theirs], theirs).item()
    flat = texture_error([torch.ones_like(features) for features in theirs], theirs).item()
    assert same < 0.05
    assert [weak, flat] == pytest.approx([0.25, 1], abs=0.03)
    assert texture_error([features + 5 for features in theirs], theirs).item() < 1e-4  # of what: others tell


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, photo: Image.Image) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for k in range(4):
        photo.crop((16 * k, 0, 16 * k + 128, 128)).save(folder / f"{k}.png")
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


def write_settings(folder: Path, photos: Path, start: Path | None, **tables: dict[str, Any]) -> Path:
    given: dict[str, dict[str, Any]] = {
        "data": {"source": "folder", "folder": str(photos), "workers": 0},
        "autoencoder": {"steps": 3, "batch_size": 2, "side": 96, "learning_rate": 1e-3},
        "ladder": {"steps": 3, "batch_size": 2, "side": 88, "learning_rate": 1e-3},
        "joint": {"steps": 5, "crops": [[2, 96], [1, 104]], "learning_rate": 1e-3},
        "text": {"steps": 3, "crops": [[2, 96], [1, 104]], "learning_rate": 1e-3, "vocabulary": 1000},
        "prior": {"steps": 3, "crops": 3, "batch_size": 2, "learning_rate": 1e-3},
        "checkpoints": {"every_steps": 1, "keep": 5},
    }
    lines = ['recipe = "embedded"', 'run = "run"', "log_every = 1", 'mixed_precision = "no"', "sample = 40"]
    lines += [f"start = {json.dumps(str(start))}"] if start else []
    for name, table in (given | tables).items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    (folder / "config.toml").write_text("\n".join(lines) + "\n")
    return folder / "config.toml"


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The folder of a tiny model whose codebooks are large enough for a prior."""
    folder = tmp_path_factory.mktemp("beginning") / "model"
    shutil.copytree(tiny_model, folder)
    torch.manual_seed(0)
    ladder = HyperLadder(latent_channels=4, grids=((32, 16), (16, 16), (8, 16)), width=8)
    fill(ladder)
    ladder.save_pretrained(folder / "hyper_enc")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, photos: Path, beginning: Path) -> Path:
    """A finished run of all stages that was never broken off."""
    folder = tmp_path_factory.mktemp("whole")
    train(write_settings(folder, photos, beginning), lambda text: None)
    return folder / "run"


def test_all_stages_give_a_model(whole: Path, photo: Image.Image) -> None:
    model = install.import_folder(whole / "model", name="tiny-trained").folder
    engine = get_engine(model)
    assert engine.decode(engine.encode(photo)).size == photo.size
    assert (whole / "model" / "prior" / "prior.safetensors").is_file()
    assert engine.pipeline.tokenizer.model_max_length == 32
    assert not any("_name_or_path" in file.read_text() for file in (whole / "model").glob("*/config.json"))
    for stage in STAGES:
        assert [line["step"] for line in read_log(whole / stage)] == list(range(1, 6 if stage == "joint" else 4))
    for stage in ("autoencoder", "ladder"):
        assert list(json.loads((whole / stage / "skipped.json").read_text())) == ["bad.png"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_goes_on_in_a_copy_of_its_folder(
    stage: StageName, whole: Path, photos: Path, beginning: Path, tmp_path: Path
) -> None:
    for earlier in STAGES[: STAGES.index(stage)]:
        shutil.copytree(whole / earlier / "finished", tmp_path / "run" / earlier / "finished")
    shutil.copytree(whole / stage / "checkpoints", tmp_path / "run" / stage / "checkpoints")
    for later in (tmp_path / "run" / stage / "checkpoints").glob("step-0000000[3-9]"):
        shutil.rmtree(later)
    shutil.copy(whole / stage / "log.jsonl", tmp_path / "run" / stage)
    if stage == "text":
        shutil.copytree(whole / stage / "beginning", tmp_path / "run" / stage / "beginning")
    (tmp_path / "run" / stage / "checkpoints" / "step-00000003.partial").mkdir()  # it was being written
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:  # what comes after the stage is another test's matter
        patch.setattr(embedded, "export", lambda run, folder: None)
        text = write_settings(tmp_path, photos, beginning).read_text()
        stages = json.dumps(STAGES[: STAGES.index(stage) + 1])
        (tmp_path / "config.toml").write_text(f"stages = {stages}\n{text}")
        train(tmp_path / "config.toml", told.append)
    assert f"{stage}: goes on after step 2" in told
    assert read_log(tmp_path / "run" / stage) == read_log(whole / stage)
    for file in (whole / stage / "finished").rglob("*.safetensors"):
        assert (tmp_path / "run" / file.relative_to(whole)).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("gone", "change", "told", "stale"),
    [
        ("ladder", ("", ""), "joint: networks of ladder '.{12}' there, 'yet to be made' now", STAGES[2:]),
        ("joint/finished", ("", ""), "than there are now .text: networks of joint", STAGES[3:]),
        ("text", ("", ""), "goes on", ()),
        ("text/finished", ("vocabulary = 1000", "vocabulary = 1001"), "text: vocabulary 1000 there", STAGES[3:4]),
        ("joint/finished", ("steps = 5", "steps = 6"), "than there are now .text: networks of joint", STAGES[3:]),
        ("none", ("steps = 5", "steps = 6"), "joint: steps 5 there, 6 now; text: networks of joint", STAGES[2:]),
        ("none", ("sample", "seed = 1\nsample"), "autoencoder: seed 0 there, 1 now", STAGES),
        ("none", ("start = .*", ""), "autoencoder: start '.{12}' there, None now", STAGES),
    ],
)
def test_stages_of_other_networks_or_settings_are_not_mixed(
    gone: str, change: tuple[str, str], told: str, stale: tuple[StageName, ...], whole: Path, photos: Path,
    beginning: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What is said of a finished run where the folder of a stage is deleted, or its settings change."""

    def trained(run: Any) -> None:
        raise TrainingError("goes on")

    monkeypatch.setattr(embedded, "TRAIN", dict.fromkeys(STAGES, trained))
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / gone, ignore_errors=True)
    config = write_settings(tmp_path, photos, beginning)
    config.write_text(re.sub(*change, config.read_text()))
    with pytest.raises(TrainingError, match=told) as error:
        train(config, lambda text: None)
    folders = ", ".join(str(tmp_path / "run" / name) for name in stale)
    assert not stale or f"put them back, or delete {folders}, to do these stages again" in str(error.value)


def test_a_finished_run_is_finished(whole: Path, photos: Path, beginning: Path, tmp_path: Path) -> None:
    """Also elsewhere, where stages that others need no more were deleted, and as one of before that notes nothing."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(beginning, tmp_path / "start")
    config = write_settings(tmp_path, photos, tmp_path / "start")
    told: list[str] = []
    train(config, told.append)
    assert told == [f"{stage}: is done" for stage in STAGES]
    for name in ("autoencoder", "ladder"):
        shutil.rmtree(tmp_path / "run" / name)
    config.write_text('stages = ["joint", "text", "prior"]\n' + config.read_text())
    train(config, told.append)
    for note in (tmp_path / "run").rglob("begun.json"):
        note.unlink()
    config.write_text("seed = 1\n" + config.read_text())
    assert train(config, told.append) == tmp_path / "run" / "model" and len(told) == 5 + 3 + 3


def test_a_run_of_another_recipe_is_left_alone(whole: Path, photos: Path, beginning: Path, tmp_path: Path) -> None:
    assert json.loads((whole / "begun.json").read_text()) == {"recipe": "embedded"}
    config = write_settings(tmp_path, photos, beginning)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "begun.json").write_text('{"recipe": "perco-sd", "seed": 0}')
    with pytest.raises(InvalidSettings, match=r"begun with other settings .recipe 'perco-sd' there, 'embedded' now"):
        train(config, lambda text: None)


def test_codebooks_hold_still_while_what_is_around_them_learns(photos: Path, beginning: Path, tmp_path: Path) -> None:
    joint = {"steps": 2, "crops": [[2, 96]], "learning_rate": 1e-3, "frozen_codebooks": True}
    path = write_settings(tmp_path, photos, beginning, joint=joint)
    path.write_text('stages = ["joint"]\n' + path.read_text())
    train(path, lambda text: None)
    name = "hyper_enc/diffusion_pytorch_model.safetensors"
    before, after = load_file(beginning / name), load_file(tmp_path / "run" / "joint" / "finished" / name)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert not any("_codebook" in key for key in changed)
    assert {"levels.0.encoder.7.weight", "levels.0.leave.2.weight"} <= changed


def test_walks_may_stop_anywhere() -> None:
    walks = [some_timesteps(random.Random(seed)) for seed in range(200)]
    assert WALK == (999, 949, 899, 849, 799, 749, 699, 649, 599, 549, 499, 449, 399, 349, 299, 249, 199, 149, 99, 49)
    assert all(walk[0] == 999 and walk == sorted(set(walk), reverse=True) for walk in walks)
    assert {len(walk) for walk in walks} == {1, 2, 3, 4}
    assert {timestep for walk in walks for timestep in walk} == set(WALK)


def test_a_ladder_from_nothing_goes_on_with_its_rate_weights(whole: Path, photos: Path, tmp_path: Path) -> None:
    settings_of, configs = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "export", lambda run, folder: None)
        patch.setattr(embedded, "new_ladder", lambda: HyperLadder(4, ((32, 16), (16, 16), (8, 16)), width=8))
        patch.setattr(embedded, "RATE_SHARES", (0.0, 0.02, 0.05))
        for name in ("unbroken", "broken"):
            (tmp_path / name).mkdir()
            shutil.copytree(whole / "autoencoder" / "finished", tmp_path / name / "run" / "autoencoder" / "finished")
            settings_of[name] = write_settings(tmp_path / name, photos, None)
            settings_of[name].write_text('stages = ["ladder"]\n' + settings_of[name].read_text())
        train(settings_of["unbroken"], lambda text: None)
        shutil.copytree(tmp_path / "unbroken" / "run", tmp_path / "broken" / "run", dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "broken" / "run" / "ladder" / "finished")
        shutil.rmtree(tmp_path / "broken" / "run" / "ladder" / "checkpoints" / "step-00000003")
        train(settings_of["broken"], lambda text: None)
    for name in settings_of:
        configs[name] = (tmp_path / name / "run" / "ladder" / "finished" / "hyper_enc" / "config.json").read_text()
    assert configs["broken"] == configs["unbroken"]
    weights = json.loads(configs["broken"])["rate_weights"]
    assert weights[0] == 0 and weights[1] > 0 and weights[2] > 0


def test_what_a_stage_builds_on_is_missed(photos: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = write_settings(tmp_path, photos, tiny_model)
    config.write_text('stages = ["prior"]\n' + config.read_text())
    with pytest.raises(TrainingError, match="a prior needs codebooks of at least 16 codes, and one here has 8"):
        train(config, lambda text: None)
    config = write_settings(tmp_path, photos, None)
    config.write_text('stages = ["ladder"]\n' + config.read_text())
    with pytest.raises(TrainingError, match="there is no vae yet: let the stage autoencoder come first"):
        train(config, lambda text: None)
    config = write_settings(tmp_path, photos, tmp_path / "nothing")
    with pytest.raises(InvalidSettings, match=r"start: .*nothing is no model folder"):
        train(config, lambda text: None)


def test_paces() -> None:
    names = ("ladder.levels.0.encoder.0.weight", "vae.encoder.1.weight", "unet.conv_out.bias")
    assert [pace(name) for name in names] == [0.35, 1.0, 2.0]


@torch.no_grad()
def test_a_new_unet_adds_nothing_to_the_estimate() -> None:
    local = torch.randn(1, 17, 6, 5)
    output = embedded.new_unet()(torch.randn(1, 16, 6, 5), 999, None, local_features=local).sample
    assert torch.equal(output, local[:, :16])


@pytest.mark.slow
def test_from_nothing(photos: Path, tmp_path: Path) -> None:
    """At full size, a step or two a stage: principal components, k-means and all."""
    tables = {
        "autoencoder": {"steps": 2, "batch_size": 2, "side": 88, "learning_rate": 1e-4},
        "joint": {"steps": 2, "crops": [[1, 96]], "learning_rate": 1e-4},
        "text": {"steps": 1, "crops": [[1, 96]], "learning_rate": 1e-4},
    }
    model = train(write_settings(tmp_path, photos, None, **tables), lambda text: None)
    (first, _) = read_log(tmp_path / "run" / "autoencoder")
    assert first["psnr"] > 20  # linear algebra alone
    assert len(get_engine(model).rate_points) == len(embedded.GRIDS)


def test_a_walk_is_that_of_ddim() -> None:
    """Held against diffusers' scheduler, by way of what decodes."""
    pipeline = get_engine("embedded", "cpu").pipeline
    torch.manual_seed(0)
    noise, local = torch.randn(1, 16, 8, 8), torch.randn(1, pipeline.unet.config.local_features_channels, 8, 8)
    for steps in (1, 2, 4):
        scheduler = denoising.new_scheduler()
        scheduler.set_timesteps(steps)
        text = torch.zeros(1, 1, pipeline.unet.config.cross_attention_dim)
        with torch.no_grad():
            ours = denoising.walk(pipeline.unet, scheduler, noise, local, scheduler.timesteps.tolist(), text)
            theirs = sampling.denoise(pipeline, noise, local, text, None, steps, 1.0)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
