"""One case for each way in which a file can be wrong, the error that names it, and bounds on what it may cost."""

import contextlib
import zlib

import brotli
import numpy as np
import pytest
from conftest import peak_bytes
from numpy.typing import NDArray

from perco_engine.bitstream import pack, read_header, unpack, unpack_partial
from perco_engine.bitstream.fields import encode_varint
from perco_engine.bitstream.header import checksum
from perco_engine.codes import AlphaMask, Codes, Metadata, ModelReference
from perco_engine.errors import (
    BitstreamError,
    ChecksumMismatch,
    InvalidHeader,
    InvalidStream,
    LimitExceeded,
    NotAPercoFile,
    TruncatedFile,
    UnsupportedChunk,
    UnsupportedVersion,
)
from perco_engine.rates import EMBEDDED, Grid, RatePoint, ladder

ONE_GRID = (RatePoint(0.125, (Grid(8, 256),)),)
PLAIN_BODY = bytes.fromhex("93 50 43 6F  10  01  00 07 00 07  A5 40")


def file_of(body: bytes | str) -> bytes:
    """A file with a right checksum."""
    body = bytes.fromhex(body) if isinstance(body, str) else body
    return body + checksum(body)


def file_with(*chunks: bytes | str) -> bytes:
    """The plain file with these chunks."""
    parts = [bytes.fromhex(chunk) if isinstance(chunk, str) else chunk for chunk in chunks]
    return file_of(bytes.fromhex("93 50 43 6F  10  41  00 07 00 07  02  A5 40") + b"".join(parts))


def chunk_of(type_byte: int, payload: bytes) -> bytes:
    return bytes([type_byte]) + encode_varint(len(payload)) + payload


def deflate(content: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return compressor.compress(content) + compressor.flush()


CAPTION = "04 03 646F67"

HEADERS: dict[str, tuple[bytes, type[BitstreamError], str]] = {
    "empty": (b"", NotAPercoFile, "not a .perco file"),
    "another format": (b"\x89PNG\r\n\x1a\n" + bytes(20), NotAPercoFile, "not a .perco file"),
    "cut within the magic": (b"\x93PC", NotAPercoFile, "not a .perco file"),
    "bit 7 stripped": (bytes(byte & 0x7F for byte in file_of(PLAIN_BODY)), NotAPercoFile, "not a .perco file"),
    "the magic alone": (b"\x93PCo", TruncatedFile, "first four bytes"),
    "version 0": (file_of("9350436F 00 01 00070007 A540"), UnsupportedVersion, "version 0.*upgrade"),
    "version 2": (file_of("9350436F 20 01 00070007 A540"), UnsupportedVersion, "version 2.*upgrade"),
    "version 15, nothing behind it": (b"\x93PCo\xf0", UnsupportedVersion, "version 15"),
    "wrong checksum": (PLAIN_BODY + b"\x63\x06", ChecksumMismatch, "damaged"),
    "reserved model": (file_of("9350436F 10 3F 00070007 A540"), InvalidHeader, "model 63"),
    "width of 65536": (file_of("9350436F 10 01 FFFF0007 A540"), InvalidHeader, "65536 x 8"),
    "height of 65536": (file_of("9350436F 10 01 0007FFFF A540"), InvalidHeader, "8 x 65536"),
    "cut within the size": (file_of("9350436F 10 01 0007 00"), TruncatedFile, "the height needs 2 bytes and 1 are"),
    "cut within the fingerprint": (file_of("9350436F 10 00 00070007 01234567"), TruncatedFile, "fingerprint"),
    "cut within a family's fingerprint": (file_of("9350436F 10 20 00070007 012345"), TruncatedFile, "fingerprint"),
    "cut before the seed": (file_of("9350436F 10 81 00070007"), TruncatedFile, "the seed"),
    "seed of 2**32": (file_of("9350436F 10 81 00070007 FFFFFFFF0F A540"), InvalidHeader, "seed is 4294967296"),
    "seed beyond 32 bits": (file_of("9350436F 10 81 00070007 FFFFFFFF1F A540"), InvalidHeader, "the seed is malformed"),
    "seed of six bytes": (file_of("9350436F 10 81 00070007 808080808001 A540"), InvalidHeader, "the seed is malformed"),
    "superfluous byte in the seed": (file_of("9350436F 10 81 00070007 8100 A540"), InvalidHeader, "superfluous"),
    "hyper-latent longer than the file": (file_of("9350436F 10 41 00070007 7F A540"), TruncatedFile, "hyper-latent"),
    "chunks announced, none there": (file_of("9350436F 10 41 00070007 02 A540"), TruncatedFile, "it announces"),
    "chunk without a length": (file_with("04"), TruncatedFile, "length of a chunk"),
    "chunk longer than the file": (file_with("04 7F 646F67"), TruncatedFile, "a chunk of type 1 needs 127"),
    "chunk of four gigabytes": (file_with("04 FFFFFFFF0F 646F67"), TruncatedFile, "needs 4294967295 bytes"),
    "empty chunk": (file_with("04 00"), InvalidHeader, "empty"),
    "caption twice": (file_with(CAPTION, CAPTION), InvalidHeader, "at most once"),
    "chunks out of order": (file_with("84 01 00", CAPTION), InvalidHeader, "chunks ascend"),
    "chunk type 0": (file_with("00 01 00"), InvalidHeader, "chunks ascend"),
    "unknown required chunk": (file_with("0C 01 00"), UnsupportedChunk, "0x0C.*upgrade"),
    "required chunk in the reserved coding": (file_with("07 03 646F67"), UnsupportedChunk, "0x07.*upgrade"),
    "alpha in the reserved coding": (file_with("0B 01 00"), UnsupportedChunk, "0x0B"),
    "caption is not UTF-8": (file_with("04 02 C328"), InvalidStream, "UTF-8"),
    "caption holds half a surrogate pair": (file_with("04 03 EDA0BD"), InvalidStream, "UTF-8"),
    "malformed deflate": (file_with("05 03 FFFFFF"), InvalidStream, "deflate"),
    "cut deflate": (file_with(chunk_of(5, deflate(b"dog" * 9)[:-1])), InvalidStream, "deflate"),
    "bytes behind deflate": (file_with(chunk_of(5, deflate(b"dog") + b"\0")), InvalidStream, "deflate"),
    "malformed Brotli": (file_with("06 03 FFFFFF"), InvalidStream, "brotli"),
    "cut Brotli": (file_with(chunk_of(6, brotli.compress(b"dog" * 9)[:-1])), InvalidStream, "brotli"),
    "bytes behind Brotli": (file_with(chunk_of(6, brotli.compress(b"dog") + b"\0")), InvalidStream, "brotli"),
    "caption of 4097 bytes": (file_with(chunk_of(4, b"a" * 4097)), LimitExceeded, "more than 4096"),
    "malformed EXIF chunk": (file_with("85 03 FFFFFF"), InvalidStream, "deflate"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "error", "message"), HEADERS.values(), ids=HEADERS)
def test_wrong_header(data: bytes, error: type[BitstreamError], message: str) -> None:
    for read in (read_header, lambda data: unpack(data, ONE_GRID)):
        with pytest.raises(error, match=message) as caught:
            read(data)
        assert type(caught.value) is error


PICTURES: dict[str, tuple[bytes, type[BitstreamError], str]] = {
    "no index": (file_of("9350436F 10 01 00070007"), TruncatedFile, "indices"),
    "index without the flush": (file_of("9350436F 10 01 00070007 A5"), TruncatedFile, "hyper-latent ends"),
    "cut, and so without its checksum": (file_of(PLAIN_BODY)[:-1], TruncatedFile, "hyper-latent ends"),
    "byte behind the indices": (file_of("9350436F 10 01 00070007 A54000"), InvalidStream, "does not end"),
    "another flush": (file_of("9350436F 10 01 00070007 A580"), InvalidStream, "does not end"),
    "padding is not zero": (file_of("9350436F 10 01 00070007 A541"), InvalidStream, "does not end"),
    "absurd size": (file_of("9350436F 10 01 FFFEFFFE A540A540"), TruncatedFile, "indices of the picture"),
    "alpha too short": (file_with("08 01 37"), InvalidStream, "0 samples, not 1 x 1"),
    "alpha too long": (file_with("08 03 37 0000"), InvalidStream, "2 samples, not 1 x 1"),
    "alpha of an unknown scale": (file_with("08 02 77 00"), InvalidStream, "upgrade"),
    "alpha with its reserved bit": (file_with("08 02 3F 00"), InvalidStream, "upgrade"),
    "alpha sample out of range": (file_with("08 02 30 02"), InvalidStream, "exceeds its 1 bits"),
    "alpha beyond its picture": (file_with(chunk_of(0b1010, brotli.compress(bytes(1000)))), LimitExceeded, "than 65"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "error", "message"), PICTURES.values(), ids=PICTURES)
def test_wrong_picture(data: bytes, error: type[BitstreamError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        unpack(data, ONE_GRID)
    assert type(caught.value) is error


def whole_files() -> dict[str, tuple[bytes, tuple[RatePoint, ...]]]:
    """A plain file of each kind of codebook, and one that holds everything."""
    rng = np.random.default_rng(1)
    odd = ladder(Grid(32, 3), Grid(16, 8196), Grid(8, 64))

    def indices(points: tuple[RatePoint, ...], rate_point: int) -> tuple[NDArray[np.int32], ...]:
        grids = points[rate_point].grids
        return tuple(rng.integers(0, grid.codebook_size, grid.shape(50, 30)).astype(np.int32) for grid in grids)

    everything = Codes(
        ModelReference(0, b"\xaa" * 8), 50, 30, 2, indices(odd, 2), "a dog on a red sofa", 200,
        AlphaMask(rng.integers(0, 4, (4, 7)).astype(np.uint8), 2, 3), Metadata(b"Exif", b"icc", b"<xmp/>"),
    )  # fmt: skip
    return {
        "plain": (pack(Codes(ModelReference(1), 50, 30, 3, indices(EMBEDDED, 3)), EMBEDDED), EMBEDDED),
        "odd codebooks": (pack(Codes(ModelReference(1), 50, 30, 2, indices(odd, 2)), odd), odd),
        "everything": (pack(everything, odd), odd),
    }


@pytest.mark.parametrize("name", ["plain", "odd codebooks", "everything"])
def test_a_file_cut_anywhere_is_an_error(name: str) -> None:
    data, points = whole_files()[name]
    unpack(data, points)
    for length in range(len(data)):
        with pytest.raises(BitstreamError) as caught:
            unpack(data[:length], points)
        expected = NotAPercoFile if length < 4 else TruncatedFile
        if name != "everything":
            assert type(caught.value) is expected, length
        else:  # cut just behind type and length of a chunk, these look like a checksum
            assert isinstance(caught.value, expected | ChecksumMismatch), length


@pytest.mark.parametrize("name", ["plain", "odd codebooks", "everything"])
def test_a_cut_file_gives_a_prefix_or_an_error(name: str) -> None:
    data, points = whole_files()[name]
    whole = unpack(data, points)
    for length in range(len(data)):
        try:
            partial = unpack_partial(data[:length], points)
        except BitstreamError:
            continue
        assert partial.rate_point == len(partial.indices) - 1
        for grid, expected in zip(partial.indices, whole.indices, strict=False):
            assert np.array_equal(grid, expected)
        assert partial.caption in ("", whole.caption)


@pytest.mark.parametrize("broken", ["04 02 C328", "05 03 FFFFFF", "08 02 30 02", "09 03 FFFFFF", "85 03 FFFFFF"])
def test_a_broken_chunk_of_a_cut_file_is_left_out(broken: str) -> None:
    data = file_with(broken, "8C 09 3C782F3E")
    partial = unpack_partial(data, ONE_GRID)
    assert (partial.caption, partial.alpha, partial.metadata) == ("", None, Metadata())
    assert partial.indices[0].tolist() == [[0xA5]]


def test_a_cut_file_with_an_unknown_required_chunk_asks_for_an_upgrade() -> None:
    data = file_with("0C 01 00", "8C 04 3C782F3E")
    for cut in (data[:-1], data[:-8]):  # the second one ends with the unknown chunk
        for read in (lambda cut: read_header(cut, allow_truncated=True), lambda cut: unpack_partial(cut, ONE_GRID)):
            with pytest.raises(UnsupportedChunk, match=r"0x0C.*upgrade"):
                read(cut)
    for read in (read_header, lambda cut: unpack(cut, ONE_GRID)):
        with pytest.raises(UnsupportedChunk, match=r"0x0C.*upgrade.*copy or download"):
            read(data[:-1])


def test_zeros_behind_a_file_are_an_error() -> None:
    """The checksum does not find them."""
    for data, error in ((file_of(PLAIN_BODY), "copy or download"), (file_with("FD 01 AA"), "chunks ascend")):
        for count in (3, 200):
            assert checksum(data + bytes(count - 2)) == bytes(2)
            with pytest.raises(BitstreamError, match=error):
                unpack(data + bytes(count), ONE_GRID)


@pytest.mark.parametrize("name", ["plain", "odd codebooks", "everything"])
def test_every_flipped_bit_is_an_error(name: str) -> None:
    data, points = whole_files()[name]
    for position in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[position // 8] ^= 0x80 >> position % 8
        for read in (read_header, lambda data: unpack(data, points)):
            with pytest.raises(BitstreamError):
                read(bytes(damaged))


def test_random_bytes_with_a_right_checksum() -> None:
    """Whatever the bytes, the outcome is Codes or a BitstreamError."""
    rng = np.random.default_rng(2)
    outcomes = set()
    for _ in range(3000):
        body = PLAIN_BODY[:4] + bytes([0x10 | rng.integers(4)]) + rng.bytes(1) + bytes([0, rng.integers(256), 0, 9])
        body += rng.bytes(int(rng.integers(0, 30)))
        try:
            unpack(file_of(body), EMBEDDED)
            outcomes.add("Codes")
        except BitstreamError as error:
            outcomes.add(type(error).__name__)
        with contextlib.suppress(BitstreamError):
            unpack_partial(file_of(body)[:-1], EMBEDDED)
    assert {"TruncatedFile", "InvalidStream", "InvalidHeader", "UnsupportedChunk"} <= outcomes


@pytest.mark.parametrize("coding", ["deflate", "Brotli"])
@pytest.mark.parametrize(
    ("type_byte", "name", "limit"), [(1 << 2, "caption", 2**12), (33 << 2, "EXIF", 2**24), (2 << 2, "alpha", 2**24)]
)
def test_bombs_cost_no_memory(coding: str, type_byte: int, name: str, limit: int) -> None:
    """64 MiB in some hundred bytes (Brotli) or 64 KiB (deflate); the large picture lets the alpha be large."""
    content = bytes(64 * 2**20)
    payload = deflate(content) if coding == "deflate" else brotli.compress(content, quality=5)
    chunk = chunk_of(type_byte | (1 if coding == "deflate" else 2), payload)
    indices = np.zeros((128, 128), dtype=np.int32)
    plain = pack(Codes(ModelReference(1), 8192, 8192, 0, (indices,)), EMBEDDED)
    stream = plain[10:-2]
    body = plain[:5] + bytes([0x41]) + plain[6:10] + encode_varint(len(stream)) + stream + chunk

    def read() -> None:
        with pytest.raises(LimitExceeded, match=f"more than {limit}"):
            unpack(file_of(body), EMBEDDED)

    read()
    assert peak_bytes(read) < 4 * limit + 2**20, name


@pytest.mark.parametrize("points", [EMBEDDED, ONE_GRID, (RatePoint(1.0, (Grid(1, 2),)),)])
def test_absurd_sizes_cost_no_memory(points: tuple[RatePoint, ...]) -> None:
    data = file_of("9350436F 10 01 FFFEFFFE 0000000000000000")

    def read() -> None:
        for function in (unpack, unpack_partial):
            with pytest.raises(TruncatedFile):
                function(data, points)

    read()
    assert peak_bytes(read) < 2**18
