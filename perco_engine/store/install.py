"""Installing a model: from a published folder, or from the hub, into the store.

published folder ─> copy, convert, complete ─> check every key and shape ─> colours for previews ─> record ─> rename
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import weights
from ..bitstream.prior import PRIOR_FILE, Prior
from ..errors import InvalidModel, ModelUnavailable
from ..model_files import check_entry, is_null, read_json
from ..model_folder import COMPONENT_CLASSES, DEFAULTS
from ..version import __version__
from . import checkpoint, preview_colours
from .check import REFERENCE_DESIGNS, check_folder, rate_text
from .checkpoint import Checkpoint
from .component_files import BASE_DOCUMENTS, bring, bring_documents, is_document, is_there
from .download import BaseComponent, base_component, download
from .inventory import NAME, hashes, problems, staging

REFERENCE_FAMILY = "perco-sd"
PUBLISHED = (
    "its authors publish a folder for each rate (0.0019, 0.0313 and 0.1250 bpp) on a shared drive, which the README of "
    "https://github.com/Nikolai10/PerCo links to under 'Pre-trained Models'. Download a folder there, unpack it, and "
    "run: perco models import FOLDER"
)
"""Where the checkpoints of REFERENCE_FAMILY come from."""

FROM_BASE = ("vae", "scheduler", "text_encoder", "tokenizer")
"""Components that PerCo (SD) shares with its base model."""


def import_folder(
    source: Path,
    *,
    name: str | None = None,
    family: str = "auto",
    bpp: float | None = None,
    base: str | None = None,
) -> Checkpoint:
    """Installs a model folder, as its authors published it; the folder itself stays as it is.

    name: to install it under; default FAMILY-RATE, or, outside of a family, the folder's.
    family: "auto" is perco-sd for a folder of the reference at one of its rates, and none otherwise; "none".
    bpp: the rate that it is thought to be of; an error where it is not.
    base: a folder or repository that gives what is missing (see download.base_component).

    The same weights under the same name are there already: nothing is done then.

    Raises InvalidModel for a folder that is not a complete model, whose weights do not fit its configurations, that
    is pickled as more than tensors, or of another rate or family than was said; ModelUnavailable where a component is
    missing and cannot be fetched; ValueError for a name that cannot be, or is in use for other weights.
    """
    return _install(source, str(source.absolute()), "", {}, name=name, family=family, bpp=bpp, base=base)


def pull(repository: str, *, revision: str | None = None, name: str | None = None, **options: Any) -> Checkpoint:
    """Downloads a model folder from the hub, at a pinned revision, and installs it; see import_folder for the options.

    Raises also ModelUnavailable, with what to do by hand, where it cannot be downloaded, and for a family that is not
    on the hub: where it is.
    """
    if repository == REFERENCE_FAMILY:
        raise ModelUnavailable(f"{REFERENCE_FAMILY} is not on the hub: {PUBLISHED}")
    if Path(repository).is_dir():
        raise ValueError(f"{repository} is a folder on this machine: perco models import {repository}")
    if weights.named(repository) is not None:
        raise ModelUnavailable(f"{repository!r} is part of this package: there is nothing to fetch")
    found = download(repository, revision)
    default = repository.rsplit("/", 1)[-1]
    return _install(found.folder, repository, found.commit, found.files, name=name, default_name=default, **options)


def _install(
    source: Path,
    origin: str,
    revision: str,
    expected: Mapping[str, str],
    *,
    name: str | None,
    family: str = "auto",
    bpp: float | None = None,
    base: str | None = None,
    default_name: str | None = None,
) -> Checkpoint:
    """Installs the model in the folder `source`.  expected: SHA-256 of files of it, as the hub names them."""
    if name is not None:
        _check_name(name)
    if family not in ("auto", "none") and not ((spec := weights.named(family)) and spec.is_family):
        raise ValueError(f"{family!r} is no family of checkpoints that this release knows: auto, none or perco-sd")
    if not (source / "model_index.json").is_file():
        inner = [path.parent for path in sorted(source.glob("*/model_index.json"))]
        hint = f"; it holds {' and '.join(str(path) for path in inner)}: import that" if inner else ""
        raise InvalidModel(f"{source} has no model_index.json: it is not the folder of a published model{hint}")
    with staging() as folder:
        entries, origins = _gather(source, folder, base, link=bool(revision))
        try:
            components = check_folder(folder, entries)
            if (prior := Prior.load(folder)) is not None:
                prior.check(components["hyper_enc"].rate_points[-1])
        except InvalidModel as error:
            raise InvalidModel(_as_found(str(error), folder, source, origins)) from error
        point = components["hyper_enc"].rate_points[0]
        found_family = _family(family, entries, components["hyper_enc"], source)
        if bpp is not None and not any(abs(bpp - one.bpp) < 5e-5 for one in components["hyper_enc"].rate_points):
            raise InvalidModel(f"{source} is of {point.bpp} bpp, and not of {bpp}")
        fallback = re.sub(r"[^A-Za-z0-9._-]+", "-", default_name or source.resolve().name).strip("-._") or "model"
        chosen = name or (f"{found_family}-{point.bpp:.4f}" if found_family else fallback)
        _check_name(chosen)
        if entries["hyper_enc"][1] in REFERENCE_DESIGNS and entries["vae"][1] == "AutoencoderKL":
            preview_colours.write(folder, entries)
        files = hashes(folder)
        for path, digest in expected.items():
            if files.get(path, digest) != digest:
                raise InvalidModel(f"{path} is not what the hub has: delete {(source / path).resolve()} and pull again")
        new = Checkpoint(
            name=chosen,
            folder=folder,
            family=found_family,
            bpp=point.bpp if found_family else None,
            fingerprint=weights.fingerprint(folder),
            source=origin,
            revision=revision,
            base=", ".join(dict.fromkeys(found.origin for found in origins.values())),
            version=__version__,
            files=files,
        )
        new.write()
        return _register(new)


def _register(new: Checkpoint) -> Checkpoint:
    """Moves a finished folder into the store, at once."""
    target = weights.models_folder() / new.name
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        try:
            old = checkpoint.read(target)
        except InvalidModel:
            old = None
        if old is not None and _but_documents(old.files) == _but_documents(new.files):
            if not problems(old):
                return old
            raise ValueError(
                f"{new.name!r} is installed, and damaged: perco models remove {new.name}, then import again"
            )
        # One that was put there by hand may be the only copy, and the very one that is imported.
        instead = f", or run: perco models remove {new.name}" if (target / checkpoint.RECORD).exists() else ""
        raise ValueError(f"another model is installed as {new.name!r}: choose another --name{instead}")
    new.folder.rename(target)
    return replace(new, folder=target)


def _but_documents(files: Mapping[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if not is_document(name)}


def _as_found(message: str, folder: Path, source: Path, origins: Mapping[str, BaseComponent]) -> str:
    """A message about the copy in `folder`, which is gone when it is read, as one about what was copied."""
    for name, found in origins.items():
        message = message.replace(str(folder / name), str(found.folder / name))
    return message.replace(str(folder), str(source))


def _gather(
    source: Path, folder: Path, base: str | None, *, link: bool
) -> tuple[dict[str, Any], dict[str, BaseComponent]]:
    """Brings all components of a model into `folder`, with its model_index.json, licence and card.

    Returns the entries of the index, [module, class] by component, and where components come from that were missing.
    """
    index = read_json(source / "model_index.json")
    entries = {name: index[name] for name in COMPONENT_CLASSES if not is_null(index.get(name))}
    for name, entry in entries.items():
        check_entry(source, name, entry)
    is_reference = entries.get("hyper_enc", ["", ""])[1] in REFERENCE_DESIGNS
    needed = COMPONENT_CLASSES if is_reference else dict.fromkeys(["vae", "hyper_enc", "unet", "scheduler"]) | entries
    origins: dict[str, BaseComponent] = {}
    for name in needed:
        if name in entries and is_there(source, name):
            bring(source / name, folder / name, name, link=link)
        elif is_reference and name in FROM_BASE:
            found = base_component(name, base)
            bring(found.folder / name, folder / name, name, link=False)
            bring_documents(found.folder, folder / BASE_DOCUMENTS)
            entries[name] = _base_entry(folder, name)
            origins[name] = found
        else:
            raise InvalidModel(
                f"{source} has no {name} with settings and weights, which no base model can give: download it again"
            )
    bring_documents(source, folder)
    if (source / PRIOR_FILE).is_file():
        (folder / PRIOR_FILE).parent.mkdir()
        shutil.copyfile(source / PRIOR_FILE, folder / PRIOR_FILE)
    kept = {key: index[key] for key in ("_class_name", "_diffusers_version", *DEFAULTS) if key in index}
    text = json.dumps(kept | dict(sorted(entries.items())), indent=1)
    (folder / "model_index.json").write_text(text + "\n", encoding="utf-8")
    return entries, origins


def _base_entry(folder: Path, name: str) -> list[str]:
    """The entry of model_index.json for a component of the base model.

    Its scheduler becomes what the reference decodes with: DDIM on the same noise levels, with v-prediction, which not
    all bases are made for.
    """
    if name == "vae":
        return ["diffusers", "AutoencoderKL"]
    if name != "scheduler":
        return ["transformers", "CLIPTextModel" if name == "text_encoder" else "CLIPTokenizer"]
    path = folder / name / "scheduler_config.json"
    fixed = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "clip_sample": False}
    path.write_text(json.dumps(read_json(path) | fixed, indent=1) + "\n", encoding="utf-8")
    return ["diffusers", "DDIMScheduler"]


def _family(family: str, entries: dict[str, Any], hyper_enc: Any, source: Path) -> str | None:
    """The family that a model belongs to, or None."""
    if family == "none" or (family == "auto" and entries["hyper_enc"][1] not in REFERENCE_DESIGNS):
        return None
    spec = weights.named(REFERENCE_FAMILY if family == "auto" else family)
    points = hyper_enc.rate_points
    if spec is not None and len(points) == 1 and points[0] in spec.rate_points:
        return spec.name
    if family == "auto":
        return None
    of = rate_text(points[0]) if len(points) == 1 else "a ladder of several rates"
    known = ", ".join(str(point.bpp) for point in (spec.rate_points if spec else ()))
    raise InvalidModel(f"{source} is of {of}, which is none of the rates of {family} ({known} bpp)")


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"a model's name has letters, digits, '.', '_' and '-', 64 at most; {name!r} has not")
    if weights.named(name) is not None:
        raise ValueError(f"{name!r} is a registered name: choose another --name")
