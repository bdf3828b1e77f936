"""Codes: everything that a .perco file says, as plain numpy and Python.

Importing this module leaves numpy alone: whoever reads a header needs ModelReference and Metadata, and no arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEFAULT_SEED = 0
"""The noise seed of a file that does not name one."""


MIME_TYPE = "image/x-perco"

MAX_FILE_BYTES = 256 << 20
"""Of a .perco file that is read: none needs to be larger."""

MAX_PIXELS = 178_956_970
"""The largest picture that is decoded: what Pillow by default refuses as a decompression bomb."""


@dataclass(frozen=True)
class ModelReference:
    """The model that a file names, by the registry id of the weights (1..31); or by that of a family of checkpoints
    (32..62) and the first 4 bytes of the checkpoint's fingerprint; or by 0 and the 8-byte fingerprint.
    """

    registry_id: int
    fingerprint: bytes = b""


EXIF_PREFIX = b"Exif\x00\x00"
"""What an EXIF block begins with in JPEG files and in Pillow's `info`, but not in a .perco file."""


def is_of_other_pixels(profile: bytes) -> bool:
    """Whether an ICC profile is for grey or CMYK, say, and not for RGB (ICC.1:2022, section 7.2)."""
    return profile[36:40] == b"acsp" and profile[16:20] != b"RGB "


@dataclass(frozen=True)
class Metadata:
    """What travels with the picture unchanged: the raw bytes of its EXIF, ICC and XMP blocks (empty: none)."""

    exif: bytes = b""
    icc_profile: bytes = b""
    xmp: bytes = b""

    @property
    def colours(self) -> Metadata:
        """The ICC profile alone, without which the pixels' colours would be other ones."""
        return Metadata(icc_profile=self.icc_profile)


@dataclass(frozen=True)
class AlphaMask:
    """A coarse opacity mask: `samples` (rows, columns) uint8, one for each square of `2**log2_scale` pixels.

    Samples hold 0 (transparent) to `2**bits_per_sample - 1` (opaque); bits_per_sample is 1..8, log2_scale 0..6.
    """

    samples: NDArray[np.uint8]
    bits_per_sample: int
    log2_scale: int

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AlphaMask):
            return NotImplemented
        return (self.bits_per_sample, self.log2_scale) == (other.bits_per_sample, other.log2_scale) and _equal(
            self.samples, other.samples
        )


@dataclass(frozen=True)
class Codes:
    """The one value between bytes and networks.

    indices: a tuple of (rows, columns) int32 grids, coarse to fine; entry (r, c) of grid k is in
        0..codebook_size-1 of the k-th grid of the rate point.
    rate_point: index into the rate points of the model.
    """

    model: ModelReference
    width_px: int
    height_px: int
    rate_point: int
    indices: tuple[NDArray[np.int32], ...]
    caption: str = ""
    seed: int = DEFAULT_SEED
    alpha: AlphaMask | None = None
    metadata: Metadata = field(default_factory=Metadata)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Codes):
            return NotImplemented
        return self._plain() == other._plain() and (
            len(self.indices) == len(other.indices)
            and all(_equal(a, b) for a, b in zip(self.indices, other.indices, strict=True))
        )

    def _plain(self) -> tuple[object, ...]:
        return (
            self.model, self.width_px, self.height_px, self.rate_point,
            self.caption, self.seed, self.alpha, self.metadata,
        )  # fmt: skip


def _equal(a: NDArray[np.integer], b: NDArray[np.integer]) -> bool:
    return a.shape == b.shape and bool((a == b).all())
