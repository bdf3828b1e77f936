"""Thunar's custom actions: one file that the user owns, uca.xml.

It is edited as text, so that everything else in it stays byte for byte; ours are known by their unique-id.
"""

import re
from xml.etree import ElementTree

OURS = re.compile(
    r"<action>(?:(?!</action>).)*?<unique-id>pillow-perco-[^<]*</unique-id>(?:(?!</action>).)*?</action>\n?", re.DOTALL
)
END = "</actions>"
EMPTY = '<?xml version="1.0" encoding="UTF-8"?>\n<actions>\n</actions>\n'


def with_actions(text: str, actions: str) -> str:
    """The file with our actions in place of those of ours that it has.  Raises ValueError for a file that is no XML."""
    text = re.sub(r"<actions\s*/>", f"<actions>\n{END}", without_actions(text))
    before, end, after = text.rpartition(END)
    if not end:
        raise ValueError("it has no <actions>")
    merged = before + actions + end + after
    _check(merged)
    return merged


def without_actions(text: str) -> str:
    """The file without our actions.  Raises ValueError for a file that is no XML."""
    _check(text)
    return OURS.sub("", text)


def _check(text: str) -> None:
    try:
        ElementTree.fromstring(text.encode())
    except ElementTree.ParseError as error:
        raise ValueError(f"it is no XML: {error}") from error
