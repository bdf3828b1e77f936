"""The recipe perco-sd: PerCo on a latent diffusion model, from its folder and photos to a model folder."""

from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from ..errors import InvalidSettings
from ..pipeline import PercoPipeline
from ..prompts import embed
from . import begun, lpips, networks
from .captions import Captioned
from .checkpoints import Checkpoints, Progress, check_gradient, found, writing
from .crops import Crop, Crops, collate
from .journal import Journal, Tell
from .objective import PercoObjective, draw
from .photos import short_side_crop
from .processes import accelerated
from .settings import MODEL, Objective, Optimizer, PercoSd, WebdatasetData
from .shards import ShardCrops, open_shards
from .sources import open_source
from .validation import Validation, open_photos

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def train(settings: PercoSd, tell: Tell = print) -> Path:
    """Trains until the steps are done, from the newest checkpoint if there is one; returns the model's folder.

    Raises InvalidSettings, ModelError, TrainingError; see also Checkpoints.after_step.
    """
    folder = settings.run / MODEL
    with accelerated(settings.run, settings.compute.mixed_precision) as accelerator:
        main = accelerator.is_main_process
        say: Tell = tell if main else lambda text: None
        accelerator.gradient_accumulation_steps = accumulation(settings.optimizer, accelerator.num_processes)
        torch.manual_seed(settings.seed)
        base = networks.base_folder(settings.model)
        pipeline = networks.load(base, settings.model.hyper_encoder, settings.objective.prediction)
        mark = {"model.base": networks.frozen_mark(pipeline)} if main else {}
        if found(settings.run / "checkpoints"):
            begun.check(settings.run, mark, since=mark)
        networks.choose_weights(pipeline, settings.learn)
        place(pipeline, settings, accelerator.device)
        objective = new_objective(pipeline, settings, accelerator.device)
        captions = Captioned(settings.captions, settings.run, accelerator.process_index, str(accelerator.device))
        validation = Validation.of(settings, captions) if main else None
        weights = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        say(f"{sum(weight.numel() for weight in weights):,} weights learn, on {accelerator.device}")

        optimizer = new_optimizer(weights, settings.optimizer)
        # Counted in steps of the optimizer, whatever the number of processes: so accelerate does not get to wrap it.
        schedule = get_scheduler(
            settings.optimizer.schedule,
            optimizer,
            num_warmup_steps=settings.optimizer.warmup_steps,
            num_training_steps=settings.optimizer.steps,
        )
        averaged = None
        if settings.compute.ema_decay is not None:
            averaged = EMAModel(weights, settings.compute.ema_decay)
        loader = new_loader(settings, accelerator)
        wrapped, optimizer = accelerator.prepare(objective, optimizer)

        progress = Progress()
        parts = {"unet": pipeline.unet, "hyper_enc": pipeline.hyper_enc, "schedule": schedule}
        parts |= {} if averaged is None else {"averaged": averaged}
        checkpoints = Checkpoints(accelerator, settings.run / "checkpoints", settings.checkpoints, parts, progress)
        if checkpoints.load():
            apply(settings.optimizer, optimizer, schedule)
            say(f"goes on after step {progress.step}")
        elif main:
            begun.keep(settings.run, lasting(settings) | mark)
        if averaged is not None:
            averaged.decay = settings.compute.ema_decay  # a checkpoint has that of before
            averaged.to(accelerator.device)
        journal = Journal(accelerator, settings.run, settings.log_every, say, progress.step)
        objective.train()
        with checkpoints.watching():
            if progress.step < settings.optimizer.steps:
                for batch in batches(loader, accelerator, progress):
                    progress.saw(batch)
                    with accelerator.accumulate(wrapped):
                        loss, figures = wrapped(*inputs(pipeline, captions, settings, batch))
                        accelerator.backward(loss)
                        if accelerator.sync_gradients:
                            norm = accelerator.clip_grad_norm_(weights, settings.optimizer.clip)
                            if accelerator.scaler is None:  # which leaves such steps out by itself
                                check_gradient(norm, progress.step)
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=True)
                    journal.add(figures)
                    if not accelerator.sync_gradients:
                        continue
                    journal.add({"learning_rate": schedule.get_last_lr()[0]})
                    if not accelerator.optimizer_step_was_skipped:
                        schedule.step()
                    if averaged is not None:
                        averaged.step(weights)
                    progress.step += 1
                    journal.after_step(progress.step)
                    if settings.validation and progress.step % settings.validation.every_steps == 0:
                        if validation is not None:
                            validation.run(pipeline, objective, averaged, weights, accelerator, journal, progress.step)
                        accelerator.wait_for_everyone()
                    if progress.step == settings.optimizer.steps:
                        break
                    checkpoints.after_step()
                checkpoints.save()
        journal.skipped(progress.skipped)
        if main:
            if averaged is not None:
                averaged.copy_to(weights)
            networks.merge(pipeline, settings.learn)
            with writing(folder):
                networks.write_model(pipeline, base, folder, getattr(torch, settings.compute.model_dtype))
        accelerator.wait_for_everyone()
    return folder


def check(settings: PercoSd, tell: Tell) -> None:
    """Looks for all that the settings name, before anything large is loaded; tells how many photos have captions.

    Raises InvalidSettings, also where the run was begun with other settings that last.
    """
    now = lasting(settings)
    if found(settings.run / "checkpoints"):
        begun.check(settings.run, now)
    networks.check_base(settings.model)
    if settings.validation is not None:
        open_photos(settings.validation, settings.data)
    optimizer_class(settings.optimizer)
    start = settings.model.hyper_encoder
    if start is not None and wants_lpips(settings.objective, start.bpp):
        lpips.load(settings.objective.lpips_vgg)
    if settings.captions.source == "table":
        captions = Captioned(settings.captions, settings.run)
        if not isinstance(settings.data, WebdatasetData):
            names = open_source(settings.data, "train").names
            tell(f"{captions.count(names)} of {len(names)} photos have a caption in {settings.captions.table}")
    if settings.learn.scope == "lora" and find_spec("peft") is None:
        raise InvalidSettings('learn.scope: "lora" needs the package: pip install peft; or take another scope')


def lasting(settings: PercoSd) -> dict[str, Any]:
    """The settings that hold for the whole of a run.  Raises InvalidSettings where there are no photos."""
    if isinstance(settings.data, WebdatasetData):
        photos = [PurePosixPath(urlsplit(shard).path).name for shard in open_shards(settings.data)]
    else:
        photos = list(open_source(settings.data, "train").names)
    start = settings.model.hyper_encoder
    return {
        "recipe": settings.recipe,
        "model.hyper_encoder": None if start is None else asdict(start),
        "objective.prediction": settings.objective.prediction,
        "learn": asdict(settings.learn),
        "resolution": settings.resolution,
        "seed": settings.seed,
        "data": begun.names_mark(photos),
    }


def wants_lpips(objective: Objective, bpp: float) -> bool:
    """Whether LPIPS is in the loss of a model of this rate."""
    return objective.lpips_weight > 0 and bpp > objective.lpips_above_bpp


def accumulation(optimizer: Optimizer, processes: int) -> int:
    """How many batches of each process make one step.  Raises InvalidSettings where they do not come out even."""
    micro = micro_batch_size(optimizer, processes)
    if optimizer.batch_size % (micro * processes):
        raise InvalidSettings(
            f"optimizer.batch_size ({optimizer.batch_size}) must be a multiple of the {processes} processes"
            f"{f' times optimizer.micro_batch_size ({micro})' if optimizer.micro_batch_size else ''}"
        )
    return optimizer.batch_size // (micro * processes)


def micro_batch_size(optimizer: Optimizer, processes: int) -> int:
    """How many photos one process takes at once."""
    return optimizer.micro_batch_size or max(1, optimizer.batch_size // processes)


def place(pipeline: PercoPipeline, settings: PercoSd, device: torch.device) -> None:
    """Moves the networks to the device: those that do not learn in the dtype of the mixed precision."""
    dtype = DTYPES[settings.compute.mixed_precision]
    for name, network in pipeline.networks.items():
        network.to(device).eval()
        if dtype is not torch.float32 and name not in ("unet", "hyper_enc"):
            with networks.quiet():
                network.to(dtype)
    if hasattr(pipeline.vae, "disable_slicing"):
        pipeline.vae.disable_slicing()  # batches of training are small
    if settings.compute.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()


def new_objective(pipeline: PercoPipeline, settings: PercoSd, device: torch.device) -> PercoObjective:
    """The loss, with LPIPS where the rate and the settings ask for it."""
    decode = distance = None
    if wants_lpips(settings.objective, pipeline.hyper_enc.rate_points[0].bpp):
        distance = lpips.load(settings.objective.lpips_vgg).to(device)
        vae = pipeline.vae

        def decode(latents: Tensor) -> Tensor:
            sample: Tensor = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample
            return sample

    return PercoObjective(
        pipeline.unet, pipeline.hyper_enc, pipeline.scheduler, settings.objective, decode, distance
    )  # fmt: skip


def new_optimizer(weights: list[nn.Parameter], settings: Optimizer) -> torch.optim.Optimizer:
    """AdamW, or its 8-bit version."""
    optimizer: torch.optim.Optimizer = optimizer_class(settings)(
        weights,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    return optimizer


def apply(settings: Optimizer, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> None:
    """Gives an optimizer and a schedule that come from a checkpoint the settings of now."""
    schedule.base_lrs = [settings.learning_rate] * len(optimizer.param_groups)
    for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
        rate = settings.learning_rate * factor(schedule.last_epoch)
        group |= {"lr": rate, "initial_lr": settings.learning_rate, "betas": (settings.beta1, settings.beta2)}
        group |= {"eps": settings.epsilon, "weight_decay": settings.weight_decay}
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def optimizer_class(settings: Optimizer) -> Any:
    """The optimizer's class.  Raises InvalidSettings where the one in 8 bits cannot be had."""
    if settings.kind == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InvalidSettings(
            'optimizer.kind: "adamw-8bit" needs the package: pip install bitsandbytes; or set it to "adamw"'
        ) from error
    return AdamW8bit


def new_loader(settings: PercoSd, accelerator: Any) -> Any:
    """Batches of crops: all that the run takes, in order, or an endless stream of this process' shards."""
    data, processes = settings.data, accelerator.num_processes
    size = micro_batch_size(settings.optimizer, processes)
    options: dict[str, Any] = {
        "batch_size": size, "collate_fn": collate, "num_workers": data.workers, "drop_last": True,
        "pin_memory": accelerator.device.type == "cuda", "persistent_workers": data.workers > 0,
        # Its own, so that whether a run was broken off does not show in torch's random numbers.
        "generator": torch.Generator().manual_seed(settings.seed),
    }  # fmt: skip
    if isinstance(data, WebdatasetData):
        shards = open_shards(data)
        crops = ShardCrops(
            data, shards, short_side_crop, settings.resolution, settings.seed, accelerator.process_index, processes
        )
        return DataLoader(crops, **options)
    source = open_source(data, "train")
    count = settings.optimizer.steps * settings.optimizer.batch_size
    listed = Crops(source, short_side_crop, settings.resolution, settings.seed, count)
    return accelerator.prepare_data_loader(DataLoader(listed, **options))


def batches(loader: Any, accelerator: Any, progress: Progress) -> Iterator[Crop]:
    """The loader's batches, on the device, from where the run stands."""
    done = progress.step * accelerator.gradient_accumulation_steps
    if isinstance(loader.dataset, ShardCrops):
        loader.dataset.resume(done, progress.places)
    elif done:
        loader = accelerator.skip_first_batches(loader, done)
    for batch in loader:
        yield batch | {"pixels": batch["pixels"].to(accelerator.device, non_blocking=True)}


def inputs(pipeline: PercoPipeline, captions: Captioned, settings: PercoSd, batch: Crop) -> tuple[Any, ...]:
    """What the objective takes: latents, text embeddings, draws and pixels of a batch."""
    pixels = batch["pixels"]
    latents = pipeline.encode_latents(pixels).float()
    draws = draw(batch["seed"], latents.shape[1:])
    text = None
    if pipeline.text_encoder is not None:
        told = captions(batch["name"], batch["sidecar"], pixels, batch["key"])
        shown = draws.text.ge(settings.objective.text_dropout).tolist()
        kept = [caption if show else "" for caption, show in zip(told, shown, strict=True)]
        text = embed(pipeline.text_encoder, pipeline.tokenizer, kept, pixels.device).float()
    return latents, text, draws.to(pixels.device), pixels
