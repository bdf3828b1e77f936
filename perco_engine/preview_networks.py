"""The embedded model's shortest way to a picture, in numpy: the ladder's decoder and the autoencoder's linear half.

    indices ─> [ level 1 ] ─> estimate ─> [ level 2 ] ─> ... ─> latents ─> linear synthesis ─> small picture

What models/ladder.py and models/autoencoder.py compute in torch, on the same weights in the same model folder: equal to
`PercoPipeline.decode_preview` up to rounding.  All arrays are (rows, columns, channels) float32.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from .convolution import Array, as_matrix, convolve, interpolate, pad, pool, repeat, shuffle, silu
from .errors import InvalidModel
from .model_files import WEIGHT_FILES, read_json
from .rates import LATENT_PX

PLACE = 64
"""Latents a side of the places where a coarse decoding is fitted to the right one."""

PLACES = 2
"""How many of them there are along each side of a picture."""

RIDGE = 1e-3
"""Keeps that fit tame where a place is flat: of the mean square of what it knows."""

Take = Callable[[str], NDArray[Any]]


class Level:
    """One rung of the ladder, as LadderLevel.decode; its weights are read when they are first needed.

    take: gives a tensor by its name in the level.  halvings: log2 of how many latents a side one index stands for.
    """

    def __init__(self, take: Take, halvings: int) -> None:
        self.halvings = halvings
        self._take = take
        self.codes: Array = (take("quantizer._codebook.embed")[0] / take("metric").reshape(-1)).astype(np.float32)
        self._matrices: dict[str, tuple[Array, Array]] = {}

    def _convolve(self, name: str, x: Array) -> Array:
        if name not in self._matrices:
            bias = self._take(f"{name}.bias").astype(np.float32)
            self._matrices[name] = as_matrix(self._take(f"{name}.weight")), bias
        return convolve(pad(x), *self._matrices[name])

    def _block(self, name: str, x: Array) -> Array:
        """A ResidualBlock, in x's own memory."""
        x += self._convolve(f"{name}.conv2", silu(self._convolve(f"{name}.conv1", silu(x.copy()))))
        return x

    def terms(self, indices: NDArray[np.integer], estimate: Array, halvings: int = 0) -> tuple[Array, Array]:
        """What codes of this level, (r, c), change the estimate by: the linear part, and the network's.

        halvings: the estimate is of 2**halvings latents a side; 0 is what the networks were trained for.  Otherwise
        what they would do on finer grids is done on this one, which is a rough likeness.
        Both terms have the estimate's shape, (rows, columns, channels).
        """
        rows, columns, _ = estimate.shape
        codes = pool(self.codes[indices], max(0, halvings - self.halvings))
        growing = max(0, self.halvings - halvings)
        x = np.concatenate([codes, pool(estimate, growing)], 2)
        x = self._block("grow.0", self._convolve("enter", x))
        for k in range(self.halvings):
            left = growing - 1 - k
            if left >= 0:
                x = repeat(x, -(-rows >> left), -(-columns >> left))
            x = self._block(f"grow.{k + 1}", self._convolve(f"smooth.{k}", x))
        x = silu(self._convolve("leave.0", np.concatenate([x, estimate], 2)))
        linear = interpolate(codes, 1 << growing, rows, columns) if growing else codes
        return linear, self._convolve("leave.2", x)

    def decode(self, indices: NDArray[np.integer], estimate: Array) -> Array:
        """The better estimate of the latents (rows, columns, channels), from codes (r, c) and the estimate before."""
        linear, network = self.terms(indices, estimate)
        return estimate + linear + network


@dataclass(frozen=True)
class _Place:
    """A stretch of latents along one side, from `start`, and how many at its ends are spoilt by what is cut off."""

    start: int
    size: int
    margin: int

    def cells(self, halvings: int) -> slice:
        """It as a slice of a grid with cells of 2**halvings latents."""
        return slice(self.start >> halvings, -(-(self.start + self.size) >> halvings))

    def inner(self, halvings: int) -> slice:
        """The same without its ends."""
        return _Place(self.start + self.margin, self.size - 2 * self.margin, 0).cells(halvings)

    def inner_of_place(self) -> slice:
        """What `inner` is, as a slice of the latents of this place."""
        return slice(self.margin, self.size - self.margin)


def _places(size: int, unit: int) -> list[_Place]:
    """PLACES stretches, spread over `size` latents and aligned to `unit`; the whole where that is hardly longer."""
    place = max(PLACE, 4 * unit)
    if size <= PLACES * place:
        return [_Place(0, size, 0)]
    starts = ((2 * k + 1) * (size - place) // (2 * PLACES) for k in range(PLACES))
    return [_Place(start // unit * unit, place, unit) for start in starts]


def _rows(x: Array) -> Array:
    """The cells of (rows, columns, channels) in one list."""
    return x.reshape(-1, x.shape[2])


class PreviewNetworks:
    """What a preview needs of a model folder of the embedded model's kind.

    Raises InvalidModel where the folder lacks something of it, OSError where it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        try:
            config = read_json(folder / "hyper_enc" / "config.json")
            self.grids: list[tuple[int, int]] = [(int(pixels), int(size)) for pixels, size in config["grids"]]
            hyper_enc: Any = safe_open(folder / "hyper_enc" / WEIGHT_FILES["hyper_enc"], "numpy")
            vae: Any = safe_open(folder / "vae" / WEIGHT_FILES["vae"], "numpy")
            self._weight = vae.get_tensor("synthesis.weight").astype(np.float32)
            self._bias = vae.get_tensor("synthesis.bias").astype(np.float32)
            self._take: Take = hyper_enc.get_tensor
            self._levels: dict[int, Level] = {}
            self._level(0)
        except (SafetensorError, ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise InvalidModel(f"{folder} is no model that a preview can be made with: {error}") from error

    def _level(self, k: int) -> Level:
        if k not in self._levels:
            halvings = (self.grids[k][0] // LATENT_PX).bit_length() - 1
            self._levels[k] = Level(lambda name: self._take(f"levels.{k}.{name}"), halvings)
        return self._levels[k]

    def multiplications(self, level: int, halvings: int = 0) -> float:
        """About how many multiplications the networks of a level take for each latent; see `Level.terms`."""
        width = int(self._take(f"levels.{level}.enter.bias").shape[0])
        growing = self._level(level).halvings
        # In convolutions of width to width: those of the coarsest grid, three for each halving, and the last two.
        steps = [3.25, *[3.0] * growing]
        cost = sum(count / 4 ** max(growing - k, halvings) for k, count in enumerate(steps)) + 1.5 / 4**halvings
        return float(9 * width**2 * cost)

    def latents(self, indices: Sequence[NDArray[np.integer]], rows: int, columns: int) -> Array:
        """The estimate of the latents (rows, columns, channels) that grids of codes, (r, c) for each level, give."""
        estimate = np.zeros((rows, columns, self._weight.shape[1]), np.float32)
        for k, grid in enumerate(indices):
            estimate = self._level(k).decode(grid, estimate)
        return estimate

    def coarse_latents(self, indices: Sequence[NDArray[np.integer]], rows: int, columns: int, halvings: int) -> Array:
        """The same of a large picture, as means of 2**halvings latents a side, for a fraction of the work.

        The networks run on the coarse grid, where they are off; by how much is learnt in places of this picture that
        they are run on as they should be.  A least-squares fit for each level, so nothing here knows the weights.
        """
        unit = 1 << max(halvings, *(self._level(k).halvings for k in range(len(indices))))
        places = [(y, x) for y in _places(rows, unit) for x in _places(columns, unit)]
        exact = [np.zeros((y.size, x.size, self._weight.shape[1]), np.float32) for y, x in places]
        estimate = np.zeros((-(-rows >> halvings), -(-columns >> halvings), self._weight.shape[1]), np.float32)
        ones = np.ones((*estimate.shape[:2], 1), np.float32)
        for k, grid in enumerate(indices):
            level = self._level(k)
            exact = [
                level.decode(grid[y.cells(level.halvings), x.cells(level.halvings)], part)
                for (y, x), part in zip(places, exact, strict=True)
            ]
            known = np.concatenate([estimate, *level.terms(grid, estimate, halvings), ones], 2)
            seen = np.concatenate([_rows(known[y.inner(halvings), x.inner(halvings)]) for y, x in places])
            wanted = np.concatenate(
                [
                    _rows(pool(part[y.inner_of_place(), x.inner_of_place()], halvings))
                    for (y, x), part in zip(places, exact, strict=True)
                ]
            )
            squares = seen.T @ seen
            squares += np.eye(len(squares), dtype=np.float32) * (RIDGE * np.trace(squares) / len(squares))
            fitted = np.linalg.solve(squares, seen.T @ wanted)
            estimate = (_rows(known) @ fitted).reshape(estimate.shape)
        return estimate

    def coarse_colours(self, latents: Array) -> Array:
        """The colour of each cell of latents that are means: (rows, columns, 3), about 0..1."""
        to_colour = self._weight.reshape(3, -1, *self._weight.shape[1:]).mean(1).sum((2, 3))
        colours: Array = (latents @ to_colour.T + self._bias.reshape(3, -1).mean(1)) / 2 + np.float32(0.5)
        return colours

    def synthesis(self, latents: Array, reduction: int) -> Array:
        """Latents to pixels (rows * 8/reduction, columns * 8/reduction, 3), about -1..1, by the linear map alone."""
        side = LATENT_PX // reduction
        weight = self._weight.reshape(3, side, reduction, side, reduction, *self._weight.shape[1:]).mean((2, 4))
        bias = self._bias.reshape(3, side, reduction, side, reduction).mean((2, 4)).reshape(-1)
        matrix = as_matrix(weight.reshape(-1, *self._weight.shape[1:]))
        return shuffle(convolve(pad(latents, "edge"), matrix, bias), side)

    def decode(self, indices: Sequence[NDArray[np.integer]], height_px: int, width_px: int, reduction: int) -> Array:
        """Indices, a grid (r, c) for each level, to a small picture by the shortest way; 2.5 kB of memory a latent.

        reduction: 1, 2, 4 or 8.  Returns (ceil(height/reduction), ceil(width/reduction), 3), about 0..1.
        """
        rows, columns = -(-height_px // LATENT_PX), -(-width_px // LATENT_PX)
        picture = self.synthesis(self.latents(indices, rows, columns), reduction)
        picture *= np.float32(0.5)
        picture += np.float32(0.5)
        return picture[: -(-height_px // reduction), : -(-width_px // reduction)]


def export(folder: Path, target: Path) -> None:
    """Writes of a model folder what previews need, as a folder that PreviewNetworks reads.

    Raises InvalidModel for a folder of another kind, OSError.
    """
    PreviewNetworks(folder)
    for part, needed in (("hyper_enc", _is_decoders), ("vae", lambda name: name.startswith("synthesis."))):
        (target / part).mkdir(parents=True)
        weights = load_file(folder / part / WEIGHT_FILES[part])
        save_file({name: value for name, value in weights.items() if needed(name)}, target / part / WEIGHT_FILES[part])
        shutil.copyfile(folder / part / "config.json", target / part / "config.json")
    shutil.copyfile(folder / "model_index.json", target / "model_index.json")
    if (folder / "prior").is_dir():
        shutil.copytree(folder / "prior", target / "prior")


def _is_decoders(name: str) -> bool:
    """Whether a tensor of a ladder is one that its decoder needs."""
    return ".encoder." not in name and not name.endswith(("cluster_size", "embed_avg", "initted"))
