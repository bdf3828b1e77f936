"""Tags: what EfficientNet-Lite0 sees in a picture, in the words of ImageNet's 1000 classes; the captioner "tags".

Names and their licence are in imagenet_labels.txt; the network's weights come in a package (Apache-2.0, 18 MB).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache as remembered
from importlib import resources

import torch
from PIL import Image
from torch import Tensor

from .devices import usable_device
from .lite0 import lite0
from .pixels import to_rgb
from .tensors import to_tensor

SIDE_PX = 224
"""The side of the pictures that the network was trained on; others are squeezed into it."""

PROBABLE, MOST_TAGS = 0.25, 2
"""A caption has every tag that is so probable, at most so many; in any case the most probable one."""


@remembered
def labels() -> tuple[str, ...]:
    """The names of the 1000 classes, in the order of the network's outputs."""
    text = (resources.files(__package__) / "imagenet_labels.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if not line.startswith("#"))


@dataclass(frozen=True)
class TagCaptioner:
    """Captions of one or two tags, such as "great grey owl"; offline.

    device: default CUDA or MPS where there is one, else the CPU.
    """

    device: str | torch.device | None = None

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """One caption for each picture, of any Pillow mode."""
        if not images:
            return []
        device = usable_device(self.device)
        network = lite0(device)
        return [caption(network.probabilities(_small(image).to(device))[0]) for image in images]


def _small(image: Image.Image) -> Tensor:
    """The whole picture as the network takes it: (1, 3, SIDE_PX, SIDE_PX) in -1..1."""
    return to_tensor([to_rgb(image).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)])


def caption(probabilities: Tensor) -> str:
    """The caption of a picture by the probabilities (1000,) of the classes."""
    best = probabilities.topk(MOST_TAGS)
    found = [labels()[number] for value, number in zip(*best, strict=True) if value >= PROBABLE]
    return ", ".join(found or [labels()[int(best.indices[0])]])
