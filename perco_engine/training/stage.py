"""A stage of a training run: its clock, optimizer, averaged weights, checkpoint and log."""

import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def channels_last(module: M) -> M:
    """The module with its convolutions in the memory layout that is fast for them."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def autocast() -> torch.autocast:
    """bf16 where the device has it; the master weights stay in float32."""
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


def pace(name: str) -> float:
    """The learning rate of a parameter, relative to the stage's.

    What feeds a quantizer learns slowly: its gradient passes straight through, and at full rate the codes run away.
    The U-Net learns fast: it starts from nothing between networks that are trained already.
    """
    if name.startswith("ladder.levels.") and ".encoder." in name:
        return 0.35
    return 2.0 if name.startswith("unet.") else 1.0


class Stage:
    """A stage's clock, optimizer, averaged weights and checkpoint.

    The learning rate warms up over 50 steps, holds, and falls along a cosine over the last 70 % of the minutes.
    """

    def __init__(self, folder: Path, stage: str, minutes: float, modules: dict[str, nn.Module], lr: float) -> None:
        self.path = folder / f"{stage}.pt"
        self.log = folder / f"{stage}.log"
        self.modules = nn.ModuleDict(modules)
        self.averaged = copy.deepcopy(self.modules).requires_grad_(False)
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.modules.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(pace(name), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "pace": factor} for factor, group in groups.items()],
            lr=lr, betas=(0.9, 0.99), weight_decay=1e-4,
        )  # fmt: skip
        self.lr, self.seconds, self.spent, self.step = lr, minutes * 60, 0.0, 0
        self.figures: dict[str, list[float]] = {}
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.modules.load_state_dict(state["modules"])
            self.averaged.load_state_dict(state["averaged"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.spent, self.step = state["spent"], state["step"]

    def save(self) -> None:
        """Writes the checkpoint, beside and renamed."""
        beside = self.path.with_suffix(".tmp")
        torch.save(
            {
                "modules": self.modules.state_dict(),
                "averaged": self.averaged.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "spent": self.spent,
                "step": self.step,
            },
            beside,
        )
        beside.replace(self.path)

    def steps(self) -> Iterator[int]:
        """Yields step numbers until the minutes are spent; checkpoints every 4 minutes and at the end."""
        saved = self.spent
        while self.spent < self.seconds:
            start = time.monotonic()
            left = 1 - self.spent / self.seconds
            rate = self.lr * min(1.0, (self.step + 1) / 50) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, left / 0.7)))
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["pace"]
            yield self.step
            self.step += 1
            self.spent += min(time.monotonic() - start, 10.0)  # a run may be suspended: that is not its time
            if self.step % 20 == 0:
                means = " ".join(f"{name} {sum(v) / len(v):.4f}" for name, v in self.figures.items())
                with self.log.open("a") as log:
                    print(f"step {self.step} minute {self.spent / 60:.1f} {means}", file=log)
                self.figures.clear()
            if self.spent - saved > 240:
                self.save()
                saved = self.spent
        self.save()

    def update(self, loss: Tensor, **figures: float | Tensor) -> None:
        """One optimizer step; then the averaged weights follow.  `figures` go to the log as means of 20 steps."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        decay = min(0.998, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            live, averaged = self.modules.state_dict(), self.averaged.state_dict()
            floats = [name for name, value in averaged.items() if value.is_floating_point()]
            torch._foreach_lerp_([averaged[n] for n in floats], [live[n] for n in floats], 1 - decay)
            for name, value in averaged.items():
                if "_codebook" in name or not value.is_floating_point():
                    value.copy_(live[name])
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(float(value.detach() if isinstance(value, Tensor) else value))
