"""A tiny real model with random weights, and pictures that no two are alike."""

import json
import os
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from perco_engine import devices, search, torchac_backend
from perco_engine.models.autoencoder import PatchAutoencoder
from perco_engine.models.ladder import HyperLadder
from perco_engine.models.unet import UNet2DConditionModel
from perco_engine.pipeline import PercoPipeline
from perco_engine.training.denoising import new_scheduler

PARITY = Path(__file__).parent / "parity"
PHOTO = Path(__file__).parent.parent / "pillow_perco" / "demo.jpg"

SETTINGS = {
    "perco_sd_base", "http_proxy", "https_proxy", "all_proxy", "xdg_current_desktop", "columns", "lines", "no_color",
}  # fmt: skip
"""Variables of the environment, in lower case, that change what is tested."""


def peak_bytes(act: Callable[[], object]) -> int:
    """The memory that Python had allocated at most while `act` ran."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that install under /usr/local are for those who ask for them."""
    if "desktop" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("desktop"):
                item.add_marker(pytest.mark.skip(reason="installs under /usr/local: pytest -m desktop"))


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of whoever runs the tests is looked at or changed: models, thumbnails, a warm engine, settings, a GPU.

    (The desktop tests start programs with an environment of their own, in which the temporary folder is the system's.)
    """
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as runtime:
        extensions = torchac_backend._library_path().parent.parent  # which is built once, and kept
        for name in [name for name in os.environ if name.lower() in SETTINGS]:
            patch.delenv(name)
        patch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
        for name in ("PERCO_HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp("own")))
        patch.setenv("XDG_RUNTIME_DIR", runtime)  # as short as a socket's name must be
        patch.setenv("TERM", "xterm")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr(devices, "best_device", lambda: torch.device("cpu"))
        patch.setattr(devices.cache, "budget_bytes", 16 << 30)
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield


@contextmanager
def reachable(folder: Path) -> Iterator[None]:
    """A folder that every user can enter, as long as it lasts."""
    closed = {one: mode for one in (folder, *folder.parents) if (mode := one.stat().st_mode) & 0o011 != 0o011}
    for one, mode in closed.items():
        one.chmod(mode | 0o011)
    try:
        yield
    finally:
        for one, mode in closed.items():
            one.chmod(mode)


@pytest.fixture(scope="session", autouse=True)
def seldom_searched() -> Iterator[None]:
    """Encoding takes no seconds for better codes but in the tests of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "USUAL_PIXELS", 0)
        yield


def fill(ladder: HyperLadder) -> None:
    """Gives a ladder codebooks, as its training would with the first photos."""
    for level in ladder.levels:
        level.quantizer._codebook.embed.normal_()
        level.quantizer._codebook.initted.fill_(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unregistered model of the embedded model's kind: three levels, some thousand weights."""
    torch.manual_seed(0)
    vae = PatchAutoencoder(latent_channels=4, width=20, depth=1)
    ladder = HyperLadder(latent_channels=4, grids=((32, 16), (16, 16), (8, 8)), width=8)
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2D",
        local_features_channels=5,
        add_local_features=True,
    )
    fill(ladder)
    pipeline = PercoPipeline(
        vae=vae, hyper_enc=ladder, unet=unet, scheduler=new_scheduler(),
        default_num_inference_steps=2, default_guidance_scale=1.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A real photo, 192x128 pixels, mode RGB."""
    with Image.open(PHOTO) as image:
        return image.convert("RGB").resize((192, 128))


@pytest.fixture
def noise() -> Iterator[Image.Image]:
    """Noise of an odd size, mode RGB."""
    pixels = np.random.default_rng(1).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    yield Image.fromarray(pixels)


def opened_size(path: Path) -> tuple[int, int]:
    """The size of the picture in a file, which is closed again."""
    with Image.open(path) as image:
        return image.size


@pytest.fixture(scope="session")
def latent_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a latent diffusion model as Stable Diffusion's are, tiny: no hyper-encoder, a plain first layer."""
    folder = tmp_path_factory.mktemp("models") / "latent-diffusion"
    shutil.copytree(PARITY / "pipeline_tiny" / "pipeline", folder, ignore=lambda *_: ["hyper_enc"])
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if not k.startswith("conv_in_extended")}, weights)
    index = json.loads((folder / "model_index.json").read_text())
    del index["hyper_enc"]
    index |= {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
