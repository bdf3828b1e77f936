"""Names of files as lines of text, which no name can break or make a terminal obey."""

import os
import sys
from collections.abc import Sequence

MOST_TOLD = 5
"""How many files a message names."""


def printable(path: str | os.PathLike[str]) -> str:
    """A path as a line of text can hold it, whatever bytes and control characters are in its name."""
    # Not by os.fsencode: where names are ASCII by the locale, a caption still has other letters.
    text = os.fspath(path).encode("utf-8", sys.getfilesystemencodeerrors()).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def some(paths: Sequence[str | os.PathLike[str]]) -> str:
    """The first of these paths, and how many more there are."""
    named = ", ".join(printable(path) for path in paths[:MOST_TOLD])
    return named if len(paths) <= MOST_TOLD else f"{named} and {len(paths) - MOST_TOLD} more"
