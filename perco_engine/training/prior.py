"""Trains the prior of a ladder's indices (bitstream/prior.py) on the codes of random crops of photos.

The network is trained with the numbers that it will have: weights, embeddings and activations are rounded in the
forward pass, and gradients pass the rounding straight through (Bengio et al., 2013).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..bitstream.prior import ACTIVATION_SHIFT, LARGEST, LARGEST_BIAS, PHASES, PRIOR_FILE, SMALLEST_CODEBOOK, Prior
from ..choice import choose
from ..errors import TrainingError
from ..models.ladder import HyperLadder
from ..rates import Grid
from .crops import Crops
from .photos import random_crop
from .stage import Run, Stage

STATE, HIDDEN, EMBEDDED = 48, 96, 16
"""Channels: of a level's state, of the hidden layers, of an embedded index."""

WEIGHT_STEP = 2.0**-ACTIVATION_SHIFT
ACTIVATION_STEP = 1 / 32
SUM_STEP = WEIGHT_STEP * ACTIVATION_STEP
"""Of the sums; 1 is a bit in the logits (LOGIT_SHIFT brings them to 1/256)."""

CROP_PX = 512
"""The side of the crops: eight cells of the coarsest grid."""


class Rounded(torch.autograd.Function):
    """x, held between `low` and `high` and rounded to a multiple of `step`; the gradient passes where x is not held."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: float, low: float, high: float) -> Tensor:
        ctx.save_for_backward((x >= low - step) & (x <= high + step))
        return torch.floor(x.clamp(low, high) / step + 0.5) * step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


def as_weight(x: Tensor) -> Tensor:
    return _rounded(x, WEIGHT_STEP, LARGEST)


def as_embedding(x: Tensor) -> Tensor:
    return _rounded(x, ACTIVATION_STEP, LARGEST)


def as_bias(x: Tensor) -> Tensor:
    return _rounded(x, SUM_STEP, LARGEST_BIAS)


def _rounded(x: Tensor, step: float, largest: int) -> Tensor:
    rounded: Tensor = Rounded.apply(x, step, -largest * step, largest * step)  # type: ignore[no-untyped-call]
    return rounded


def activation(sums: Tensor) -> Tensor:
    activations: Tensor = Rounded.apply(  # type: ignore[no-untyped-call]
        sums, ACTIVATION_STEP, 0.0, LARGEST * ACTIVATION_STEP
    )
    return activations


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution with rounded weights, zeros around; `weight` (outputs, inputs) stands for one of 1x1."""
    kernel = as_weight(weight if weight.ndim == 4 else weight[:, :, None, None])
    return F.conv2d(x, kernel, None if bias is None else as_bias(bias), padding=kernel.shape[-1] // 2)


class PriorLevel(nn.Module):
    """The parameters of one level, by the names of FORMAT.md."""

    def __init__(self, codebook_size: int, *, first: bool, last: bool) -> None:
        super().__init__()

        def weight(fan_in: int, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * math.sqrt(2 / fan_in))

        def bias(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape))

        tensors = {
            "embedding": nn.Parameter(0.7 * torch.randn(codebook_size, EMBEDDED)),
            "enter.weight": weight(9 * STATE, STATE, STATE, 3, 3),
            "enter.bias": bias(STATE),
            "near.weight": weight(12 * EMBEDDED + STATE, HIDDEN, EMBEDDED, 5, 5),
            "near.bias": bias(len(PHASES), HIDDEN),
            "context.weight": weight(12 * EMBEDDED + STATE, HIDDEN, STATE),
            "middle.weight": weight(HIDDEN, HIDDEN, HIDDEN),
            "middle.bias": bias(HIDDEN),
            "out.weight": nn.Parameter(0.02 * torch.randn(codebook_size, HIDDEN)),
            "out.bias": bias(codebook_size),
            "state.weight": weight(9 * (STATE + EMBEDDED), STATE, STATE + EMBEDDED, 3, 3),
            "state.bias": bias(STATE),
        }
        absent = (["enter.weight"] if first else []) + (["state.weight", "state.bias"] if last else [])
        self.tensors = nn.ParameterDict({k.replace(".", "_"): v for k, v in tensors.items() if k not in absent})

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self.tensors[name.replace(".", "_")]
        return tensor


class PriorNetwork(nn.Module):
    """The prior of these grids (coarse to fine), to be trained."""

    def __init__(self, grids: list[Grid]) -> None:
        super().__init__()
        self.grids = grids
        self.levels: Sequence[PriorLevel] = nn.ModuleList(  # type: ignore[assignment]
            PriorLevel(grid.codebook_size, first=k == 0, last=k == len(grids) - 1) for k, grid in enumerate(grids)
        )

    def bits(self, indices: list[Tensor], phases: list[int]) -> list[Tensor]:
        """The mean bits of an index, at each level, in the cells of one phase.

        indices: (b, rows, columns) int64 a level, of whole crops; phases: of each level, 0..3.
        """
        state: Tensor | None = None
        bits = []
        for k, (level, grid, phase) in enumerate(zip(self.levels, indices, phases, strict=True)):
            batch, rows, columns = grid.shape
            if state is None:
                context = activation(as_bias(level["enter.bias"])).view(1, -1, 1, 1).expand(batch, -1, rows, columns)
            else:
                factor = self.grids[k - 1].pixels_per_index // self.grids[k].pixels_per_index
                state = state.repeat_interleave(factor, 2).repeat_interleave(factor, 3)[..., :rows, :columns]
                context = activation(convolve(state, level["enter.weight"], level["enter.bias"]))
            embedded = F.embedding(grid, as_embedding(level["embedding"])).movedim(-1, 1)
            known = torch.zeros(rows, columns, device=grid.device)
            for row, column in PHASES[:phase]:
                known[row::2, column::2] = 1
            row, column = PHASES[phase]
            sums = convolve(embedded * known, level["near.weight"]) + convolve(context, level["context.weight"])
            sums = sums + as_bias(level["near.bias"][phase]).view(1, -1, 1, 1)
            hidden = activation(sums[..., row::2, column::2])
            hidden = activation(convolve(hidden, level["middle.weight"], level["middle.bias"]))
            logits = convolve(hidden, level["out.weight"], level["out.bias"]) * math.log(2)
            bits.append(F.cross_entropy(logits, grid[:, row::2, column::2]) / math.log(2))
            if k + 1 < len(self.levels):
                both = torch.cat([context, embedded], 1)
                state = activation(convolve(both, level["state.weight"], level["state.bias"]))
        return bits

    @torch.no_grad()
    def integers(self) -> dict[str, NDArray[np.generic]]:
        """The tensors of `bitstream.prior.Prior`."""
        tensors: dict[str, NDArray[np.generic]] = {}
        for k, level in enumerate(self.levels):
            for name, value in level.tensors.items():
                name = name.replace("_", ".")
                if name.endswith("bias"):
                    tensors[f"{k}.{name}"] = (as_bias(value) / SUM_STEP).cpu().numpy().astype(np.int32)
                else:
                    rounded, step = (
                        (as_embedding(value), ACTIVATION_STEP)
                        if name == "embedding"
                        else (as_weight(value), WEIGHT_STEP)
                    )
                    tensors[f"{k}.{name}"] = (rounded / step).cpu().numpy().astype(np.int8)
        return tensors

    @torch.no_grad()
    def load_integers(self, tensors: Mapping[str, NDArray[np.generic]]) -> None:
        """Takes over what `integers` gave.  Raises TrainingError where it is of other grids, or of other widths."""
        own = self.integers()
        if {name: tensor.shape for name, tensor in own.items()} != {k: v.shape for k, v in tensors.items()}:
            raise TrainingError("the start folder's prior is of another ladder: start from a folder without prior/")
        for k, level in enumerate(self.levels):
            for name, value in level.tensors.items():
                name = name.replace("_", ".")
                step = ACTIVATION_STEP if name == "embedding" else SUM_STEP if name.endswith("bias") else WEIGHT_STEP
                value.copy_(torch.from_numpy(tensors[f"{k}.{name}"].astype(np.float32)) * step)

    def save_pretrained(self, folder: Path) -> None:
        """Writes the prior's file, as a model folder has it, PRIOR_FILE, into its folder."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.integers(), folder / Path(PRIOR_FILE).name)


@torch.no_grad()
def codes_of_crops(run: Run, vae: Any, ladder: HyperLadder, prior: Prior | None, count: int) -> list[Tensor]:
    """The indices of random crops, (count, rows, columns) int16 a level, as an encoder with `prior` chooses them."""
    crops = Crops(run.source, random_crop, CROP_PX, run.settings.seed, count)
    found: list[list[Tensor]] = [[] for _ in ladder.levels]
    for position in range(count):
        crop = crops[position]["pixels"][None].to(run.accelerator.device)
        grids = choose(ladder, prior, vae.encode(crop).latents, None)
        for kept, grid in zip(found, grids, strict=True):
            kept.append(grid[0].to("cpu", torch.int16))
    return [torch.stack(kept) for kept in found]


def train_prior(run: Run) -> None:
    """Trains the prior of the run's ladder, or of the start folder's; the codes of its crops are kept.

    It begins with the start folder's prior, where that has one.

    Raises TrainingError where the ladder has a codebook that is too small for a prior.
    """
    settings, device = run.settings.prior, run.accelerator.device
    vae = run.begun(("joint", "autoencoder"), "vae").to(device)
    ladder: HyperLadder = run.begun(("joint", "ladder"), "hyper_enc").to(device)
    grids = list(ladder.rate_points[-1].grids)
    if (smallest := min(grid.codebook_size for grid in grids)) < SMALLEST_CODEBOOK:
        raise TrainingError(
            f"a prior needs codebooks of at least {SMALLEST_CODEBOOK} codes, and one here has {smallest}: leave the "
            f"stage prior out of stages"
        )
    network, prior = PriorNetwork(grids), None
    if (begun := run.find((), "prior")) is not None:
        network.load_integers(load_file(begun.parent / PRIOR_FILE))
        prior = Prior.load(begun.parent)
    indices = run.kept("prior", "codes.pt", lambda: codes_of_crops(run, vae, ladder, prior, settings.crops))
    stage = Stage(run, "prior", {"prior": network})
    for step in stage.steps():
        chosen = torch.randint(len(indices[0]), (settings.batch_size,))
        phases = stage.rng(step).choices(range(len(PHASES)), k=len(indices))
        bits = network.bits([grid[chosen].long().to(device) for grid in indices], phases)
        stage.update(torch.stack(bits).sum(), **{f"bits{k + 1}": value for k, value in enumerate(bits)})
    stage.finish(prior=stage.averaged["prior"])
