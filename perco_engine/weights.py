"""Where models are: the registry of known ones, the folders of the others, and how a file's model is found.

A model is a folder that `PercoPipeline.from_pretrained` loads.  A file names its model by a registry id; or by the id
of a family of checkpoints and a fingerprint of the checkpoint's weights; or, for models that are not in the registry,
by the fingerprint alone.
"""

import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import rates
from .bitstream.header import FAMILY_FINGERPRINT_BYTES, FINGERPRINT_BYTES, FIRST_FAMILY, read_header
from .codes import Codes, ModelReference
from .errors import InvalidModel, ModelUnavailable, UnsupportedRatePoint
from .model_files import WEIGHT_FILES, is_null, read_json
from .rates import RatePoint
from .store.checkpoint import RECORD, Checkpoint, installed
from .store.checkpoint import read as read_record

if TYPE_CHECKING:
    from .bitstream.entropy import Coder
    from .bitstream.prior import Prior


@dataclass(frozen=True)
class ModelSpec:
    """A registered model, or family of checkpoints: its id in files never changes, and is never given to another.

    rate_points: those that a file's rate point counts; a family's whether their checkpoints are installed or not.
    folder: of weights that come with this package, else None.
    get: what the user is to do where the model is not on this machine.
    """

    name: str
    registry_id: int
    rate_points: tuple[RatePoint, ...]
    folder: str | None
    get: str

    @property
    def is_family(self) -> bool:
        """Whether this names checkpoints of several rates, one for each, and not one set of weights."""
        return self.registry_id >= FIRST_FAMILY


REGISTRY = (
    ModelSpec(
        "embedded",
        10,
        rates.EMBEDDED,
        str(Path(__file__).parent / "embedded"),
        "it is part of this package: reinstall pillow-perco",
    ),
    ModelSpec(
        "perco-sd",
        32,
        rates.PERCO_SD,
        None,
        "download the folder of its checkpoint and run: perco models import FOLDER "
        "(perco models pull perco-sd says where the folders are)",
    ),
)
"""The models that files may name.  No id is given twice: 1 to 9 were of embedded weights before the first release."""


@dataclass(frozen=True)
class Model:
    """A model on this machine: its folder, and how a file names it.

    fingerprint: what a file holds of it: 8 bytes for id 0, 4 for a checkpoint of a family, none for other ids.
    rate_point: of a checkpoint of a family, the index of its one rate point among the family's; else None.
    """

    name: str
    folder: Path
    registry_id: int
    fingerprint: bytes = b""
    rate_point: int | None = None

    @property
    def reference(self) -> ModelReference:
        """How files name this model."""
        return ModelReference(self.registry_id, self.fingerprint)

    def file_rate_points(self, own: tuple[RatePoint, ...]) -> tuple[RatePoint, ...]:
        """What the rate point of a file counts: of a family all, whichever are at hand, else the model's own."""
        spec = registered(self.registry_id)
        return spec.rate_points if spec else own

    def codes(
        self,
        data: bytes,
        points: tuple[RatePoint, ...],
        *,
        prior: "Prior | None",
        coder: "Coder | None" = None,
        grids: int | None = None,
        allow_truncated: bool = False,
    ) -> Codes:
        """What the bytes of a file that names this model say.

        points: those of `file_rate_points`.  The rest is as `bitstream.unpack` has it; allow_truncated: as
            `bitstream.unpack_partial`, and then with all grids.
        Raises BitstreamError, and UnsupportedRatePoint where the file is of a rate that its model does not offer, or
        of another one than the weights that it names.
        """
        from .bitstream.container import OWN_CODER, unpack, unpack_partial  # with numpy, which opening a file spares

        coder = coder or OWN_CODER
        if self.rate_point is not None:  # told before its indices are read, which would be too many or too few
            rate_point = read_header(data, allow_truncated=allow_truncated).rate_point
            if self.rate_point != rate_point < len(points):
                raise UnsupportedRatePoint(
                    f"the file is of {points[rate_point].bpp} bpp, and the weights that it names, {self.name!r}, are "
                    f"of {points[self.rate_point].bpp}: the file is damaged"
                )
        if allow_truncated:
            return unpack_partial(data, points, prior=prior, coder=coder)
        return unpack(data, points, prior=prior, coder=coder, grids=grids)


def registered(registry_id: int) -> ModelSpec | None:
    """The model with this id in files, or None if this release does not know it."""
    return next((spec for spec in REGISTRY if spec.registry_id == registry_id), None)


def named(name: str) -> ModelSpec | None:
    """The registered model, or family, of this name, or None."""
    return next((spec for spec in REGISTRY if spec.name == name), None)


def home() -> Path:
    """The folder that holds models beside the embedded one: PERCO_HOME, or the platform's data folder."""
    if chosen := os.environ.get("PERCO_HOME"):
        return Path(chosen)
    import platformdirs

    try:
        return Path(platformdirs.user_data_dir("pillow-perco", appauthor=False))
    except RuntimeError as error:  # a process without a user
        raise ModelUnavailable(f"there is no folder for models ({error}): set PERCO_HOME to one") from error


def models_folder() -> Path:
    """The folder with one folder for each installed model."""
    return home() / "models"


@functools.cache
def _fingerprint(files: tuple[tuple[str, str, int, int], ...]) -> bytes:
    digest = hashlib.sha256()
    for path, name, size, _ in files:
        digest.update(f"{name} {size}\n".encode())
        with open(path, "rb") as weights:
            for block in iter(lambda: weights.read(1 << 20), b""):
                digest.update(block)
    return digest.digest()[:FINGERPRINT_BYTES]


def fingerprint(folder: Path) -> bytes:
    """The first 8 bytes of the SHA-256 of the files that a model's weights are loaded from: their names, sizes, bytes.

    What lies beside them does not count.  FORMAT.md has it in full.
    """
    files = {name: folder / name for name in sorted(set(_weight_files(folder))) if (folder / name).is_file()}
    return _fingerprint(
        tuple((str(path.resolve()), name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files.items())
    )


def _weight_files(folder: Path) -> Iterator[str]:
    """Where in a model folder its weights are loaded from: those of the components that it names, and its prior.

    Not all of them need be there: what is missing or damaged is told when the model is loaded.
    """
    from .bitstream.prior import PRIOR_FILE  # with numpy, which opening a file spares

    components = _read_object(folder / "model_index.json")
    for name, file in WEIGHT_FILES.items():
        if is_null(components.get(name)):
            continue
        shards = _read_object(folder / name / f"{file}.index.json").get("weight_map")
        # Of both, diffusers takes the shards, and transformers the one file.
        if isinstance(shards, dict) and not (name == "text_encoder" and (folder / name / file).is_file()):
            yield from (f"{name}/{shard}" for shard in shards.values())
        else:
            yield f"{name}/{file}"
    yield PRIOR_FILE


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none."""
    try:
        return read_json(path)
    except InvalidModel:
        return {}


def as_model(checkpoint: Checkpoint) -> Model:
    """An installed checkpoint as a model: of its family, if it is of one that this release knows with its rate."""
    spec = named(checkpoint.family or "")
    if spec is not None and spec.is_family:
        for k, point in enumerate(spec.rate_points):
            if point.bpp == checkpoint.bpp:
                mark = checkpoint.fingerprint[:FAMILY_FINGERPRINT_BYTES]
                return Model(checkpoint.name, checkpoint.folder, spec.registry_id, mark, k)
    return Model(checkpoint.name, checkpoint.folder, 0, checkpoint.fingerprint)


def checkpoints(family: ModelSpec) -> tuple[Model, ...]:
    """The installed checkpoints of a family, lowest rate first, and by name where there are several of one rate.

    Raises ModelUnavailable, with what to do, if there is none.
    """
    models = [as_model(checkpoint) for checkpoint in installed(models_folder())]
    found = [model for model in models if model.registry_id == family.registry_id]
    if not found:
        raise ModelUnavailable(f"the model {family.name!r} is not on this machine: {family.get}")
    return tuple(sorted(found, key=lambda model: (model.rate_point or 0, model.name)))


def checkpoint(family: ModelSpec, point: RatePoint) -> Model:
    """The installed checkpoint of a family at one of its rate points; of several, the first by name.

    Raises ModelUnavailable, with what to do, if there is none.
    """
    for model in checkpoints(family):
        if model.rate_point == family.rate_points.index(point):
            return model
    raise ModelUnavailable(f"the model {family.name!r} at {point.bpp} bpp is not on this machine: {family.get}")


def find(model: str | os.PathLike[str]) -> Model:
    """The model of this name (of the registry, or installed), or in this folder.

    Of a family it is the installed checkpoint whose nominal rate is nearest to DEFAULT_BPP.

    Raises ModelUnavailable, with what to do, if it is not on this machine, InvalidModel if its record is damaged, and
    ValueError for what is neither a name nor a path.
    """
    if not isinstance(model, str | os.PathLike):
        raise ValueError(f"model must be a name or a folder, not {model!r:.80}")
    name = model if isinstance(model, str) else ""
    spec = named(name)
    if spec is not None and spec.is_family:
        found = checkpoints(spec)
        points = [spec.rate_points[one.rate_point or 0] for one in found]
        return found[rates.nearest(points)]
    if spec is not None:
        if spec.folder is None or not (Path(spec.folder) / "model_index.json").exists():
            raise ModelUnavailable(f"the model {spec.name!r} is not on this machine: {spec.get}")
        return Model(spec.name, Path(spec.folder), spec.registry_id)
    folder = Path(model)
    for checkpoint in installed(models_folder()):
        if checkpoint.name == name or checkpoint.folder.resolve() == folder.resolve():
            return as_model(checkpoint)
    stored = models_folder() / name
    if name and (stored / RECORD).is_file():
        read_record(stored)  # says what is wrong with it: otherwise it would have been among those installed
    if name and not folder.is_dir() and (stored / "model_index.json").is_file():
        folder = stored  # put there by hand
    if not (folder / "model_index.json").exists():
        names = ", ".join(spec.name for spec in REGISTRY)
        raise ModelUnavailable(
            f"{str(model)!r} is neither a registered model ({names}), nor an installed one (perco models list), "
            f"nor a folder with a model_index.json"
        )
    for spec in REGISTRY:
        if spec.folder and folder.resolve() == Path(spec.folder).resolve():
            return Model(spec.name, Path(spec.folder), spec.registry_id)
    return _remember(Model(folder.name, folder, 0, fingerprint(folder)))


_seen: dict[bytes, Model] = {}


def _remember(model: Model) -> Model:
    _seen[model.fingerprint] = model
    return model


def _recall(mark: bytes) -> Model | None:
    """A model outside of the registry that this process has used, whose fingerprint begins so and is still the same."""
    for model in tuple(_seen.values()):  # other threads may add to them
        if model.fingerprint.startswith(mark) and fingerprint(model.folder) == model.fingerprint:
            return model
    return None


def find_for_file(reference: ModelReference, rate_point: int | None = None) -> Model:
    """The model that a file names.

    A fingerprint is looked for among the folders that this process has used and those in the store.
    rate_point: of the file, which tells the rate of a family's checkpoint that is not installed.
    Raises ModelUnavailable, with what to do.
    """
    mark = reference.fingerprint
    if reference.registry_id:
        spec = registered(reference.registry_id)
        if spec is None:
            raise ModelUnavailable(
                f"the file needs model number {reference.registry_id}, which this release does not know: the file "
                f"was made by a newer release (update pillow-perco), or by a draft before the first one"
            )
        return _find_in_family(spec, mark, rate_point) if spec.is_family else find(spec.name)
    if seen := _recall(mark):
        return seen
    for checkpoint in installed(models_folder()):
        if checkpoint.fingerprint == mark:
            return _remember(Model(checkpoint.name, checkpoint.folder, 0, mark))
    for index in sorted(models_folder().glob("*/model_index.json")):
        if not (index.parent / RECORD).is_file() and fingerprint(index.parent) == mark:
            return _remember(Model(index.parent.name, index.parent, 0, mark))
    raise ModelUnavailable(
        f"the file needs an unregistered model with fingerprint {mark.hex()}: name its folder as the model, "
        f"or install it: perco models import FOLDER"
    )


def _find_in_family(spec: ModelSpec, mark: bytes, rate_point: int | None) -> Model:
    """The checkpoint of a family whose fingerprint begins with `mark`: installed, or a folder that was named before."""
    try:
        found = checkpoints(spec)
    except ModelUnavailable:
        found = ()
    for model in found:
        if model.fingerprint == mark:
            return model
    rate = ""
    if rate_point is not None and rate_point < len(spec.rate_points):
        if seen := _recall(mark):  # its rate is looked at when it is loaded
            return Model(seen.name, seen.folder, spec.registry_id, mark, rate_point)
        rate = f" at {spec.rate_points[rate_point].bpp} bpp"
    needed = f"the file needs {spec.name}{rate} (weights {mark.hex()})"
    others = [model for model in found if rate_point is not None and model.rate_point == rate_point]
    if others:
        names = ", ".join(f"{model.name} (weights {model.fingerprint.hex()})" for model in others)
        raise ModelUnavailable(
            f"{needed}; this rate is installed with other weights, {names}, which would show another picture. "
            f"Get the checkpoint that the file was written with, and run: "
            f"perco models import FOLDER --name ANOTHER-NAME"
        )
    raise ModelUnavailable(f"{needed}, and this rate is not installed: {spec.get}")
