"""A TOML file to a training run's settings: every key is checked before anything starts, unknown ones are refused."""

import difflib
import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from pydantic import TypeAdapter, ValidationError

from ..errors import InvalidSettings
from ..rates import PERCO_SD
from .embedded_settings import STAGES, Clock, Embedded
from .settings import Captions, Model, PercoSd, WebdatasetData

Settings = PercoSd | Embedded

RECIPES: dict[str, type[Any]] = {"perco-sd": PercoSd, "embedded": Embedded}

S = TypeVar("S")


def read(path: Path) -> Settings:
    """The settings in a TOML file, their relative paths resolved against its folder.

    Raises InvalidSettings, which names every key that is wrong, and says what it may be.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InvalidSettings(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidSettings(f"{path} is not TOML: {error}") from error
    return resolved(parse(table, str(path)), path.resolve().parent)


def parse(table: dict[str, Any], where: str) -> Settings:
    """The settings in a table as tomllib reads it.  where: what messages call it.  Raises InvalidSettings."""
    recipe = table.get("recipe")
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise InvalidSettings(f"{where}: recipe must be {' or '.join(map(repr, RECIPES))}, not {recipe!r}")
    try:
        # As JSON, where strict means that "3" is no number, and still a text is a path and an array a tuple.
        text = json.dumps(table, default=str)
        settings: Settings = TypeAdapter(RECIPES[recipe]).validate_json(text, strict=True, extra="forbid")
        problems = list(contradictions(settings))
    except ValidationError as error:
        problems = [problem(found, RECIPES[recipe]) for found in error.errors()]
    if problems:
        raise InvalidSettings("\n  ".join([f"{where} cannot be used:", *problems]))
    return settings


def problem(found: Any, recipe: type[Any]) -> str:
    """One thing that pydantic found wrong: the key, and what to do."""
    location = [str(part) for part in found["loc"]]
    if location[:1] == ["data"] and len(location) > 1:
        del location[1]  # the source, by which pydantic tells the kinds of data apart
    key, message = ".".join(location), found["msg"][0].lower() + found["msg"][1:]
    match found["type"]:
        case "unexpected_keyword_argument":
            known = keys(recipe, found["loc"][:-1])
            near = difflib.get_close_matches(location[-1], known, 1)
            return f"{key} is no setting: {f'did you mean {near[0]}?' if near else 'there are ' + ', '.join(known)}"
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"{key} is missing: give it"
        case "union_tag_not_found" | "union_tag_invalid":
            data = next(field.type for field in fields(recipe) if field.name == "data")
            kinds = [get_args(table.__annotations__["source"])[0] for table in tables(data)]
            return f"{key}.source must be one of {', '.join(kinds)}"
        case _:
            return f"{key}: {message}, not {found['input']!r:.60}"


def tables(kind: Any) -> list[Any]:
    """The dataclasses in a type."""
    return (
        [kind]
        if isinstance(kind, type) and is_dataclass(kind)
        else [table for part in get_args(kind) for table in tables(part)]
    )


def keys(kind: Any, location: Sequence[int | str]) -> list[str]:
    """The settings of the table at a location, as pydantic counts them."""
    for part in location:
        found = tables(kind)
        tagged = [table for table in found if part in get_args(table.__annotations__.get("source"))]
        kind = (tagged or [field.type for table in found for field in fields(table) if field.name == part])[0]
    return [field.name for table in tables(kind) for field in fields(table)]


def contradictions(settings: Settings) -> Iterator[str]:
    """What is wrong with settings each of which is right alone, and what to do."""
    if settings.checkpoints.every_steps is None and settings.checkpoints.every_minutes is None:
        yield "checkpoints: give every_steps or every_minutes"
    if isinstance(settings, Embedded):
        for name in settings.stages:
            clock: Clock = getattr(settings, name)
            if (clock.minutes is None) == (clock.steps is None):
                yield f"{name}: give either minutes or steps"
        order = [name for name in STAGES if name in settings.stages]
        if list(settings.stages) != order:
            yield f"stages must be in their order, each once: {order}"
        return
    optimizer, start = settings.optimizer, settings.model.hyper_encoder
    if settings.resolution % 64:
        yield f"resolution must be a multiple of 64 pixels, not {settings.resolution}"
    if optimizer.micro_batch_size and optimizer.batch_size % optimizer.micro_batch_size:
        yield (
            f"optimizer.batch_size ({optimizer.batch_size}) must be a multiple of optimizer.micro_batch_size "
            f"({optimizer.micro_batch_size})"
        )
    if optimizer.warmup_steps > optimizer.steps:
        yield f"optimizer.warmup_steps must be at most optimizer.steps ({optimizer.steps})"
    if start and start.bpp not in [point.bpp for point in PERCO_SD]:
        yield f"model.hyper_encoder.bpp must be one of {', '.join(str(p.bpp) for p in PERCO_SD)}, not {start.bpp}"
    if start and start.design == "elic" and start.local_features < 2:
        yield "model.hyper_encoder.local_features must be at least 2 in the design elic, not 1"
    if settings.captions.source == "table" and settings.captions.table is None:
        yield "captions.table is missing: name the .csv or .parquet file, or take another captions.source"
    if settings.captions.source != "table" and settings.captions.table is not None:
        yield f'captions.table is of captions.source = "table", and not of "{settings.captions.source}": set that, too'
    if settings.captions.source != "captioner" and settings.captions.captioner != Captions().captioner:
        yield 'captions.captioner is of captions.source = "captioner": set that, too'
    grid = settings.objective.timestep_grid
    if grid is not None and grid > 1000:
        yield f"objective.timestep_grid must be at most 1000, the noise levels that there are, not {grid}"
    if isinstance(settings.data, WebdatasetData) and settings.validation and settings.validation.folder is None:
        yield "validation.folder is missing: a webdataset has no held-out photos, so name a folder of some"


def resolved(settings: S, folder: Path) -> S:
    """The settings with relative paths in them made absolute."""

    def there(text: str) -> str:
        return str(folder / text) if (folder / text).is_dir() else text

    def one(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            value = replace(value, **{field.name: one(getattr(value, field.name)) for field in fields(value)})
        match value:
            case Path():
                return folder / value
            case Model():
                return replace(value, base=there(value.base))
            case Captions():
                return replace(value, captioner=there(value.captioner))
            case WebdatasetData():
                return replace(value, shards=tuple(s if ":" in s else str(folder / s) for s in value.shards))
        return value

    return cast(S, one(settings))


def examples() -> dict[str, str]:
    """The settings files that come with the package: by name, the text."""
    folder = resources.files(__package__) / "recipes"
    found = sorted(file.name for file in folder.iterdir() if file.name.endswith(".toml"))
    return {name.removesuffix(".toml"): (folder / name).read_text(encoding="utf-8") for name in found}
