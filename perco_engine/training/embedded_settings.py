"""The settings of the recipe embedded: one table for each of its stages (settings.py says how they are filled)."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from annotated_types import Ge, MinLen, MultipleOf

from .settings import CheckpointSettings, Count, ListedData, NotNegative, Positive, Seed

Side = Annotated[int, Ge(88), MultipleOf(8)]
"""Pixels a side of a crop of the embedded model: what SSIM of four scales needs, and whole latents."""

EVERY_FOUR_MINUTES = CheckpointSettings(every_minutes=4)

StageName = Literal["autoencoder", "ladder", "joint", "text", "prior"]
STAGES: tuple[StageName, ...] = get_args(StageName)


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How long a stage of the embedded model's training takes: so many minutes, or so many steps."""

    minutes: Positive | None = None
    steps: Count | None = None
    learning_rate: Positive


@dataclass(frozen=True, kw_only=True)
class StageSettings(Clock):
    """A stage that sees crops of one size.

    batch_size: crops of one step and process.  side: pixels a side of a crop.
    """

    batch_size: Count
    side: Side


@dataclass(frozen=True, kw_only=True)
class PictureSettings(Clock):
    """A stage that learns through the decoded picture, at one level of the ladder in each step.

    What is given for each level goes from coarse to fine, and its last entry serves all further levels.

    crops: how many crops a step sees in a process, and pixels a side of one: the coarser the codes, the more of a photo
        they must be seen in.
    level_weights: how often a level is drawn, relative to the others.
    feature_weights: what the feature distance weighs in the loss: most where pixels cannot be right anyway.
    """

    crops: Annotated[tuple[tuple[Count, Side], ...], MinLen(1)]
    level_weights: Annotated[tuple[Positive, ...], MinLen(1)] = (1,)
    feature_weights: Annotated[tuple[NotNegative, ...], MinLen(1)] = (0.6, 0.5, 0.4, 0.35, 0.3, 0.28)

    def draw_level(self, rng: random.Random, levels: int) -> int:
        """A step's level of so many, 0 the coarsest."""
        weights = [_of_level(self.level_weights, level) for level in range(levels)]
        return rng.choices(range(levels), weights)[0]

    def feature_weight(self, level: int) -> float:
        """What the feature distance weighs at a level."""
        return _of_level(self.feature_weights, level)


def _of_level(weights: tuple[float, ...], level: int) -> float:
    """The last of the weights serves all further levels."""
    return weights[min(level, len(weights) - 1)]


@dataclass(frozen=True, kw_only=True)
class JointSettings(PictureSettings):
    """The joint stage.

    texture_weights: what the error of texture weighs in the loss: much where codes tell what is there, and not what of.
    frozen_codes: leave the ladder as it is: the codes of a photo stay the same.
    frozen_codebooks: leave the vectors of its codes as they are, and how often each is chosen, while what is around
        them learns.  For a ladder that is trained already.
    features: the EfficientNets whose feature distance is in the loss, one after the other, a step each.
    """

    texture_weights: Annotated[tuple[NotNegative, ...], MinLen(1)] = (0, 1, 6, 6, 4, 2)
    frozen_codes: bool = False
    frozen_codebooks: bool = False
    features: Annotated[tuple[Literal["lite0", "lite1"], ...], MinLen(1)] = ("lite0", "lite1")

    def texture_weight(self, level: int) -> float:
        """What the error of texture weighs at a level."""
        return _of_level(self.texture_weights, level)


@dataclass(frozen=True, kw_only=True)
class TextSettings(PictureSettings):
    """The stage of the text encoder.  Captions are those beside the photos and tags of the crops (text.py).

    corpus: a text file with a sentence a line, # before comments, that a fresh text encoder gets its words from,
        besides the names of ImageNet's classes.  vocabulary: how many tokens it has.
    """

    level_weights: Annotated[tuple[Positive, ...], MinLen(1)] = (7, 4, 1)
    corpus: Path | None = None
    vocabulary: Annotated[int, Ge(1000)] = 2300


@dataclass(frozen=True, kw_only=True)
class PriorSettings(Clock):
    """The stage of the prior.

    crops: how many are coded to learn from.  batch_size: of them in one step and process.
    """

    crops: Count = 3000
    batch_size: Count = 8


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """The embedded model, from nothing, in stages.

    stages: which, in their order.
    start: a model folder of the same architecture whose networks each stage begins with, instead of with nothing.
    sample: crops of 256 pixels that the linear maps of the autoencoder are solved on.
    log_every: steps whose means make a line of the log.
    """

    recipe: Literal["embedded"]
    run: Path
    data: ListedData
    seed: Seed = 0
    stages: Annotated[tuple[StageName, ...], MinLen(1)] = STAGES
    start: Path | None = None
    sample: Count = 600
    mixed_precision: Literal["no", "bf16"] = "bf16"
    autoencoder: StageSettings = StageSettings(minutes=15, batch_size=12, side=160, learning_rate=6e-4)
    ladder: StageSettings = StageSettings(minutes=12, batch_size=24, side=256, learning_rate=6e-4)
    joint: JointSettings = JointSettings(
        minutes=80, crops=((2, 384), (3, 320), (4, 256), (8, 192), (8, 192)), learning_rate=3e-4
    )
    text: TextSettings = TextSettings(minutes=42, crops=((5, 256), (5, 256), (4, 256), (6, 192)), learning_rate=4e-4)
    prior: PriorSettings = PriorSettings(minutes=15, learning_rate=3e-3)
    checkpoints: CheckpointSettings = EVERY_FOUR_MINUTES
    log_every: Count = 20
