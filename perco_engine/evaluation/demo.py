"""`perco demo`: one photo at every rate, as a contact sheet and a table."""

import math
import time

from PIL import Image

from perco_engine import get_engine
from perco_engine.pixels import to_rgb

from .contact_sheet import Cell, contact_sheet
from .metrics import psnr

LONGEST_SIDE = 768

COLUMNS = 4
"""The original and up to seven rates in two rows."""


def run(photo: Image.Image, effort: int | None = None) -> tuple[Image.Image, str]:
    """The contact sheet (original and one reconstruction for each rate point, bytes under each), and the table.

    photo: of any mode, its opacity is dropped.  effort: steps of the search for better codes; None: the usual.
    """
    engine = get_engine()
    photo = to_rgb(photo).copy()
    photo.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    pixels = photo.width * photo.height
    cells = [Cell(photo, ("original", f"{photo.width}x{photo.height} pixels, {3 * pixels:,} bytes of RGB"))]
    table = [f"{'bpp':>7} {'bytes':>6} {'real bpp':>9} {'1 :':>7} {'PSNR dB':>8} {'encode s':>9} {'decode s':>9}"]
    for point in engine.rate_points:
        start = time.perf_counter()
        data = engine.encode(photo, bpp=point.bpp, effort=effort)
        encoded = time.perf_counter()
        picture = engine.decode(data)
        decoded = time.perf_counter()
        real, ratio, quality = 8 * len(data) / pixels, 3 * pixels / len(data), psnr(photo, picture, math.inf)
        cells.append(Cell(picture, (f"{len(data):,} bytes", f"{real:.4f} bits per pixel, 1 : {ratio:,.0f}")))
        table.append(
            f"{point.bpp:>7} {len(data):>6} {real:>9.4f} {ratio:>7,.0f} {quality:>8.2f} "
            f"{encoded - start:>9.2f} {decoded - encoded:>9.2f}"
        )
    rows = [cells[k : k + COLUMNS] for k in range(0, len(cells), COLUMNS)]
    return contact_sheet(rows, text_px=22), "\n".join(table)
