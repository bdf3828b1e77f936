"""Every exception that the engine raises on purpose.

    PercoError
    ├── BitstreamError            the bytes are not a file that this release can read
    │   ├── NotAPercoFile         wrong magic
    │   ├── NotAReferenceFile     not what PerCo (SD) writes, so its pickle is not read
    │   ├── UnsupportedVersion    a format version that this release does not know
    │   ├── UnsupportedChunk      a required chunk of an unknown kind or coding
    │   ├── TruncatedFile         the bytes end too early
    │   ├── ChecksumMismatch      the bytes are not those that were written
    │   ├── InvalidHeader         a header field outside of its range
    │   ├── InvalidStream         a stream or chunk that no writer of the format makes
    │   └── LimitExceeded         a text, a chunk or a picture larger than the limits allow
    ├── ModelError
    │   ├── ModelUnavailable      the model is not known, or not on this machine
    │   ├── InvalidModel          a model folder that cannot be loaded as what it says it is
    │   ├── UnsupportedRatePoint  the model does not offer this rate point
    │   └── PreviewUnavailable    the model has nothing that a preview without torch can be made of
    ├── BudgetTooSmall            (also a ValueError) no rate point fits into max_bytes
    ├── NotFinite                 the networks made numbers that are none
    ├── NotEnoughMemory           the device has too little memory for the picture or the model
    ├── OffloadUnavailable        offload was asked for and accelerate is not installed
    ├── ConversionError           a conversion of many files cannot begin as it was asked for
    ├── CoderUnavailable          torchac's extension was asked for and is not built
    ├── UnfitPackages             (also an ImportError) an installed package does not work with another
    ├── EvaluationError           an evaluation cannot go on in the folder that it was given
    └── TrainingError             a training run cannot go on
        └── InvalidSettings       (also a ValueError) a run's settings file does not say what it must

Each message says what is wrong and, where there is something to do, what to do.
"""


class PercoError(Exception):
    """Base of all errors of perco_engine."""


class BitstreamError(PercoError):
    """The bytes are not a .perco file that this release can read."""


class NotAPercoFile(BitstreamError):
    """The file does not begin with the magic of the format."""


class NotAReferenceFile(BitstreamError):
    """The bytes are not a file as the reference implementation, PerCo (SD), writes it."""


class UnsupportedVersion(BitstreamError):
    """The file was written in a format version that this release does not know."""


class UnsupportedChunk(BitstreamError):
    """The file holds a required chunk of a kind or coding that this release does not know."""


class TruncatedFile(BitstreamError):
    """The file ends before everything that its header announces."""


class ChecksumMismatch(BitstreamError):
    """The checksum at the end of the file does not match its contents."""


class InvalidHeader(BitstreamError):
    """A field of the header is outside of the range that FORMAT.md gives for it."""


class InvalidStream(BitstreamError):
    """The contents of a stream or a chunk are not what any writer of the format makes."""


class LimitExceeded(BitstreamError):
    """A text, a chunk or a picture is larger than the limits of FORMAT.md or of the caller."""


class ModelError(PercoError):
    """A model cannot be found, loaded or used as asked."""


class ModelUnavailable(ModelError):
    """The model that is asked for, or that a file names, is not on this machine."""


class InvalidModel(ModelError):
    """A model folder cannot be loaded as what it declares to be."""


class UnsupportedRatePoint(ModelError):
    """The model does not offer the rate point that a file names."""


class PreviewUnavailable(ModelError):
    """A model has nothing that a small picture can be made of without its networks."""


class BudgetTooSmall(PercoError, ValueError):
    """Not even the lowest rate point fits into the bytes that were allowed."""


class NotFinite(PercoError):
    """The networks made infinities or no numbers at all: weights are damaged, or 16 bits too few for them."""


class NotEnoughMemory(PercoError):
    """Memory ran out while a model was loaded, or a picture encoded or decoded; the text says what takes less."""


class OffloadUnavailable(PercoError):
    """Offload of the networks was asked for, and the package that does it is not installed."""


class ConversionError(PercoError):
    """A conversion of many files cannot begin as it was asked for; nothing was written."""


class CoderUnavailable(PercoError):
    """torchac's compiled extension was asked for and is not built on this machine."""


class UnfitPackages(PercoError, ImportError):
    """Two installed packages do not work together; the text says which, and what to do."""


class EvaluationError(PercoError):
    """An evaluation cannot go on with the results that lie where it is to write, or has nothing to evaluate."""


class TrainingError(PercoError):
    """A training run cannot start or go on: what it needs is not there, or does not fit."""


class InvalidSettings(TrainingError, ValueError):
    """The settings of a training run are missing, unknown, out of range, or contradict each other."""


def full_text(error: BaseException) -> str:
    """What an error says; its class's name where it says nothing, as MemoryError() does."""
    return str(error) if str(error).strip() else type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without blank ones: libraries' errors may go on for pages."""
    return full_text(error).strip().splitlines()[0]
