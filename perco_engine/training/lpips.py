"""LPIPS on VGG-16 with the epsilon inside the root, as a loss: the root's slope at zero has no bound otherwise.

LPIPS' own weights (Zhang et al., CVPR 2018, version 0.1) come in the package lpips; torchvision's of VGG-16, on which
they rest, are fetched by torch.hub (528 MB), or read from a file.  Neither lpips nor torchvision is imported.
"""

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InvalidSettings

VGG = "https://download.pytorch.org/models/vgg16-397923af.pth"
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
EPSILON = 1e-8

MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of ImageNet's channels, in -1..1."""


class VggLpips(nn.Module):
    """distance(x, y) of pictures (b, 3, h, w) in -1..1, h and w at least 16: a scalar, the mean over the batch.

    vgg: VGG-16's state dict, as torchvision has it.  linear: LPIPS' own, lin<k>.model.1.weight (1, channels, 1, 1).
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, vgg: dict[str, Tensor], linear: dict[str, Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        widths, place = [3, *(width for block in BLOCKS for width in block)], 0
        layers = iter(pairwise(widths))
        for number, block in enumerate(BLOCKS):
            modules: list[nn.Module] = [nn.MaxPool2d(2)] if number else []
            place += bool(number)
            for _ in block:
                convolution = nn.Conv2d(*next(layers), 3, padding=1)
                names = {name: f"features.{place}.{name}" for name in ("weight", "bias")}
                convolution.load_state_dict({name: vgg[key] for name, key in names.items()})
                modules += [convolution, nn.ReLU()]
                place += 2
            self.blocks.append(nn.Sequential(*modules))
            self.register_buffer(f"linear{number}", linear[f"lin{number}.model.1.weight"].float())
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """What each block gives, every position at unit length."""
        x, found = (x - self.mean) / self.deviation, []
        for block in self.blocks:
            x = block(x)
            found.append(x / (x.pow(2).sum(1, keepdim=True) + EPSILON).sqrt())
        return found

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                theirs = self.features(y.float())
            distances = [
                ((a - b).pow(2) * getattr(self, f"linear{k}")).sum(1).mean()
                for k, (a, b) in enumerate(zip(self.features(x.float()), theirs, strict=True))
            ]
        return torch.stack(distances).sum()


def load(vgg: Path | None) -> VggLpips:
    """LPIPS.  vgg: a file with VGG-16's weights; None: torch.hub's copy, fetched where there is none yet.

    Raises InvalidSettings, with what to do, where weights cannot be had.
    """
    instead = "or set objective.lpips_weight = 0"
    package = find_spec("lpips")
    if package is None or package.origin is None:
        raise InvalidSettings(
            f"objective.lpips_weight: LPIPS is not available without its weights: pip install --no-deps lpips; "
            f"{instead}"
        )
    own = Path(package.origin).parent / "weights" / "v0.1" / "vgg.pth"
    try:
        linear = torch.load(own, map_location="cpu", weights_only=True)  # which were saved on a GPU
    except Exception as error:  # whatever the file or the library come up with
        raise InvalidSettings(
            f"objective.lpips_weight: {own} does not hold LPIPS' weights ({error}): install the package anew: "
            f"pip install --force-reinstall --no-deps lpips; {instead}"
        ) from error
    try:
        if vgg is None:
            weights = torch.hub.load_state_dict_from_url(
                VGG, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
        else:
            weights = torch.load(vgg, map_location="cpu", weights_only=True)
        return VggLpips(weights, linear)
    except Exception as error:  # whatever the network, the file or the library come up with
        kept = Path(torch.hub.get_dir(), "checkpoints", VGG.rsplit("/", 1)[1])
        if vgg is None and kept.is_file():
            raise InvalidSettings(
                f"objective.lpips_weight: {kept} does not hold VGG-16's weights ({error}): delete it, and it is "
                f"fetched again; {instead}"
            ) from error
        raise InvalidSettings(
            f"objective.lpips_weight: LPIPS is not available, since VGG-16's weights cannot be had ({error}): download "
            f"{VGG} where there is a network and name the file in objective.lpips_vgg; {instead}"
        ) from error
