"""The files of the reference implementation, PerCo (SD): read without opening a pickle, and converted to .perco.

Such a file is a pickle (protocol 4) of {0: text, 1: stream, 2: size}, whose values are pickles again, as bytes objects:

    text     the caption's UTF-8, by zlib at level 9
    stream   the indices in row order, by torchac with one CDF for all
    size     (height, width) in pixels of the picture as it was coded, 512 x 512 by the reference's own command

Opening a pickle can run any program.  So this is no unpickler: it takes the few opcodes of these four pickles, each in
its place, and in the end demands that CPython's pickler would have made exactly these bytes of them.  Whatever else the
bytes may be is refused.  Protocol 4 is what Python 3.8 to 3.13 write unless they are told otherwise, and the reference
does not tell them; what it would write with Python 3.14, which takes protocol 5, is refused like any other pickle.

Sources: compression_utils.py of PerCo (SD) for the layout, PEP 3154 for opcodes and frames.
"""

import zlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from . import rates, weights
from .bitstream import container, entropy
from .bitstream.chunks import MAX_CAPTION_BYTES
from .bitstream.entropy import CDF
from .bitstream.fields import FieldReader
from .bitstream.header import MAX_SIDE_PX
from .codes import Codes, ModelReference
from .errors import BitstreamError, InvalidHeader, InvalidStream, LimitExceeded, NotAReferenceFile
from .rates import PERCO_SD, RatePoint

MAX_FILE_BYTES = 4 << 20
"""The largest file that is read: at the highest rate, more pixels than the engine decodes."""

_PROTOCOL_4 = b"\x80\x04"
_FRAME = b"\x95"
_MEMOIZE = b"\x94"
_EMPTY_DICT_AND_MARK = b"}" + _MEMOIZE + b"("
_PAIR = b"\x86" + _MEMOIZE
_KEYS = (b"K\x00", b"K\x01", b"K\x02")
_SETITEMS = b"u"
_STOP = b"."
_LENGTH_BYTES = {b"C": 1, b"B": 4}  # BINBYTES8 begins at 4 GiB
_INTEGER_BYTES = {b"K": 1, b"M": 2, b"J": 4}
_FULL_FRAME_BYTES = 1 << 16
_SMALLEST_FRAME_BYTES = 4
_ZLIB_LEVEL_9 = b"\x78\xda"


@dataclass(frozen=True)
class ReferenceFile:
    """What a file of the reference says.  It does not say its rate.

    stream: torchac's bytes; `decode_indices` decodes them.
    height_px, width_px: of the picture as it was coded, 1..65535.
    """

    caption: str
    stream: bytes = field(repr=False)
    height_px: int
    width_px: int


def read(data: bytes) -> ReferenceFile:
    """Reads a file of the reference, without executing anything.

    Raises NotAReferenceFile for anything but what the reference writes, TruncatedFile for the beginning of that,
    LimitExceeded for a file of more than MAX_FILE_BYTES or a caption of more than 4096 bytes, InvalidHeader for a size
    outside of 1 to 65535, InvalidStream for a caption that is not UTF-8 by zlib.
    """
    if len(data) > MAX_FILE_BYTES:
        raise LimitExceeded(
            f"the file is larger than {MAX_FILE_BYTES} bytes, which no file of PerCo (SD) needs to be: "
            "check that it is one"
        )
    outer = _PickleReader(data)
    outer.expect(_EMPTY_DICT_AND_MARK)
    values = []
    for key in _KEYS:
        outer.expect(key)
        values.append(outer.take_bytes())
    outer.expect(_SETITEMS)
    outer.finish()
    text, stream = (_only_bytes(pickled) for pickled in values[:2])
    height_px, width_px = _pair(values[2])
    if not (1 <= height_px <= MAX_SIDE_PX and 1 <= width_px <= MAX_SIDE_PX):
        raise InvalidHeader(
            f"the picture is {width_px} x {height_px} pixels; a side has 1 to {MAX_SIDE_PX}: write the file again"
        )
    return ReferenceFile(_decode_caption(text), stream, height_px, width_px)


def reference_cdf(codebook_size: int) -> CDF:
    """The CDF that the reference codes with: the integers that torchac makes of a float32 sum of 1 / codebook_size.

    torch sums up in float64 and rounds each sum to float32; torchac multiplies by 65536 - codebook_size, rounds half to
    even, and adds the symbol, so that none has probability 0.  The sums are exact (24 bits, up to 2**14 times), and the
    rest is single IEEE operations on each entry, so these are the same integers on every machine.  For powers of two
    they equal `entropy.uniform_cdf`, for 8196 they do not.
    """
    symbols = np.arange(codebook_size + 1)
    cumulative = (symbols * np.float64(np.float32(1 / codebook_size))).astype(np.float32)
    scaled: NDArray[np.float32] = np.rint(cumulative * np.float32((1 << entropy.PRECISION_BITS) - codebook_size))
    return (scaled.astype(np.int64) + symbols).astype(np.int32)


def decode_indices(file: ReferenceFile, point: RatePoint) -> NDArray[np.int32]:
    """The indices, (rows, columns) int32, of a file that was written at a rate point of `rates.PERCO_SD`.

    Raises InvalidStream, naming the rate points that fit, if it was not written at this one.
    """
    try:
        return _decode(file, point)
    except BitstreamError as error:
        raise _not_written_at(point, possible_rate_points(file)) from error


def possible_rate_points(file: ReferenceFile) -> tuple[RatePoint, ...]:
    """Those of `rates.PERCO_SD`, lowest first, of which the reference might have written this stream for this size."""
    possible = []
    for point in PERCO_SD:
        try:
            _decode(file, point)
        except BitstreamError:
            continue
        possible.append(point)
    return tuple(possible)


def choose_rate_point(file: ReferenceFile, bpp: float | None = None) -> RatePoint:
    """The rate point that a file was written at: the one nearest to `bpp`, or the only one that is possible.

    Raises InvalidStream, naming those that are possible, if that is not; ValueError where it takes a `bpp` to choose.
    """
    possible = possible_rate_points(file)
    if bpp is not None:
        point = PERCO_SD[rates.nearest(PERCO_SD, bpp)]
        if point not in possible:
            raise _not_written_at(point, possible)
        return point
    if not possible:
        raise InvalidStream(f"the file was written at no rate of PerCo (SD); {_what_fits(possible)}")
    if len(possible) > 1:
        raise ValueError(f"the file does not tell its rate: say as bpp which it is; {_what_fits(possible)}")
    return possible[0]


def to_codes(file: ReferenceFile, point: RatePoint, model: ModelReference) -> Codes:
    """What the file says, as `container.pack` takes it with the rate points `rates.PERCO_SD`.

    model: the checkpoint whose codebook the indices belong to.  The file does not name it.

    Raises InvalidStream if the file was not written at this rate point.
    """
    return Codes(
        model=model,
        width_px=file.width_px,
        height_px=file.height_px,
        rate_point=PERCO_SD.index(point),
        indices=(decode_indices(file, point),),
        caption=file.caption,
    )


def convert(data: bytes, bpp: float | None = None) -> bytes:
    """A file of the reference as the bytes of a .perco file: the same indices, caption and size.

    The checkpoint of its rate must be installed: a .perco file names the weights that its codes belong to.

    Raises as `read` and `choose_rate_point` do, and ModelUnavailable, with what to do.
    """
    file = read(data)
    point = choose_rate_point(file, bpp)
    family = next(spec for spec in weights.REGISTRY if spec.rate_points == PERCO_SD)
    return container.pack(to_codes(file, point, weights.checkpoint(family, point).reference), PERCO_SD)


class _PickleReader:
    """Takes the parts off a pickle, wherever its frames begin; `finish` looks whether they begin where they should."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._fields = FieldReader(data)
        self._parts: list[bytes] = []
        self._take_exactly(_PROTOCOL_4)

    def expect(self, opcodes: bytes) -> None:
        """Takes these opcodes, which are one part for the writer's frames."""
        self._skip_frame()
        self._take_exactly(opcodes)
        self._parts.append(opcodes)

    def take_bytes(self) -> bytes:
        """Takes a bytes object and its place in the memo."""
        self._skip_frame()
        opcode = self._fields.take(1, "the opcode of a bytes object")
        if opcode not in _LENGTH_BYTES:
            raise _refused(f"byte {self._fields.position - 1} begins no bytes object")
        length = self._fields.take(_LENGTH_BYTES[opcode], "the length of a bytes object")
        value = self._fields.take(int.from_bytes(length, "little"), "a bytes object")
        if (opcode == b"C") != (len(value) < 1 << 8):
            raise _refused(f"{len(value)} bytes have the opcode of another length")
        self._parts.append(opcode + length + value)
        self.expect(_MEMOIZE)
        return value

    def take_integer(self) -> int:
        """Takes an integer of up to 32 bits with sign."""
        self._skip_frame()
        opcode = self._fields.take(1, "the opcode of an integer")
        if opcode not in _INTEGER_BYTES:
            raise _refused(f"byte {self._fields.position - 1} begins no integer")
        digits = self._fields.take(_INTEGER_BYTES[opcode], "an integer")
        value = int.from_bytes(digits, "little", signed=opcode == b"J")
        if opcode != (b"K" if 0 <= value < 1 << 8 else b"M" if 0 <= value < 1 << 16 else b"J"):
            raise _refused(f"the integer {value} has the opcode of another length")
        self._parts.append(opcode + digits)
        return value

    def finish(self) -> None:
        """Takes the end, and looks whether the writer would have made the same bytes of the same parts."""
        self.expect(_STOP)
        if self._fields.remaining_bytes:
            raise _refused(f"{self._fields.remaining_bytes} bytes follow its end")
        if _framed(self._parts) != self._data:
            raise _refused("its frames are not those of the writer")

    def _take_exactly(self, opcodes: bytes) -> None:
        position = self._fields.position
        found = self._fields.take(len(opcodes), "the structure of the file")
        if found != opcodes:
            raise _refused(f"from byte {position} on it has {found.hex(' ')}, not {opcodes.hex(' ')}")

    def _skip_frame(self) -> None:
        position = self._fields.position
        if self._data[position : position + 1] == _FRAME:
            self._fields.take(9, "the head of a frame")


def _framed(parts: list[bytes]) -> bytes:
    """The pickle that CPython's pickler makes of these parts.

    A frame ends before the object that finds it full, and before a bytes object as large as a full frame, which stands
    between two frames.  Less than four bytes get no frame around them.
    """
    pickled = [_PROTOCOL_4]
    frame: list[bytes] = []

    def end_frame() -> None:
        contents = b"".join(frame)
        if len(contents) >= _SMALLEST_FRAME_BYTES:
            pickled.append(_FRAME + len(contents).to_bytes(8, "little"))
        pickled.append(contents)
        frame.clear()

    for part in parts:
        opcode = part[:1]
        if opcode in _LENGTH_BYTES and len(part) - 1 - _LENGTH_BYTES[opcode] >= _FULL_FRAME_BYTES:
            end_frame()
            pickled.append(part)
            continue
        begins_an_object = opcode in _LENGTH_BYTES or opcode in _INTEGER_BYTES
        if begins_an_object and sum(map(len, frame)) >= _FULL_FRAME_BYTES:
            end_frame()
        frame.append(part)
    end_frame()
    return b"".join(pickled)


def _only_bytes(pickled: bytes) -> bytes:
    """The bytes object that this is the pickle of."""
    reader = _PickleReader(pickled)
    value = reader.take_bytes()
    reader.finish()
    return value


def _pair(pickled: bytes) -> tuple[int, int]:
    """The tuple of two integers that this is the pickle of."""
    reader = _PickleReader(pickled)
    pair = reader.take_integer(), reader.take_integer()
    reader.expect(_PAIR)
    reader.finish()
    return pair


def _decode_caption(text: bytes) -> str:
    """The caption in a zlib stream, of which no more than the limit is ever decompressed."""
    if text[:2] != _ZLIB_LEVEL_9:
        raise InvalidStream("the caption is not compressed by zlib at level 9; write the file again")
    inflate = zlib.decompressobj()
    try:
        content = inflate.decompress(text, MAX_CAPTION_BYTES + 1)
        if len(content) > MAX_CAPTION_BYTES:
            raise LimitExceeded(f"the caption has more than {MAX_CAPTION_BYTES} bytes, more than .perco files hold")
        if not inflate.eof or inflate.unused_data:
            raise InvalidStream("the caption is not one complete zlib stream; copy or write the file again")
        return content.decode("utf-8")
    except (zlib.error, UnicodeDecodeError) as error:
        raise InvalidStream(f"the caption is not UTF-8 compressed by zlib ({error}); write the file again") from error


def _decode(file: ReferenceFile, point: RatePoint) -> NDArray[np.int32]:
    (grid,) = point.grids
    if file.height_px % grid.pixels_per_index or file.width_px % grid.pixels_per_index:
        raise InvalidStream(  # the reference's encoder would round up here, and its decoder down
            f"{file.width_px} x {file.height_px} pixels are not whole squares of {grid.pixels_per_index} pixels"
        )
    rows, columns = grid.shape(file.width_px, file.height_px)
    (indices,) = entropy.decode(file.stream, [rows * columns], [reference_cdf(grid.codebook_size)])
    return indices.reshape(rows, columns)


def _not_written_at(point: RatePoint, possible: tuple[RatePoint, ...]) -> InvalidStream:
    return InvalidStream(f"the file was not written at {point.bpp} bits a pixel; {_what_fits(possible)}")


def _what_fits(possible: tuple[RatePoint, ...]) -> str:
    if not possible:
        return "its stream and its size fit none of them: copy or write the file again"
    return f"its stream and its size fit {' and '.join(str(point.bpp) for point in possible)}"


def _refused(why: str) -> NotAReferenceFile:
    return NotAReferenceFile(
        f"this is not a file as PerCo (SD) writes it: {why}. Other pickles are not opened, as they may run programs; "
        "write the file again with PerCo (SD)"
    )
