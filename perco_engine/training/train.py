"""`perco train`: a settings file to a model folder."""

from pathlib import Path

from ..errors import InvalidSettings
from . import embedded, perco_sd
from .embedded_settings import Embedded
from .journal import Tell
from .processes import is_first
from .settings_file import Settings, read


def check(config: Path, tell: Tell = lambda text: None) -> Settings:
    """The settings in a file, once all that they name has been looked for.  Raises InvalidSettings."""
    settings = read(config)
    there = next(path for path in (settings.run, *settings.run.parents) if path.exists())
    if not there.is_dir():
        raise InvalidSettings(f"run: {there} is a file: name a folder")
    if isinstance(settings, Embedded):
        embedded.check(settings)
    else:
        perco_sd.check(settings, tell)
    return settings


def train(config: Path, tell: Tell = print) -> Path:
    """Trains as a settings file says, from where the run stands; returns the folder of the model.

    Raises InvalidSettings before anything starts, ModelError where a model or a package cannot be had, TrainingError
    where the run was told to stop.
    """
    settings = check(config, tell if is_first() else lambda text: None)
    settings.run.mkdir(parents=True, exist_ok=True)
    return embedded.train(settings, tell) if isinstance(settings, Embedded) else perco_sd.train(settings, tell)
