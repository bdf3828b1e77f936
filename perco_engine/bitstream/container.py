"""Codes <-> the bytes of a file (FORMAT.md).

The rate points of the model that a file names say how many indices it holds, and its prior, if it has one, how probable
they are; the caller looks both up by `read_header(data).model`.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from perco_engine.bitstream import entropy
from perco_engine.bitstream.alpha import decode_alpha, encode_alpha, mask_shape
from perco_engine.bitstream.chunks import ChunkKind, encode_chunk
from perco_engine.bitstream.entropy import Coder, Decoder, uniform_cdf
from perco_engine.bitstream.fields import encode_varint
from perco_engine.bitstream.header import CHECKSUM_BYTES, Header, checksum, encode_header, read_header
from perco_engine.bitstream.prior import Prior, most_grids
from perco_engine.codes import Codes
from perco_engine.errors import BitstreamError, ChecksumMismatch, InvalidStream, TruncatedFile, UnsupportedRatePoint
from perco_engine.rates import RatePoint

__all__ = ["Header", "pack", "read_header", "unpack", "unpack_partial"]

OWN_CODER: Coder = entropy


def pack(
    codes: Codes, rate_points: Sequence[RatePoint], *, prior: Prior | None = None, coder: Coder = OWN_CODER
) -> bytes:
    """The file that says what `codes` says: its indices by the prior, or as equally probable, whichever is shorter.

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
    header = partial(
        encode_header,
        codes.model,
        codes.width_px,
        codes.height_px,
        codes.rate_point,
        codes.seed,
        has_chunks=bool(chunks),
    )
    start = header(by_prior=False)  # checks these fields before anything is done with them
    _check_indices(codes, point)
    hyper_latent = coder.encode([grid.reshape(-1) for grid in codes.indices], _cdfs(point))
    if prior is not None:
        likelier = _encode_by_prior(codes, point, prior)
        if len(likelier) < len(hyper_latent):
            start, hyper_latent = header(by_prior=True), likelier
    length = encode_varint(len(hyper_latent)) if chunks else b""
    body = start + length + hyper_latent + chunks
    return body + checksum(body)


def unpack(
    data: bytes,
    rate_points: Sequence[RatePoint],
    *,
    prior: Prior | None = None,
    coder: Coder = OWN_CODER,
    grids: int | None = None,
) -> Codes:
    """What a file says; the inverse of `pack`.

    grids: read only the first so many grids of the file (at least 1), for a small picture of a large file; the Codes
        are then those of the rate point that these grids make, and whether the rest is sound is not looked at.

    Raises a BitstreamError as `read_header` does, UnsupportedRatePoint if the model does not offer the rate point, and
    InvalidModel if the prior is not one for it.
    """
    try:
        header = read_header(data)
    except ChecksumMismatch:
        _raise_if_cut(data, rate_points, prior, coder)
        raise
    point = _rate_point(header, rate_points)
    if grids is None or grids >= len(point.grids):
        return _codes(header, header.rate_point, _decode(header.hyper_latent, header, point, prior, coder), point)
    level = next(k for k, lower in enumerate(rate_points) if lower.grids == point.grids[:grids])
    first = list(_decoded_grids(Decoder(header.hyper_latent), header, rate_points[level], prior))
    return _codes(header, level, first, rate_points[level])


def unpack_partial(
    data: bytes, rate_points: Sequence[RatePoint], *, prior: Prior | None = None, coder: Coder = OWN_CODER
) -> Codes:
    """What can be had of a file that was cut: Codes at the highest rate point whose grids are there in full.

    A file that is whole comes out as `unpack` gives it; the caption and the other chunks come along as far as they are
    there in full and can be read.  Raises TruncatedFile if not even the coarsest grid is there, and as `unpack` does
    otherwise; but where chunks follow, a wrong checksum may be a cut behind the first two bytes of a further chunk, and
    is no error.
    """
    try:
        return unpack(data, rate_points, prior=prior, coder=coder)
    except (TruncatedFile, ChecksumMismatch) as error:
        header = read_header(data, allow_truncated=True)
        ends_with_stream = _ends_with_its_stream(data, header)
        if ends_with_stream and isinstance(error, ChecksumMismatch):
            raise  # with all its indices: it was not cut
        point = _rate_point(header, rate_points)
        grids: list[NDArray[np.int32]] = []
        decoder = Decoder(header.hyper_latent)
        with suppress(TruncatedFile):
            for grid in _decoded_grids(decoder, header, point, prior):
                grids.append(grid)
            if not ends_with_stream:
                decoder.finish()
        offered = [k for k, lower in enumerate(rate_points) if lower.grids == point.grids[: len(grids)]]
        if not grids or not offered:
            raise TruncatedFile(
                "the file was cut within its coarsest grid of indices, nothing of the picture can be shown; "
                "copy or download it again"
            ) from error
        try:
            return _codes(header, offered[-1], grids, rate_points[offered[-1]])
        except BitstreamError:  # the opacity mask is broken
            return _codes(replace(header, alpha=None), offered[-1], grids, rate_points[offered[-1]])


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


def _raise_if_cut(data: bytes, rate_points: Sequence[RatePoint], prior: Prior | None, coder: Coder) -> None:
    """Raises TruncatedFile if the bytes of a file with a wrong checksum evidently end too early."""
    header = read_header(data, allow_truncated=True)
    stream = header.hyper_latent
    if _ends_with_its_stream(data, header):
        stream = stream[:-CHECKSUM_BYTES]
    if header.rate_point < len(rate_points):
        with suppress(InvalidStream):
            _decode(stream, header, rate_points[header.rate_point], prior, coder)


def _ends_with_its_stream(data: bytes, header: Header) -> bool:
    """Whether nothing follows the hyper-latent of a file that may be cut: it has no chunks, or lost them all."""
    return header.sizes_bytes["header"] + len(header.hyper_latent) == len(data)


def _encode_by_prior(codes: Codes, point: RatePoint, prior: Prior) -> bytes:
    """The stream of all indices by the prior."""
    encoder = entropy.Encoder()

    def code(level: int, cells: tuple[slice, slice], cdf: entropy.CDF) -> NDArray[np.int32]:
        symbols = codes.indices[level][cells].reshape(-1)
        encoder.encode(symbols, cdf)
        return symbols

    for _ in prior.walk(point, codes.width_px, codes.height_px, code):
        pass
    return encoder.finish()


def _decode(
    stream: bytes, header: Header, point: RatePoint, prior: Prior | None, coder: Coder
) -> Sequence[NDArray[np.int32]]:
    """All grids of a file."""
    if not header.by_prior:
        return coder.decode(stream, _counts(header, point), _cdfs(point))
    decoder = Decoder(stream)
    grids = list(_decoded_grids(decoder, header, point, prior))
    decoder.finish()
    return grids


def _decoded_grids(
    decoder: Decoder, header: Header, point: RatePoint, prior: Prior | None
) -> Iterator[NDArray[np.int32]]:
    """The grids of a file, one after the other, as far as the stream holds them in full."""
    if not header.by_prior:
        for count, cdf in zip(_counts(header, point), _cdfs(point), strict=True):
            yield decoder.decode(count, cdf)
        return
    if prior is None:
        raise InvalidStream("the file is coded by a prior, and its model has none: it is damaged, or of another model")
    size = (header.width_px, header.height_px)
    possible = replace(point, grids=point.grids[: most_grids(point, *size, len(header.hyper_latent))])
    yield from prior.walk(possible, *size, lambda level, cells, cdf: decoder.decode(len(cdf), cdf))
    if possible != point:
        raise entropy.too_short(header.hyper_latent)


def _counts(header: Header, point: RatePoint) -> list[int]:
    return [rows * columns for rows, columns in point.shapes(header.width_px, header.height_px)]


def _cdfs(point: RatePoint) -> list[entropy.CDF]:
    return [uniform_cdf(grid.codebook_size) for grid in point.grids]


def _rate_point(header: Header, rate_points: Sequence[RatePoint]) -> RatePoint:
    if header.rate_point >= len(rate_points):
        raise UnsupportedRatePoint(
            f"the file has rate point {header.rate_point}, its model offers 0 to {len(rate_points) - 1}: "
            f"update pillow-perco, or the file is damaged"
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
