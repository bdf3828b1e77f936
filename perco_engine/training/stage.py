"""A stage of the embedded model's training: its clock, optimizer, averaged weights, checkpoints and log."""

import copy
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import TrainingError
from ..files import new_folder
from ..model_folder import progress_bars_off
from ..models.autoencoder import PatchAutoencoder
from ..models.ladder import HyperLadder
from ..models.unet import UNet2DConditionModel
from . import checkpoints
from .checkpoints import Checkpoints, Progress, check_gradient, writing
from .crops import Crop, Crops, collate
from .embedded_settings import Clock, Embedded, StageName
from .journal import Journal, Tell
from .photos import random_crop
from .sources import Source

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

NETWORKS: dict[str, Any] = {"vae": PatchAutoencoder, "hyper_enc": HyperLadder, "unet": UNet2DConditionModel}
"""The networks by their names in a model folder."""

ENDLESS = 1 << 40
"""Crops that no stage will ever see."""


def channels_last(module: M) -> M:
    """The module with its convolutions in the memory layout that is fast for them."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def pace(name: str) -> float:
    """The learning rate of a parameter, relative to the stage's.

    What feeds a quantizer learns slowly: its gradient passes straight through, and at full rate the codes run away.
    The U-Net learns fast: it starts from nothing between networks that are trained already; faster yet what brings it
    captions, a thin layer between networks that hold still.
    """
    if name.startswith("unet.add_embedding."):
        return 25.0
    if name.startswith("text_encoder."):
        return 5.0
    if name.startswith("ladder.levels.") and ".encoder." in name:
        return 0.35
    return 2.0 if name.startswith("unet.") else 1.0


@dataclass(frozen=True)
class Run:
    """What the stages of a run share.  source: the photos that are trained on."""

    settings: Embedded
    accelerator: Any
    source: Source
    tell: Tell

    def folder(self, stage: StageName) -> Path:
        """A stage's folder: checkpoints, log and curves, and, once it is done, finished/ with its networks."""
        return self.settings.run / stage

    def is_done(self, stage: StageName) -> bool:
        """Whether a stage has written its networks."""
        return (self.folder(stage) / "finished").is_dir()

    def find(self, stages: Sequence[StageName], name: str) -> Path | None:
        """The folder `name` that the first of these stages that is done gave, else the start folder's, else None."""
        places = [self.folder(stage) / "finished" / name for stage in stages]
        if self.settings.start is not None:
            places.append(self.settings.start / name)
        return next((place for place in places if place.is_dir()), None)

    def begun(self, stages: Sequence[StageName], name: str, fresh: Callable[[], Any] | None = None) -> Any:
        """The network `name`, frozen, as `find` finds it, else fresh.

        Raises TrainingError where there is none, or it cannot be loaded.
        """
        found = self.find(stages, name)
        if found is not None:
            try:
                with progress_bars_off():
                    network = NETWORKS[name].from_pretrained(found, local_files_only=True)
            except (OSError, ValueError, RuntimeError) as error:
                raise TrainingError(f"cannot load {found}: {error}") from error
        elif fresh is not None:
            network = fresh()
        else:
            first = f"let the stage {' or '.join(stages)} come first (stages), or name a start folder"
            raise TrainingError(f"there is no {name} yet: {first}")
        return network.requires_grad_(False).eval()

    def kept(self, stage: StageName, name: str, make: Callable[[], T]) -> T:
        """What `make` makes, once: it is kept in a stage's folder, and read from there when the run goes on."""
        path = self.folder(stage) / name
        if self.accelerator.is_main_process and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            torch.save(make(), partial)
            partial.rename(path)
        self.accelerator.wait_for_everyone()
        made: T = torch.load(path, weights_only=True)
        return made

    def autocast(self) -> Any:
        """bf16 where the settings say so; the master weights stay in float32."""
        return self.accelerator.autocast()

    def is_new(self, stage: StageName) -> bool:
        """Whether a stage has no checkpoint to go on from."""
        return not checkpoints.found(self.folder(stage) / "checkpoints")

    def rng(self, stage: StageName, step: int) -> random.Random:
        """A step's random numbers, the same in all processes, whenever the run was broken off."""
        return random.Random(f"{self.settings.seed}/{stage}/{step}")


class Stage:
    """A stage's clock, optimizer, averaged weights, checkpoints and log; goes on from the newest checkpoint.

    modules: by name, what is averaged and stored; what requires gradients learns.  All processes start with those of
        the first one.

    The learning rate warms up over 50 steps, holds, and falls along a cosine over the last 70 % of the stage.
    """

    def __init__(self, run: Run, name: StageName, modules: dict[str, nn.Module]) -> None:
        self.run, self.name, self.accelerator = run, name, run.accelerator
        self.settings: Clock = getattr(run.settings, name)
        self.progress = Progress()
        self.modules = nn.ModuleDict(modules).to(self.accelerator.device)
        self._share()
        self.averaged = copy.deepcopy(self.modules).requires_grad_(False)
        groups: dict[float, list[nn.Parameter]] = {}
        for key, parameter in self.modules.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(pace(key), []).append(parameter)
        optimizer = torch.optim.AdamW(
            [{"params": group, "pace": factor} for factor, group in groups.items()],
            lr=self.settings.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4,
        )  # fmt: skip
        self.optimizer = self.accelerator.prepare(optimizer)
        torch.manual_seed(run.settings.seed + self.accelerator.process_index)
        parts = {"modules": self.modules, "averaged": self.averaged}
        folder = run.folder(name)
        self.checkpoints = Checkpoints(
            self.accelerator, folder / "checkpoints", run.settings.checkpoints, parts, self.progress
        )
        if self.checkpoints.load():
            run.tell(f"{name}: goes on after step {self.progress.step}")
        self.journal = Journal(self.accelerator, folder, run.settings.log_every, run.tell, self.progress.step, name)

    def crops(self, size: int, side: int) -> Iterator[Tensor]:
        """Endless batches (size, 3, side, side) of random crops in -1..1, one a step."""
        return (batch["pixels"] for batch in self.batches(size, side))

    def by_level(self, crops: Sequence[tuple[int, int]], level_of: Callable[[int], int]) -> Iterator[Crop]:
        """Endless batches, one a step, of as many crops of such a side as `crops` says of the step's level.

        level_of: a step's level; the last entry of `crops` serves all further ones.
        """
        last = len(crops) - 1
        done = Counter(min(level_of(step), last) for step in range(self.progress.step))
        data = [self.batches(size, side, stream, done[stream]) for stream, (size, side) in enumerate(crops)]
        while True:
            yield next(data[min(level_of(self.progress.step), last)])

    def batches(self, size: int, side: int, stream: int = 0, done: int | None = None) -> Iterator[Crop]:
        """Endless batches of random crops, as crops.collate makes them: pixels (size, 3, side, side) in -1..1.

        stream: of several, each with an order of its own.  done: batches that were seen; default one a step.
        """
        seed = self.run.settings.seed + stream
        crops = Crops(self.run.source, random_crop, side, seed, ENDLESS)
        done = self.progress.step if done is None else done
        loader = self.accelerator.prepare_data_loader(
            DataLoader(
                crops,
                batch_size=size,
                collate_fn=collate,
                num_workers=self.run.settings.data.workers,
                persistent_workers=self.run.settings.data.workers > 0,
                generator=torch.Generator().manual_seed(seed),
            )
        )
        if done:
            loader = self.accelerator.skip_first_batches(loader, done)
        for batch in loader:
            self.progress.saw(batch)
            batch["pixels"] = batch["pixels"].contiguous(memory_format=torch.channels_last)
            yield batch

    @property
    def device(self) -> torch.device:
        """Where the stage computes."""
        return self.accelerator.device  # type: ignore[no-any-return]

    def rng(self, step: int) -> random.Random:
        """A step's random numbers in this process, whenever the run was broken off."""
        return random.Random(f"{self.run.settings.seed}/{self.name}/{step}/{self.accelerator.process_index}")

    @property
    def left(self) -> float:
        """The share of the stage that is still to come, 1..0."""
        if self.settings.steps is not None:
            return 1 - self.progress.step / self.settings.steps
        assert self.settings.minutes is not None
        return 1 - self.progress.spent_s / (self.settings.minutes * 60)

    def steps(self) -> Iterator[int]:
        """Yields step numbers until the stage is over; writes checkpoints in between, and in the end."""
        with self.checkpoints.watching():
            while self.left > 0:
                start = time.monotonic()
                warm, cool = min(1.0, (self.progress.step + 1) / 50), min(1.0, self.left / 0.7)
                rate = self.settings.learning_rate * warm * (0.5 - 0.5 * math.cos(math.pi * cool))
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * group["pace"]
                yield self.progress.step
                self.progress.step += 1
                self._pass(min(time.monotonic() - start, 10.0))  # a run may be suspended: that is not its time
                self.journal.after_step(self.progress.step)
                self.checkpoints.after_step()
            self.checkpoints.save()
        self.journal.skipped(self.progress.skipped)

    def update(self, loss: Tensor, **figures: float | Tensor) -> None:
        """One optimizer step; then the averaged weights follow.  `figures` go to the log."""
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        self._reduce()
        check_gradient(self.accelerator.clip_grad_norm_(self.modules.parameters(), 1.0), self.progress.step)
        self.optimizer.step()
        decay = min(0.998, (self.progress.step + 1) / (self.progress.step + 10))
        with torch.no_grad():
            live, averaged = self.modules.state_dict(), self.averaged.state_dict()
            floats = [name for name, value in averaged.items() if value.is_floating_point()]
            torch._foreach_lerp_([averaged[n] for n in floats], [live[n] for n in floats], 1 - decay)
            for name, value in averaged.items():
                if "_codebook" in name or not value.is_floating_point():
                    value.copy_(live[name])
        self.journal.add({"loss": loss, **figures})

    def finish(self, **networks: Any) -> None:
        """Writes what the stage was for, for the next one: networks by their names in a model folder."""
        target = self.run.folder(self.name) / "finished"
        if self.accelerator.is_main_process:
            with writing(target), progress_bars_off(), new_folder(target) as partial:
                for name, network in networks.items():
                    network.save_pretrained(partial / name)
        self.accelerator.wait_for_everyone()
        self.checkpoints.forget()
        self.journal.close()

    def _share(self) -> None:
        """Gives the first process' networks to all."""
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast

            with torch.no_grad():
                for value in self.modules.state_dict().values():
                    value.copy_(broadcast(value.clone()))

    def _reduce(self) -> None:
        """The mean of all processes' gradients.

        By hand, since the losses call more than the networks' forward methods, and not all of them in each step.
        """
        if self.accelerator.num_processes > 1:
            for parameter in self.modules.parameters():
                if parameter.requires_grad:
                    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    parameter.grad = self.accelerator.reduce(gradient, "mean")

    def _pass(self, seconds: float) -> None:
        """Lets time pass, in all processes as much as in the first one."""
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast

            seconds = float(broadcast(torch.tensor(seconds, device=self.accelerator.device)))
        self.progress.spent_s += seconds
