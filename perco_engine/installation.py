"""Whether the packages on this machine fit each other: importing this checks it, before the networks' libraries come.

transformers imports torchvision wherever it is installed.  One of another build than torch's (metrics such as lpips
bring it in, maybe from another index) then ends in an error that names neither.

Raises UnfitPackages.
"""

import importlib.util
from importlib.metadata import version

from .errors import UnfitPackages, first_line


def _check_torchvision() -> str | None:
    """The version of torchvision, if it is installed.  Raises UnfitPackages if it does not work with torch."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise UnfitPackages(
            f"torchvision {version('torchvision')} does not work with torch {version('torch')} ({first_line(error)}), "
            f"and transformers cannot be imported beside it: install both from the same index, or pip uninstall "
            f"torchvision (only LPIPS, DISTS and FID need it)"
        ) from error
    return version("torchvision")


TORCHVISION = _check_torchvision()
"""The version of torchvision that is installed, None without."""
