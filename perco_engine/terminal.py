"""Pictures in a terminal: Kitty's and iTerm2's protocols, Sixel, and half blocks for all others.

Each is a few lines over what Pillow gives.  The libraries for them need a C library, or question the terminal when they
are imported, and none writes all four.
"""

import base64
import io
import os
import re
import select
import sys
import time
from collections.abc import Mapping
from typing import Literal, TextIO, get_args

from PIL import Image

Protocol = Literal["kitty", "iterm2", "sixel", "blocks"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

QUESTION = b"\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\\x1b[c"
"""Whether Kitty's protocol is known, and what kind of terminal it is.  Every terminal answers the second."""

ANSWER_SECONDS = 2.0
"""Far away terminals take that long; near ones answer at once, and nobody waits for more than an answer."""

SIXEL_COLOURS = 256


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream is a terminal; Python has None for one that was closed when the process began."""
    return stream is not None and stream.isatty()


def detect() -> Protocol:
    """What the terminal at stdin and stdout can show, by the environment, else by asking it; or half blocks.

    Inside of tmux and screen the environment is that of the terminal around them, so only the answer counts.
    """
    if not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
        return "blocks"
    return by_environment(os.environ) or by_answer(_ask())


def by_environment(environment: Mapping[str, str]) -> Protocol | None:
    """What the variables say that terminals set; None where they say nothing."""
    if "TMUX" in environment or environment.get("TERM", "").startswith(("screen", "tmux")):
        return None
    program, term = environment.get("TERM_PROGRAM", ""), environment.get("TERM", "")
    if "KITTY_WINDOW_ID" in environment or term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "mintty") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    if term.startswith(("foot", "mlterm", "contour")) or "sixel" in term:
        return "sixel"
    return None


def by_answer(answer: bytes) -> Protocol:
    """What the answers to QUESTION say; attribute 4 of the second is Sixel (DEC's primary device attributes)."""
    if b"\x1b_Gi=31;OK" in answer:
        return "kitty"
    found = re.search(rb"\x1b\[\?([0-9;]*)c", answer)
    return "sixel" if found and b"4" in found.group(1).split(b";")[1:] else "blocks"


def _ask() -> bytes:
    """The terminal's answer to QUESTION; what came within ANSWER_SECONDS."""
    if sys.platform == "win32" or os.environ.get("TERM", "") in ("", "dumb"):
        return b""
    import termios
    import tty

    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    answer = b""
    try:
        tty.setcbreak(handle, termios.TCSANOW)
        os.write(sys.stdout.fileno(), QUESTION)
        deadline = time.monotonic() + ANSWER_SECONDS
        while not re.search(rb"\x1b\[\?[0-9;]*c", answer):
            if not select.select([handle], [], [], max(0, deadline - time.monotonic()))[0]:
                break
            answer += os.read(handle, 1024)
    finally:
        termios.tcflush(handle, termios.TCIFLUSH)  # what is late is nothing that was typed
        termios.tcsetattr(handle, termios.TCSANOW, before)
    return answer


def render(picture: Image.Image, protocol: Protocol, columns: int, rows: int, true_colour: bool = True) -> str:
    """The picture as the text that shows it within so many columns and rows, a line break at its end.

    true_colour: for half blocks; False: the 256 colours of xterm.
    Opacity is shown on black.
    """
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture.convert("RGBA")).convert("RGB")
    if protocol == "blocks":
        return blocks(_within(flat, columns, 2 * rows, larger=True), true_colour)
    width, height = cell_size_px()
    small = _within(flat, columns * width, rows * height)
    return {"kitty": kitty, "iterm2": iterm2, "sixel": sixel}[protocol](small) + "\n"


def cell_size_px() -> tuple[int, int]:
    """Width and height of a character, as the terminal tells, or a usual size."""
    if sys.platform != "win32" and is_terminal(sys.stdout):
        import fcntl
        import struct
        import termios

        try:
            told = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, bytes(8))
            rows, columns, width, height = struct.unpack("HHHH", told)
            if rows and columns and width >= columns and height >= rows:
                return width // columns, height // rows
        except (OSError, ValueError):
            pass
    return 8, 16


def _within(picture: Image.Image, width: int, height: int, larger: bool = False) -> Image.Image:
    scale = min(width / picture.width, height / picture.height)
    if scale >= 1 and not larger:
        return picture
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def kitty(picture: Image.Image) -> str:
    """By Kitty's graphics protocol: a PNG in pieces of 4096 letters."""
    text = base64.b64encode(_png(picture)).decode()
    pieces = [text[k : k + 4096] for k in range(0, len(text), 4096)]
    keys = ["a=T,f=100,q=2,", *[""] * (len(pieces) - 1)]
    return "".join(
        f"\x1b_G{key}m={int(k < len(pieces) - 1)};{piece}\x1b\\"
        for k, (key, piece) in enumerate(zip(keys, pieces, strict=True))
    )


def iterm2(picture: Image.Image) -> str:
    """By iTerm2's inline images protocol."""
    data = _png(picture)
    size = f"width={picture.width}px;height={picture.height}px"
    return f"\x1b]1337;File=inline=1;size={len(data)};{size}:{base64.b64encode(data).decode()}\a"


def sixel(picture: Image.Image) -> str:
    """As Sixel graphics (DEC VT330/VT340): up to 256 colours, six rows at a time, a run of equal columns as !n."""
    import numpy as np

    colours = picture.quantize(SIXEL_COLOURS)
    reduced = picture.quantize(palette=colours, dither=Image.Dither.FLOYDSTEINBERG)  # no dither without a palette
    indices = np.asarray(reduced)
    palette = np.array(reduced.getpalette(), np.uint16).reshape(-1, 3)
    parts = [f'\x1bP0;1q"1;1;{picture.width};{picture.height}']
    parts += [f"#{k};2;{r};{g};{b}" for k, (r, g, b) in enumerate((palette * 100 + 127) // 255)]
    for top in range(0, picture.height, 6):
        band = indices[top : top + 6]
        weights = (1 << np.arange(len(band)))[:, None]
        lines = [f"#{k}" + _runs(((band == k) * weights).sum(0).astype(np.uint8).tobytes()) for k in np.unique(band)]
        parts.append("$".join(lines) + "-")
    return "".join(parts) + "\x1b\\"


def _runs(sixels: bytes) -> str:
    """Sixels 0..63 of a row as letters, with their runs counted."""
    letters = bytes(63 + value for value in sixels).decode()
    return re.sub(r"(.)\1{3,}", lambda run: f"!{len(run.group())}{run.group(1)}", letters)


def blocks(picture: Image.Image, true_colour: bool = True) -> str:
    """As half blocks: two pixels a character, the upper one in the letter's colour, the lower one behind it."""
    if picture.height % 2:
        padded = Image.new("RGB", (picture.width, picture.height + 1))
        padded.paste(picture)
        picture = padded
    pixels = list(zip(*[iter(picture.tobytes())] * 3, strict=True))
    lines = []
    for top in range(0, picture.height, 2):
        upper = pixels[top * picture.width : (top + 1) * picture.width]
        lower = pixels[(top + 1) * picture.width : (top + 2) * picture.width]
        cells = (
            f"\x1b[38;{_colour(a, true_colour)};48;{_colour(b, true_colour)}m▀"
            for a, b in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m\n")
    return "".join(lines)


def _colour(rgb: tuple[int, int, int], true_colour: bool) -> str:
    if true_colour:
        return "2;{};{};{}".format(*rgb)
    red, green, blue = ((level * 5 + 127) // 255 for level in rgb)
    return f"5;{16 + 36 * red + 6 * green + blue}"


def _png(picture: Image.Image) -> bytes:
    written = io.BytesIO()
    picture.save(written, "PNG", compress_level=1)
    return written.getvalue()
