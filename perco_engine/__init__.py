"""The engine behind pillow_perco: perceptual image compression at a hundred bytes.

    engine = perco_engine.get_engine()
    data = engine.encode(image, bpp=0.0019)
    image = engine.decode(data)

Importing this package costs nothing: torch is imported with the first name that needs it.
"""

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .codes import Codes as Codes
    from .codes import Metadata as Metadata
    from .engine import Engine as Engine
    from .engine import get_engine as get_engine
    from .errors import PercoError as PercoError
    from .family import FamilyEngine as FamilyEngine
    from .pipeline import PercoPipeline as PercoPipeline

_HOMES = {
    "Codes": "codes", "Engine": "engine", "FamilyEngine": "family", "Metadata": "codes", "PercoError": "errors",
    "PercoPipeline": "pipeline", "get_engine": "engine",
}  # fmt: skip
__all__ = ["Codes", "Engine", "FamilyEngine", "Metadata", "PercoError", "PercoPipeline", "__version__", "get_engine"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
