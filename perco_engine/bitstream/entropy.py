"""The arithmetic coder of the hyper-latent: integers <-> bytes, in integer arithmetic throughout.

The coder narrows an interval [low, low + span) of 32-bit numbers by one symbol after the other and writes the leading
bits as they become certain.  Source: Witten, Neal and Cleary, "Arithmetic Coding for Data Compression", CACM 1987, with
the registers, the 16-bit frequencies and the ending that FORMAT.md fixes ("The arithmetic coder"); torchac writes the
same bits.  Two shortcuts make it fast, neither of which changes a bit:

- All the shifts that a symbol causes are made at once, by their number.
- Encoder and decoder add up what FORMAT.md's registers hold after each shift.  The encoder keeps the exact lower end of
  the interval, so that a carry does what the counter of undecided bits does there; the decoder keeps the distance
  between the coded number and `low`, which every kind of shift doubles alike.

A CDF (cumulative distribution function) is an int32 array of the codebook size + 1 strictly ascending numbers, from 0
to 65536: symbol s has the probability (cdf[s + 1] - cdf[s]) / 65536.  With shape (n, codebook size + 1) it is one for
each of n symbols.
"""

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from perco_engine.errors import InvalidStream, TruncatedFile

PRECISION_BITS = 16
MAX_CODEBOOK_SIZE = 65535
_TOTAL = 1 << PRECISION_BITS
_REGISTER_BITS = 32
_QUARTER = 1 << 30
_HALF = 1 << 31
_BELOW_HALF = _HALF - 1
_SPILL_BITS = 512  # keeps the encoder's number short, and its arithmetic fast
_REFILL_BYTES = 64

CDF = NDArray[np.int32]


class Coder(Protocol):
    """Codes all grids of a file as one run of the arithmetic coder: this module, or torchac_backend.AutomaticCoder."""

    def encode(self, symbols: Sequence[NDArray[np.int32]], cdfs: Sequence[CDF]) -> bytes:
        """The stream of several flat arrays of symbols, each with its own CDF."""

    def decode(self, data: bytes, counts: Sequence[int], cdfs: Sequence[CDF]) -> list[NDArray[np.int32]]:
        """The inverse of `encode`; raises TruncatedFile or InvalidStream."""


def encode(symbols: Sequence[NDArray[np.int32]], cdfs: Sequence[CDF]) -> bytes:
    """The stream of several flat arrays of symbols, each with its own CDF.

    Raises ValueError for a symbol outside of its CDF, or for numbers that are no CDF.
    """
    encoder = Encoder()
    for values, cdf in zip(symbols, cdfs, strict=True):
        encoder.encode(values, cdf)
    return encoder.finish()


def decode(data: bytes, counts: Sequence[int], cdfs: Sequence[CDF]) -> list[NDArray[np.int32]]:
    """The inverse of `encode`: `counts[k]` symbols by `cdfs[k]`.

    Raises TruncatedFile if `data` holds fewer symbols, InvalidStream if `encode` would never have made `data`.
    """
    decoder = Decoder(data)
    symbols = [decoder.decode(count, cdf) for count, cdf in zip(counts, cdfs, strict=True)]
    decoder.finish()
    return symbols


def uniform_cdf(codebook_size: int) -> CDF:
    """The CDF of equally probable symbols, cdf[i] = i * 65536 // codebook_size: exact for powers of two.

    Raises ValueError unless `codebook_size` is 2 to 65535.
    """
    if not 2 <= codebook_size <= MAX_CODEBOOK_SIZE:
        raise ValueError(f"codebook_size must be 2 to {MAX_CODEBOOK_SIZE}, not {codebook_size}")
    return (np.arange(codebook_size + 1, dtype=np.int64) * _TOTAL // codebook_size).astype(np.int32)


def minimum_bits(count: int, cdf: CDF) -> int:
    """A number of bits that `count` symbols take in any case: a lower bound, exact for powers of two.

    The whole bits of the most probable symbol, less what rounding can give back: an interval of 2**30 and more comes
    out at most 1 + 2**-14 times too wide, which is less than 2**-12 bits a symbol.
    """
    widest = int(np.diff(cdf).max())
    return max(0, count * (PRECISION_BITS - (widest - 1).bit_length()) - (count >> 12))


def check_cdf(cdf: CDF, count: int) -> None:
    """Raises ValueError unless `cdf` is a CDF for `count` symbols."""
    if cdf.ndim not in (1, 2) or cdf.shape[-1] < 3 or (cdf.ndim == 2 and len(cdf) != count):
        raise ValueError(f"a CDF has shape (codebook size + 1,) or (symbols, codebook size + 1), not {cdf.shape}")
    if (cdf[..., 0] != 0).any() or (cdf[..., -1] != _TOTAL).any() or (np.diff(cdf) <= 0).any():
        raise ValueError(f"a CDF ascends strictly from 0 to {_TOTAL}")


class Encoder:
    """Writes symbols to a stream, in one or more calls."""

    def __init__(self) -> None:
        self._low = 0
        self._span = 1 << _REGISTER_BITS
        self._code = 0  # the lower end of the interval, all its bits since the last spill and the register's 32
        self._bits = 0  # how many bits have left the register since the last spill
        self._spilled: list[int] = []  # numbers of _SPILL_BITS bits, and perhaps a carry into the one before

    def encode(self, symbols: NDArray[np.int32], cdf: CDF) -> None:
        """Appends a flat array of symbols; raises ValueError for a symbol outside of `cdf`."""
        check_cdf(cdf, len(symbols))
        if symbols.size and not (symbols.min() >= 0 and symbols.max() < cdf.shape[-1] - 1):
            raise ValueError(f"symbols must be 0 to {cdf.shape[-1] - 2}, not {symbols.min()} to {symbols.max()}")
        rows = cdf if cdf.ndim == 1 else cdf.reshape(-1)
        first = symbols if cdf.ndim == 1 else symbols + np.arange(len(symbols)) * cdf.shape[-1]
        low, span, code, bits = self._low, self._span, self._code, self._bits
        for lower, upper in zip(rows[first].tolist(), rows[first + 1].tolist(), strict=True):
            start = span * lower >> PRECISION_BITS
            span = (span * upper >> PRECISION_BITS) - start
            low += start
            code += start
            high = low + span - 1
            shift = 31 - ((high | ~low) & ((1 << (low ^ high).bit_length() - 1) - 1)).bit_length()
            if shift:
                low = low << shift & _BELOW_HALF
                span <<= shift
                code <<= shift
                bits += shift
                if bits >= _SPILL_BITS:
                    bits -= _SPILL_BITS
                    self._spilled.append(code >> _REGISTER_BITS + bits)
                    code &= (1 << _REGISTER_BITS + bits) - 1
        self._low, self._span, self._code, self._bits = low, span, code, bits

    def finish(self) -> bytes:
        """Writes the two bits that tell the last interval from all others, and gives the whole stream."""
        total_bits = self._bits + 2
        code = self._code - self._low + _final_value(self._low) >> _REGISTER_BITS - 2
        size_bytes = -(-total_bits // 8)
        code <<= 8 * size_bytes - total_bits
        parts = [code.to_bytes(size_bytes + 1, "big")]
        carry, parts[0] = parts[0][0], parts[0][1:]
        for number in reversed(self._spilled):
            number += carry
            carry = number >> _SPILL_BITS
            parts.append((number & (1 << _SPILL_BITS) - 1).to_bytes(_SPILL_BITS // 8, "big"))
        return b"".join(reversed(parts))


def too_short(data: bytes) -> TruncatedFile:
    """The error to raise for a stream that does not hold all symbols."""
    return TruncatedFile(
        f"the hyper-latent ends too early: {len(data)} bytes do not hold all indices of the picture; "
        "copy or download the file again"
    )


class Decoder:
    """Reads symbols from a stream, in one or more calls with the counts and CDFs that the encoder was given.

    Bits past the end of the stream read as zeros, and no symbol is taken that other bits there could change: a stream
    that `Encoder` made decides all of its symbols, a cut one decides the symbols before the cut.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0  # in bytes, of what was loaded into the window
        self._window = 0
        self._window_bits = 0
        self._unread_bits = 8 * len(data) - _REGISTER_BITS  # negative: that many bits of the register are made up
        self._low = 0
        self._span = 1 << _REGISTER_BITS
        self._refill()
        self._window_bits -= _REGISTER_BITS
        self._offset = self._window >> self._window_bits  # the coded number, less low
        self._window &= (1 << self._window_bits) - 1

    def decode(self, count: int, cdf: CDF) -> NDArray[np.int32]:
        """The next `count` symbols, int32; raises TruncatedFile, before allocating them, if `data` cannot hold them."""
        symbols = None
        if minimum_bits(count, cdf) <= self._unread_bits + _REGISTER_BITS:
            symbols = self.decode_available(count, cdf)
        if symbols is None or len(symbols) < count:
            raise too_short(self._data)
        return symbols

    def decode_available(self, count: int, cdf: CDF) -> NDArray[np.int32]:
        """The next symbols, int32: at most `count`, and only those that no bit past the end could change."""
        check_cdf(cdf, count)
        symbols = array("i")
        bounds = array("i", cdf.astype(np.int32, copy=False).tobytes())
        row, row_step = 0, 0 if cdf.ndim == 1 else cdf.shape[1]
        low, span, offset = self._low, self._span, self._offset
        window, window_bits, unread_bits = self._window, self._window_bits, self._unread_bits
        for _ in range(count):
            target = ((offset << PRECISION_BITS) + _TOTAL - 1) // span
            place = bisect_right(bounds, target, row, row + cdf.shape[-1]) - 1
            start = span * bounds[place] >> PRECISION_BITS
            end = span * bounds[place + 1] >> PRECISION_BITS
            if unread_bits < 0 and offset + (1 << -unread_bits) > end:
                break
            symbols.append(place - row)
            row += row_step
            low += start
            span = end - start
            offset -= start
            high = low + span - 1
            shift = 31 - ((high | ~low) & ((1 << (low ^ high).bit_length() - 1) - 1)).bit_length()
            if shift:
                if window_bits < shift:
                    self._window, self._window_bits = window, window_bits
                    self._refill()
                    window, window_bits = self._window, self._window_bits
                low = low << shift & _BELOW_HALF
                span <<= shift
                window_bits -= shift
                unread_bits -= shift
                offset = offset << shift | window >> window_bits
                window &= (1 << window_bits) - 1
        self._low, self._span, self._offset = low, span, offset
        self._window, self._window_bits, self._unread_bits = window, window_bits, unread_bits
        return np.array(symbols, dtype=np.int32)

    def finish(self) -> None:
        """Checks that the stream ends here, as `Encoder.finish` ends it; raises TruncatedFile or InvalidStream."""
        surplus_bits = self._unread_bits + _REGISTER_BITS - 2
        if surplus_bits < 0:
            raise TruncatedFile("the hyper-latent ends within its last byte; copy or download the file again")
        if surplus_bits >= 8 or self._offset != _final_value(self._low) - self._low:
            raise InvalidStream("the hyper-latent does not end where its indices end; copy or download the file again")

    def _refill(self) -> None:
        loaded = self._data[self._position : self._position + _REFILL_BYTES]
        self._position += len(loaded)
        self._window = self._window << 8 * _REFILL_BYTES | int.from_bytes(loaded.ljust(_REFILL_BYTES, b"\0"), "big")
        self._window_bits += 8 * _REFILL_BYTES


def _final_value(low: int) -> int:
    """The number whose first two bits end a stream: all continuations of them lie in the last interval."""
    return _QUARTER if low < _QUARTER else _HALF
