"""How far decoded pictures are, as a set, from the originals: FID and KID of whole pictures and of 256-pixel patches.

FID: Heusel et al., NeurIPS 2017.  KID: Bińkowski et al., ICLR 2018.  Patches: Mentzer et al. (HiFiC), NeurIPS 2020,
appendix A.7: a picture is cut into squares, and once more on a grid that is shifted by half a square.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from .metrics import LITE, to_tensor

Features = NDArray[np.float64]
Network = Callable[[Image.Image], Features]
"""An RGB picture to its features (d,)."""

PATCH_PX = 256
SUBSETS, SUBSET_SIZE = 100, 1000


def frechet_distance(x: Features, y: Features) -> float:
    """FID of features (n, d) and (m, d): |mean difference|^2 + tr(A + B - 2 (AB)^(1/2)) of their covariances A, B.

    The trace of the root is the sum of the singular values of one set of centred features times the other, which needs
    no root of a matrix and is exact where n < d makes the covariances singular.
    """
    centred = [(f - f.mean(0)) / np.sqrt(len(f) - 1) for f in (x, y)]
    shift = np.square(x.mean(0) - y.mean(0)).sum()
    spread = sum(np.square(f).sum() for f in centred)
    a, b = (_narrow(f) for f in centred)
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(shift + spread - 2 * overlap)


def _narrow(f: Features) -> Features:
    """At most d rows with the same f.T @ f, so that many pictures cost no more than many features."""
    rows: Features = np.linalg.qr(f)[1] if len(f) > f.shape[1] else f
    return rows


def kernel_distance(x: Features, y: Features) -> float:
    """KID of features (n, d) and (m, d): the unbiased squared MMD with the kernel (x.y/d + 1)^3.

    Of more than 1000 pictures: the mean over 100 random subsets of 1000, the same in every run.
    """
    if max(len(x), len(y)) <= SUBSET_SIZE:
        return _mmd(x, y)
    rng = np.random.default_rng(0)

    def some(f: Features) -> Features:
        return f[rng.choice(len(f), min(len(f), SUBSET_SIZE), replace=False)]

    return float(np.mean([_mmd(some(x), some(y)) for _ in range(SUBSETS)]))


def _mmd(x: Features, y: Features) -> float:
    def kernel(a: Features, b: Features) -> Features:
        base = a @ b.T / a.shape[1] + 1
        cube: Features = base * base * base  # a power of floats takes ten times as long
        return cube

    def mean_of_pairs(k: Features) -> float:
        return float((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)))

    return mean_of_pairs(kernel(x, x)) + mean_of_pairs(kernel(y, y)) - 2 * float(kernel(x, y).mean())


def whole(picture: Image.Image) -> Iterator[Image.Image]:
    """The picture itself."""
    yield picture


def patches(picture: Image.Image) -> Iterator[Image.Image]:
    """The whole squares of the grid at (0, 0), then those of the grid at half a square; none of a small picture."""
    for start in (0, PATCH_PX // 2):
        for top in range(start, picture.height - PATCH_PX + 1, PATCH_PX):
            for left in range(start, picture.width - PATCH_PX + 1, PATCH_PX):
                yield picture.crop((left, top, left + PATCH_PX, top + PATCH_PX))


def _inception(device: torch.device) -> Network:
    """Inception's pooled features (2048,), of pictures resized as clean-fid does (Parmar et al., CVPR 2022)."""
    from cleanfid.features import build_feature_extractor
    from cleanfid.resize import build_resizer

    network = build_feature_extractor("clean", device, use_dataparallel=False)
    resize = build_resizer("clean")

    @torch.inference_mode()
    def features(picture: Image.Image) -> Features:
        sample = torch.from_numpy(resize(np.asarray(picture))).permute(2, 0, 1)[None]
        return np.asarray(network(sample.to(device))[0].cpu().numpy(), np.float64)

    return features


def _lite2(device: torch.device) -> Network:
    """EfficientNet-Lite2's last features, averaged over positions (1280,)."""
    from ..models.perceptual import FeatureDistance

    network = FeatureDistance("lite2").net.to(device)

    @torch.inference_mode()
    def features(picture: Image.Image) -> Features:
        found = network.extract_features(to_tensor(picture, device) * 2 - 1)
        return np.asarray(found.mean((2, 3))[0].cpu().numpy(), np.float64)

    return features


@dataclass(frozen=True)
class SetMetric:
    """A distance of two sets of pictures; lower is better.

    network: a key of NETWORKS.  samples: what of each picture is compared.
    least_side_px: pictures with a shorter side are left out.
    """

    name: str
    title: str
    what: str
    network: str
    samples: Callable[[Image.Image], Iterator[Image.Image]]
    distance: Callable[[Features, Features], float]
    decimals: int
    least_side_px: int = 1
    higher_is_better: bool = False


NETWORKS: dict[str, tuple[Callable[[torch.device], Network], str]] = {
    "inception": (_inception, "clean-fid scipy torchvision"),
    "lite2": (_lite2, LITE.format("lite2")),
}
"""Networks by name: what loads them, and the packages that this needs."""

_INCEPTION = "of Inception features (package clean-fid), which are biased upwards for few pictures"
_LITE2 = "of pooled EfficientNet-Lite2 features, whose weights come in a package: not comparable with Inception's"
_PATCHES = f"{PATCH_PX}-pixel patches, two grids half a patch apart"

SET_METRICS = {
    metric.name: metric
    for metric in (
        SetMetric("fid", "FID", f"whole pictures, {_INCEPTION}", "inception", whole, frechet_distance, 2),
        SetMetric("kid", "KID", f"whole pictures, {_INCEPTION}", "inception", whole, kernel_distance, 4),
        SetMetric("fid_256", "FID/256", f"{_PATCHES}, {_INCEPTION}", "inception", patches, frechet_distance, 2),
        SetMetric("kid_256", "KID/256", f"{_PATCHES}, {_INCEPTION}", "inception", patches, kernel_distance, 4),
        SetMetric(
            "lite2_kid", "Lite2-KID", f"whole pictures, KID {_LITE2}", "lite2", whole, kernel_distance, 4,
            least_side_px=32,
        ),
        SetMetric("lite2_kid_256", "Lite2-KID/256", f"{_PATCHES}, KID {_LITE2}", "lite2", patches, kernel_distance, 4),
    )
}  # fmt: skip
"""Every metric of a set of pictures, in the order of the reports."""


def extract(network: Network, metric: SetMetric, pictures: Iterable[Image.Image]) -> Features:
    """The features (n, d) of what the metric compares of these pictures; (0, 0) if that is nothing."""
    large = (picture for picture in pictures if min(picture.size) >= metric.least_side_px)
    rows = [network(sample) for picture in large for sample in metric.samples(picture)]
    return np.stack(rows) if rows else np.empty((0, 0))
