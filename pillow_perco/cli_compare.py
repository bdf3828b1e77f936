"""`perco compare`: a thin command over perco_engine.evaluation."""

from pathlib import Path

import click

from perco_engine.printable import printable

from .cli_options import EFFORT, INPUT, MODEL, OUT, OUTPUT, listed, tell


@click.command()
@click.argument("photos", nargs=-1, required=True, type=INPUT)
@click.option(
    "--out", type=OUTPUT, default=Path("perco-compare.html"), show_default=True, help="Where the page is written."
)
@MODEL
@click.option("--bpp", metavar="A,B,...", help="Nominal rates.  [default: all of the model's]")
@click.option(
    "--max-size", type=click.IntRange(16), default=1024, show_default=True, help="Larger photos are reduced first."
)
@click.option(
    "--against", metavar="A,B,...", default="jpeg,webp,avif,jxl", show_default=True, help="Classical formats."
)
@click.option(
    "--metrics", metavar="A,B,...", help="psnr,ms_ssim,lite0,lite2,lpips,dists  [default: psnr,ms_ssim,lite2]"
)
@click.option(
    "--by", metavar="METRIC", help="Classical files are the best by this.  [default: lite2, else lite0, ms_ssim, psnr]"
)
@click.option("--peers", type=OUT, help="Folder that keeps the classical files that were tried, for other runs.")
@EFFORT
def compare(
    photos: tuple[Path, ...], out: Path, model: str, bpp: str | None, max_size: int, against: str, metrics: str | None,
    by: str | None, peers: Path | None, effort: int | None,
) -> None:  # fmt: skip
    """Show PHOTOS at every rate beside JPEG, WebP, AVIF and JPEG XL of the same bytes, on one HTML page."""
    from perco_engine.evaluation import compare as comparing

    settings = comparing.Settings(
        model,
        bpp=listed(bpp, float), max_size_px=max_size, formats=listed(against, str),
        names=listed(metrics, str) or comparing.DEFAULT_METRICS, by=by, kept=peers, effort=effort,
    )  # fmt: skip
    comparing.compare(photos, out, settings, tell)
    click.echo(f"look at {printable(out)}: {out.stat().st_size / 1e6:.1f} MB, needs no other file")
