"""`perco models`: the models on this machine beside the embedded one."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_options import FOLDER

if TYPE_CHECKING:
    from perco_engine.store.checkpoint import Checkpoint


@click.group()
def models() -> None:
    """List, install, check and remove models, such as the checkpoints of PerCo (SD)."""


def how_to_install(command: Any) -> Any:
    """The options that `pull` and `import` share."""
    for option in (
        click.option("--base", help="Where missing components come from: a folder, or a repository on the hub."),
        click.option("--bpp", type=float, help="The rate that it is thought to be of: an error if it is not."),
        click.option(
            "--family",
            default="auto",
            show_default=True,
            help="The family that it belongs to, or none; auto: perco-sd, if it is of one of its rates.",
        ),
        click.option(
            "--name",
            help="The name to install it under.  [default: FAMILY-RATE, or that of the folder or repository]",
        ),
    ):
        command = option(command)
    return command


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each model, in a list.")
def list_command(as_json: bool) -> None:
    """List the models on this machine."""
    from perco_engine.store import inventory

    found = inventory.list_models()
    if as_json:
        told = [
            {
                "name": one.name, "family": one.family, "bpp": list(one.rate_points), "size_bytes": one.size_bytes,
                "state": one.state or "ok", "folder": str(one.folder),
            }
            for one in found
        ]  # fmt: skip
        click.echo(json.dumps(told, indent=1))
        return
    width = max(len(one.name) for one in found)
    click.echo(f"{'name':<{width}}  {'family':<9} {'bpp':<16} {'MB':>8}  state")
    for one in found:
        ends = dict.fromkeys((one.rate_points[0], one.rate_points[-1])) if one.rate_points else ["-"]
        bpp = " to ".join(str(end) for end in ends)
        size = one.size_bytes / 1e6
        click.echo(f"{one.name:<{width}}  {one.family or '-':<9} {bpp:<16} {size:>8.1f}  {one.state or 'ok'}")


@models.command("import")
@click.argument("folder", type=FOLDER)
@how_to_install
def import_command(folder: Path, **options: Any) -> None:
    """Install a published model FOLDER as it is: checked, its weights as safetensors, the folder left alone."""
    from perco_engine.store import install

    tell(install.import_folder(folder, **options))


@models.command()
@click.argument("repository")
@click.option("--revision", help="A branch, tag or commit.  [default: main, as it is now]")
@how_to_install
def pull(repository: str, **options: Any) -> None:
    """Download a model REPOSITORY (OWNER/NAME) from the hub, and install it; or tell where a family is published."""
    from perco_engine.store import install

    tell(install.pull(repository, **options))


def tell(checkpoint: "Checkpoint") -> None:
    """What was installed, and how to use it."""
    use = f"--model {checkpoint.name}"
    if checkpoint.family and _is_chosen(checkpoint):
        use = f"--model {checkpoint.family} --bpp {checkpoint.bpp}"
    revision = f" at revision {checkpoint.revision}" if checkpoint.revision else ""
    click.echo(f"{checkpoint.name}: installed from {checkpoint.source}{revision}")
    click.echo(f"weights {checkpoint.fingerprint.hex()}, {checkpoint.size_bytes / 1e6:.1f} MB in {checkpoint.folder}")
    if checkpoint.base:
        click.echo(f"missing components from {checkpoint.base}")
    click.echo(f"use it with: perco encode PHOTO FILE.perco {use}")


def _is_chosen(checkpoint: "Checkpoint") -> bool:
    """Whether a family's checkpoint is the one that its rate stands for: several of one rate may be installed."""
    from perco_engine import weights

    family = weights.named(checkpoint.family or "")
    assert family is not None
    point = next(point for point in family.rate_points if point.bpp == checkpoint.bpp)
    return weights.checkpoint(family, point).name == checkpoint.name


@models.command()
@click.argument("name", required=False)
def verify(name: str | None) -> None:
    """Read every file of the model NAME, or of all, and compare it with what was installed."""
    from perco_engine import weights
    from perco_engine.store import checkpoint, inventory

    if name is None:
        folders = [one.folder for one in inventory.list_models() if one.folder.parent == weights.models_folder()]
    else:
        folders = [weights.models_folder() / one for one in inventory.installed_names(name)]
    if not folders:
        click.echo("nothing is installed beside the models of this package")
    damaged = []
    for folder in folders:
        wrong = inventory.verify(folder)
        damaged += [folder] if wrong else []
        click.echo(f"{folder.name}: {'ok' if not wrong else '; '.join(wrong)}")
    if any((folder / checkpoint.RECORD).exists() for folder in damaged):
        raise click.ClickException("perco models remove NAME, and install it again")
    if damaged:
        raise click.exceptions.Exit(1)


@models.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
def remove(name: str, yes: bool) -> None:
    """Delete the installed model NAME, or all installed checkpoints of the family NAME."""
    from perco_engine.store import inventory

    names = inventory.installed_names(name)
    if not yes:
        folders = " and ".join(str(folder) for folder in inventory.paths(name))
        click.confirm(f"delete {folders}?", abort=True)
    for one in names:
        inventory.remove(one)
        click.echo(f"{one}: removed")


@models.command()
@click.argument("name", required=False)
def path(name: str | None) -> None:
    """Print the folder of the model NAME (of a family: each checkpoint's), or of all models."""
    from perco_engine import weights
    from perco_engine.store import inventory

    for folder in [weights.models_folder()] if name is None else inventory.paths(name):
        click.echo(folder)
