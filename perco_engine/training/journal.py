"""What a run tells while it goes: lines of JSON, curves and images for TensorBoard, and photos that were no good."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_beside

LOG = "log.jsonl"
SKIPPED = "skipped.json"

Tell = Callable[[str], None]


class Journal:
    """The means of every `every` steps' figures, over all processes.

    log.jsonl has a line for each such mean, {"step": ..., name: value}; curves/ is TensorBoard's.  What a broken-off
    run wrote after the checkpoint that it goes on from is cut off.

    step: after which the run goes on.  group: a stage's name, which curves are kept apart by.
    """

    def __init__(
        self, accelerator: Any, folder: Path, every: int, tell: Tell, step: int = 0, group: str = "train"
    ) -> None:
        self.accelerator, self.folder, self.every, self.tell, self.group = accelerator, folder, every, tell, group
        self.sums: dict[str, list[Tensor]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            kept = [line for line in read_log(folder) if line["step"] <= step]
            write_beside(folder / LOG, "".join(json.dumps(line) + "\n" for line in kept).encode())
        if accelerator.log_with:
            accelerator.init_trackers(f"curves/{group}", init_kwargs={"tensorboard": {"purge_step": step + 1}})

    def add(self, figures: Mapping[str, float | Tensor]) -> None:
        """Figures of a step, or of a part of it."""
        for name, value in figures.items():
            self.sums.setdefault(name, []).append(torch.as_tensor(value).detach().float().to(self.accelerator.device))

    def after_step(self, step: int) -> None:
        """Writes the means, if it is time."""
        if step % self.every or not self.sums:
            return
        means = torch.stack([torch.stack(values).mean() for values in self.sums.values()])
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means, "mean")
        self.write(step, dict(zip(self.sums, means.tolist(), strict=True)), self.group)
        self.sums.clear()

    def write(self, step: int, figures: Mapping[str, float], group: str) -> None:
        """A line of the log, and points of the curves."""
        if self.accelerator.is_main_process:
            line = {"step": step, **figures} if group == self.group else {"step": step, group: dict(figures)}
            with (self.folder / LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        self.accelerator.log({f"{group}/{name}": value for name, value in figures.items()}, step=step)

    def images(self, step: int, images: Mapping[str, Any]) -> None:
        """Pictures by name, (h, w, 3) uint8 each, for TensorBoard."""
        for tracker in self.accelerator.trackers:
            for name, image in images.items():
                tracker.log_images({name: image[None]}, step=step, dataformats="NHWC")

    def skipped(self, photos: dict[str, str]) -> int:
        """Tells of the photos, of all processes, that could not be read; returns how many.  skipped.json names them."""
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            photos = dict(pair for pair in gather_object(list(photos.items())))
        if photos and self.accelerator.is_main_process:
            write_beside(self.folder / SKIPPED, json.dumps(photos, indent=1).encode())
            self.tell(f"{len(photos)} photos could not be read and were left out: {self.folder / SKIPPED}")
        return len(photos)

    def close(self) -> None:
        """Lets go of TensorBoard's files."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers.clear()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; without the one that was being written when the run was broken off."""
    path, lines = folder / LOG, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
