"""Lossless compression of a chunk's contents: plain, raw deflate or Brotli, whichever is shortest.

Decompression never makes more bytes than its limit allows, so a few bytes that expand to gigabytes (a text bomb) cost
nothing.  Sources: RFC 1951 (deflate), RFC 7932 (Brotli).
"""

import zlib
from enum import IntEnum

from perco_engine.errors import InvalidStream, LimitExceeded

_DEFLATE_WINDOW_BITS = -15  # negative: no zlib header and no Adler-32, the file has a checksum of its own
_SLOW_BROTLI_BYTES = 1 << 18  # above this size Brotli's best quality takes seconds


class Coding(IntEnum):
    """How the payload of a chunk is compressed: the two lowest bits of its type byte (3 is reserved)."""

    PLAIN = 0
    DEFLATE = 1
    BROTLI = 2


def compress(content: bytes) -> tuple[Coding, bytes]:
    """The shortest coding of `content`, and its bytes; never longer than `content` itself."""
    import brotli

    deflate = zlib.compressobj(9, zlib.DEFLATED, _DEFLATE_WINDOW_BITS)
    quality = 11 if len(content) <= _SLOW_BROTLI_BYTES else 5
    candidates = {
        Coding.PLAIN: content,
        Coding.DEFLATE: deflate.compress(content) + deflate.flush(),
        Coding.BROTLI: brotli.compress(content, quality=quality),
    }
    coding = min(candidates, key=lambda coding: (len(candidates[coding]), coding))
    return coding, candidates[coding]


def decompress(coding: Coding, payload: bytes, limit_bytes: int) -> bytes:
    """The contents of a payload.

    Raises LimitExceeded if they are longer than `limit_bytes`, InvalidStream if the payload is not exactly one stream
    of its coding.
    """
    if coding is Coding.PLAIN:
        content, complete = payload[: limit_bytes + 1], True
    elif coding is Coding.DEFLATE:
        content, complete = _inflate(payload, limit_bytes + 1)
    else:
        content, complete = _decompress_brotli(payload, limit_bytes + 1)
    if len(content) > limit_bytes:
        raise LimitExceeded(
            f"a chunk of {len(payload)} bytes expands to more than {limit_bytes} bytes, the limit of its kind; "
            "the file is damaged, or was made to exhaust memory: do not use it"
        )
    if not complete:
        raise _malformed(coding)
    return content


def _inflate(payload: bytes, at_most_bytes: int) -> tuple[bytes, bool]:
    inflate = zlib.decompressobj(_DEFLATE_WINDOW_BITS)
    try:
        content = inflate.decompress(payload, at_most_bytes)
    except zlib.error as error:
        raise _malformed(Coding.DEFLATE) from error
    return content, inflate.eof and not inflate.unused_data


def _decompress_brotli(payload: bytes, at_least_bytes: int) -> tuple[bytes, bool]:
    import brotli

    decompressor = brotli.Decompressor()
    try:  # stops at the end of the buffer (tens of kilobytes) in which the limit is reached
        content: bytes = decompressor.process(payload, output_buffer_limit=at_least_bytes)
    except brotli.error as error:
        raise _malformed(Coding.BROTLI) from error
    return content, decompressor.is_finished()


def _malformed(coding: Coding) -> InvalidStream:
    return InvalidStream(
        f"the payload of a chunk is not one complete {coding.name.lower()} stream; write the file again"
    )
