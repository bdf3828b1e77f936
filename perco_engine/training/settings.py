"""A training run's settings: one TOML file, read into frozen dataclasses.

    recipe = "perco-sd" | "embedded"      what is trained
    run = "runs/name"                     the run's folder: checkpoints, log, curves, and the model in the end
    [data]        photos                  [captions]    where their captions come from
    [checkpoints] when, and how many      the rest: the recipe's own

Paths are relative to the settings file.  Every key is checked before anything starts, and unknown ones are refused.
"""

import difflib
import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

from annotated_types import Ge, Gt, Interval, MinLen, MultipleOf
from pydantic import Discriminator, TypeAdapter, ValidationError

from ..errors import InvalidSettings
from ..rates import PERCO_SD

Count = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Side = Annotated[int, Ge(88), MultipleOf(8)]
"""Pixels a side of a crop of the embedded model: what SSIM of four scales needs, and whole latents."""

Share = Annotated[float, Interval(ge=0, le=1)]
Name = Annotated[str, MinLen(1)]


@dataclass(frozen=True, kw_only=True)
class Photos:
    """What all sources of photos share.

    workers: processes that read photos beside the one that trains; 0: none.
    """

    workers: Annotated[int, Ge(0)] = 2


@dataclass(frozen=True, kw_only=True)
class Listed(Photos):
    """What sources share whose photos are known by name from the start.

    exclude: a text file with a name a line, of photos that are left out (known to be corrupt, for example).
    held_out: the share of photos, chosen by a hash of their names, that is never trained on.
    in_memory: keep every photo that was read, decoded (3 bytes a pixel).
    """

    exclude: Path | None = None
    held_out: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    in_memory: bool = False


@dataclass(frozen=True, kw_only=True)
class FolderData(Listed):
    """Every picture below a folder.

    manifest: a CSV file with the columns file and split (train or held-out), instead of held_out.
    """

    source: Literal["folder"]
    folder: Path
    manifest: Path | None = None


@dataclass(frozen=True, kw_only=True)
class OpenImagesData(Listed):
    """Open Images V6, by an image list of its site: a CSV file with the column ImageID, or lines train/ID.

    folder: where the pictures lie, as train/ID.jpg or ID.jpg.
    """

    source: Literal["open-images"]
    folder: Path
    image_list: Path


@dataclass(frozen=True, kw_only=True)
class TfdsData(Listed):
    """A data set of tensorflow_datasets, by its random-access data source.

    name: as in "open_images_v4".  image, label: the names of its features; label gives names to photos, default the
        number.
    """

    source: Literal["tfds"]
    name: Name
    split: Name = "train"
    data_dir: Path | None = None
    image: Name = "image"
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class WebdatasetData(Photos):
    """A webdataset: tar shards that hold a picture, and maybe a .txt with its caption, under each name.

    shards: paths or addresses, {000..123} standing for numbers; relative paths are relative to the settings file.
    shuffle: photos that are held in memory, and drawn from, by each process that reads.
    """

    source: Literal["webdataset"]
    shards: Annotated[tuple[Name, ...], MinLen(1)]
    shuffle: Annotated[int, Ge(1)] = 1000


ListedData = Annotated[FolderData | OpenImagesData | TfdsData, Discriminator("source")]
Data = Annotated[FolderData | OpenImagesData | TfdsData | WebdatasetData, Discriminator("source")]


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Where captions come from.

    source: none; sidecar (.txt beside the photo, or in the shard); table (a .csv or .parquet file); captioner (made
        when a photo is first seen, and kept in the run's folder).
    table, name_column, caption_column: the table; its names are paths in the data's folder, or these without suffix.
    captioner: "blip2", or a model's name or folder, as for `perco encode --captioner`.
    A photo without a caption trains without one.
    """

    source: Literal["none", "sidecar", "table", "captioner"] = "sidecar"
    table: Path | None = None
    name_column: Name = "file"
    caption_column: Name = "caption"
    captioner: str = "blip2"


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When the run's state is written, and how many of the newest are kept.  The end of a run always is."""

    every_steps: Count | None = None
    every_minutes: Positive | None = None
    keep: Count = 2


@dataclass(frozen=True, kw_only=True)
class HyperEncoderStart:
    """A fresh hyper-encoder.

    bpp: one of PerCo (SD)'s rates, which gives the grid and the codebook.
    design: elic (published checkpoints) or hific (the first release).  width: channels inside.
    local_features: channels that it gives to the U-Net.  codebook_dim: dimensions of the codebook.
    """

    bpp: float
    design: Literal["elic", "hific"] = "elic"
    width: Annotated[int, Ge(2)] = 192
    local_features: Count = 320
    codebook_dim: Count = 32


@dataclass(frozen=True, kw_only=True)
class Model:
    """What training starts from.

    base: a folder of Stable Diffusion or of a PerCo model, or a repository OWNER/NAME on the hub.
    hyper_encoder: a fresh one; without this table, that of the base, which then is a PerCo model, goes on learning.
    """

    base: Name
    hyper_encoder: HyperEncoderStart | None = None


@dataclass(frozen=True, kw_only=True)
class Learn:
    """What learns, besides the hyper-encoder: never the autoencoder, the text encoder or the captioner.

    scope: all (the whole U-Net), linear (its linear layers and conv_in_extended), lora (low-rank additions to its
        attention layers, merged in the end, and conv_in_extended).
    lora_rank, lora_alpha: of the additions.
    """

    scope: Literal["all", "linear", "lora"] = "all"
    lora_rank: Count = 16
    lora_alpha: Positive = 16.0


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss (Careil et al., section 4; Körber et al.).

    prediction: what the U-Net predicts.
    timestep_grid: draw noise levels from the grid of so many sampling steps (50 in PerCo's paper), not from all.
    min_snr_gamma: weigh noise levels by min(SNR, gamma) (Hang et al., ICCV 2023).
    noise_offset: noise that is the same all over a channel, added to the noise.
    input_perturbation: noise that the U-Net sees and is not asked for (Ning et al., ICML 2023).
    text_dropout: how often the caption is left out, so that guidance works.
    commitment_weight: of the hyper-encoder's commitment loss, which is logged in any case.
    lpips_weight: of LPIPS between the photo and the decoded one-step estimate, for rates above lpips_above_bpp.
    lpips_vgg: a file with torchvision's weights of VGG-16, instead of the copy that torch.hub downloads.
    """

    prediction: Literal["v_prediction", "epsilon"] = "v_prediction"
    timestep_grid: Count | None = None
    min_snr_gamma: Positive | None = None
    noise_offset: NotNegative = 0.0
    input_perturbation: NotNegative = 0.0
    text_dropout: Share = 0.1
    commitment_weight: NotNegative = 0.0
    lpips_weight: NotNegative = 0.1
    lpips_above_bpp: NotNegative = 0.05
    lpips_vgg: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW, its learning rate, and how many photos a step sees.

    steps: optimizer steps of the whole run.
    batch_size: photos of one step, over all processes.  micro_batch_size: photos that one process puts through the
        networks at once; default its whole share.  What is missing is accumulated.
    schedule: of diffusers' get_scheduler.  warmup_steps: over which the rate rises linearly.
    """

    steps: Count
    batch_size: Count
    micro_batch_size: Count | None = None
    kind: Literal["adamw", "adamw-8bit"] = "adamw"
    learning_rate: Positive = 1e-5
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    warmup_steps: Annotated[int, Ge(0)] = 0
    beta1: Share = 0.9
    beta2: Share = 0.999
    epsilon: Positive = 1e-8
    weight_decay: NotNegative = 0.01
    clip: Positive = 1.0


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How it is computed.

    mixed_precision: the dtype of the large products, and of the networks that do not learn.
    gradient_checkpointing: compute activations twice instead of keeping them.
    ema_decay: the model that is written is the moving average of the weights, with this decay; without: the last ones.
    model_dtype: of the weights that were trained, in the model that is written.
    """

    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    ema_decay: Annotated[float, Interval(ge=0, lt=1)] | None = None
    model_dtype: Literal["float32", "float16", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Photos that are encoded and decoded while training, as images and curves in TensorBoard.

    folder: of the photos; without: held-out ones.  photos: how many.  every_steps: how often.
    inference_steps, guidance_scale: of the decoder.
    """

    every_steps: Count = 1000
    photos: Count = 4
    folder: Path | None = None
    inference_steps: Count = 20
    guidance_scale: NotNegative = 3.0


@dataclass(frozen=True, kw_only=True)
class PercoSd:
    """PerCo on a latent diffusion model, as PerCo (SD) trains it.

    resolution: pixels a side of the crops that it is trained on, a multiple of 64.
    log_every: steps whose means make a line of the log.
    """

    recipe: Literal["perco-sd"]
    run: Path
    data: Data
    model: Model
    optimizer: Optimizer
    seed: int = 0
    resolution: Annotated[int, Ge(64)] = 512
    captions: Captions = Captions()
    learn: Learn = Learn()
    objective: Objective = Objective()
    compute: Compute = Compute()
    checkpoints: Checkpoints = Checkpoints(every_steps=500)
    log_every: Count = 1
    validation: Validation | None = None


StageName = Literal["autoencoder", "ladder", "joint", "prior"]
STAGES: tuple[StageName, ...] = get_args(StageName)


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How long a stage of the embedded model's training takes: so many minutes, or so many steps."""

    minutes: Positive | None = None
    steps: Count | None = None
    learning_rate: Positive


@dataclass(frozen=True, kw_only=True)
class StageSettings(Clock):
    """A stage that sees crops of one size.

    batch_size: crops of one step and process.  side: pixels a side of a crop.
    """

    batch_size: Count
    side: Side


@dataclass(frozen=True, kw_only=True)
class JointSettings(Clock):
    """The joint stage.

    crops: for each level, coarse to fine, how many crops a step sees in a process, and pixels a side of one: the
        coarser the codes, the more of a photo they must be seen in.  The last one serves all further levels.
    frozen_codes: leave the ladder as it is: the codes of a photo stay the same.
    """

    crops: Annotated[tuple[tuple[Count, Side], ...], MinLen(1)]
    frozen_codes: bool = False


@dataclass(frozen=True, kw_only=True)
class PriorSettings(Clock):
    """The stage of the prior.

    crops: how many are coded to learn from.  batch_size: of them in one step and process.
    """

    crops: Count = 3000
    batch_size: Count = 8


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """The embedded model, from nothing, in stages.

    stages: which, in their order.
    start: a model folder of the same architecture whose networks each stage begins with, instead of with nothing.
    sample: crops of 256 pixels that the linear maps of the autoencoder are solved on.
    log_every: steps whose means make a line of the log.
    """

    recipe: Literal["embedded"]
    run: Path
    data: ListedData
    seed: int = 0
    stages: Annotated[tuple[StageName, ...], MinLen(1)] = STAGES
    start: Path | None = None
    sample: Count = 600
    mixed_precision: Literal["no", "bf16"] = "bf16"
    autoencoder: StageSettings = StageSettings(minutes=15, batch_size=12, side=160, learning_rate=6e-4)
    ladder: StageSettings = StageSettings(minutes=12, batch_size=24, side=256, learning_rate=6e-4)
    joint: JointSettings = JointSettings(
        minutes=80, crops=((2, 384), (3, 320), (4, 256), (8, 192), (8, 192)), learning_rate=3e-4
    )
    prior: PriorSettings = PriorSettings(minutes=15, learning_rate=3e-3)
    checkpoints: Checkpoints = Checkpoints(every_minutes=4)
    log_every: Count = 20


Settings = PercoSd | Embedded

RECIPES: dict[str, type[Any]] = {"perco-sd": PercoSd, "embedded": Embedded}

S = TypeVar("S")


def read(path: Path) -> Settings:
    """The settings in a TOML file, their relative paths resolved against its folder.

    Raises InvalidSettings, which names every key that is wrong, and says what it may be.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidSettings(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidSettings(f"{path} is not TOML: {error}") from error
    return resolved(parse(table, str(path)), path.resolve().parent)


def parse(table: dict[str, Any], where: str) -> Settings:
    """The settings in a table as tomllib reads it.  where: what messages call it.  Raises InvalidSettings."""
    recipe = table.get("recipe")
    if recipe not in RECIPES:
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
    if settings.captions.source == "table" and settings.captions.table is None:
        yield "captions.table is missing: name the .csv or .parquet file, or take another captions.source"
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
