"""The own arithmetic coder: literal streams, an independent coder, the reference's streams, cut and padded streams."""

import json
import pickletools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from perco_engine.bitstream.entropy import Decoder, Encoder, decode, encode, minimum_bits, uniform_cdf
from perco_engine.errors import InvalidStream, TruncatedFile

REFERENCE_FILES = Path(__file__).parent / "parity" / "reference_files"


def symbols_of(*values: int) -> NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def random_cdf(rng: np.random.Generator, codebook_size: int, *, skewed: bool = False) -> NDArray[np.int32]:
    candidates = np.r_[1:60, 65476:65536] if skewed else np.arange(1, 65536)
    inner = np.sort(rng.choice(candidates, codebook_size - 1, replace=False))
    return np.concatenate([[0], inner, [65536]]).astype(np.int32)


def encode_bit_by_bit(symbols: NDArray[np.int32], cdf: NDArray[np.int32]) -> bytes:
    """FORMAT.md's registers and `emit`, a bit at a time."""
    low, high, pending, bits = 0, 0xFFFFFFFF, 0, ""

    def emit(bit: int) -> None:
        nonlocal bits, pending
        bits += str(bit) + str(1 - bit) * pending
        pending = 0

    for symbol in symbols.tolist():
        span = high - low + 1
        high = low + span * int(cdf[symbol + 1]) // 65536 - 1
        low = low + span * int(cdf[symbol]) // 65536
        while True:
            if high < 0x80000000:
                emit(0)
                subtract = 0
            elif low >= 0x80000000:
                emit(1)
                subtract = 0x80000000
            elif low >= 0x40000000 and high < 0xC0000000:
                pending += 1
                subtract = 0x40000000
            else:
                break
            low, high = 2 * (low - subtract), 2 * (high - subtract) + 1
    pending += 1
    emit(0 if low < 0x40000000 else 1)
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[k : k + 8], 2) for k in range(0, len(bits), 8))


def decode_bit_by_bit(data: bytes, count: int, cdf: NDArray[np.int32]) -> list[int]:
    """FORMAT.md's decoder, a bit at a time."""
    bits = iter("".join(f"{byte:08b}" for byte in data))
    low, high, value = 0, 0xFFFFFFFF, 0
    for _ in range(32):
        value = 2 * value + int(next(bits, "0"))
    symbols: list[int] = []
    for _ in range(count):
        span = high - low + 1
        target = ((value - low + 1) * 65536 - 1) // span
        symbol = int(np.count_nonzero(cdf <= target)) - 1
        symbols.append(symbol)
        high = low + span * int(cdf[symbol + 1]) // 65536 - 1
        low = low + span * int(cdf[symbol]) // 65536
        while True:
            if high < 0x80000000:
                subtract = 0
            elif low >= 0x80000000:
                subtract = 0x80000000
            elif low >= 0x40000000 and high < 0xC0000000:
                subtract = 0x40000000
            else:
                break
            low, high = 2 * (low - subtract), 2 * (high - subtract) + 1
            value = 2 * (value - subtract) + int(next(bits, "0"))
    return symbols


@pytest.mark.parametrize(
    ("codebook_size", "symbols", "stream"),
    [
        (256, [], "40"),  # the flush alone: 01 and padding
        (256, [0xA5], "a540"),
        (256, [0, 255, 1], "00ff0140"),
        (64, [0b101010, 0b000001], "a8 14"),  # 101010 000001, 01, 00
        (2, [1, 0, 1, 1, 0, 0], "b1"),  # 101100, 01
        (1024, [0b1111100000, 0b0101010101], "f8 15 54"),  # 1111100000 0101010101, 01, 00
        (3, [1], "60"),  # the middle third leaves a bit pending: 0, 11, and padding
        (3, [2], "c0"),  # 0xAAAA0000 and up: 1, then low is 0x55540000: 10, and padding
    ],
)
def test_literal_streams(codebook_size: int, symbols: list[int], stream: str) -> None:
    assert encode([symbols_of(*symbols)], [uniform_cdf(codebook_size)]) == bytes.fromhex(stream)
    (decoded,) = decode(bytes.fromhex(stream), [len(symbols)], [uniform_cdf(codebook_size)])
    assert decoded.tolist() == symbols
    assert decoded.dtype == np.int32


def test_uniform_cdf_is_exact_integer_arithmetic() -> None:
    assert uniform_cdf(4).tolist() == [0, 16384, 32768, 49152, 65536]
    assert uniform_cdf(3).tolist() == [0, 21845, 43690, 65536]
    for codebook_size in (2, 64, 1024, 8196, 65535):
        assert uniform_cdf(codebook_size).tolist() == [k * 65536 // codebook_size for k in range(codebook_size + 1)]
    for codebook_size in (-1, 0, 1, 65536):
        with pytest.raises(ValueError, match="codebook_size"):
            uniform_cdf(codebook_size)


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_coder_of_the_specification(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codebook_size = int(rng.integers(2, 50))
    cdf = random_cdf(rng, codebook_size, skewed=seed % 2 == 0)
    probabilities = np.diff(cdf) / 65536 if seed % 3 else None
    symbols = rng.choice(codebook_size, int(rng.integers(0, 900)), p=probabilities).astype(np.int32)
    stream = encode([symbols], [cdf])
    assert stream == encode_bit_by_bit(symbols, cdf)
    assert decode_bit_by_bit(stream, len(symbols), cdf) == symbols.tolist()
    assert decode(stream, [len(symbols)], [cdf])[0].tolist() == symbols.tolist()


def test_carry_runs_through_all_that_was_written() -> None:
    """Symbols around the half leave thousands of bits pending; the last one settles them all."""
    cdf = np.array([0, 32767, 32769, 65536], dtype=np.int32)
    for last in (0, 2):
        symbols = symbols_of(*[1] * 400, last)
        stream = encode([symbols], [cdf])
        assert stream == encode_bit_by_bit(symbols, cdf)
        assert decode(stream, [401], [cdf])[0].tolist() == symbols.tolist()


def test_segments_are_one_run_and_may_be_coded_in_pieces() -> None:
    rng = np.random.default_rng(7)
    sizes, counts = (256, 8196, 64), (6, 24, 96)
    symbols = [rng.integers(0, size, count).astype(np.int32) for size, count in zip(sizes, counts, strict=True)]
    cdfs = [uniform_cdf(size) for size in sizes]
    stream = encode(symbols, cdfs)
    encoder = Encoder()
    for values, cdf in zip(symbols, cdfs, strict=True):
        encoder.encode(values[:5], cdf)
        encoder.encode(values[5:], cdf)
    assert encoder.finish() == stream
    assert len(stream) < (6 * 8 + 24 * 13.01 + 96 * 6) / 8 + 2
    for decoded, values in zip(decode(stream, counts, cdfs), symbols, strict=True):
        assert np.array_equal(decoded, values)


def test_each_symbol_may_have_its_own_cdf() -> None:
    rng = np.random.default_rng(3)
    cdf = np.stack([random_cdf(rng, 16) for _ in range(200)])
    symbols = rng.integers(0, 16, 200).astype(np.int32)
    stream = encode([symbols], [cdf])
    assert np.array_equal(decode(stream, [200], [cdf])[0], symbols)
    one_by_one = Encoder()
    for k in range(200):
        one_by_one.encode(symbols[k : k + 1], cdf[k])
    assert one_by_one.finish() == stream


@pytest.mark.parametrize("codebook_size", [2, 3, 64, 256, 8196])
def test_cut_stream_gives_only_certain_symbols(codebook_size: int) -> None:
    """What `decode_available` gives is what every completion of the stream gives, and no symbol less."""
    rng = np.random.default_rng(codebook_size)
    symbols = rng.integers(0, codebook_size, 40).astype(np.int32)
    cdf = uniform_cdf(codebook_size)
    stream = encode([symbols], [cdf])
    for length in range(len(stream)):
        cut = stream[:length]
        certain = Decoder(cut).decode_available(40, cdf).tolist()
        zeros = decode_bit_by_bit(cut + bytes(80), 40, cdf)
        ones = decode_bit_by_bit(cut + b"\xff" * 80, 40, cdf)
        agreeing = next((k for k in range(40) if zeros[k] != ones[k]), 40)
        assert certain == symbols[:agreeing].tolist()
        with pytest.raises(TruncatedFile):
            decode(cut, [40], [cdf])


@pytest.mark.parametrize("codebook_size", [2, 3, 64, 256, 8196])
def test_only_what_the_encoder_makes_is_accepted(codebook_size: int) -> None:
    """Every stream that decodes is the one that its symbols encode to."""
    rng = np.random.default_rng(codebook_size)
    cdf = uniform_cdf(codebook_size)
    accepted = 0
    for _ in range(2000):
        data = rng.bytes(int(rng.integers(0, 5)))
        count = int(rng.integers(0, 4))
        try:
            symbols = decode(data, [count], [cdf])
        except (TruncatedFile, InvalidStream):
            continue
        accepted += 1
        assert encode(symbols, [cdf]) == data
    assert accepted


def test_surplus_bytes_and_bits_are_refused() -> None:
    cdf = uniform_cdf(256)
    for stream in ("a54000", "a540ff", "a541", "a580", "a5c0", "a500"):
        with pytest.raises(InvalidStream):
            decode(bytes.fromhex(stream), [1], [cdf])


def test_more_symbols_than_bits_are_refused_without_memory() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TruncatedFile):
            decode(bytes(20), [65535 * 65535], [uniform_cdf(256)])
        assert len(Decoder(bytes(20)).decode_available(65535 * 65535, uniform_cdf(256))) == 20
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codebook_size", [2, 3, 5, 255, 256, 257, 8196, 65535])
def test_minimum_bits_is_a_lower_bound(codebook_size: int) -> None:
    cdf = uniform_cdf(codebook_size)
    likeliest = int(np.diff(cdf).argmax())
    for count in (1, 100, 5000):
        stream = encode([np.full(count, likeliest, dtype=np.int32)], [cdf])
        assert minimum_bits(count, cdf) <= 8 * len(stream) - 2
    if codebook_size in (2, 256):
        assert minimum_bits(1000, cdf) == 1000 * (codebook_size.bit_length() - 1)


@pytest.mark.parametrize(
    "cdf", [[0, 65536], [1, 5, 65536], [0, 5, 65535], [0, 5, 5, 65536], [0, 9, 5, 65536], [[0, 5, 65536]] * 2]
)
def test_what_is_no_cdf_is_refused(cdf: list[int]) -> None:
    with pytest.raises(ValueError, match="CDF"):
        encode([symbols_of(0)], [np.array(cdf, dtype=np.int32)])
    with pytest.raises(ValueError, match="CDF"):
        decode(bytes(8), [1], [np.array(cdf, dtype=np.int32)])


@pytest.mark.parametrize("symbol", [-1, 256])
def test_symbols_outside_of_the_codebook_are_refused(symbol: int) -> None:
    with pytest.raises(ValueError, match="symbols must be 0 to 255"):
        encode([symbols_of(3, symbol)], [uniform_cdf(256)])


def reference_stream(path: Path) -> bytes:
    """The torchac stream of a file of the reference: bytes in a pickle in a dict in a pickle.  Nothing is unpickled."""
    _, in_a_pickle, _ = bytes_in_a_pickle(path.read_bytes())
    (stream,) = bytes_in_a_pickle(in_a_pickle)
    return stream


def bytes_in_a_pickle(pickled: bytes) -> list[bytes]:
    return [value for _, value, _ in pickletools.genops(pickled) if isinstance(value, bytes)]


@pytest.mark.parametrize(
    "case", json.loads((REFERENCE_FILES / "files.json").read_text()), ids=lambda case: case["file"]
)
def test_the_streams_of_the_reference(case: dict[str, object]) -> None:
    path = REFERENCE_FILES / str(case["file"])
    cdf = np.load(REFERENCE_FILES / f"cdf16_uniform_{case['codebook']}.npy").view(np.uint16).astype(np.int32)
    cdf[-1] = 65536  # stored as 0
    indices = np.load(path.with_name(f"{path.stem}_indices.npy"))
    stream = reference_stream(path)
    assert len(stream) == case["stream_bytes"]
    (decoded,) = decode(stream, [indices.size], [cdf])
    assert np.array_equal(decoded, indices.reshape(-1))
    assert encode([indices.reshape(-1)], [cdf]) == stream
    if case["codebook"] != 8196:  # its float arithmetic hit the exact values only for powers of two
        assert np.array_equal(cdf, uniform_cdf(int(str(case["codebook"]))))
