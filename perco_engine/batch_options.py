"""What engines take by name, for all pictures of a batch or for each of them."""

import os
from collections.abc import Sequence
from typing import Any, TypedDict, TypeVar

from .captioner import Captioner
from .codes import Metadata

Options = TypeVar("Options", "EncodeOptions", "DecodeOptions")
T = TypeVar("T")


class EncodeOptions(TypedDict, total=False):
    """What `Engine.encode` and `Engine.encode_batch` take by name; the latter says what each means."""

    bpp: float | None
    max_bytes: int | None
    caption: str | Sequence[str | None] | None
    captioner: str | os.PathLike[str] | Captioner | None
    seed: int | None
    effort: int | None
    best_of: int
    alpha: bool
    metadata: Metadata | Sequence[Metadata] | None


class DecodeOptions(TypedDict, total=False):
    """What `Engine.decode` and `Engine.decode_batch` take by name; the latter says what each means."""

    steps: int | None
    guidance_scale: float | None
    seed: int | Sequence[int] | None
    max_size_px: int | None
    allow_truncated: bool


def for_each(given: T | Sequence[T], count: int, name: str) -> list[T]:
    """One value for all, or one for each, as one for each.

    name: of the values, in the plural.  Raises ValueError for another number of them than `count`.
    """
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{len(given)} {name} for {count} files")
    return list(given)


def of_members(options: Options, members: Sequence[int], count: int) -> Options:
    """The options for some pictures of a batch of `count`: what is given for each is given for these."""
    chosen: Any = {}
    for name, value in options.items():
        per_picture = isinstance(value, Sequence) and not isinstance(value, str)
        chosen[name] = [for_each(value, count, name)[k] for k in members] if per_picture else value
    result: Options = chosen
    return result
