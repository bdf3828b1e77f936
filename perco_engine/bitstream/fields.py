"""The fields of a file: reading bytes in order, and numbers of variable length (FORMAT.md, "Numbers")."""

from perco_engine.errors import InvalidHeader, TruncatedFile

MAX_VARINT = 2**32 - 1
_MAX_VARINT_BYTES = 5


def encode_varint(value: int) -> bytes:
    """`value` (0..2**32-1) as LEB128: seven bits a byte, lowest first, bit 7 set on all bytes but the last."""
    if not 0 <= value <= MAX_VARINT:
        raise ValueError(f"a number in the file is 0 to {MAX_VARINT}, not {value}")
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(0x80 | value & 0x7F)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


class FieldReader:
    """Takes the fields off `data` one after the other.  `position` is the offset of the next byte."""

    def __init__(self, data: bytes, position: int = 0) -> None:
        self._data = data
        self.position = position

    @property
    def remaining_bytes(self) -> int:
        """How many bytes were not taken yet."""
        return len(self._data) - self.position

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes; raises TruncatedFile, naming `what` they hold, if there are fewer."""
        if count > self.remaining_bytes:
            raise TruncatedFile(
                f"the file ends too early: {what} needs {count} bytes and {max(self.remaining_bytes, 0)} are left; "
                "copy or download the file again"
            )
        self.position += count
        return self._data[self.position - count : self.position]

    def take_rest(self) -> bytes:
        """All the bytes that were not taken yet."""
        return self.take(self.remaining_bytes, "the rest")

    def take_varint(self, what: str) -> int:
        """The next number of variable length (0..2**32-1).

        Raises TruncatedFile, or InvalidHeader for a number that is too large or longer than it needs to be.
        """
        value = 0
        for k in range(_MAX_VARINT_BYTES):
            (byte,) = self.take(1, what)
            value |= (byte & 0x7F) << 7 * k
            if byte < 0x80:
                if value > MAX_VARINT or (k > 0 and byte == 0):
                    break
                return value
        raise InvalidHeader(f"the number that gives {what} is malformed: it has superfluous bytes, or exceeds 32 bits")
