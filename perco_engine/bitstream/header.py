"""The header of a file: everything that can be said of it without its pixels, read by the standard library alone."""

import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from perco_engine.bitstream.chunks import Chunk, ChunkKind, decode_chunks
from perco_engine.bitstream.fields import FieldReader, encode_varint
from perco_engine.codes import DEFAULT_SEED, Metadata, ModelReference
from perco_engine.errors import (
    BitstreamError,
    ChecksumMismatch,
    InvalidHeader,
    InvalidStream,
    NotAPercoFile,
    TruncatedFile,
    UnsupportedChunk,
    UnsupportedVersion,
)

MAGIC = b"\x93PCo"
VERSION = 1
MAX_SIDE_PX = 65535
MAX_SEED = 2**32 - 1
MAX_RATE_POINTS = 8
FINGERPRINT_BYTES = 8
FAMILY_FINGERPRINT_BYTES = 4
CHECKSUM_BYTES = 2
UNREGISTERED_MODEL = 0
FIRST_FAMILY = 32
RESERVED_MODEL = 63
_BY_PRIOR = 0x08
_SEED_FOLLOWS = 0x80
_CHUNKS_FOLLOW = 0x40
_MODEL_MASK = 0x3F
_READ_WITH_THE_HEADER = (ChunkKind.CAPTION, ChunkKind.EXIF, ChunkKind.ICC_PROFILE, ChunkKind.XMP)


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    rate_point: index into the rate points of the model, 0..7.
    hyper_latent: the entropy-coded indices; `container.unpack` decodes them.
    by_prior: whether they are coded by the model's prior, and not as equally probable.
    alpha: the chunk of the opacity mask, still compressed, or None.
    sizes_bytes: the bytes of each stream that the file holds (header, hyper_latent, caption, alpha, exif, icc_profile,
        xmp, unknown, checksum); they add up to the size of the file, unless it is cut.
    intact: whether the checksum matches; False only where `read_header` was told to allow it.
    """

    model: ModelReference
    width_px: int
    height_px: int
    rate_point: int
    seed: int
    hyper_latent: bytes = field(repr=False)
    by_prior: bool = False
    caption: str = ""
    metadata: Metadata = field(default_factory=Metadata)
    alpha: Chunk | None = field(default=None, repr=False)
    sizes_bytes: Mapping[str, int] = field(default_factory=dict)
    intact: bool = True

    @property
    def has_alpha(self) -> bool:
        """Whether the file holds an opacity mask."""
        return self.alpha is not None


def fingerprint_bytes(registry_id: int) -> int:
    """How many bytes of the weights' fingerprint a file holds that names its model by this id, 0..62."""
    if registry_id == UNREGISTERED_MODEL:
        return FINGERPRINT_BYTES
    return FAMILY_FINGERPRINT_BYTES if registry_id >= FIRST_FAMILY else 0


def checksum(data: bytes) -> bytes:
    """The two bytes that end a file whose other bytes are `data`: CRC-16/CCITT-FALSE, big-endian."""
    return binascii.crc_hqx(data, 0xFFFF).to_bytes(CHECKSUM_BYTES, "big")


def encode_header(
    model: ModelReference,
    width_px: int,
    height_px: int,
    rate_point: int,
    seed: int,
    *,
    by_prior: bool,
    has_chunks: bool,
) -> bytes:
    """The bytes before the hyper-latent stream (and before its length, where chunks follow).

    Raises ValueError for a value that the format cannot hold.
    """
    _require(0 <= model.registry_id < RESERVED_MODEL, f"registry_id must be 0 to 62, not {model.registry_id}")
    due_bytes = fingerprint_bytes(model.registry_id)
    _require(
        len(model.fingerprint) == due_bytes,
        f"a model of registry_id {model.registry_id} has a fingerprint of {due_bytes} bytes in a file, "
        f"not {len(model.fingerprint)}",
    )
    for name, side_px in (("width_px", width_px), ("height_px", height_px)):
        _require(1 <= side_px <= MAX_SIDE_PX, f"{name} must be 1 to {MAX_SIDE_PX}, not {side_px}: resize the image")
    _require(0 <= rate_point < MAX_RATE_POINTS, f"rate_point must be 0 to {MAX_RATE_POINTS - 1}, not {rate_point}")
    _require(0 <= seed <= MAX_SEED, f"seed must be 0 to {MAX_SEED}, not {seed}")
    has_seed = seed != DEFAULT_SEED
    return b"".join(
        (
            MAGIC,
            bytes([VERSION << 4 | _BY_PRIOR * by_prior | rate_point]),
            bytes([_SEED_FOLLOWS * has_seed | _CHUNKS_FOLLOW * has_chunks | model.registry_id]),
            (width_px - 1).to_bytes(2, "big"),
            (height_px - 1).to_bytes(2, "big"),
            model.fingerprint,
            encode_varint(seed - 1) if has_seed else b"",
        )
    )


def read_header(data: bytes, *, allow_truncated: bool = False) -> Header:
    """Reads everything of a file but its pixels.

    data: the whole file.
    allow_truncated: take what is there of a cut or damaged file, with `intact=False` and without the chunks that are
        incomplete, or broken, or behind a broken one; the `hyper_latent` of a file without chunks then holds all bytes
        to the end, checksum or not.

    Raises NotAPercoFile, UnsupportedVersion, TruncatedFile, ChecksumMismatch, InvalidHeader, InvalidStream,
    UnsupportedChunk or LimitExceeded.
    """
    _check_magic_and_version(data)
    body = data[:-CHECKSUM_BYTES]
    intact = data[-CHECKSUM_BYTES:] == checksum(body)
    try:
        header = _parse(body, intact=True)
    except TruncatedFile:
        if not allow_truncated:
            raise
    except UnsupportedChunk as error:
        if intact:
            raise
        raise UnsupportedChunk(f"{error}, or copy or download the file again: its checksum does not match") from error
    except BitstreamError as error:
        if intact:
            raise
        if not allow_truncated:  # what is wrong with damaged bytes says nothing: name the damage
            raise _checksum_mismatch() from error
    else:
        if intact:
            return header
        if not allow_truncated:
            raise _checksum_mismatch()
    return _parse(data, intact=False)


def _parse(data: bytes, *, intact: bool) -> Header:
    """The header of a file; `data` ends before the checksum if `intact`, else wherever the file was cut."""
    reader = FieldReader(data, position=len(MAGIC))
    (version_and_rate_point,) = reader.take(1, "the version")
    (flags,) = reader.take(1, "the model")
    width_px = 1 + int.from_bytes(reader.take(2, "the width"), "big")
    height_px = 1 + int.from_bytes(reader.take(2, "the height"), "big")
    if max(width_px, height_px) > MAX_SIDE_PX:
        raise InvalidHeader(f"the picture is {width_px} x {height_px} pixels; a side has at most {MAX_SIDE_PX}")
    registry_id = flags & _MODEL_MASK
    if registry_id == RESERVED_MODEL:
        raise InvalidHeader(f"the file names model {RESERVED_MODEL}, which is reserved; upgrade pillow-perco")
    fingerprint = reader.take(fingerprint_bytes(registry_id), "the fingerprint of the model")
    seed = DEFAULT_SEED
    if flags & _SEED_FOLLOWS:
        seed = 1 + reader.take_varint("the seed")
        if seed > MAX_SEED:
            raise InvalidHeader(f"the seed is {seed}; it is at most {MAX_SEED}")

    return _parse_streams(
        Header(
            model=ModelReference(registry_id, fingerprint),
            width_px=width_px,
            height_px=height_px,
            rate_point=version_and_rate_point & MAX_RATE_POINTS - 1,
            by_prior=bool(version_and_rate_point & _BY_PRIOR),
            seed=seed,
            hyper_latent=b"",
            intact=intact,
        ),
        reader,
        chunks_follow=bool(flags & _CHUNKS_FOLLOW),
    )


def _parse_streams(fields: Header, reader: FieldReader, *, chunks_follow: bool) -> Header:
    """The header completed by the hyper-latent and the chunks that follow its fields."""
    chunks: list[Chunk] = []
    header_bytes = reader.position
    if chunks_follow:
        length_bytes = reader.take_varint("the length of the hyper-latent")
        header_bytes = reader.position
        if not fields.intact:
            length_bytes = min(length_bytes, reader.remaining_bytes)
        hyper_latent = reader.take(length_bytes, "the hyper-latent")
        decoded = decode_chunks(reader.take_rest())
        chunks.extend(decoded if fields.intact else _complete_chunks(decoded))
        if fields.intact and not chunks:
            raise TruncatedFile("the file ends before the chunks that it announces; copy or download it again")
    else:
        hyper_latent = reader.take_rest()

    sizes_bytes = {"header": header_bytes, "hyper_latent": len(hyper_latent)}
    for chunk in chunks:
        name = "unknown" if chunk.kind is None else chunk.kind.name.lower()
        sizes_bytes[name] = sizes_bytes.get(name, 0) + chunk.size_bytes
    if fields.intact:
        sizes_bytes["checksum"] = CHECKSUM_BYTES
    contents = {chunk.kind: chunk.content() for chunk in chunks if chunk.kind in _READ_WITH_THE_HEADER}
    return replace(
        fields,
        hyper_latent=hyper_latent,
        caption=_decode_caption(contents.get(ChunkKind.CAPTION, b"")),
        metadata=Metadata(
            exif=contents.get(ChunkKind.EXIF, b""),
            icc_profile=contents.get(ChunkKind.ICC_PROFILE, b""),
            xmp=contents.get(ChunkKind.XMP, b""),
        ),
        alpha=next((chunk for chunk in chunks if chunk.kind is ChunkKind.ALPHA), None),
        sizes_bytes=sizes_bytes,
    )


def _check_magic_and_version(data: bytes) -> None:
    if data[: len(MAGIC)] != MAGIC:
        raise NotAPercoFile("this is not a .perco file: it does not begin with the bytes 93 50 43 6F")
    if len(data) == len(MAGIC):
        raise TruncatedFile("the file ends after its first four bytes; copy or download it again")
    version = data[len(MAGIC)] >> 4
    if version != VERSION:
        raise UnsupportedVersion(
            f"the file has format version {version}, this release reads version {VERSION}; upgrade pillow-perco"
        )


def _complete_chunks(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """The chunks before the place where the file was cut, as far as their contents can be read.

    Raises UnsupportedChunk.
    """
    try:
        for chunk in chunks:
            if chunk.kind in _READ_WITH_THE_HEADER:
                content = chunk.content()
                if chunk.kind is ChunkKind.CAPTION:
                    _decode_caption(content)
            yield chunk
    except UnsupportedChunk:
        raise
    except BitstreamError:
        return


def _decode_caption(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidStream("the caption is not valid UTF-8; write the file again") from error


def _checksum_mismatch() -> ChecksumMismatch:
    return ChecksumMismatch("the file is damaged: its checksum does not match; copy or download it again")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
