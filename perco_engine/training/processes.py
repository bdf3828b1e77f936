"""accelerate: on which devices a run computes, in which precision, and how its processes find each other."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import InvalidSettings, TrainingError

SHUTDOWN_SECONDS = 600
"""How long processes that are told to stop may take for a step and a checkpoint."""


@contextmanager
def accelerated(folder: Path, mixed_precision: str) -> Iterator[Any]:
    """accelerate's Accelerator for one run, on the devices that `accelerate launch` or this machine gives.

    folder: of TensorBoard's curves.

    Raises TrainingError without the package, InvalidSettings for a precision that the device has not.
    """
    if find_spec("accelerate") is None:
        raise TrainingError("training needs more packages: pip install 'pillow-perco[train]'")
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import GradientAccumulationPlugin

    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
            log_with="tensorboard" if find_spec("tensorboard") else None,
            project_dir=str(folder),
            step_scheduler_with_optimizer=False,
            # Codebooks, the only buffers that change, are kept equal by the quantizer itself.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as error:
        raise InvalidSettings(f"mixed_precision: {mixed_precision} cannot be had on this device ({error})") from error
    try:
        yield accelerator
    finally:
        accelerator.end_training()
        AcceleratorState._reset_state()  # a program may train again, in another precision
        GradientState._reset_state()


def is_launched() -> bool:
    """Whether accelerate or torchrun has started this process among others."""
    return "LOCAL_RANK" in os.environ or "RANK" in os.environ


def is_first() -> bool:
    """Whether this process is the only one, or the first of those that train."""
    return os.environ.get("RANK", "0") == "0"


def devices() -> int:
    """How many processes this machine is good for: one a GPU, or one."""
    return max(1, torch.cuda.device_count())


def launch(command: Sequence[str], processes: int) -> None:
    """Runs a command of Python's, as in ["-m", "module", ...], in several processes, one a GPU where there are GPUs.

    A signal to end is passed on to them, so that they write a checkpoint.

    Raises TrainingError where one of them fails.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = dict(os.environ) if torch.cuda.is_available() else os.environ | {"ACCELERATE_USE_CPU": "true"}
    from torch.distributed.launcher.api import LaunchConfig

    if any(field.name == "shutdown_timeout" for field in fields(LaunchConfig)):  # in newer releases of torch
        launcher += ["--shutdown-timeout", str(SHUTDOWN_SECONDS)]
    stopped, launchers = list[int](), list[subprocess.Popen[bytes]]()

    def stop(number: int, frame: Any) -> None:
        stopped.append(number)
        for one in launchers:
            one.terminate()

    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup ignores SIGHUP
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        # In a session of its own: what a terminal sends to all of a group would reach it twice.
        launchers.append(subprocess.Popen([*launcher, *command], env=environment, start_new_session=True))
        if stopped:
            launchers[0].terminate()
        failed = launchers[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        raise TrainingError("stopped: the same command goes on from the newest checkpoint")
    if failed:
        raise TrainingError(f"one of {processes} processes failed: what it said stands above")
