"""Codes <-> the bytes of a file (FORMAT.md).

The rate points of the model that a file names say how many indices it holds; the caller looks them up by
`read_header(data).model`.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import cast

import numpy as np
from numpy.typing import NDArray

from perco_engine.bitstream import entropy
from perco_engine.bitstream.alpha import decode_alpha, encode_alpha, mask_shape
from perco_engine.bitstream.chunks import ChunkKind, encode_chunk
from perco_engine.bitstream.entropy import Coder, Decoder, uniform_cdf
from perco_engine.bitstream.fields import encode_varint
from perco_engine.bitstream.header import CHECKSUM_BYTES, Header, checksum, encode_header, read_header
from perco_engine.codes import Codes
from perco_engine.errors import ChecksumMismatch, InvalidStream, TruncatedFile, UnsupportedRatePoint
from perco_engine.rates import RatePoint

__all__ = ["Header", "pack", "read_header", "unpack", "unpack_partial"]

OWN_CODER = cast(Coder, entropy)


def pack(codes: Codes, rate_points: Sequence[RatePoint], *, coder: Coder = OWN_CODER) -> bytes:
    """The file that says what `codes` says.

    Raises ValueError where `codes` contradicts itself, its rate point, or the limits of the format.
    """
    if not 0 <= codes.rate_point < len(rate_points):
        raise ValueError(f"rate_point must be 0 to {len(rate_points) - 1} for this model, not {codes.rate_point}")
    point = rate_points[codes.rate_point]
    chunks = b"".join(
        encode_chunk(kind, content)
        for kind, content in (
            (ChunkKind.CAPTION, _encode_caption(codes.caption)),
            (ChunkKind.ALPHA, encode_alpha(codes.alpha, codes.width_px, codes.height_px) if codes.alpha else b""),
            (ChunkKind.EXIF, codes.metadata.exif),
            (ChunkKind.ICC_PROFILE, codes.metadata.icc_profile),
            (ChunkKind.XMP, codes.metadata.xmp),
        )
        if content
    )
    header = encode_header(
        codes.model, codes.width_px, codes.height_px, codes.rate_point, codes.seed, has_chunks=bool(chunks)
    )
    _check_indices(codes, point)
    hyper_latent = coder.encode([grid.reshape(-1) for grid in codes.indices], _cdfs(point))
    length = encode_varint(len(hyper_latent)) if chunks else b""
    body = header + length + hyper_latent + chunks
    return body + checksum(body)


def unpack(
    data: bytes, rate_points: Sequence[RatePoint], *, coder: Coder = OWN_CODER, grids: int | None = None
) -> Codes:
    """What a file says; the inverse of `pack`.

    grids: read only the first so many grids of the file (at least 1), for a small picture of a large file; the Codes
        are then those of the rate point that these grids make, and whether the rest is sound is not looked at.

    Raises a BitstreamError as `read_header` does, and UnsupportedRatePoint if the model does not offer the rate point.
    """
    try:
        header = read_header(data)
    except ChecksumMismatch:
        _raise_if_cut(data, rate_points, coder)
        raise
    point = _rate_point(header, rate_points)
    if grids is None or grids >= len(point.grids):
        return _codes(header, header.rate_point, _decode(header.hyper_latent, header, point, coder), point)
    level = next(k for k, lower in enumerate(rate_points) if lower.grids == point.grids[:grids])
    decoder = Decoder(header.hyper_latent)
    first = zip(_counts(header, rate_points[level]), _cdfs(rate_points[level]), strict=True)
    return _codes(header, level, [decoder.decode(*grid) for grid in first], rate_points[level])


def unpack_partial(data: bytes, rate_points: Sequence[RatePoint], *, coder: Coder = OWN_CODER) -> Codes:
    """What can be had of a file that was cut: Codes at the highest rate point whose grids are there in full.

    A file that is whole comes out as `unpack` gives it; the caption and the other chunks come along as far as they are
    there in full.  Raises TruncatedFile if not even the coarsest grid is there, and as `unpack` does otherwise: a file
    that is cut right behind the type and the one-byte length of a chunk is a ChecksumMismatch, as its last two bytes
    are then no chunk and might be a checksum.
    """
    try:
        return unpack(data, rate_points, coder=coder)
    except TruncatedFile as error:
        header = read_header(data, allow_truncated=True)
        point = _rate_point(header, rate_points)
        decoder = Decoder(header.hyper_latent)
        grids: list[NDArray[np.int32]] = []
        with suppress(TruncatedFile):
            for count, cdf in zip(_counts(header, point), _cdfs(point), strict=True):
                grids.append(decoder.decode(count, cdf))
        offered = [k for k, lower in enumerate(rate_points) if lower.grids == point.grids[: len(grids)]]
        if not grids or not offered:
            raise TruncatedFile(
                "the file was cut within its coarsest grid of indices, nothing of the picture can be shown; "
                "copy or download it again"
            ) from error
        return _codes(header, offered[-1], grids, rate_points[offered[-1]])


def _codes(header: Header, rate_point: int, flat: Sequence[NDArray[np.int32]], point: RatePoint) -> Codes:
    shapes = point.shapes(header.width_px, header.height_px)
    alpha = None
    if header.alpha is not None:
        largest_rows, largest_columns = mask_shape(header.width_px, header.height_px, 0)
        content = header.alpha.content(limit_bytes=1 + largest_rows * largest_columns)
        alpha = decode_alpha(content, header.width_px, header.height_px)
    return Codes(
        model=header.model,
        width_px=header.width_px,
        height_px=header.height_px,
        rate_point=rate_point,
        indices=tuple(grid.reshape(shape) for grid, shape in zip(flat, shapes, strict=True)),
        caption=header.caption,
        seed=header.seed,
        alpha=alpha,
        metadata=header.metadata,
    )


def _raise_if_cut(data: bytes, rate_points: Sequence[RatePoint], coder: Coder) -> None:
    """Raises TruncatedFile if the bytes of a file with a wrong checksum evidently end too early."""
    header = read_header(data, allow_truncated=True)
    stream = header.hyper_latent
    if header.sizes_bytes["header"] + len(stream) == len(data):
        stream = stream[:-CHECKSUM_BYTES]
    if header.rate_point < len(rate_points):
        with suppress(InvalidStream):
            _decode(stream, header, rate_points[header.rate_point], coder)


def _decode(stream: bytes, header: Header, point: RatePoint, coder: Coder) -> list[NDArray[np.int32]]:
    return coder.decode(stream, _counts(header, point), _cdfs(point))


def _counts(header: Header, point: RatePoint) -> list[int]:
    return [rows * columns for rows, columns in point.shapes(header.width_px, header.height_px)]


def _cdfs(point: RatePoint) -> list[entropy.CDF]:
    return [uniform_cdf(grid.codebook_size) for grid in point.grids]


def _rate_point(header: Header, rate_points: Sequence[RatePoint]) -> RatePoint:
    if header.rate_point >= len(rate_points):
        raise UnsupportedRatePoint(
            f"the file has rate point {header.rate_point}, its model offers 0 to {len(rate_points) - 1}; "
            "install the version of the model that wrote it"
        )
    return rate_points[header.rate_point]


def _check_indices(codes: Codes, point: RatePoint) -> None:
    shapes = point.shapes(codes.width_px, codes.height_px)
    given = tuple(grid.shape for grid in codes.indices)
    if given != shapes:
        raise ValueError(f"the indices must have the shapes {shapes}, coarse to fine, not {given}")
    for grid, indices in zip(point.grids, codes.indices, strict=True):
        if not np.issubdtype(indices.dtype, np.integer):
            raise ValueError(f"the indices must be integers, not {indices.dtype}")
        if indices.min() < 0 or indices.max() >= grid.codebook_size:
            raise ValueError(
                f"the indices must be 0 to {grid.codebook_size - 1}, not {indices.min()} to {indices.max()}"
            )


def _encode_caption(caption: str) -> bytes:
    try:
        return caption.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("the caption holds half a surrogate pair, which is no character: remove it") from error
