"""`perco desktop`: pictures in every file manager."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from perco_engine.printable import printable

if TYPE_CHECKING:
    from .desktop.points import Place

FILES = click.Path(dir_okay=False, path_type=Path)  # one that is gone is told with others that fail


@click.group()
def desktop() -> None:
    """Show .perco files in file managers, convert by right-click, open by double-click."""


def which_place(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say whose desktop it is."""
    for option in (
        click.option("--system", is_flag=True, help="For all users, and for GNOME's sandbox (run it as root)."),
        click.option(
            "--prefix", type=click.Path(path_type=Path), default=Path("/usr/local"), show_default=True,
            help="With --system: where it goes.",
        ),
        click.option(
            "--destdir", type=click.Path(path_type=Path), envvar="DESTDIR",
            help="With --system: a folder that stands for /, to build a package.  [default: $DESTDIR]",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def place_for(system: bool, prefix: Path, destdir: Path | None) -> "Place":
    """The place that the options name."""
    from .desktop import points

    if not system:
        _check_system()
        context = click.get_current_context()
        if any(context.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in ("prefix", "destdir")):
            raise click.UsageError("--prefix and --destdir go with --system")
        return points.user_place()
    if not prefix.is_absolute():
        raise click.BadParameter("the prefix must be an absolute path")
    return points.system_place(prefix, destdir.absolute() if destdir else None)


def _check_system() -> None:
    if sys.platform in ("win32", "darwin"):
        raise click.ClickException("the file managers of this system cannot be taught .perco: perco view shows a file")


@desktop.command()
@which_place
def install(**where: Any) -> None:
    """Install the MIME type, the thumbnailer, menu entries and the viewer; again is no harm."""
    from .desktop import check, install

    place = place_for(**where)
    before = os.umask(0o022) if place.is_system else None  # all users are to read it, whatever root keeps to itself
    try:
        for line in install.install(place):
            click.echo(line)
    finally:
        if before is not None:
            os.umask(before)
    for line in check.advice(place):
        click.echo(line)


@desktop.command()
@which_place
def uninstall(**where: Any) -> None:
    """Take out exactly what install put in."""
    from .desktop import install

    for line in install.uninstall(place_for(**where)):
        click.echo(line)


@desktop.command()
def status() -> None:
    """Tell which points are installed, and whether each would really work; 1 where one of them does not, or none is.

    Looked at is what is yours and what is below /usr/local.
    """
    from .desktop import check

    _check_system()
    faults = 0
    for finding in check.findings():
        click.echo(finding.line)
        faults += bool(finding.mend) and finding.fault
    sys.exit(1 if faults else 0)


@desktop.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-r", "--recursive", is_flag=True, help="With all folders below it.")
@click.option("--again", is_flag=True, help="Also where there are current ones.")
def thumbnails(folder: Path, recursive: bool, again: bool) -> None:
    """Put thumbnails in full quality of FOLDER's .perco files, hidden ones excepted, into your thumbnail cache."""
    from perco_engine.thumbnails import fill

    _check_system()
    failed = 0
    for one in fill(folder, recursive=recursive, again=again):
        click.echo(
            f"{printable(one.path)}: {one.error or ('made' if one.made else 'there already')}", err=bool(one.error)
        )
        failed += bool(one.error)
    if failed:
        raise click.ClickException(f"{failed} files have got no thumbnails")


@desktop.command()
@click.argument("files", nargs=-1, required=True, type=FILES)
@click.option("--to", default="perco", show_default=True, metavar="FORMAT", help="perco, png, jpg, ...")
@click.option("--bpp", help="To .perco: nominal bits a pixel.")
def convert(files: tuple[Path, ...], to: str, bpp: str | None) -> None:
    """Convert FILES, each beside itself, as the menus do; what is there already is not replaced.

    `perco convert` has all options.  A failure is also shown on the desktop, by notify-send.
    """
    from .desktop.menu import convert_beside

    failures = list(convert_beside(files, to, bpp))
    if failures:
        raise click.ClickException("; ".join(failures))
