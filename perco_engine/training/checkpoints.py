"""The state of a run on disk: whole or not at all, a few of the newest, and nothing in it that knows where it lies."""

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import TrainingError
from .settings import CheckpointSettings

PARTIAL = ".partial"


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


@dataclass
class Progress:
    """How far a run is.

    step: optimizer steps that are done.  spent_s: seconds that they took.
    skipped: photos that this process could not read, and why.
    places: of a stream's readers, how many samples each has read.
    """

    step: int = 0
    spent_s: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)

    def saw(self, batch: dict[str, Any]) -> None:
        """Takes over what a batch tells of its photos."""
        self.skipped |= batch["skipped"]
        self.places |= batch["places"]


def check_gradient(norm: Tensor, step: int) -> None:
    """Raises TrainingError for a gradient that would spoil the weights, and the next checkpoints with them."""
    if not torch.isfinite(norm):
        raise TrainingError(
            f"the gradient after step {step} is not finite, and no weight has followed it: lower learning_rate, or set "
            f'mixed_precision to "no"; the same command goes on from the newest checkpoint'
        )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises TrainingError where the libraries cannot write to the disk, whatever they raise then."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise TrainingError(
            f"cannot write {path} ({error}): make room; the same command goes on from the newest checkpoint"
        ) from error


class Checkpoints:
    """The folders step-00001234 in a run's folder, through accelerate's save_state and load_state.

    Networks are stored as safetensors under their names, without what accelerate wraps around them, so that a run goes
    on with another number of processes too; the optimizer and the random numbers as accelerate does it.

    parts: by name, the networks, and what else has a state_dict (averaged weights, the learning rate's schedule).
    when: by steps, by minutes; also when the process is told to stop (SIGTERM, SIGINT).
    """

    def __init__(
        self, accelerator: Any, folder: Path, when: CheckpointSettings, parts: dict[str, Any], progress: Progress
    ) -> None:
        self.accelerator, self.folder, self.when, self.parts, self.progress = accelerator, folder, when, parts, progress
        self.saved_s = time.monotonic()
        self.stopped = False
        self.hooks = [
            accelerator.register_save_state_pre_hook(self._write),
            accelerator.register_load_state_pre_hook(self._read),
        ]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Meanwhile SIGTERM and SIGINT ask for a checkpoint and an end, instead of being one.  A second one is."""

        def stop(number: int, frame: Any) -> None:
            self.stopped = True
            signal.signal(number, before[number])

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            before[int(number)] = signal.signal(number, stop)
        try:
            yield
        finally:
            for restored, handler in before.items():
                signal.signal(restored, handler)

    def after_step(self) -> None:
        """Writes a checkpoint if it is time.  Raises TrainingError, after it, where the run was told to stop."""
        late = self.when.every_minutes and time.monotonic() - self.saved_s > self.when.every_minutes * 60
        wishes = torch.tensor([bool(late), self.stopped], device=self.accelerator.device, dtype=torch.float32)
        if self.accelerator.num_processes > 1:  # all do the same, whoever was told to
            wishes = self.accelerator.reduce(wishes, "sum")
        late, stopped = (bool(wish) for wish in wishes.tolist())
        if late or stopped or (self.when.every_steps and self.progress.step % self.when.every_steps == 0):
            self.save()
        if stopped:
            raise TrainingError(
                f"stopped after step {self.progress.step}, which is saved: the same command goes on from there"
            )

    def save(self) -> None:
        """Writes a checkpoint of the step that is done, unless there is one; removes those that are too many.

        Raises TrainingError where it cannot be written.
        """
        target = self.folder / f"step-{self.progress.step:08}"
        if not target.exists():
            with writing(target):
                self._save(target)
        self.saved_s = time.monotonic()

    def _save(self, target: Path) -> None:
        partial = target.with_name(target.name + PARTIAL)
        if self.accelerator.is_main_process:
            for left in self.folder.glob(f"step-*{PARTIAL}"):  # where a run was killed
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for file in partial.iterdir():
                with file.open("r+b") as written:  # Windows writes through only what it may write
                    os.fsync(written.fileno())
            partial.rename(target)
            for old in found(self.folder)[: -self.when.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load(self) -> bool:
        """Goes on from the newest checkpoint, if there is one.  Raises TrainingError where it cannot be read."""
        there = found(self.folder)
        if not there:
            return False
        newest = there[-1]
        try:
            self.accelerator.load_state(str(newest))
        except Exception as error:  # the libraries raise whatever a wrong file leads them to
            raise TrainingError(
                f"the checkpoint {newest} cannot be read, or is of other settings ({error}): put the settings back, or "
                f"delete its folder, and the run goes on from the one before it"
            ) from error
        # Checkpoints are of whole steps, which may be of another number of batches now.
        self.accelerator.step = 0
        return True

    def forget(self) -> None:
        """Lets go of the accelerator, so that another stage's state can be its state."""
        for hook in self.hooks:
            hook.remove()
        self.accelerator.free_memory()

    def _write(self, models: list[Any], weights: list[Any], folder: str) -> None:
        """accelerate's hook: our own files in place of the wrapped networks."""
        weights.clear()
        rank = self.accelerator.process_index
        (Path(folder) / f"progress.{rank}.json").write_text(json.dumps(asdict(self.progress)), encoding="utf-8")
        if self.accelerator.is_main_process:
            states = {}
            for name, part in self.parts.items():
                if isinstance(part, nn.Module):
                    tensors = {key: value.contiguous() for key, value in part.state_dict().items()}
                    save_file(tensors, Path(folder) / f"{name}.safetensors")
                else:
                    states[name] = part.state_dict()
            torch.save(states, Path(folder) / "states.pt")

    def _read(self, models: list[Any], folder: str) -> None:
        models.clear()
        states = torch.load(Path(folder) / "states.pt", map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                part.load_state_dict(load_file(Path(folder) / f"{name}.safetensors"))
            else:
                part.load_state_dict(states[name])
        told = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("progress.*.json"))]
        self.progress.step, self.progress.spent_s = told[0]["step"], told[0]["spent_s"]
        self.progress.places = {int(reader): place for one in told for reader, place in one["places"].items()}
        if self.accelerator.process_index < len(told):
            self.progress.skipped = told[self.accelerator.process_index]["skipped"]
