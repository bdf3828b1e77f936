"""The bytes of a .perco file, as FORMAT.md specifies them.

    container ──> header ──> fields, chunks ──> compression    bytes <-> texts, numbers and streams of bytes
        └───────> alpha, prior, entropy                        streams of bytes <-> numpy arrays

Nothing here imports torch.  Importing this package and `read_header` take the standard library alone (and brotli, for a
file that uses it), so that a file can be opened without numpy; `pack`, `unpack` and `unpack_partial` import numpy when
they are first asked for.
"""

from typing import TYPE_CHECKING, Any

from perco_engine.bitstream.header import Header, read_header

if TYPE_CHECKING:
    from perco_engine.bitstream.container import pack, unpack, unpack_partial

__all__ = ["Header", "pack", "read_header", "unpack", "unpack_partial"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from perco_engine.bitstream import container

        return getattr(container, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
