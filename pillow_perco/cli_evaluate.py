"""`perco evaluate`, `captions`, `peers` and `select-coco`: thin commands over perco_engine.evaluation."""

from pathlib import Path

import click

from .cli_options import EFFORT, FOLDER, MODEL, OUT, listed, tell


@click.command()
@click.argument("folder", type=FOLDER)
@click.option("--out", required=True, type=OUT, help="Folder of the results.")
@MODEL
@click.option("--bpp", metavar="A,B,...", help="Nominal rates.  [default: all of the model's]")
@click.option("--steps", metavar="A,B,...", help="Denoising steps, a decode each.  [default: the model's]")
@click.option(
    "--metrics", metavar="A,B,...", help="psnr,ms_ssim,lite0,lite2,lpips,dists, fid...  [default: all that can be had]"
)
@click.option("--against", metavar="A,B,...", help="Classical formats in the same bytes: jpeg,webp,avif,jxl. Slow.")
@click.option("--peers", type=OUT, help="Keeps the classical files that were tried, for other runs.  [default: in OUT]")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes that look for them.")
@click.option("--limit", type=click.IntRange(1), help="Only the first so many photos.")
@click.option("--captioner", metavar="MODEL", help="Writes the captions of photos without a .txt file beside them.")
@EFFORT
def evaluate(
    folder: Path, out: Path, model: str, bpp: str | None, steps: str | None, metrics: str | None, against: str | None,
    peers: Path | None, jobs: int, limit: int | None, captioner: str | None, effort: int | None,
) -> None:  # fmt: skip
    """Encode and decode the photos of FOLDER at every rate, and measure rates, quality and times.

    Writes .perco files, pictures, results.jsonl, summary.md, plots and contact sheets.  A run that was broken off goes
    on where it stopped.
    """
    from perco_engine.evaluation import evaluate as evaluation
    from perco_engine.evaluation import report

    settings = evaluation.Settings(
        folder, out, model,
        bpp=listed(bpp, float), steps=listed(steps, int) or (None,),
        metrics=listed(metrics, str) or evaluation.ALL_METRICS, against=listed(against, str), limit=limit,
        captioner=captioner, effort=effort, peers=peers, jobs=jobs,
    )  # fmt: skip
    run = evaluation.evaluate(settings, tell)
    click.echo(report.write(run))
    click.echo(f"\nlook at {out / 'summary.md'}")


@click.command("peers")
@click.argument("folder", type=FOLDER)
@click.option("--bpp", required=True, metavar="A,B,...", help="Bits per pixel of whole files, at most.")
@click.option("--keep", required=True, type=OUT, help="Folder that keeps what was tried, for other runs.")
@click.option("--against", metavar="A,B,...", default="jpeg,webp,avif,jxl", show_default=True, help="Formats.")
@click.option(
    "--metrics", metavar="A,B,...", help="psnr,ms_ssim,lite0,lite2,lpips,dists, fid...  [default: all that can be had]"
)
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes that search.")
def find_peers(folder: Path, bpp: str, keep: Path, against: str, metrics: str | None, jobs: int) -> None:
    """Find the best JPEG, WebP, AVIF and JPEG XL files of the photos of FOLDER at given rates, and print their means.

    The best is searched over scale and quality, for each metric by that metric.  What is kept serves
    perco evaluate --peers too, and perco compare --peers where it does not reduce the photos (--max-size).
    """
    from perco_engine.evaluation import metrics as all_metrics
    from perco_engine.evaluation import peers

    names = listed(metrics, str) or tuple(all_metrics.METRICS)
    rates, formats = listed(bpp, float), listed(against, str)
    click.echo(peers.tabulate(folder, keep, rates, formats, names, jobs, tell))


@click.command("captions")
@click.argument("folder", type=FOLDER)
@click.option("--out", required=True, type=OUT, help="Folder of the results.")
@MODEL
@click.option("--bpp", metavar="A,B,...", help="Nominal rates.  [default: all of the model's]")
@click.option(
    "--captioner",
    metavar="MODEL",
    default="tags",
    show_default=True,
    help="For photos without a .txt file beside them.",
)
@click.option(
    "--metrics",
    metavar="A,B,...",
    default="lite0,lite2",
    show_default=True,
    help="psnr,ms_ssim,lite0,lite2,lpips,dists",
)
@click.option("--limit", type=click.IntRange(1), help="Only the first so many photos.")
def compare_captions(
    folder: Path, out: Path, model: str, bpp: str | None, captioner: str, metrics: str, limit: int | None
) -> None:
    """Tell what captions do: decode the photos of FOLDER with the right caption, none, and another photo's.

    Prints means of each, and of their differences photo by photo, with standard errors.
    """
    from perco_engine.evaluation import captions

    settings = captions.Settings(
        folder, out, model, bpp=listed(bpp, float), captioner=captioner, metrics=listed(metrics, str), limit=limit
    )
    click.echo(captions.tabulate(settings, tell))


@click.command("select-coco")
@click.argument("annotations", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("photos", type=FOLDER)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
def select_coco(annotations: Path, photos: Path, out: Path) -> None:
    """Put MS-COCO-30k, as PerCo (SD) selects it, into the folder OUT, each photo with its caption.

    ANNOTATIONS is captions_train2017.json, PHOTOS the folder train2017.
    """
    from perco_engine.evaluation.coco import gather

    click.echo(f"{out}: {sum(1 for _ in gather(annotations, photos, out))} photos")
