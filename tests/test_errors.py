"""What errors say, also those that say nothing."""

import pytest

from perco_engine.errors import first_line, full_text


@pytest.mark.parametrize(
    ("error", "whole", "first"),
    [
        (OSError("a\nb"), "a\nb", "a"),
        (RuntimeError("\n  a\nb"), "\n  a\nb", "a"),
        (MemoryError(), "MemoryError", "MemoryError"),
        (EOFError("\n"), "EOFError", "EOFError"),
    ],
)
def test_no_text_is_empty(error: Exception, whole: str, first: str) -> None:
    assert (full_text(error), first_line(error)) == (whole, first)
