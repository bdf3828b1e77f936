"""PerCo's published numbers, as data.  None of them was measured here.

bpp: of whole files as the authors count them, caption included, pickle not.  The autoencoders are the bound of their
models and have no rate.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

SD = "Körber et al., arXiv 2409.20255 (PerCo (SD))"
OFFICIAL = "Careil et al., ICLR 2024, arXiv 2310.10325 (PerCo), as given in the figure of PerCo (SD)"


@dataclass(frozen=True)
class Curve:
    """A published rate-distortion curve: for each metric (bpp, value) pairs, or one value as a bound of any rate."""

    name: str
    dataset: str
    source: str
    points: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name in plots."""
        return f"{self.name}, {self.dataset} (published, not measured)"


def _curve(name: str, dataset: str, source: str, metrics: tuple[str, ...], *rows: tuple[float, ...]) -> Curve:
    """A curve of rows (bpp, value of the first metric, ...)."""
    return Curve(
        name, dataset, source, {metric: tuple((row[0], row[k]) for row in rows) for k, metric in enumerate(metrics, 1)}
    )


COCO = "MS-COCO-30k"
KODAK = "Kodak"
COCO_METRICS = ("ms_ssim", "lpips", "fid")
KODAK_METRICS = ("psnr", "ms_ssim", "lpips", "dists")

PUBLISHED = (
    _curve(
        "PerCo (SD)", COCO, f"{SD}, read off its figure", COCO_METRICS,
        (0.0037, 0.380, 0.553, 4.76),
        (0.0113, 0.527, 0.433, 3.38),
        (0.0329, 0.667, 0.313, 2.57),
        (0.0524, 0.741, 0.253, 2.26),
        (0.0953, 0.820, 0.175, 1.47),
        (0.1266, 0.855, 0.140, 1.22),
    ),
    _curve(
        "PerCo", COCO, OFFICIAL, COCO_METRICS,
        (0.0042, 0.396, 0.542, 5.47),
        (0.0333, 0.709, 0.241, 2.62),
        (0.127, 0.878, 0.102, 1.00),
    ),
    Curve(
        "SD autoencoder", COCO, f"{SD}, read off its figure",
        bounds={"ms_ssim": 0.931, "lpips": 0.065, "fid": 0.64},
    ),
    _curve(
        "PerCo (SD)", KODAK, SD, KODAK_METRICS,
        (0.0324, 19.53, 0.674, 0.297, 0.161),
        (0.1261, 22.79, 0.847, 0.143, 0.080),
    ),
    Curve(
        "SD autoencoder", KODAK, SD,
        bounds={"psnr": 26.65, "ms_ssim": 0.925, "lpips": 0.073, "dists": 0.042},
    ),
)  # fmt: skip
