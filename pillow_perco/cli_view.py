"""`perco view` and `perco service`."""

import os
import shutil
import sys
from pathlib import Path

import click

from perco_engine import service as warm
from perco_engine.errors import PercoError
from perco_engine.printable import printable
from perco_engine.terminal import PROTOCOLS, Protocol, is_terminal

from .cli_options import FILE_MODEL, INPUT, SEED, STEPS
from .desktop.menu import notify

MOST_ROWS = MOST_COLUMNS = 1000
"""In the terminal, of a picture whose width is asked for."""


@click.command()
@click.argument("file", type=INPUT)
@click.option("--terminal", "in_terminal", is_flag=True, help="Show it here, in the terminal.")
@click.option("--protocol", type=click.Choice(PROTOCOLS), help="For the terminal.  [default: what it says it can]")
@click.option("--width", type=click.IntRange(1, MOST_COLUMNS), help="For the terminal: columns.  [default: all]")
@click.option("--steps", type=STEPS, help="Denoising steps.  [default: the model's]")
@SEED
@FILE_MODEL
def view(
    file: Path, in_terminal: bool, protocol: Protocol | None, width: int | None, steps: int | None, seed: int | None,
    model: str | None,
) -> None:  # fmt: skip
    """Show what a .perco file holds, in your picture viewer or in the terminal."""
    from PIL import Image

    from perco_engine import terminal, viewing

    if not (in_terminal or protocol or width):
        try:
            viewing.open_in_viewer(viewing.decoded(file, steps=steps, seed=seed, model=model))
        except (OSError, PercoError) as error:
            if not is_terminal(sys.stderr):  # a double-click, where nobody would see it
                notify(f"{printable(file.name)}: {error}")
            raise
        return
    picture = viewing.decoded(file, steps=steps, seed=seed, model=model)
    columns, lines = shutil.get_terminal_size()
    rows = MOST_ROWS if width else max(1, lines - 1)
    true_colour = os.environ.get("COLORTERM", "truecolor") in ("truecolor", "24bit")
    with Image.open(picture) as image:
        text = terminal.render(image, protocol or terminal.detect(), width or columns, rows, true_colour)
    click.echo(text, nl=False, color=True)


@click.group()
def service() -> None:
    """The warm engine of `perco view`: it starts when that needs it, and ends when nobody does."""


@service.command()
@click.option(
    "--idle", type=click.IntRange(1), default=int(warm.IDLE_SECONDS), show_default=True,
    help="Seconds without work until it ends.",
)  # fmt: skip
def start(idle: int) -> None:
    """Start it, unless it runs."""
    click.echo(f"running, process {warm.start(idle)['pid']}")


@service.command()
def stop() -> None:
    """Stop it."""
    click.echo("stopped" if warm.stop() else "it was not running")


@service.command()
def status() -> None:
    """Tell whether it runs; exit code 1 if not."""
    found = warm.status()
    if found is None:
        click.echo("not running")
        raise click.exceptions.Exit(1)
    for name, value in found.items():
        if name != "ok":
            click.echo(f"{name.replace('_', ' '):<20} {value}")
