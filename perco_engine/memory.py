"""Memory on the device: what a model needs, whether it fits, and what to say when it did not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .errors import NotEnoughMemory
from .pipeline import LATENTS_AT_ONCE, PercoPipeline

GIB = 1 << 30
