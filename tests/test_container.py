"""Codes <-> bytes: literal files, round trips, sizes, what a writer refuses, what a cut file still gives."""

import math
import random
import subprocess
import sys
import zlib
from dataclasses import replace

import brotli
import numpy as np
import pytest

from perco_engine.bitstream import Header, pack, read_header, unpack, unpack_partial
from perco_engine.bitstream.chunks import ChunkKind, encode_chunk
from perco_engine.bitstream.compression import Coding, compress, decompress
from perco_engine.bitstream.fields import FieldReader, encode_varint
from perco_engine.bitstream.header import checksum
from perco_engine.codes import AlphaMask, Codes, Metadata, ModelReference
from perco_engine.errors import ChecksumMismatch, InvalidStream, TruncatedFile, UnsupportedRatePoint
from perco_engine.rates import EMBEDDED, PERCO_SD, Grid, RatePoint

ONE_GRID = (RatePoint(0.125, (Grid(8, 256),)),)
PLAIN = bytes.fromhex("93 50 43 6F  10  01  00 07 00 07  A5 40  63 05")


def plain_codes() -> Codes:
    return Codes(ModelReference(1), 8, 8, 0, (np.array([[0xA5]], dtype=np.int32),))


def random_codes(width_px: int, height_px: int, rate_point: int = 4, points: tuple[RatePoint, ...] = EMBEDDED) -> Codes:
    rng = np.random.default_rng(width_px + height_px)
    point = points[rate_point]
    indices = tuple(
        rng.integers(0, grid.codebook_size, shape).astype(np.int32)
        for grid, shape in zip(point.grids, point.shapes(width_px, height_px), strict=True)
    )
    return Codes(ModelReference(1), width_px, height_px, rate_point, indices)


def full_codes() -> Codes:
    rng = np.random.default_rng(5)
    return replace(
        random_codes(100, 70),
        model=ModelReference(0, b"\x01\x23\x45\x67\x89\xab\xcd\xef"),
        caption="a red barn with a pond, déjà vu 🐸",
        seed=2**32 - 1,
        alpha=AlphaMask(rng.integers(0, 16, (18, 25)).astype(np.uint8), 4, 2),
        metadata=Metadata(b"Exif\0\0II*\0", bytes(300), b"<x:xmpmeta/>"),
    )


def with_checksum(body: bytes) -> bytes:
    return body + checksum(body)


# Literal files


def test_plain_file() -> None:
    assert pack(plain_codes(), ONE_GRID) == PLAIN
    assert unpack(PLAIN, ONE_GRID) == plain_codes()


def test_explicit_seed_costs_its_varint() -> None:
    for seed, field in ((1, "00"), (128, "7F"), (129, "80 01"), (2**32 - 1, "FE FF FF FF 0F")):
        body = bytes.fromhex("93 50 43 6F  10  81  00 07 00 07") + bytes.fromhex(field) + bytes.fromhex("A5 40")
        assert pack(replace(plain_codes(), seed=seed), ONE_GRID) == with_checksum(body)
        assert unpack(with_checksum(body), ONE_GRID).seed == seed


def test_fingerprint_costs_eight_bytes() -> None:
    body = bytes.fromhex("93 50 43 6F  10  00  00 07 00 07  0123456789ABCDEF  A5 40")
    codes = replace(plain_codes(), model=ModelReference(0, bytes.fromhex("0123456789ABCDEF")))
    assert pack(codes, ONE_GRID) == with_checksum(body)
    assert unpack(with_checksum(body), ONE_GRID) == codes


def test_a_family_costs_four_bytes() -> None:
    """Ids 32 (0x20) to 62 (0x3E) are followed by four bytes, 31 (0x1F) by none."""
    for registry_id, fields in (
        (32, "20  00 07 00 07  01234567"),
        (62, "3E  00 07 00 07  01234567"),
        (31, "1F  00 07 00 07"),
    ):
        body = bytes.fromhex(f"93 50 43 6F  10  {fields}  A5 40")
        mark = bytes.fromhex("01234567") if registry_id >= 32 else b""
        codes = replace(plain_codes(), model=ModelReference(registry_id, mark))
        assert pack(codes, ONE_GRID) == with_checksum(body)
        assert unpack(with_checksum(body), ONE_GRID) == codes


def test_caption_is_a_chunk() -> None:
    """A caption of three letters: type 1 plain, length 3; the hyper-latent gets its length of 2."""
    body = bytes.fromhex("93 50 43 6F  10  41  00 07 00 07  02  A5 40  04 03") + b"dog"
    assert pack(replace(plain_codes(), caption="dog"), ONE_GRID) == with_checksum(body)
    assert read_header(with_checksum(body)).caption == "dog"


def test_all_fields_of_the_first_ten_bytes() -> None:
    points = tuple(ONE_GRID * 8)
    codes = Codes(ModelReference(31), 0xFFFF, 2, 7, (np.zeros((1, 8192), dtype=np.int32),))
    data = pack(codes, points)
    assert data[:10] == bytes.fromhex("93 50 43 6F  17  1F  FF FE 00 01")
    assert unpack(data, points) == codes


def test_every_coding_of_a_chunk_is_read() -> None:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    payloads = {0: b"dog", 1: deflate.compress(b"dog") + deflate.flush(), 2: brotli.compress(b"dog")}
    for coding, payload in payloads.items():
        chunk = bytes([1 << 2 | coding, len(payload)]) + payload
        body = bytes.fromhex("93 50 43 6F  10  41  00 07 00 07  02  A5 40") + chunk
        assert read_header(with_checksum(body)).caption == "dog"


def test_unknown_optional_chunks_are_skipped() -> None:
    """Optional kinds 0 and 31, and EXIF in the reserved coding: whatever they hold, the picture stays."""
    chunks = bytes.fromhex("80 01 00  87 02 FF FF  FC 01 AA")
    body = bytes.fromhex("93 50 43 6F  10  41  00 07 00 07  02  A5 40") + chunks
    header = read_header(with_checksum(body))
    assert header.sizes_bytes == {"header": 11, "hyper_latent": 2, "unknown": len(chunks), "checksum": 2}
    assert unpack(with_checksum(body), ONE_GRID) == plain_codes()


def test_checksum_is_crc_16_ccitt_false() -> None:
    assert checksum(b"123456789") == b"\x29\xb1"


# Round trips


@pytest.mark.parametrize(
    ("width_px", "height_px"), [(1, 1), (1, 65535), (65535, 1), (64, 64), (65, 63), (512, 512), (768, 512)]
)
@pytest.mark.parametrize("rate_point", range(5))
def test_round_trip_of_every_rate_point(width_px: int, height_px: int, rate_point: int) -> None:
    codes = random_codes(width_px, height_px, rate_point)
    data = pack(codes, EMBEDDED)
    assert unpack(data, EMBEDDED) == codes
    grids = zip(EMBEDDED[rate_point].grids, codes.indices, strict=True)
    bits = sum(indices.size * math.log2(grid.codebook_size) for grid, indices in grids)
    assert len(data) == 12 + int(bits + 2 + 7) // 8
    assert all(grid.dtype == np.int32 for grid in unpack(data, EMBEDDED).indices)


@pytest.mark.parametrize("rate_point", range(7))
def test_round_trip_of_the_reference_rate_points(rate_point: int) -> None:
    codes = random_codes(513, 300, rate_point, PERCO_SD)
    assert unpack(pack(codes, PERCO_SD), PERCO_SD) == codes


def test_lowest_rate_of_512_by_512_takes_77_bytes() -> None:
    assert len(pack(random_codes(512, 512, 0, PERCO_SD), PERCO_SD)) == 77
    assert len(pack(random_codes(512, 512, 0), EMBEDDED)) == 77


def test_round_trip_of_everything_at_once() -> None:
    codes = full_codes()
    data = pack(codes, EMBEDDED)
    assert unpack(data, EMBEDDED) == codes
    assert unpack_partial(data, EMBEDDED) == codes
    header = read_header(data)
    assert (header.model, header.width_px, header.height_px) == (codes.model, 100, 70)
    assert (header.rate_point, header.seed, header.caption) == (4, 2**32 - 1, codes.caption)
    assert header.metadata == codes.metadata
    assert header.has_alpha
    assert header.intact
    assert set(header.sizes_bytes) == {
        "header", "hyper_latent", "caption", "alpha", "exif", "icc_profile", "xmp", "checksum"
    }  # fmt: skip
    assert sum(header.sizes_bytes.values()) == len(data)


@pytest.mark.parametrize(
    ("bits_per_sample", "log2_scale", "soft"), [(1, 6, False), (8, 0, False), (8, 0, True), (4, 3, True), (1, 0, False)]
)
def test_round_trip_of_alpha(bits_per_sample: int, log2_scale: int, soft: bool) -> None:
    shape = -(-70 // 2**log2_scale), -(-100 // 2**log2_scale)
    rows, columns = np.indices(shape)
    levels = (rows * 2 + columns) if soft else (rows > columns) * 255
    mask = AlphaMask((levels % 2**bits_per_sample).astype(np.uint8), bits_per_sample, log2_scale)
    codes = replace(random_codes(100, 70), alpha=mask)
    assert unpack(pack(codes, EMBEDDED), EMBEDDED) == codes


@pytest.mark.parametrize("length", [1, 2, 3, 10, 100, 4096])
def test_caption_is_never_a_byte_longer_than_its_utf8(length: int) -> None:
    incompressible = "".join(random.Random(length).choices([chr(k) for k in range(32, 127)], k=length))
    for caption in (incompressible, ("a photo of a dog " * 300)[:length]):
        content = caption.encode()
        coding, payload = compress(content)
        assert len(payload) <= len(content)
        assert decompress(coding, payload, 4096) == content


def test_compression_takes_the_shortest_coding() -> None:
    assert compress(b"dog")[0] is Coding.PLAIN
    assert compress(b"two parrots standing next to each other")[0] is Coding.BROTLI


@pytest.mark.parametrize(
    ("value", "encoded"), [(0, "00"), (127, "7F"), (128, "80 01"), (300, "AC 02"), (2**32 - 1, "FF FF FF FF 0F")]
)
def test_varint(value: int, encoded: str) -> None:
    assert encode_varint(value) == bytes.fromhex(encoded)
    assert FieldReader(bytes.fromhex(encoded)).take_varint("a number") == value


def test_varint_range() -> None:
    for value in (-1, 2**32):
        with pytest.raises(ValueError, match="0 to 4294967295"):
            encode_varint(value)


# What a writer refuses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width_px": 0}, "width_px must be 1 to 65535"),
        ({"height_px": 65536}, "height_px must be 1 to 65535, not 65536: resize"),
        ({"rate_point": 1}, "rate_point must be 0 to 0"),
        ({"rate_point": -1}, "rate_point must be 0 to 0"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**32}, "seed must be"),
        ({"model": ModelReference(63)}, "registry_id must be 0 to 62"),
        ({"model": ModelReference(0)}, "fingerprint of 8 bytes in a file, not 0"),
        ({"model": ModelReference(1, bytes(8))}, "fingerprint of 0 bytes in a file, not 8"),
        ({"model": ModelReference(32)}, "fingerprint of 4 bytes in a file, not 0"),
        ({"model": ModelReference(62, bytes(8))}, "fingerprint of 4 bytes in a file, not 8"),
        ({"indices": ()}, "the indices must have the shapes"),
        ({"indices": (np.zeros((1, 2), dtype=np.int32),)}, "the indices must have the shapes"),
        ({"indices": (np.full((1, 1), 256),)}, "the indices must be 0 to 255"),
        ({"indices": (np.full((1, 1), -1),)}, "the indices must be 0 to 255"),
        ({"indices": (np.zeros((1, 1)),)}, "the indices must be integers"),
        ({"caption": "a" * 4097}, "caption has 4097 bytes, the format holds 4096: shorten it"),
        ({"caption": "\ud83d"}, "half a surrogate pair"),
        ({"metadata": Metadata(exif=bytes(2**24 + 1))}, "exif has 16777217 bytes"),
        ({"alpha": AlphaMask(np.zeros((2, 1), np.uint8), 1, 3)}, "the alpha mask must be uint8"),
        ({"alpha": AlphaMask(np.full((1, 1), 2, np.uint8), 1, 3)}, "an alpha sample is at most 1"),
        ({"alpha": AlphaMask(np.zeros((1, 1), np.uint8), 9, 3)}, "1 to 8 bits a sample"),
        ({"alpha": AlphaMask(np.zeros((1, 1), np.uint8), 8, 7)}, "log2_scale 0 to 6"),
    ],
)
def test_pack_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(replace(plain_codes(), **change), ONE_GRID)  # type: ignore[arg-type]


def test_pack_refuses_an_alpha_mask_beyond_the_limit() -> None:
    mask = AlphaMask(np.broadcast_to(np.uint8(0), (4096, 4096)), 8, 0)  # 2**24 samples and a byte
    codes = replace(random_codes(4096, 4096, 0), alpha=mask)
    with pytest.raises(ValueError, match="raise log2_scale"):
        pack(codes, EMBEDDED)


def test_rate_point_that_the_model_does_not_offer() -> None:
    data = pack(random_codes(8, 8, 4), EMBEDDED)
    for function in (unpack, unpack_partial):
        with pytest.raises(UnsupportedRatePoint, match="rate point 4, its model offers 0 to 3"):
            function(data, EMBEDDED[:4])


# Cut files


def test_cut_ladder_goes_down_to_its_complete_grids() -> None:
    codes = random_codes(300, 200)
    data = pack(codes, EMBEDDED)
    counts = [grid.size for grid in codes.indices]
    bits = np.cumsum([count * width for count, width in zip(counts, (8, 8, 9, 9, 8), strict=True)])
    for length in range(4, len(data)):
        complete = sum(8 * (length - 10) >= end for end in bits)
        if complete == 0:
            with pytest.raises(TruncatedFile):
                unpack_partial(data[:length], EMBEDDED)
            continue
        partial = unpack_partial(data[:length], EMBEDDED)
        assert partial == replace(codes, rate_point=complete - 1, indices=codes.indices[:complete])


def test_cut_file_without_a_ladder_has_nothing_to_show() -> None:
    data = pack(random_codes(300, 200, 3, PERCO_SD), PERCO_SD)
    with pytest.raises(TruncatedFile):
        unpack_partial(data[:-5], PERCO_SD)
    assert unpack_partial(data[:-2], PERCO_SD) == unpack(data, PERCO_SD)


def test_cut_file_keeps_the_chunks_that_are_complete() -> None:
    codes = full_codes()
    data = pack(codes, EMBEDDED)
    sizes = read_header(data).sizes_bytes
    end_of_alpha = sum(sizes[name] for name in ("header", "hyper_latent", "caption", "alpha"))
    partial = unpack_partial(data[: end_of_alpha + 5], EMBEDDED)
    assert partial == replace(codes, metadata=Metadata())
    header = read_header(data[: end_of_alpha + 5], allow_truncated=True)
    assert (header.intact, header.caption, header.has_alpha) == (False, codes.caption, True)
    partial = unpack_partial(data[: end_of_alpha - 1], EMBEDDED)
    assert partial == replace(codes, metadata=Metadata(), alpha=None)
    partial = unpack_partial(data[: sizes["header"] + sizes["hyper_latent"] - 1], EMBEDDED)
    assert (partial.rate_point, partial.caption, partial.alpha) == (3, "", None)


def test_every_cut_of_a_file_with_chunks_shows_what_is_there_in_full() -> None:
    codes = full_codes()
    data = pack(codes, EMBEDDED)
    sizes = dict(read_header(data).sizes_bytes)
    header_bytes, checksum_bytes = sizes.pop("header"), sizes.pop("checksum")
    ends = dict(zip(sizes, np.cumsum([header_bytes, *sizes.values()])[1:], strict=True))
    assert list(ends) == ["hyper_latent", "caption", "alpha", "exif", "icc_profile", "xmp"]
    assert ends["xmp"] + checksum_bytes == len(data)
    last_bits = np.cumsum([grid.size * width for grid, width in zip(codes.indices, (8, 8, 9, 9, 8), strict=True)])
    for length in range(header_bytes + 4, len(data) + 1):
        grids = sum(8 * (length - header_bytes) >= end for end in last_bits)
        kept = {name for name, end in ends.items() if end <= length}
        assert unpack_partial(data[:length], EMBEDDED) == replace(
            codes,
            rate_point=grids - 1,
            indices=codes.indices[:grids],
            caption=codes.caption if "caption" in kept else "",
            alpha=codes.alpha if "alpha" in kept else None,
            metadata=Metadata(
                **{name: getattr(codes.metadata, name) for name in ("exif", "icc_profile", "xmp") if name in kept}
            ),
        ), length


def test_damage_is_not_taken_for_a_cut() -> None:
    data = bytearray(pack(random_codes(300, 200), EMBEDDED))
    data[40] ^= 1
    with pytest.raises(ChecksumMismatch):
        unpack_partial(bytes(data), EMBEDDED)
    data = bytearray(pack(full_codes(), EMBEDDED))
    sizes = read_header(bytes(data)).sizes_bytes
    data[sizes["header"] + sizes["hyper_latent"] - 1] ^= 1
    with pytest.raises(InvalidStream, match="copy or download"):
        unpack_partial(bytes(data), EMBEDDED)


# What opening costs


def test_header_is_read_by_the_standard_library_alone() -> None:
    program = (
        "import sys; from perco_engine.bitstream import read_header; "
        f"h = read_header(bytes.fromhex('{PLAIN.hex()}')); print(h.width_px, *sorted(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert said[0] == "8"
    assert not {"numpy", "torch", "brotli", "PIL"} & set(said)


def test_container_imports_no_torch() -> None:
    program = (
        "import sys; from perco_engine.bitstream import pack; print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True"]


def test_header_prints_without_its_streams() -> None:
    header = read_header(pack(random_codes(768, 512), EMBEDDED))
    assert isinstance(header, Header)
    assert len(repr(header)) < 400


def test_chunk_bytes_are_type_length_payload() -> None:
    assert encode_chunk(ChunkKind.EXIF, b"\x00") == bytes.fromhex("84 01 00")
