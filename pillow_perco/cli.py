"""The command line: each command parses, calls one function, and prints."""

import io
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from PIL import Image

import pillow_perco
from perco_engine import bitstream, conversion, picture_files
from perco_engine.errors import PercoError, full_text
from perco_engine.files import make_place, read_perco_file, write_beside
from perco_engine.printable import printable

from .cli_compare import compare
from .cli_convert import EXIT_INTERRUPTED, convert
from .cli_desktop import desktop
from .cli_evaluate import compare_captions, evaluate, find_peers, select_coco
from .cli_models import models
from .cli_options import BPP, EFFORT, FILE_MODEL, GUIDANCE, INPUT, MAX_BYTES, MODEL, OUTPUT, SEED, SEED_NUMBER, STEPS
from .cli_train import train
from .cli_view import service, view
from .PercoImagePlugin import describe

DEMO_PHOTO = Path(__file__).parent / "demo.jpg"


class Group(click.Group):
    """Turns what can go wrong with files and models into one line on stderr and exit code 1."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:  # where --help and --version print
        with self._in_words():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with self._in_words(), warnings.catch_warnings():
            if not sys.warnoptions:  # nobody asks for what Pillow warns programmers of
                warnings.filterwarnings("ignore", module=r"PIL\.")
            return super().invoke(ctx)

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        _escape_letters()
        try:
            yield
        except (BrokenPipeError, RuntimeError):  # whoever read it is gone, which click knows; click's own; our fault
            raise
        except MemoryError as error:
            less = "smaller pictures (--max-size), fewer at once (--samples), no search (--effort 0)"
            raise click.ClickException(f"not enough memory; what takes less: {less}") from error
        except KeyboardInterrupt:
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
        except (PercoError, *picture_files.UNREADABLE) as error:
            raise click.ClickException(full_text(error)) from error


def _escape_letters() -> None:
    """Names may have letters that the encoding of the output lacks: they are written as Python writes them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(pillow_perco.__version__, prog_name="perco")
def main() -> None:
    """Pictures in a hundred bytes: encode photos to .perco files and decode them again."""


def read_photo(path: Path, keep_metadata: bool = False) -> picture_files.Photo:
    """A photo as a person sees it: upright, in sRGB.  Raises click.ClickException for what is none."""
    try:
        with Image.open(path) as photo:
            return picture_files.read_photo(photo, keep_metadata)
    except picture_files.UNREADABLE as error:
        text = full_text(error)
        raise click.ClickException(text if printable(path) in text else f"{printable(path)}: {text}") from error


def refuse_overwriting(source: Path, target: Path) -> None:
    """Raises click.ClickException where both are one file."""
    if target.exists() and source.samefile(target):
        raise click.ClickException(f"{printable(target)} would be written over: choose another name")


def refuse_other_names(target: Path, command: str) -> None:
    """Raises click.ClickException unless this is the name of a .perco file, which the command writes."""
    if not conversion.is_perco(target):
        raise click.ClickException(
            f"{printable(target)}: {command} writes .perco files; end the name so (perco decode and convert make "
            f"pictures of them)"
        )


def kind_of(target: Path) -> str:
    """Pillow's name of the format that this name stands for.  Raises click.ClickException where it is none."""
    kind = picture_files.writable_kind(target.suffix)
    if kind is None:
        raise click.ClickException(f"{printable(target)}: no picture format can be written under this name; try .png")
    return kind


def fill_cache(file: Path, model: str, wanted: bool | None) -> None:
    """Puts a written file into the thumbnail cache: if wanted, or if nothing is said and that is quick."""
    from perco_engine import get_engine, thumbnails

    if thumbnails.is_wanted(wanted, get_engine(model)):
        for _ in thumbnails.fill_files([file], again=True):
            pass


@main.command()
@click.argument("source", type=INPUT)
@click.argument("target", type=OUTPUT)
@click.option(
    "--bpp",
    type=BPP,
    help="Nominal bits a pixel; the model's nearest rate point.  [default: 0.03; with --max-bytes, the best that fits]",
)
@click.option("--max-bytes", type=MAX_BYTES, help="Hard limit on the whole file; the best that fits is written.")
@click.option("--caption", help="Text stored with the picture.")
@click.option(
    "--captioner", metavar="MODEL", help="Without --caption: the model (tags, blip2, a name, a folder) to write it."
)
@click.option("--seed", type=SEED_NUMBER, help="Seed of the noise that decoding starts from.")
@EFFORT
@click.option(
    "--best-of",
    type=click.IntRange(1, 129),
    default=1,
    show_default=True,
    help="Try so many seeds, keep the one that decodes nearest to the photo.",
)
@MODEL
@click.option("--no-alpha", is_flag=True, help="Drop opacity.")
@click.option(
    "--keep-metadata", is_flag=True, help="Store the photo's EXIF and XMP (they are larger than the picture)."
)
@click.option(
    "--thumbnails/--no-thumbnails", "thumbnailed", default=None,
    help="Put TARGET into the desktop's thumbnail cache.  [default: yes, if the model decodes in one step]",
)  # fmt: skip
def encode(
    source: Path, target: Path, no_alpha: bool, keep_metadata: bool, thumbnailed: bool | None, **options: Any
) -> None:
    """Encode the picture SOURCE to the .perco file TARGET.

    The picture is turned upright and converted to sRGB.  TARGET is replaced only when everything went well.
    """
    refuse_other_names(target, "encode")
    refuse_overwriting(source, target)
    read = read_photo(source, keep_metadata)
    make_place(target)
    photo, metadata = read.image, {name: block for name, block in vars(read.metadata).items() if block}
    pillow_perco.save(photo, target, alpha=not no_alpha, **options, **metadata)
    size = target.stat().st_size
    fill_cache(target, options["model"], thumbnailed)
    click.echo(f"{printable(target)}: {size} bytes, {8 * size / (photo.width * photo.height):.4f} bits per pixel")


@main.command()
@click.argument("source", type=INPUT)
@click.argument("target", type=OUTPUT)
@click.option(
    "--steps", type=STEPS, help="Denoising steps (0: the hyper-latent's own estimate).  [default: the model's]"
)
@click.option("--guidance", type=GUIDANCE, help="Guidance scale, for models that read captions.")
@SEED
@click.option("--max-size", type=click.IntRange(1), help="Longer side of the result, in pixels, at most.")
@FILE_MODEL
@click.option(
    "--samples", type=click.IntRange(1, 129), help="Write a sheet of so many plausible originals, a seed each."
)
def decode(
    source: Path, target: Path, steps: int | None, guidance: float | None, seed: int | None,
    max_size: int | None, model: str | None, samples: int | None,
) -> None:  # fmt: skip
    """Decode the .perco file SOURCE to a picture of the kind that TARGET's name says."""
    from perco_engine.engine import engine_of_file
    from perco_engine.evaluation.contact_sheet import samples_sheet

    kind = kind_of(target)
    data = read_perco_file(source)
    header = bitstream.read_header(data)
    make_place(target)
    engine = engine_of_file(data, model)
    first = header.seed if seed is None else seed
    seeds = [(first + k) % 2**32 for k in range(samples or 1)]
    pictures = engine.decode_batch(
        [data] * len(seeds), steps=steps, guidance_scale=guidance, seed=seeds, max_size_px=max_size
    )
    pictures = [picture_files.turned(picture, header.metadata)[0] for picture in pictures]
    picture = samples_sheet(pictures, seeds) if samples else pictures[0]
    write_beside(target, picture_files.picture_bytes(picture, kind, header.metadata.colours))
    click.echo(f"{printable(target)}: {picture.width}x{picture.height} pixels")


@main.command()
@click.argument("file", type=INPUT)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(file: Path, as_json: bool) -> None:
    """Tell what a .perco file says, without decoding its pixels."""
    data = read_perco_file(file)
    header = bitstream.read_header(data)
    said = {**describe(header, len(data)), "mode": "RGBA" if header.has_alpha else "RGB"}
    if as_json:
        click.echo(json.dumps(said, indent=1))
        return
    for name, value in said.items():
        if name == "bytes":
            value = ", ".join(f"{part} {size}" for part, size in value.items() if size)
        click.echo(f"{name.replace('_', ' '):<16} {printable(str(value)) if value not in ('', None) else '-'}")


@main.command("convert-reference")
@click.argument("source", type=INPUT)
@click.argument("target", type=OUTPUT)
@click.option("--bpp", type=float, help="The rate that SOURCE was written at, where its size alone does not tell.")
def convert_reference(source: Path, target: Path, bpp: float | None) -> None:
    """Convert SOURCE, a file of the reference implementation PerCo (SD), to the .perco file TARGET.

    Nothing in SOURCE is executed: any other pickle than such a file is refused.  The checkpoint of its rate must be
    installed (perco models), since TARGET names the weights.
    """
    from perco_engine import reference_files

    refuse_other_names(target, "convert-reference")
    refuse_overwriting(source, target)
    with source.open("rb") as file:
        data = file.read(reference_files.MAX_FILE_BYTES + 1)
    converted = reference_files.convert(data, bpp)
    make_place(target)
    write_beside(target, converted)
    click.echo(f"{printable(target)}: {len(converted)} bytes, the reference's file has {len(data)}")


@main.command()
@click.option("--photo", type=INPUT, default=DEMO_PHOTO, help="Another photo than the one that is shipped.")
@click.option(
    "--out", type=OUTPUT, default=Path("perco-demo.png"), show_default=True, help="Where the sheet is written."
)
@EFFORT
def demo(photo: Path, out: Path, effort: int | None) -> None:
    """Encode a photo at every rate: a contact sheet of what comes back, and a table."""
    from perco_engine.evaluation.demo import run

    refuse_overwriting(photo, out)
    kind = kind_of(out)
    read = read_photo(photo).image
    make_place(out)
    sheet, table = run(read, effort)
    click.echo(table)
    write_beside(out, picture_files.picture_bytes(sheet, kind))
    click.echo(f"\nlook at {printable(out)}")


@main.command()
@click.option("--photo", type=INPUT, default=DEMO_PHOTO, help="The photo to measure with.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--times", type=click.IntRange(1), default=5, show_default=True, help="Runs of which the median is taken."
)
@click.option(
    "--convert", "count", type=click.IntRange(10), metavar="N",
    help="Instead: convert N photos, and run the networks alone on the same ones.",
)  # fmt: skip
@click.option("--mixed", is_flag=True, help="With --convert: photos of many sizes.")
def bench(photo: Path, as_json: bool, times: int, count: int | None, mixed: bool) -> None:
    """Measure what importing, opening, encoding and decoding cost on this machine."""
    from perco_engine.evaluation import bench as benchmark
    from perco_engine.evaluation import bench_convert

    if count is None:
        if mixed:
            raise click.UsageError("--mixed goes with --convert N")
        result = benchmark.measure(read_photo(photo).image, times)
    else:
        result = bench_convert.measure(read_photo(photo).image, count, mixed=mixed)
    click.echo(benchmark.to_json(result) if as_json else benchmark.table(result))


@main.command()
@click.option("--build-torchac", is_flag=True, help="Compile torchac's extension (needs g++ and ninja).")
def doctor(build_torchac: bool) -> None:
    """Tell what this installation has, and what it lacks."""
    from perco_engine.evaluation.doctor import report

    if build_torchac:
        from perco_engine import torchac_backend

        torchac_backend.build()
    for line in report():
        click.echo(line)
    registered = Image.registered_extensions().get(".perco") == "PERCO" and "PERCO" in Image.OPEN
    click.echo(f"{'Pillow plugin':<24} {'registered by import pillow_perco' if registered else 'not registered'}")
    if sys.platform.startswith("linux"):
        from .desktop import check

        for finding in check.findings():
            click.echo(finding.line)


main.add_command(models)
main.add_command(convert)
main.add_command(view)
main.add_command(service)
main.add_command(compare)
main.add_command(desktop)
main.add_command(evaluate)
main.add_command(compare_captions)
main.add_command(find_peers)
main.add_command(select_coco)
main.add_command(train)

if __name__ == "__main__":
    sys.exit(main())
