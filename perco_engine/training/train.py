"""`perco train`: a settings file to a model folder."""

from pathlib import Path

from . import embedded, perco_sd
from .embedded_settings import Embedded
from .journal import Tell
from .settings_file import Settings, read


def check(config: Path) -> Settings:
    """The settings in a file, once all that they name has been looked for.  Raises InvalidSettings."""
    settings = read(config)
    if isinstance(settings, Embedded):
        embedded.check(settings)
    else:
        perco_sd.check(settings)
    return settings


def train(config: Path, tell: Tell = print) -> Path:
    """Trains as a settings file says, from where the run stands; returns the folder of the model.

    Raises InvalidSettings before anything starts, ModelError where a model or a package cannot be had, TrainingError
    where the run was told to stop.
    """
    settings = check(config)
    settings.run.mkdir(parents=True, exist_ok=True)
    return embedded.train(settings, tell) if isinstance(settings, Embedded) else perco_sd.train(settings, tell)
