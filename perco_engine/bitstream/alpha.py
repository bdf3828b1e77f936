"""The opacity mask <-> the contents of its chunk (FORMAT.md, "Alpha")."""

import numpy as np

from perco_engine.bitstream.chunks import MAX_CHUNK_BYTES
from perco_engine.bitstream.compression import compress
from perco_engine.codes import AlphaMask
from perco_engine.errors import InvalidStream

MAX_LOG2_SCALE = 6
_LEFT_DIFFERENCES = 0x80


def mask_shape(width_px: int, height_px: int, log2_scale: int) -> tuple[int, int]:
    """Rows and columns of a mask with one sample for each square of `2**log2_scale` pixels; partial squares count."""
    return -(-height_px >> log2_scale), -(-width_px >> log2_scale)


def encode_alpha(mask: AlphaMask, width_px: int, height_px: int) -> bytes:
    """The contents of the alpha chunk, before compression: of both filters the one that compresses better.

    Raises ValueError for a mask that does not fit the picture, or the format.
    """
    if not (0 <= mask.log2_scale <= MAX_LOG2_SCALE and 1 <= mask.bits_per_sample <= 8):
        raise ValueError(f"an alpha mask has log2_scale 0 to {MAX_LOG2_SCALE} and 1 to 8 bits a sample")
    shape = mask_shape(width_px, height_px, mask.log2_scale)
    if mask.samples.dtype != np.uint8 or mask.samples.shape != shape:
        raise ValueError(f"the alpha mask must be uint8 {shape}, not {mask.samples.dtype} {mask.samples.shape}")
    if mask.samples.max() >> mask.bits_per_sample:
        raise ValueError(f"an alpha sample is at most {2**mask.bits_per_sample - 1}, not {mask.samples.max()}")
    if 1 + mask.samples.size > MAX_CHUNK_BYTES:
        raise ValueError(f"the alpha mask has {mask.samples.size} samples, too many for the format: raise log2_scale")
    parameters = mask.log2_scale << 4 | mask.bits_per_sample - 1
    differences = np.diff(mask.samples, axis=1, prepend=np.uint8(0))
    return min(
        bytes([parameters]) + mask.samples.tobytes(),
        bytes([parameters | _LEFT_DIFFERENCES]) + differences.tobytes(),
        key=lambda content: len(compress(content)[1]),
    )


def decode_alpha(content: bytes, width_px: int, height_px: int) -> AlphaMask:
    """The mask in the contents of an alpha chunk, one byte or more.

    Raises InvalidStream if they do not fit a picture of this size.
    """
    log2_scale = content[0] >> 4 & 0b111
    if log2_scale > MAX_LOG2_SCALE or content[0] & 0b1000:
        raise InvalidStream("the alpha mask has parameters that this release does not know; upgrade pillow-perco")
    bits_per_sample = 1 + (content[0] & 0b111)
    rows, columns = mask_shape(width_px, height_px, log2_scale)
    if len(content) != 1 + rows * columns:
        raise InvalidStream(
            f"the alpha mask has {len(content) - 1} samples, not {rows} x {columns}; write the file again"
        )
    samples = np.frombuffer(content, np.uint8, offset=1).reshape(rows, columns)
    samples = np.cumsum(samples, axis=1, dtype=np.uint8) if content[0] & _LEFT_DIFFERENCES else samples.copy()
    if samples.max() >> bits_per_sample:
        raise InvalidStream(f"an alpha sample exceeds its {bits_per_sample} bits; write the file again")
    return AlphaMask(samples, bits_per_sample, log2_scale)
