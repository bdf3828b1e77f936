"""Chunks: what a file holds beside its hyper-latent, each with a type, a length and a payload (FORMAT.md, "Chunks")."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from perco_engine.bitstream.compression import Coding, compress, decompress
from perco_engine.bitstream.fields import FieldReader, encode_varint
from perco_engine.errors import InvalidHeader, InvalidStream, UnsupportedChunk

MAX_CAPTION_BYTES = 4096
MAX_CHUNK_BYTES = 16 * 2**20
_OPTIONAL = 0b100000


class ChunkKind(IntEnum):
    """The upper six bits of a type byte, in the order in which chunks follow each other."""

    CAPTION = 1
    ALPHA = 2
    EXIF = _OPTIONAL | 1
    ICC_PROFILE = _OPTIONAL | 2
    XMP = _OPTIONAL | 3

    @property
    def limit_bytes(self) -> int:
        """The most bytes that a chunk of this kind may decode to."""
        return MAX_CAPTION_BYTES if self is ChunkKind.CAPTION else MAX_CHUNK_BYTES


@dataclass(frozen=True)
class Chunk:
    """A chunk of the file, still compressed.  `kind` is None for an optional chunk that this release does not know."""

    kind: ChunkKind | None
    coding: Coding
    payload: bytes
    size_bytes: int

    def content(self, limit_bytes: int = MAX_CHUNK_BYTES) -> bytes:
        """What the chunk holds, which is not nothing.

        Raises LimitExceeded beyond the kind's limit or `limit_bytes`, or InvalidStream.
        """
        limit = limit_bytes if self.kind is None else min(limit_bytes, self.kind.limit_bytes)
        content = decompress(self.coding, self.payload, limit)
        if not content:
            raise InvalidStream("a chunk decodes to nothing; a writer leaves such a chunk out")
        return content


def encode_chunk(kind: ChunkKind, content: bytes) -> bytes:
    """A chunk's bytes: the type byte, the length of the payload, and the payload in the shortest coding.

    Raises ValueError if `content` is longer than its kind allows.
    """
    if len(content) > kind.limit_bytes:
        name = kind.name.lower()
        raise ValueError(
            f"{name} has {len(content)} bytes, the format holds {kind.limit_bytes}: shorten it or leave it out"
        )
    coding, payload = compress(content)
    return bytes([kind << 2 | coding]) + encode_varint(len(payload)) + payload


def decode_chunks(data: bytes) -> Iterator[Chunk]:
    """The chunks that `data` is made of, in order.

    Raises TruncatedFile; UnsupportedChunk for a required chunk of an unknown kind or coding; InvalidHeader for an empty
    chunk, or one that is out of order or there twice.
    """
    reader = FieldReader(data)
    previous = 0
    while reader.remaining_bytes:
        start = reader.position
        (type_byte,) = reader.take(1, "the type of a chunk")
        number = type_byte >> 2
        if number <= previous:
            raise InvalidHeader(f"chunk type {number} follows type {previous}: chunks ascend, each at most once")
        previous = number
        length_bytes = reader.take_varint("the length of a chunk")
        if length_bytes == 0:
            raise InvalidHeader(f"chunk type {number} is empty; a writer leaves such a chunk out")
        payload = reader.take(length_bytes, f"a chunk of type {number}")
        yield _chunk(type_byte, payload, reader.position - start)


def _chunk(type_byte: int, payload: bytes, size_bytes: int) -> Chunk:
    number = type_byte >> 2
    try:
        return Chunk(ChunkKind(number), Coding(type_byte & 0b11), payload, size_bytes)
    except ValueError:
        if number & _OPTIONAL:
            return Chunk(None, Coding.PLAIN, payload, size_bytes)
        raise UnsupportedChunk(
            f"the file needs a feature that this release does not know (chunk type byte 0x{type_byte:02X}); "
            "upgrade pillow-perco"
        ) from None
