"""Contact sheets: pictures side by side, each with its caption below."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT = "#ffffff", "#111111", "#777777"
MARGIN, SQUARE_PX = 16, 8


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet, and the lines of text below it: the first in black, the others in grey."""

    image: Image.Image
    lines: tuple[str, ...] = ()

    def width_px(self, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
        """Of the picture, or of a line where one is wider."""
        return max([self.image.width, *(math.ceil(font.getlength(line)) for line in self.lines)])


def contact_sheet(rows: Sequence[Sequence[Cell]], text_px: int = 18) -> Image.Image:
    """The rows of cells as one picture, mode RGB; every column is as wide as its widest picture or line.

    Pictures are shown pixel for pixel, opacity over a checkerboard.
    """
    font = ImageFont.load_default(text_px)
    line_height = round(text_px * 1.35)
    columns = max(len(row) for row in rows)
    widths = [max(cell.width_px(font) for row in rows for cell in row[c : c + 1]) for c in range(columns)]
    text_heights = [line_height * max(len(cell.lines) for cell in row) for row in rows]
    heights = [
        max(cell.image.height for cell in row) + text + MARGIN for row, text in zip(rows, text_heights, strict=True)
    ]
    size = sum(widths) + MARGIN * (columns + 1), sum(heights) + MARGIN * (len(rows) + 1)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        left = MARGIN
        for cell, width in zip(row, widths, strict=False):
            opaque = cell.image.convert("RGBA")
            sheet.paste(checkerboard(opaque.size), (left, top))
            sheet.paste(opaque, (left, top), opaque)
            for number, line in enumerate(cell.lines):
                position = left, top + cell.image.height + MARGIN // 2 + number * line_height
                draw.text(position, line, fill=FAINT if number else INK, font=font)
            left += width + MARGIN
        top += height + MARGIN
    return sheet


def samples_sheet(pictures: Sequence[Image.Image], seeds: Sequence[int]) -> Image.Image:
    """Decodes of one file from several seeds, in a grid about as wide as it is high."""
    cells = [Cell(picture, (f"seed {seed}",)) for picture, seed in zip(pictures, seeds, strict=True)]
    columns = max(1, round((len(cells) * pictures[0].height / pictures[0].width) ** 0.5))
    return contact_sheet([cells[k : k + columns] for k in range(0, len(cells), columns)])


def checkerboard(size: tuple[int, int]) -> Image.Image:
    """Grey and white squares, what shows through transparent pixels."""
    tile = Image.new("RGB", (2 * SQUARE_PX, 2 * SQUARE_PX), "#ffffff")
    for corner in ((0, 0), (SQUARE_PX, SQUARE_PX)):
        tile.paste("#dddddd", (*corner, corner[0] + SQUARE_PX, corner[1] + SQUARE_PX))
    board = Image.new("RGB", size)
    for left in range(0, size[0], tile.width):
        for top in range(0, size[1], tile.height):
            board.paste(tile, (left, top))
    return board
