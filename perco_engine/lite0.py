"""EfficientNet-Lite0 in memory: what tags are read from, and what codes are searched by."""

import torch

from .devices import BUILDING, cache, weights_bytes
from .models.perceptual import FeatureDistance


class _Network:
    """The network on a device.  size_bytes: of its weights."""

    def __init__(self, device: torch.device) -> None:
        with BUILDING:
            self.network = FeatureDistance("lite0").to(device, torch.float32)
        self.size_bytes = weights_bytes(self.network)


def lite0(device: torch.device) -> FeatureDistance:
    """The network, float32, loaded once for each device; its weights come in a package (Apache-2.0, 18 MB)."""
    return cache.get(("lite0", str(device)), lambda: _Network(device)).network
