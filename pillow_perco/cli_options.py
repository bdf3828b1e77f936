"""Options that several commands have."""

from pathlib import Path
from typing import Any

import click

INPUT = click.Path(exists=True, dir_okay=False, path_type=Path)
OUTPUT = click.Path(dir_okay=False, path_type=Path)
OUT = click.Path(file_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
BPP = click.FloatRange(0, min_open=True)
MAX_BYTES = click.IntRange(1)
SEED_NUMBER = click.IntRange(0, 2**32 - 1)
STEPS = click.IntRange(0, 1000)
GUIDANCE = click.FloatRange(0)
MODEL = click.option(
    "--model", default="embedded", show_default=True, help="The name of a model (perco models list), or a model folder."
)
FILE_MODEL = click.option("--model", help="The folder of the file's model, if it is not installed.")
SEED = click.option("--seed", type=SEED_NUMBER, help="Another seed than the file's.")
EFFORT, EFFORT_OF_ENCODING = (
    click.option(
        "--effort", type=click.IntRange(0, 100),
        help=f"{of}Steps of a search for better codes.  [default: 4, at the lowest rate 8; fewer beyond a megapixel]",
    ) for of in ("", "To .perco: ")
)  # fmt: skip


def tell(text: str) -> None:
    """Tells how far a long command is, on stderr."""
    click.echo(text, err=True)


def listed(text: str | None, kind: type) -> tuple[Any, ...]:
    """The values of an option that takes several, with commas between them.  Raises click.BadParameter."""
    try:
        return tuple(kind(part.strip()) for part in (text or "").split(",") if part.strip())
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no list of numbers with commas between them") from error
