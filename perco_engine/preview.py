"""Small pictures of .perco files in numpy, without torch: for thumbnails, and for `draft`.

    bytes ─> Codes ─┬─> preview_networks (the embedded model's kind) ─┬─> picture
                    └─> a colour for each code (other models)       ──┘

`decode` is exact: what `PercoPipeline.decode_preview` gives, up to rounding.  `render` is quick: of a large picture it
reads the grids that its size needs, and runs their networks as coarsely as MOST_MULTIPLICATIONS ask for.
"""

import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import bitstream, weights
from .bitstream.prior import Prior
from .codes import MAX_PIXELS, Codes
from .errors import InvalidModel, LimitExceeded, NotFinite, PreviewUnavailable
from .model_files import read_json
from .opacity import opacity
from .picture_files import turned, within
from .preview_networks import PreviewNetworks
from .rates import LATENT_PX, Grid, of_hyper_encoder

MOST_EXACT_PIXELS = 4 << 20
"""The largest picture whose preview is decoded exactly here: for a larger one, the import of torch pays off."""

MOST_MULTIPLICATIONS = 22e9
"""What the networks may take in `render` for the whole picture: about a second of one core, and four of a slow one."""

COARSEST = 4
"""Halvings; what is left of the work is little then, whatever the picture's size."""

MOST_CODES = 100_000
"""How many codes are read in `render`: with a prior, about a second."""

COLOURS = "preview_colours.npy"
"""The file of a model's folder with the mean colour of each code's cell: (codebook size, 3) uint8."""

REDUCTIONS = (8, 4, 2, 1)


class Previewer:
    """Makes previews of the files of one model; keeps what it has read of the model's folder.

    networks: of the embedded model's kind, else None.  colours: of each code of another kind, (codes, 3), 0..1.
    rate_points: those that a file's rate point counts.

    Raises PreviewUnavailable for a model that no preview can be made with, InvalidModel for a damaged one.
    """

    def __init__(self, model: weights.Model) -> None:
        config = read_json(model.folder / "hyper_enc" / "config.json")
        try:
            points = of_hyper_encoder(config)
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise InvalidModel(f"{model.folder}: its hyper-encoder's configuration tells no rate: {error!r}") from error
        self.networks: PreviewNetworks | None = None
        self.colours: NDArray[np.float32] = np.empty((0, 3), np.float32)
        if "grids" in config:
            self.networks = PreviewNetworks(model.folder)
        else:
            self.colours = _read_colours(model.folder, points[0].grids[0].codebook_size)
        self._prior = Prior.load(model.folder)
        self._model = model
        self.rate_points = model.file_rate_points(points)

    def codes(self, data: bytes, *, grids: int | None = None, allow_truncated: bool = False) -> Codes:
        """What a file of this model says; see `weights.Model.codes`."""
        return self._model.codes(
            data, self.rate_points, prior=self._prior, grids=grids, allow_truncated=allow_truncated
        )

    def picture(self, data: bytes, width_px: int, height_px: int, size: tuple[int, int]) -> Image.Image:
        """The picture of a file of width_px x height_px pixels, made `size` pixels small; RGB, or RGBA with opacity."""
        scale = min(width_px / size[0], height_px / size[1])

        def fit(cells: NDArray[np.float32], cell_px: int) -> NDArray[np.float32]:
            """Cells of cell_px a side, (rows, columns, 3), as pixels of the result."""
            if cells.shape[:2] == size[::-1] and cell_px == scale:
                return cells
            box = (0, 0, width_px / cell_px, height_px / cell_px)
            way = Image.Resampling.LANCZOS if cell_px < scale else Image.Resampling.BICUBIC
            channels = [Image.fromarray(channel).resize(size, way, box) for channel in np.moveaxis(cells, 2, 0)]
            return np.stack([np.asarray(channel) for channel in channels], 2)

        if self.networks is None:
            if max(point.count(width_px, height_px) for point in self.rate_points) > 16 * MOST_CODES:
                raise LimitExceeded(f"a picture of {width_px}x{height_px} pixels has too many codes to be looked at")
            codes = self.codes(data)
            grid = self.rate_points[codes.rate_point].grids[0]
            pixels = fit(self.colours[codes.indices[0]], grid.pixels_per_index)
        else:
            codes = self.codes(data, grids=self._needed(width_px, height_px, scale))
            rows, columns = -(-height_px // LATENT_PX), -(-width_px // LATENT_PX)
            halvings = self._halvings(len(codes.indices), rows * columns)
            if halvings:
                latents = self.networks.coarse_latents(codes.indices, rows, columns, halvings)
                pixels = fit(self.networks.coarse_colours(latents), LATENT_PX << halvings)
            else:
                reduction = next((r for r in REDUCTIONS if r <= scale), 1)
                pixels = fit(self.networks.decode(codes.indices, height_px, width_px, reduction), reduction)
        picture = Image.fromarray(as_levels(pixels))
        if codes.alpha is not None:
            picture.putalpha(opacity(codes.alpha, width_px, height_px, size))
        return picture

    def _halvings(self, grids: int, latents: int) -> int:
        """How much coarser than the latents the networks run, as a power of two, to take no more than they may."""
        assert self.networks is not None
        halvings = 0
        while (
            halvings < COARSEST
            and sum(self.networks.multiplications(k, halvings) for k in range(grids)) * latents > MOST_MULTIPLICATIONS
        ):
            halvings += 1
        return halvings

    def _needed(self, width_px: int, height_px: int, scale: float) -> int:
        """How many grids, coarse to fine, change what a result can show that is `scale` times smaller; at least 1."""
        assert self.networks is not None
        needed = count = 0
        for cell_px, size in self.networks.grids:
            rows, columns = Grid(cell_px, size).shape(width_px, height_px)
            count += rows * columns
            if needed and (2 * cell_px <= scale or count > MOST_CODES):
                break
            needed += 1
        return needed


def as_levels(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Pixels, about 0..1, as 0..255.  Raises NotFinite."""
    if not np.isfinite(pixels).all():
        raise NotFinite("the preview has values that are no numbers: install the model's weights again")
    levels: NDArray[np.uint8] = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
    return levels


@functools.lru_cache(maxsize=4)
def previewer(model: weights.Model) -> Previewer:
    """The previewer of a model, kept.  Raises PreviewUnavailable, InvalidModel."""
    return Previewer(model)


@np.errstate(under="ignore")  # whatever a caller's np.seterr says
def render(data: bytes, max_size_px: int) -> Image.Image:
    """A small picture of a .perco file: max_size_px on its longer side, or of its own size where that is less.

    Turned as the EXIF, or XMP, of the file says.  Mode RGB, or RGBA where the file holds opacity.
    Raises BitstreamError, LimitExceeded, ModelUnavailable, InvalidModel, PreviewUnavailable.
    """
    header = bitstream.read_header(data)
    width, height = header.width_px, header.height_px
    if width * height > MAX_PIXELS:
        raise LimitExceeded(f"the picture has {width}x{height} pixels, more than {MAX_PIXELS}: it is not looked at")
    maker = previewer(weights.find_for_file(header.model, header.rate_point))
    size = within((width, height), min(max_size_px, max(width, height)))
    return turned(maker.picture(data, width, height, size), header.metadata)[0]


@np.errstate(under="ignore")
def decode(data: bytes, reduction: int, *, allow_truncated: bool = False) -> Image.Image:
    """The picture of a file of the embedded model's kind at 1/reduction (2, 4 or 8) of its size, sides rounded up.

    The same as Engine.decode gives on its shorter way, up to rounding (1 level of 256).
    allow_truncated: show what the complete levels of a truncated file still give.

    Raises PreviewUnavailable for other models and for pictures of more than MOST_EXACT_PIXELS; BitstreamError,
    ModelUnavailable, InvalidModel.
    """
    header = bitstream.read_header(data, allow_truncated=allow_truncated)
    width, height = header.width_px, header.height_px
    if width * height > MOST_EXACT_PIXELS:
        raise PreviewUnavailable(f"a picture of {width}x{height} pixels is decoded by the engine")
    maker = previewer(weights.find_for_file(header.model, header.rate_point))
    if maker.networks is None:
        raise PreviewUnavailable("this model's codes alone are no picture: it is decoded by the engine")
    codes = maker.codes(data, allow_truncated=allow_truncated)
    picture = Image.fromarray(as_levels(maker.networks.decode(codes.indices, height, width, reduction)))
    if codes.alpha is not None:
        picture.putalpha(opacity(codes.alpha, width, height, picture.size))
    return picture


def _read_colours(folder: Path, codebook_size: int) -> NDArray[np.float32]:
    """The model's file COLOURS, as 0..1."""
    try:
        colours = np.load(folder / COLOURS, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise PreviewUnavailable(
            f"{folder} has no colours for previews: perco models remove it, and import it again"
        ) from error
    if colours.shape != (codebook_size, 3) or colours.dtype != np.uint8:
        raise InvalidModel(f"{folder / COLOURS} is not of this model: perco models remove it, and import it again")
    scaled: NDArray[np.float32] = (colours / np.float32(255)).astype(np.float32)
    return scaled
