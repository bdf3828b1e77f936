"""`perco convert`: many files, in both directions."""

import json
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from perco_engine import conversion
from perco_engine.conversion import PERCO, Request, Task
from perco_engine.errors import ConversionError, PercoError, full_text
from perco_engine.picture_files import readable_suffixes
from perco_engine.printable import printable, some
from perco_engine.terminal import is_terminal

from .cli_options import BPP, EFFORT_OF_ENCODING, GUIDANCE, MAX_BYTES, MODEL, SEED_NUMBER, STEPS
from .progress import Progress

EXIT_FAILED, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 130, 143
ENCODING = {
    "bpp": "--bpp", "max_bytes": "--max-bytes", "caption": "--caption", "captioner": "--captioner",
    "effort": "--effort",
}  # fmt: skip
DECODING = {"steps": "--steps", "guidance_scale": "--guidance"}


@click.command()
@click.argument("sources", nargs=-1, metavar="[SRC]...")
@click.argument("destination", metavar="DST")
@click.option("--to", metavar="FORMAT", help="perco, png, jpg, ...  [default: perco; png if all are .perco files]")
@click.option("-r", "--recursive", is_flag=True, help="Folders with all that is below them; the tree is kept.")
@click.option(
    "--watch",
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False),
    help="Convert what is or comes there, until Ctrl-C.",
)
@click.option("--skip-existing", is_flag=True, help="Leave files alone that are there already.")
@click.option("--overwrite", is_flag=True, help="Replace files that are there already.")
@MODEL
@click.option(
    "--bpp",
    type=BPP,
    help="To .perco: nominal bits a pixel.  [default: 0.03; with --max-bytes, the best that fits]",
)
@click.option("--max-bytes", type=MAX_BYTES, help="To .perco: hard limit on every file; the best that fits.")
@click.option("--caption", help="To .perco: text for all.  [default: of the .txt file beside each photo, if any]")
@click.option("--no-sidecars", is_flag=True, help="To .perco: don't look for .txt files.")
@click.option("--captioner", metavar="MODEL", help="To .perco: what writes the captions that are not there.")
@EFFORT_OF_ENCODING
@click.option("--steps", type=STEPS, help="From .perco: denoising steps.  [default: the model's]")
@click.option(
    "--guidance", "guidance_scale", type=GUIDANCE, help="From .perco: guidance scale, for models that read captions."
)
@click.option("--seed", type=SEED_NUMBER, help="Of the noise that decoding starts from.")
@click.option("--keep-metadata", is_flag=True, help="Take EXIF and XMP along.")
@click.option("--delete-source", is_flag=True, help="Remove each source once its written file was read back.")
@click.option(
    "--thumbnails/--no-thumbnails",
    default=None,
    help="Put .perco files into the desktop's thumbnail cache.  [default: yes, if the model decodes in one step]",
)
@click.option("-n", "--dry-run", is_flag=True, help="Tell what would be done, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line: one for every file, then a summary.")
@click.option("-q", "--quiet", is_flag=True, help="Tell failures only.")
def convert(
    sources: tuple[str, ...], destination: str, to: str | None, recursive: bool, watch: str | None,
    skip_existing: bool, overwrite: bool, dry_run: bool, as_json: bool, quiet: bool, no_sidecars: bool, **settings: Any,
) -> None:  # fmt: skip
    """Convert photos to .perco files, or .perco files to pictures.

    SRC are files, folders and globs; DST is a folder, or for a single SRC also a file, whose name then says the format.
    A file that fails does not stop the others, and is told at the end.  To go on after a break, say it again with
    --skip-existing: files are there whole or not at all.

    Exit codes: 0 all is well, 1 something failed, 2 the request makes no sense and nothing was written, 130
    interrupted (143 terminated).
    """
    if (watch is None) == (not sources):
        raise click.UsageError("name the files to convert, or a folder to --watch, and where they are to go")
    if watch is not None and dry_run:
        raise click.UsageError("--watch and --dry-run exclude each other")
    if skip_existing and overwrite:
        raise click.UsageError("--skip-existing and --overwrite exclude each other")
    if not destination or not all(sources):
        raise click.UsageError("an empty name is neither a file nor a folder")
    if not math.isfinite(settings["bpp"] or 0):
        raise click.BadParameter(f"{settings['bpp']} is no rate", param_hint="--bpp")
    existing = "skip" if skip_existing else "overwrite" if overwrite else None
    request = Request([watch] if watch is not None else sources, destination, to, recursive)
    try:
        if watch is None:
            tasks, skipped = _planned(request, existing)
            suffixes = {task.target.suffix.lower() for task in (*tasks, *skipped)}
        else:
            conversion.check_folder(request)
            suffixes = {request.suffix() or PERCO}
    except ConversionError as error:
        raise click.UsageError(str(error)) from error
    encodes, unread = PERCO in suffixes, suffixes - readable_suffixes() - {PERCO}
    if settings["delete_source"] and unread:
        raise click.UsageError(f"--delete-source reads files back first, which {some(sorted(unread))} cannot be")
    for name, option in (DECODING if encodes else ENCODING).items():
        if settings[name] is not None:
            raise click.UsageError(f"{option} is of the other direction: {'to' if encodes else 'from'} .perco it is")
    from perco_engine.weights import find

    find(settings["model"])  # before anything is promised or waited for
    report = _Report(
        as_json, quiet, total=None if watch is not None else len(tasks), removing=settings["delete_source"]
    )
    if watch is None:
        for task in skipped:
            report.tell(task, "skipped")
    if watch is None and (dry_run or not tasks):
        # Where nothing is left to do, the networks are not loaded for it.
        for task in tasks:
            report.tell(task, "failed" if task.problem else "planned", error=task.problem)
        report.end()
        if report.failures:
            raise click.exceptions.Exit(EXIT_FAILED)
        return
    from perco_engine.batch import Result, Thumbnailed
    from perco_engine.batch import convert as converted
    from perco_engine.batch_networks import Settings
    from perco_engine.watch import watch as watched

    def tell(done: Result | Thumbnailed) -> None:
        if isinstance(done, Result):
            report.tell(done.task, done.status, done.size_bytes, (done.width_px, done.height_px), done.error)
            report.advance(done.task)
        else:
            report.thumbnailed(done.path)

    def tell_late(done: Result | Thumbnailed) -> None:
        with suppress(BrokenPipeError):  # the same Ctrl-C has ended whoever reads this
            tell(done)

    work = tasks if watch is None else watched(request, existing)
    asked = Settings(sidecars=not no_sidecars, overwrite=overwrite, skip_existing=skip_existing, **settings)
    results = converted(work, asked, tell_late)
    with _stoppable(report), report.progress, closing(results):
        for done in results:
            tell(done)
    report.end()
    if report.failures:
        raise click.exceptions.Exit(EXIT_FAILED)


def _planned(request: Request, existing: str | None) -> tuple[list[Task], list[Task]]:
    """The tasks to do, and those to skip.  Raises ConversionError where targets are there unasked for."""
    tasks = conversion.plan(request)
    there = [] if existing == "overwrite" else conversion.existing(tasks)
    if there and existing is None:
        raise ConversionError(
            f"{len(there)} of {len(tasks)} files to write are there already "
            f"({some([task.target for task in there])}): say --skip-existing to go on, or --overwrite"
        )
    skipped = set(there)
    return [task for task in tasks if task not in skipped], there


@dataclass
class _Report:
    """What is told while files are converted, and at the end."""

    as_json: bool
    quiet: bool
    total: int | None
    removing: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    size_bytes: int = 0
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        shown = not (self.as_json or self.quiet) and is_terminal(sys.stderr)
        self._bar = Progress(self.total) if shown else None

    @property
    def progress(self) -> AbstractContextManager[Any]:
        """The progress that is shown meanwhile, if any."""
        return self._bar or nullcontext()

    def tell(
        self, task: Task, status: str, size_bytes: int = 0, size_px: tuple[int, int] = (0, 0), error: str = ""
    ) -> None:
        """What became of a file."""
        self.counts[status] += 1
        self.size_bytes += size_bytes
        if error:
            self.failures.append(printable(f"{printable(task.source)}: {error}"))
            if self.total is None and self._bar is not None:
                self._bar.tell(self.failures[-1])
            elif self.total is None and not self.as_json:
                click.echo(self.failures[-1], err=True)
        if self.as_json:
            line: dict[str, str | int] = {"source": str(task.source), "target": str(task.target), "status": status}
            if status == "written":
                line |= {"bytes": size_bytes, "width": size_px[0], "height": size_px[1]}
            if status == "planned" and self.removing:
                line["source_removed"] = True
            click.echo(json.dumps(line | ({"error": error} if error else {})))
        elif status == "planned" and not self.quiet:
            removed = ", and the source is removed" if self.removing else ""
            click.echo(f"{printable(task.source)} -> {printable(task.target)}{removed}")
        elif self.total is None and status == "written" and not self.quiet and self._bar is None:
            click.echo(f"{printable(task.target)}: {size_bytes} bytes")

    def advance(self, task: Task) -> None:
        """One more of the files that there were to do is done."""
        if self._bar is not None:
            self._bar.advance(printable(task.source))

    def thumbnailed(self, path: Path) -> None:
        """A file's thumbnails are in the cache; that they are not is no failure of the conversion."""
        if self._bar is not None:
            self._bar.thumbnailed(printable(path))

    def end(self) -> None:
        """The sum of it, and every failure."""
        if self.as_json:
            counts = {name: self.counts[name] for name in ("written", "skipped", "failed", "planned")}
            seconds = round(time.monotonic() - self.start, 3)
            click.echo(json.dumps({"summary": {**counts, "bytes": self.size_bytes, "seconds": seconds}}))
        elif not self.quiet:
            parts = [f"{self.counts[name]} {name}" for name in ("written", "planned", "skipped", "failed")]
            said = ", ".join(part for part in parts if not part.startswith("0 "))
            click.echo(f"{said or 'nothing to do'}{f'; {self.size_bytes:,} bytes' if self.counts['written'] else ''}")
        if self.total is not None and not self.as_json:
            for failure in self.failures:
                click.echo(failure, err=True)


class _Terminated(BaseException):
    """SIGTERM."""


@contextmanager
def _stoppable(report: _Report) -> Iterator[None]:
    """Ends the process at SIGINT, SIGTERM and errors: in order, and without waiting for the networks.

    (An end as usual would take their thread out of torch, which aborts the process.)
    Also where a script has started it in the background, with SIGINT ignored.
    """

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated

    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except (KeyboardInterrupt, _Terminated) as stopped:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with suppress(BrokenPipeError):  # the same Ctrl-C has ended whoever reads this
            if report.counts or report.as_json:
                report.end()
        with suppress(BrokenPipeError):
            if not report.quiet:
                click.echo("stopped; to go on, say it again with --skip-existing", err=True)
        os._exit(EXIT_INTERRUPTED if isinstance(stopped, KeyboardInterrupt) else EXIT_TERMINATED)
    except BrokenPipeError:  # whoever read it is gone
        os._exit(EXIT_FAILED)
    except Exception as error:
        with suppress(BrokenPipeError):
            if isinstance(error, OSError | ValueError | PercoError):
                click.ClickException(full_text(error)).show()
            else:
                sys.excepthook(type(error), error, error.__traceback__)
        os._exit(EXIT_FAILED)
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
