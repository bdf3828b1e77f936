"""A training run's settings: frozen dataclasses, which one TOML file fills (settings_file.py).

What every recipe has, and the recipe perco-sd; the recipe embedded has embedded_settings.py.

    recipe = "perco-sd" | "embedded"      what is trained
    run = "runs/name"                     the run's folder: checkpoints, log, curves, and the model in the end
    [data]        photos                  [captions]    where their captions come from
    [checkpoints] when, and how many      the rest: the recipe's own

Paths are relative to the file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval, MinLen
from pydantic import AllowInfNan, Discriminator

MODEL = "model"
"""The finished model's folder, in the run's."""

Count = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0), AllowInfNan(False)]
NotNegative = Annotated[float, Ge(0), AllowInfNan(False)]
Share = Annotated[float, Interval(ge=0, le=1)]
Decay = Annotated[float, Interval(ge=0, lt=1)]
Seed = Annotated[int, Interval(ge=0, lt=2**63)]
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

    exclude: a text file with a name a line, of photos that are left out (known to be corrupt, for example): paths in
        the folder, or as an image list has them, or these without suffix, without folders, or without both.
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
    table, name_column, caption_column: the table; its names are paths in the data's folder, or these without suffix,
        without folders, or without both.
    captioner: "blip2", or a model's name or folder, as for `perco encode --captioner`.
    A photo without a caption trains without one.
    """

    source: Literal["none", "sidecar", "table", "captioner"] = "sidecar"
    table: Path | None = None
    name_column: Name = "file"
    caption_column: Name = "caption"
    captioner: str = "blip2"


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
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
    beta1: Decay = 0.9
    beta2: Decay = 0.999
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
class ValidationSettings:
    """Photos that are encoded and decoded while training, as images and curves in TensorBoard.

    folder: of the photos; without: held-out ones.  photos: how many.  every_steps: how often.
    inference_steps, guidance_scale: of the decoder.
    """

    every_steps: Count = 1000
    photos: Count = 4
    folder: Path | None = None
    inference_steps: Annotated[int, Interval(ge=1, le=999)] = 20
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
    seed: Seed = 0
    resolution: Annotated[int, Ge(64)] = 512
    captions: Captions = Captions()
    learn: Learn = Learn()
    objective: Objective = Objective()
    compute: Compute = Compute()
    checkpoints: CheckpointSettings = CheckpointSettings(every_steps=500)
    log_every: Count = 1
    validation: ValidationSettings | None = None
