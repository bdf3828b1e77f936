"""A run's settings: what a file may say, and what is told of one that says something else."""

import random
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from perco_engine.errors import InvalidSettings
from perco_engine.training import embedded_settings, settings
from perco_engine.training.settings_file import examples, parse, read
from perco_engine.training.train import check
from pillow_perco.cli import main

LEAST: dict[str, Any] = {
    "recipe": "perco-sd",
    "run": "run",
    "data": {"source": "folder", "folder": "photos"},
    "model": {"base": "sd", "hyper_encoder": {"bpp": 0.0313}},
    "optimizer": {"steps": 10, "batch_size": 2},
}


def test_what_the_least_settings_mean() -> None:
    found = parse(LEAST, "x.toml")
    assert isinstance(found, settings.PercoSd)
    assert found.objective == settings.Objective(
        prediction="v_prediction", timestep_grid=None, min_snr_gamma=None, noise_offset=0, input_perturbation=0,
        text_dropout=0.1, commitment_weight=0, lpips_weight=0.1, lpips_above_bpp=0.05,
    )  # fmt: skip
    assert (found.optimizer.learning_rate, found.optimizer.weight_decay, found.optimizer.clip) == (1e-5, 0.01, 1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"recipe": "sd"}, "recipe must be 'perco-sd' or 'embedded', not 'sd'"),
        ({"sed": 1}, "sed is no setting: did you mean seed?"),
        ({"seed": "1"}, "seed: input should be a valid integer, not '1'"),
        ({"recipe": ["perco-sd"]}, "recipe must be 'perco-sd' or 'embedded', not ['perco-sd']"),
        ({"seed": -1}, "seed: input should be greater than or equal to 0"),
        ({"optimizer": {"steps": 1, "batch_size": 1, "beta2": 1.0}}, "optimizer.beta2: input should be less than 1"),
        ({"seed": True}, "seed: input should be a valid integer, not True"),
        ({"resolution": 100}, "resolution must be a multiple of 64 pixels, not 100"),
        ({"data": {"source": "zip"}}, "data.source must be one of folder, open-images, tfds, webdataset"),
        ({"data": {"folder": "x"}}, "data.source must be one of"),
        ({"data": {"source": "folder"}}, "data.folder is missing: give it"),
        (
            {"data": {"source": "folder", "folder": "x", "heldout": 0.1}},
            "data.heldout is no setting: did you mean held",
        ),
        ({"data": {"source": "folder", "folder": "x", "held_out": 1}}, "data.held_out: input should be less than 1"),
        ({"optimizer": {"steps": 1}}, "optimizer.batch_size is missing: give it"),
        ({"optimizer": {"steps": 0, "batch_size": 1}}, "optimizer.steps: input should be greater than or equal to 1"),
        ({"optimizer": {"steps": 1, "batch_size": 1, "kind": "sgd"}}, "optimizer.kind: input should be 'adamw' or"),
        ({"optimizer": {"steps": 1, "batch_size": 3, "micro_batch_size": 2}}, "must be a multiple of optimizer.micro"),
        ({"optimizer": {"steps": 1, "batch_size": 1, "warmup_steps": 2}}, "optimizer.warmup_steps must be at most"),
        ({"objective": {"text_dropout": 1.5}}, "objective.text_dropout: input should be less than or equal to 1"),
        ({"objective": {"min_snr_gamma": 0}}, "objective.min_snr_gamma: input should be greater than 0"),
        ({"model": {"base": "sd", "hyper_encoder": {"bpp": 0.03}}}, "model.hyper_encoder.bpp must be one of 0.0019, "),
        ({"captions": {"source": "table"}}, "captions.table is missing"),
        ({"captions": {"table": "x.csv"}}, 'captions.table is of captions.source = "table", and not of "sidecar"'),
        ({"captions": {"captioner": "mine"}}, 'captions.captioner is of captions.source = "captioner"'),
        ({"objective": {"timestep_grid": 5000}}, "objective.timestep_grid must be at most 1000"),
        (
            {"validation": {"inference_steps": 1000}},
            "validation.inference_steps: input should be less than or equal to",
        ),
        (
            {"validation": {"guidance_scale": float("inf")}},
            "validation.guidance_scale: input should be a finite number",
        ),
        (
            {"checkpoints": {"every_minutes": float("inf")}},
            "checkpoints.every_minutes: input should be a finite number",
        ),
        (
            {"model": {"base": "sd", "hyper_encoder": {"bpp": 0.0313, "local_features": 1}}},
            "model.hyper_encoder.local_features must be at least 2 in the design elic",
        ),
        ({"checkpoints": {"keep": 5}}, "checkpoints: give every_steps or every_minutes"),
        ({"data": {"source": "webdataset", "shards": ["a.tar"]}, "validation": {}}, "validation.folder is missing"),
    ],
)
def test_every_message_names_the_key(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidSettings) as error:
        parse(LEAST | changes, "x.toml")
    assert str(error.value).startswith("x.toml") and told in str(error.value)


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(InvalidSettings) as error:
        parse(LEAST | {"sed": 1, "seed": 0.5, "optimizer": {"steps": 1}}, "x.toml")
    assert len(str(error.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stages": ["joint", "ladder"]}, "stages must be in their order, each once: ['ladder', 'joint']"),
        ({"joint": {"learning_rate": 1e-4, "crops": [[1, 96]]}}, "joint: give either minutes or steps"),
        ({"joint": {"learning_rate": 1e-4, "steps": 1, "crops": [[1, 90]]}}, "joint.crops.0.1: input should be a mult"),
        ({"data": {"source": "webdataset", "shards": ["a"]}}, "data.source must be one of folder, open-images, tfds"),
    ],
)
def test_messages_of_the_embedded_recipe(changes: dict[str, Any], told: str) -> None:
    least = {"recipe": "embedded", "run": "r", "data": {"source": "folder", "folder": "x"}}
    with pytest.raises(InvalidSettings) as error:
        parse(least | changes, "x.toml")
    assert told in str(error.value)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "sd").mkdir()
    (tmp_path / "x.toml").write_text(
        'recipe = "perco-sd"\nrun = "run"\n[data]\nsource = "webdataset"\nshards = ["a{0..1}.tar", "https://x/b.tar"]\n'
        '[model]\nbase = "sd"\n[optimizer]\nsteps = 1\nbatch_size = 1\n'
    )
    found = read(tmp_path / "x.toml")
    assert isinstance(found, settings.PercoSd) and isinstance(found.data, settings.WebdatasetData)
    assert found.run == tmp_path / "run" and found.model.base == str(tmp_path / "sd")
    assert found.data.shards == (str(tmp_path / "a{0..1}.tar"), "https://x/b.tar")


@pytest.mark.parametrize("text", [None, "recipe = ", b"\xff"])
def test_a_file_that_is_no_settings(text: str | bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InvalidSettings, match=r"x\.toml"):
        read(path)


def test_the_recipes_are_what_was_published() -> None:
    parsed = {}
    for name, text in examples().items():
        assert text.startswith("# ")
        parsed[name] = parse(tomllib.loads(text), name)
    assert set(parsed) == {"embedded", "embedded-further", "perco-sd-15k", "perco-sd-50k", "single-gpu"}
    first, later = parsed["perco-sd-15k"], parsed["perco-sd-50k"]
    assert isinstance(first, settings.PercoSd) and isinstance(later, settings.PercoSd)
    assert (first.optimizer.steps, later.optimizer.steps) == (15_000, 50_000)
    assert (first.learn.scope, later.learn.scope) == ("linear", "all")
    for one in (first, later):
        optimizer = one.optimizer
        assert (optimizer.batch_size, optimizer.learning_rate, optimizer.warmup_steps) == (160, 1e-5, 10_000)
        assert (optimizer.weight_decay, optimizer.clip, one.objective.text_dropout) == (0.01, 1, 0.1)
        assert (one.objective.lpips_weight, one.objective.commitment_weight, one.resolution) == (0.1, 0, 512)
    embedded = parse({"recipe": "embedded", "run": "r", "data": LEAST["data"]}, "x")
    shipped = parsed["embedded"]
    assert isinstance(embedded, embedded_settings.Embedded) and isinstance(shipped, embedded_settings.Embedded)
    for stage in embedded_settings.STAGES:
        assert getattr(embedded, stage) == getattr(shipped, stage)


def test_what_is_given_for_each_level() -> None:
    joint = embedded_settings.JointSettings(
        steps=1,
        crops=((1, 96),),
        learning_rate=1e-4,
        level_weights=(3, 1),
        feature_weights=(0.5, 0.25),
        texture_weights=(0, 3),
    )
    drawn = Counter(joint.draw_level(random.Random(seed), 3) for seed in range(5000))
    assert [drawn[level] / 5000 for level in range(3)] == pytest.approx([0.6, 0.2, 0.2], abs=0.03)
    assert [joint.feature_weight(level) for level in range(4)] == [0.5, 0.25, 0.25, 0.25]
    assert [joint.texture_weight(level) for level in range(4)] == [0, 3, 3, 3]


@pytest.mark.parametrize("run", ["x.toml", "x.toml/run"])
def test_a_run_in_the_place_of_a_file(run: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(examples()["embedded"].replace('run = "', f'run = "{run}" # "', 1))
    with pytest.raises(InvalidSettings, match=r"run: .*x\.toml is a file: name a folder"):
        check(tmp_path / "x.toml")


def test_the_command_lists_prints_and_checks(tmp_path: Path) -> None:
    listed = CliRunner().invoke(main, ["train", "--list"])
    assert listed.exit_code == 0 and listed.output.splitlines()[0].startswith("embedded")
    printed = CliRunner().invoke(main, ["train", "--example", "embedded"])
    assert printed.output == examples()["embedded"]
    (tmp_path / "x.toml").write_text(printed.output)
    checked = CliRunner().invoke(main, ["train", "--check", str(tmp_path / "x.toml")])
    assert checked.exit_code == 1 and "data.folder: there is no folder" in checked.output
    assert CliRunner().invoke(main, ["train", "--example", "nothing"]).exit_code == 2
    assert CliRunner().invoke(main, ["train"]).exit_code == 2
