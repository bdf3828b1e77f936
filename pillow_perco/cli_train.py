"""`perco train`: thin commands over perco_engine.training."""

import shlex
from pathlib import Path

import click

from perco_engine.printable import printable

from .cli_options import tell


@click.command()
@click.argument("config", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--list", "list_recipes", is_flag=True, help="Name the settings files that come with the package.")
@click.option("--example", metavar="NAME", help="Print one of them; write it to a file and change what you need.")
@click.option("--check", is_flag=True, help="Only look at the settings in CONFIG, and for what they name.")
@click.option(
    "--processes", type=click.IntRange(1), help="Processes on this machine.  [default: one for each GPU, or one]"
)
def train(config: Path | None, list_recipes: bool, example: str | None, check: bool, processes: int | None) -> None:
    """Train a model as the TOML file CONFIG says, and write its folder.

    A run that was broken off goes on from its newest checkpoint: run the same command again.  On several machines:
    accelerate launch -m pillow_perco.cli train CONFIG.
    """
    from perco_engine.training.settings_file import examples

    if list_recipes:
        width = max(map(len, examples()))
        for name, text in examples().items():
            click.echo(f"{name:<{width}}  {text.splitlines()[0].removeprefix('# ')}")
    elif example is not None:
        if example not in examples():
            raise click.BadParameter(f"there is no {example}: {', '.join(examples())}", param_hint="--example")
        click.echo(examples()[example], nl=False)
    elif config is None:
        raise click.UsageError("name a settings file: perco train --list shows those that there are")
    elif check:
        from perco_engine.training.train import check as look_at

        click.echo(f"{config}: recipe {look_at(config, tell).recipe}, nothing wrong")
    else:
        start(config, processes)


def start(config: Path, processes: int | None) -> None:
    """Trains, in this process or in several."""
    from perco_engine.training import processes as running
    from perco_engine.training.train import check, train

    if not running.is_launched():
        wanted = processes or running.devices()
        if wanted > 1:
            check(config)  # wrong settings are told once, and not by each process
            running.launch(["-m", "pillow_perco.cli", "train", str(config)], wanted)
            return
    folder = train(config, tell)
    if running.is_first():
        click.echo(f"{folder}: done; install it with: perco models import {shlex.quote(printable(folder))}")
