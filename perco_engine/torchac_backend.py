"""The arithmetic coder of bitstream.entropy by torchac, where torchac's C++ extension is built already.

`import torchac` compiles that extension, prints while it does, and takes half a minute.  So nothing here imports
torchac: the compiled library is loaded from the folder in which torch keeps its extensions, and only `build` compiles,
in a process of its own.  torch is imported where a stream is large enough for torchac to be worth it.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from perco_engine.bitstream import entropy
from perco_engine.bitstream.entropy import CDF, minimum_bits, uniform_cdf
from perco_engine.errors import CoderUnavailable

MIN_SYMBOLS = 20_000
"""Fewer symbols than this take the own coder less time than the loading of the extension."""

MAX_CDF_BYTES = 256 * 2**20
"""torchac wants a copy of the CDF for every symbol; this is the most memory that the copies may take."""

MAX_CODEBOOK_SIZE = 32767
"""torchac's symbols are signed 16-bit integers."""

_EXTENSION_NAME = "torchac_backend"
_BUILD_TIMEOUT_S = 900


class AutomaticCoder:
    """A `Coder` that takes torchac for what torchac is built, able and worth it for, and the own coder for the rest."""

    def encode(self, symbols: Sequence[NDArray[np.int32]], cdfs: Sequence[CDF]) -> bytes:
        """As `entropy.encode`, and the same bytes."""
        if _worthwhile([len(values) for values in symbols], cdfs):
            return encode(symbols, cdfs)
        return entropy.encode(symbols, cdfs)

    def decode(self, data: bytes, counts: Sequence[int], cdfs: Sequence[CDF]) -> list[NDArray[np.int32]]:
        """As `entropy.decode`, and the same symbols and errors."""
        if _worthwhile(counts, cdfs):
            return decode(data, counts, cdfs)
        return entropy.decode(data, counts, cdfs)


def available() -> bool:
    """Whether torchac's extension is built for this Python and torch, loads, and codes as the own coder does."""
    return _extension() is not None


def build() -> Path:
    """Compiles torchac's extension, printing nothing, and gives the path of the library.

    Raises CoderUnavailable, with what the compiler said, if torchac, ninja or a C++ compiler is missing.
    """
    environment = dict(os.environ)  # ninja from PyPI lies beside the interpreter, which need not be on the PATH
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    try:
        run = subprocess.run(
            [sys.executable, "-c", "import sys; sys.tracebacklimit = 0; import torchac"],
            check=False,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_BUILD_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise CoderUnavailable(
            f"torchac was not built within {_BUILD_TIMEOUT_S} s; if no other build runs, delete the file `lock` in "
            f"{_library_path().parent} and try again"
        ) from error
    _extension.cache_clear()
    if run.returncode != 0 or not available():
        said = "\n".join(run.stdout.strip().splitlines()[-20:])
        raise CoderUnavailable(
            "torchac could not be built; it needs the Python packages torchac and ninja and a C++ compiler "
            f"(the own coder makes the same files without it). The build said:\n{said}"
        )
    return _library_path()


def encode(symbols: Sequence[NDArray[np.int32]], cdfs: Sequence[CDF]) -> bytes:
    """`entropy.encode` by torchac.

    Raises CoderUnavailable if the extension is not built, ValueError for what torchac cannot code (see `supports`) and
    as `entropy.encode` does.
    """
    import torch

    extension = _required_extension()
    table = _cdf_table([len(values) for values in symbols], cdfs)
    flat = np.concatenate([np.asarray(values) for values in symbols])
    if flat.size and not (flat.min() >= 0 and flat.max() < table.shape[1] - 1):
        raise ValueError(f"symbols must be 0 to {table.shape[1] - 2}, not {flat.min()} to {flat.max()}")
    stream: bytes = extension.encode_cdf(torch.from_numpy(table), torch.from_numpy(flat.astype(np.int16)))
    return stream


def decode(data: bytes, counts: Sequence[int], cdfs: Sequence[CDF]) -> list[NDArray[np.int32]]:
    """`entropy.decode` by torchac; raises as `encode` and `entropy.decode` do."""
    import torch

    extension = _required_extension()
    if sum(minimum_bits(count, cdf) for count, cdf in zip(counts, cdfs, strict=True)) > 8 * len(data):
        raise entropy.too_short(data)
    table = torch.from_numpy(_cdf_table(counts, cdfs))
    symbols = extension.decode_cdf(table, data)
    if extension.encode_cdf(table, symbols) != data:  # torchac does not tell: the own coder says what is wrong
        return entropy.decode(data, counts, cdfs)
    flat: NDArray[np.int32] = symbols.numpy().astype(np.int32)
    return np.split(flat, np.cumsum(counts)[:-1])


def supports(counts: Sequence[int], cdfs: Sequence[CDF]) -> bool:
    """Whether torchac can code this: codebooks of one size only, and copies of the CDF that fit in memory."""
    sizes = {cdf.shape[-1] for cdf in cdfs}
    return len(sizes) == 1 and max(sizes) <= MAX_CODEBOOK_SIZE + 1 and 2 * sum(counts) * max(sizes) <= MAX_CDF_BYTES


def _worthwhile(counts: Sequence[int], cdfs: Sequence[CDF]) -> bool:
    return sum(counts) >= MIN_SYMBOLS and supports(counts, cdfs) and available()


def _cdf_table(counts: Sequence[int], cdfs: Sequence[CDF]) -> NDArray[np.int16]:
    """The CDF of every symbol, (symbols, codebook size + 1) int16: the bits of uint16 numbers, 65536 as 0."""
    if not supports(counts, cdfs):
        raise ValueError("torchac codes only symbols of one codebook size, and not too many: use the own coder")
    table = np.empty((sum(counts), cdfs[0].shape[-1]), dtype=np.uint16)
    start = 0
    for count, cdf in zip(counts, cdfs, strict=True):
        entropy.check_cdf(cdf, count)
        table[start : start + count] = cdf.astype(np.uint16)
        start += count
    return table.view(np.int16)


def _required_extension() -> ModuleType:
    extension = _extension()
    if extension is None:
        raise CoderUnavailable("torchac's extension is not built on this machine: run `perco doctor --build-torchac`")
    return extension


@cache
def _extension() -> ModuleType | None:
    """torchac's compiled module, or None where it is not built, does not load or does not code as the own coder."""
    try:
        path = _library_path()
        if not path.is_file():
            return None
        spec = importlib.util.spec_from_file_location(_EXTENSION_NAME, path)
        if spec is None or spec.loader is None:
            return None
        extension = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(extension)
    except ImportError:  # no setuptools, no torch, or a library that was built for another torch
        return None
    return extension if _agrees(extension) else None


def _library_path() -> Path:
    """Where torch builds torchac's extension, by the rules of torch.utils.cpp_extension.load."""
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    if folder := os.environ.get("TORCH_EXTENSIONS_DIR"):
        root = Path(folder)
    else:
        if torch.version.hip is not None:
            accelerator = f"rocm{torch.version.hip.replace('.', '')}"
        elif torch.version.cuda is not None:
            accelerator = f"cu{torch.version.cuda.replace('.', '')}"
        else:
            accelerator = "cpu"
        python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
        root = Path(get_default_build_root()) / f"{python}_{accelerator}"
    return root / _EXTENSION_NAME / f"{_EXTENSION_NAME}{'.pyd' if sys.platform == 'win32' else '.so'}"


def _agrees(extension: ModuleType) -> bool:
    """Whether a library that was found codes a short sequence as the own coder does."""
    import torch

    symbols = np.arange(50, dtype=np.int32) ** 2 % 19
    cdf = uniform_cdf(19)
    table = torch.from_numpy(_cdf_table([50], [cdf]))
    expected = entropy.encode([symbols], [cdf])
    try:
        stream = extension.encode_cdf(table, torch.from_numpy(symbols.astype(np.int16)))
        decoded = extension.decode_cdf(table, expected)
    except (AttributeError, RuntimeError):
        return False
    return bool(stream == expected and np.array_equal(decoded.numpy(), symbols))
