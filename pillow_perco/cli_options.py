"""Options that several commands have."""

from pathlib import Path
from typing import Any

import click

OUT = click.Path(file_okay=False, path_type=Path)
EFFORT = click.option(
    "--effort", type=click.IntRange(0, 100),
    help="To .perco: steps of a search for better codes.  [default: 4, at the lowest rate 8; fewer beyond a megapixel]",
)  # fmt: skip
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


def listed(text: str | None, kind: type) -> tuple[Any, ...]:
    """The values of an option that takes several, with commas between them.  Raises click.BadParameter."""
    try:
        return tuple(kind(part.strip()) for part in (text or "").split(",") if part.strip())
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no list of numbers with commas between them") from error
