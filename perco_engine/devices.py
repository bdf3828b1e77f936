"""Where networks go: which device, in which dtype, and how much memory one process keeps filled with weights."""

import functools
import gc
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol, TypeVar

import torch

from .errors import first_line
from .locks import Lock

BUILDING = Lock(reentrant=True)
"""Held while networks are built: diffusers, accelerate and transformers change torch for the whole process meanwhile,
and two of them at once would leave it changed."""

FORK_WAITS_SECONDS = 60
"""For networks that another thread builds, at most: it might itself wait for what the thread that forks holds."""


def best_device() -> torch.device:
    """CUDA or MPS where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device that is meant; the best one for None.

    Raises ValueError, with torch's reason, for one that this machine, or this build of torch, cannot compute on.
    """
    if not isinstance(device, (str, torch.device, type(None))):
        raise ValueError(f'the device must be named, such as "cpu" or "cuda", not {device!r:.80}')
    return _tried(device)


@functools.cache
def _tried(device: str | torch.device | None) -> torch.device:
    named = best_device() if device is None else device
    try:
        probe = torch.zeros(1, device=torch.device(named))
        probe.tolist()
    except (RuntimeError, AssertionError, TypeError) as error:
        why = f"{first_line(error):.120}"
        instead = 'take "cpu"' if device is None else 'leave it out, or take "cpu"'
        raise ValueError(f"the device {str(named)!r} cannot be used here ({why}): {instead}") from error
    return probe.device  # "cuda:0" for "cuda", so that one device has one name


def best_dtype(device: torch.device) -> torch.dtype:
    """bf16, or fp16 where that is not built in, on a GPU; float32 elsewhere."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


def half_precision(device: torch.device) -> torch.autocast:
    """A context in which networks compute in bf16, where the device is a CPU that does so natively; nothing elsewhere.

    For what need not be the same everywhere, such as gradients: 1.3 to 1.5 times as fast as float32.
    """
    told: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # by newer releases of torch
    native = bool(told().get("avx512_bf16"))
    return torch.autocast("cpu", torch.bfloat16, enabled=device.type == "cpu" and native)


def weights_bytes(*networks: torch.nn.Module) -> int:
    """Memory that the weights of these networks take."""
    return sum(weight.nbytes for network in networks for weight in network.parameters())


class Loaded(Protocol):
    """What a WeightsCache holds: a loaded model.  size_bytes: memory of its weights."""

    size_bytes: int


T = TypeVar("T", bound=Loaded)


class WeightsCache:
    """Loaded models, at most `budget_bytes` of weights; the one that was not used for longest goes first.

    The one that was asked for last stays, whatever it takes.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._models: OrderedDict[Hashable, Loaded] = OrderedDict()
        self._loading: dict[Hashable, Lock] = {}
        self._lock = Lock()

    def get(self, key: Hashable, load: Callable[[], T]) -> T:
        """The model with this key, which `load` loads on first use; meanwhile other keys are not kept waiting."""
        with self._lock:
            loading = self._loading.setdefault(key, Lock())
        with loading:
            with self._lock:
                found: Any = self._models.get(key)
            with torch.inference_mode(False):  # of weights that were loaded in it no gradient could ever be had
                model: T = load() if found is None else found
            with self._lock:
                self._models[key] = model
                self._models.move_to_end(key)
                evicted = 0
                while len(self._models) > 1 and self.size_bytes > self.budget_bytes:
                    self._models.popitem(last=False)
                    evicted += 1
        if evicted:
            gc.collect()  # where networks are offloaded they hold each other
        return model

    @property
    def size_bytes(self) -> int:
        """Memory that the weights of all loaded models take."""
        return sum(model.size_bytes for model in self._models.values())

    def drop(self, key: Hashable) -> None:
        """Forgets the model with this key, if there is one; whoever uses it may finish."""
        with self._lock:
            self._models.pop(key, None)
        gc.collect()

    def clear(self) -> None:
        """Forgets every model; those in use go when their last user is done."""
        with self._lock:
            self._models.clear()
        gc.collect()


def budget_bytes(text: str) -> int:
    """PERCO_MEMORY_BUDGET as a number.  Raises ValueError for what is none."""
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"PERCO_MEMORY_BUDGET is a number of bytes, such as 8000000000, not {text!r}")
    return int(text)


cache = WeightsCache(budget_bytes(os.environ.get("PERCO_MEMORY_BUDGET") or str(16 << 30)))
"""The process-wide cache.  PERCO_MEMORY_BUDGET is its limit in bytes of weights (default 16 GiB)."""


def _in_a_forked_process() -> None:
    """torch would wait for its threads, which are of the process that forked: one is what its own workers have, too."""
    if cache.size_bytes:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    # A process that is forked while networks are built would find torch changed for ever.
    os.register_at_fork(
        before=lambda: BUILDING.acquire(FORK_WAITS_SECONDS),
        after_in_parent=BUILDING.release,
        after_in_child=_in_a_forked_process,
    )
