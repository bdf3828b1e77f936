"""The recipe embedded: trains the embedded model from nothing, in five stages, each restartable.

autoencoder: principal components, least squares, then L1 + feature distance.
ladder: k-means on what each level has to say, then the error of the latents, in pixels' units.
joint: ladder, decoder and U-Net together, through the decoded picture: L1, squared error, SSIM and feature distance
    of the U-Net's one-step estimate from pure noise, and of the ladder's own; beside it, the error of the latents at
    every level below, and the plain diffusion loss at every noise level, so that more steps stay valid.
text: a small text encoder (text.py) and the U-Net, which takes captions from then on; the codes of a photo stay.
prior: what the indices of the finished ladder tell of each other, which makes files smaller and changes no picture.

A stage that is done has written its networks into its folder, and is not run again; what it was begun with must not
have changed since (check_stages).  A further stage is a function here, a name in embedded_settings.StageName, and a
table of its own in embedded_settings.Embedded.
"""

import json
import random
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..errors import InvalidSettings, TrainingError, first_line
from ..files import new_folder
from ..models.autoencoder import PatchAutoencoder
from ..models.ladder import HyperLadder
from ..models.perceptual import FeatureDistance
from ..models.unet import UNet2DConditionModel
from ..picture_files import UNREADABLE
from ..rates import EMBEDDED, LATENT_PX
from ..tensors import to_tensor
from . import begun
from .checkpoints import writing
from .crops import Crops
from .denoising import (
    autoencoder,
    diffusion_error,
    latent_error,
    new_scheduler,
    picture_loss,
    some_timesteps,
    walk,
)
from .embedded_settings import STAGES, Clock, Embedded, StageName
from .journal import Tell
from .networks import quiet
from .photos import random_crop
from .prior import train_prior
from .processes import accelerated
from .settings import MODEL
from .sources import open_source
from .stage import Run, Stage, channels_last
from .text import check_corpus, freeze_text, no_caption, text_parts, train_text

LATENT_CHANNELS = 16

GRIDS = tuple((grid.pixels_per_index, grid.codebook_size) for grid in EMBEDDED[-1].grids)
"""(pixels per index, codebook size) of the ladder's levels."""

RATE_SHARES = (0.0, 0.0, 0.025, 0.025, 0.06, 0.06)
"""What a bit costs in the choice of a code at each level, relative to the variance of the codes."""

PRIOR_WEIGHTS = (0.6, 0.1)
"""What a bit costs at the coarsest levels, where the prior counts it, in squared distance of codes."""


def check(settings: Embedded) -> None:
    """Looks for all that the settings name.  Raises InvalidSettings, also where the run is of another recipe."""
    begun.check(settings.run, {"recipe": settings.recipe})
    open_source(settings.data, "train")
    check_corpus(settings.text.corpus)
    if settings.start is not None and not (settings.start / "model_index.json").is_file():
        raise InvalidSettings(f"start: {settings.start} is no model folder: it has no model_index.json")


def train(settings: Embedded, tell: Tell = print) -> Path:
    """Runs the stages that are not done yet; returns the folder of the model that the last one gives.

    Raises InvalidSettings, ModelError, TrainingError; see also Checkpoints.after_step.
    """
    with accelerated(settings.run, settings.mixed_precision) as accelerator:
        say: Tell = tell if accelerator.is_main_process else lambda text: None
        run = Run(settings, accelerator, open_source(settings.data, "train"), say)
        check_stages(run)
        if accelerator.is_main_process:
            begun.keep(settings.run, {"recipe": settings.recipe})
        for name in settings.stages:
            if run.is_done(name):
                say(f"{name}: is done")
                continue
            say(f"{name}: on {accelerator.device}, {len(run.source.names)} photos")
            if accelerator.is_main_process and run.is_new(name):
                begun.keep(run.folder(name), begun_with(run, name) | asdict(getattr(settings, name)))
            torch.manual_seed(settings.seed)
            TRAIN[name](run)
        if accelerator.is_main_process:
            export(run, settings.run / MODEL)
        accelerator.wait_for_everyone()
    return settings.run / MODEL


def check_stages(run: Run) -> None:
    """Raises InvalidSettings where a stage was begun with other networks or another seed, or done with other settings.

    So are those after a stage that is to be done again.
    """
    again: dict[StageName, str] = {}
    for name in run.settings.stages:
        now = begun_with(run, name, again) | asdict(getattr(run.settings, name))
        if not run.is_done(name):  # it may take another time
            now = {key: value for key, value in now.items() if key not in Clock.__annotations__}
        if told := begun.differing(run.folder(name), now):
            again[name] = f"{name}: {told}"
    if again:
        raise InvalidSettings(
            f"stages were begun with other networks or settings than there are now ({'; '.join(again.values())}): put "
            f"them back, or delete {', '.join(str(run.folder(name)) for name in again)}, to do these stages again"
        )


def begun_with(run: Run, stage: StageName, again: Collection[StageName] = ()) -> dict[str, Any]:
    """Marks of the networks that a stage begins with, and the seed.  again: stages that are to be done once more."""
    start = run.settings.start
    found: dict[str, Any] = {"seed": run.settings.seed, "start": None if start is None else begun.networks_mark(start)}
    for name in STAGES[: STAGES.index(stage)]:
        if name == "text":  # from which no stage takes any
            continue
        if run.is_done(name) and name not in again:
            found[f"networks of {name}"] = begun.networks_mark(run.folder(name) / "finished")
        elif name in run.settings.stages:
            found[f"networks of {name}"] = "yet to be made"
    return found


def sample(run: Run, count: int, seed: int) -> Tensor:
    """Random crops (count, 3, 256, 256) that belong to no step."""
    crops = Crops(run.source, random_crop, 256, seed, count)
    return torch.stack([crops[position]["pixels"] for position in range(count)])


def train_autoencoder(run: Run) -> None:
    vae = run.begun((), "vae", lambda: PatchAutoencoder(LATENT_CHANNELS)).requires_grad_(True)
    if run.is_new("autoencoder") and run.settings.start is None:
        pictures = sample(run, run.settings.sample, 0)
        vae.fit_analysis(F.unfold(pictures, 8, stride=8).transpose(1, 2).reshape(-1, 3, 8, 8))
        with torch.no_grad():
            half = pictures[: run.settings.sample // 2 or 1]
            vae.fit_synthesis(vae.analysis(half), half)
    vae.analysis.requires_grad_(False)
    vae.synthesis.requires_grad_(False)
    distance = FeatureDistance().to(run.accelerator.device)  # before the stage restores random numbers
    stage = Stage(run, "autoencoder", {"vae": channels_last(vae)})
    data = stage.crops(run.settings.autoencoder.batch_size, run.settings.autoencoder.side)
    vae.train()
    for _ in stage.steps():
        x = next(data)
        with run.autocast():
            z = vae.encode(x).latents
            y = vae.decode(z).sample
            loss, figures = picture_loss(distance, y, x)
        spread = (z.float().pow(2).mean((0, 2, 3)) - 1).pow(2).mean()
        stage.update(loss + 0.01 * spread, spread=spread, **figures)
    # The encoder is final from here on: solve the linear decoder once more, for the latents that it really makes.
    vae.load_state_dict(stage.averaged["vae"].state_dict())
    vae.cpu().eval()
    pictures = sample(run, run.settings.sample // 2 or 1, 1)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latents for part in pictures.split(50)])
        vae.fit_synthesis(latents, pictures)
    stage.finish(vae=vae)


@torch.no_grad()
def cache_latents(vae: PatchAutoencoder, run: Run, scales: tuple[float, ...], skipped: dict[str, str]) -> list[Tensor]:
    """The latents of whole photos at several scales, (c, h/8, w/8) fp16 each.  skipped: takes what cannot be read."""
    cached = []
    for picture in readable(run, skipped):
        for scale in scales:
            width, height = (round(side * scale) // LATENT_PX * LATENT_PX for side in picture.size)
            if min(width, height) < run.settings.ladder.side:
                continue
            x = to_tensor([picture.resize((width, height))]).to(run.accelerator.device)
            with run.autocast():
                cached.append(vae.encode(x.contiguous(memory_format=torch.channels_last)).latents[0].half().cpu())
    if not cached:
        raise TrainingError(f"no photo has {run.settings.ladder.side} pixels a side: lower ladder.side")
    return cached


def readable(run: Run, skipped: dict[str, str]) -> Iterator[Image.Image]:
    """Every photo that can be read.  skipped: takes the names of the others, and why."""
    for number, name in enumerate(run.source.names):
        try:
            yield run.source.read(number)
        except UNREADABLE as error:
            skipped[name] = first_line(error)
            run.tell(f"left out: {name} ({skipped[name]})")


def latent_batch(cached: list[Tensor], side: int, size: int, rng: random.Random) -> Tensor:
    """Random squares (size, c, side, side) of cached latents."""
    crops = []
    for z in rng.choices(cached, k=size):
        top, left = rng.randint(0, z.shape[1] - side), rng.randint(0, z.shape[2] - side)
        crops.append(z[:, top : top + side, left : left + side].float())
    return torch.stack(crops)


def mind_codebooks(ladder: HyperLadder, cells: int) -> None:
    """Sets how codebooks follow batches of so many latents: a code with 1/20 of the mean use starts again elsewhere."""
    for rung in ladder.levels:
        codebook = rung.quantizer._codebook
        mean = cells / 4**rung.halvings / codebook.codebook_size
        codebook.threshold_ema_dead_code, codebook.reset_cluster_size, codebook.decay = mean / 20, mean / 2, 0.995


def train_ladder(run: Run) -> None:
    vae, deviation = autoencoder(run, "autoencoder")
    ladder = run.begun((), "hyper_enc", new_ladder).requires_grad_(True)
    fresh = run.is_new("ladder") and run.settings.start is None
    if fresh:
        for rung in ladder.levels:
            rung.metric.copy_(deviation**0.75)
    side, size = run.settings.ladder.side // LATENT_PX, run.settings.ladder.batch_size
    mind_codebooks(ladder, size * run.accelerator.num_processes * side**2)
    skipped: dict[str, str] = {}
    cached = run.kept("ladder", "latents.pt", lambda: cache_latents(channels_last(vae), run, (1.0, 0.6), skipped))
    ladder.to(run.accelerator.device)
    if fresh:
        with torch.no_grad(), run.autocast():
            z = latent_batch(cached, side, 16 * size, run.rng("ladder", -1)).to(run.accelerator.device)
            ladder.train().climb(z, len(ladder.levels) - 1)
        ladder.weigh_rates(RATE_SHARES)
    weights = run.kept("ladder", "rate_weights.pt", lambda: [rung.rate_weight for rung in ladder.levels])
    ladder.set_rate_weights(weights)  # a checkpoint holds tensors alone
    stage = Stage(run, "ladder", {"ladder": channels_last(ladder)})
    stage.progress.skipped |= skipped
    ladder.train()
    for step in stage.steps():
        z = latent_batch(cached, side, size, stage.rng(step)).to(stage.device, memory_format=torch.channels_last)
        with run.autocast():
            estimates, _, commitment = ladder.climb(z, len(ladder.levels) - 1)
        errors = [latent_error(y, z, deviation) for y in estimates]
        named = {f"e{k + 1}": e for k, e in enumerate(errors)}
        stage.update(torch.stack(errors).sum() + 0.5 * commitment, commitment=commitment, **named)
    stage.finish(hyper_enc=stage.averaged["ladder"])


def new_ladder() -> HyperLadder:
    """The embedded model's hyper-encoder, freshly initialised."""
    ladder: HyperLadder = HyperLadder(LATENT_CHANNELS, GRIDS, prior_weights=PRIOR_WEIGHTS)
    return ladder


def new_unet() -> UNet2DConditionModel:
    """The embedded model's U-Net, freshly initialised to add nothing to the ladder's estimate."""
    unet = UNet2DConditionModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 160, 224),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2D",
        local_features_channels=LATENT_CHANNELS + 1,
        add_local_features=True,
    )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet


def train_joint(run: Run) -> None:
    settings = run.settings.joint
    vae, deviation = autoencoder(run, "autoencoder")
    ladder: HyperLadder = run.begun(("ladder",), "hyper_enc").requires_grad_(not settings.frozen_codes)
    unet = run.begun((), "unet", new_unet).requires_grad_(True)
    unet.conv_in.requires_grad_(False)  # kept for its name, and not in use
    vae.decoder.requires_grad_(True)
    size, side = settings.crops[0]
    mind_codebooks(ladder, size * run.accelerator.num_processes * (side // LATENT_PX) ** 2)
    for rung in ladder.levels:
        rung.frozen_codebook = settings.frozen_codebooks
    scheduler = new_scheduler()
    modules: dict[str, nn.Module] = {"vae": vae, "ladder": ladder, "unet": unet}
    freeze_text(run, unet)
    # Made before the stage restores random numbers: making them draws some.
    distances = [FeatureDistance(kind).to(run.accelerator.device) for kind in settings.features]
    stage = Stage(run, "joint", {k: channels_last(m) for k, m in modules.items()})
    vae.eval()
    ladder.train(not settings.frozen_codes)
    unet.train()

    def level_of(step: int) -> int:  # the same in all processes, and when a run goes on
        return settings.draw_level(run.rng("joint", step), len(ladder.levels))

    data = stage.by_level(settings.crops, level_of)
    for step in stage.steps():
        level, distance = level_of(step), distances[step % len(distances)]
        x = next(data)["pixels"]
        with run.autocast():
            with torch.no_grad():
                z = vae.encode(x).latents.float()
            estimates, _, commitment = ladder.climb(z, level)
            local = ladder.with_level(estimates[-1].float(), level)
            noise = torch.randn_like(z)
            text = no_caption(unet, len(x), stage.device)
            guess = walk(unet, scheduler, noise, local, some_timesteps(stage.rng(step)), text)
            weights = settings.feature_weight(level), settings.texture_weight(level)
            picture, measured = picture_loss(distance, vae.decode(guess).sample, x, *weights)
        figures = {f"{name}{level + 1}": value for name, value in measured.items()}
        errors = [latent_error(y, z, deviation) for y in estimates]
        figures |= {f"e{k + 1}": e for k, e in enumerate(errors)}
        loss = picture + 0.1 * torch.stack(errors).sum() + 0.2 * commitment
        if step % 4 == 0:
            with run.autocast():
                figures["diffusion"] = diffusion_error(unet, scheduler, z, noise, local, text, deviation)
            loss = loss + 0.2 * figures["diffusion"]
        if step % 4 == 2:
            with run.autocast():
                preview, measured = picture_loss(distance, vae.decode(estimates[-1]).sample, x, *weights)
            figures[f"preview{level + 1}"] = measured["features"]
            loss = loss + preview
        if step % 8 == 5:  # the decoder alone: what the codes do not say it must still be able to draw
            with run.autocast():
                whole = vae.decode(z).sample.float()
            figures["autoencoder"] = F.mse_loss(whole, x)
            loss = loss + 3 * (F.l1_loss(whole, x) + 4 * figures["autoencoder"])
        stage.update(loss, commitment=commitment / len(errors), **figures)
    averaged = stage.averaged
    stage.finish(vae=averaged["vae"], hyper_enc=averaged["ladder"], unet=averaged["unet"])


def export(run: Run, folder: Path) -> None:
    """Writes what the stages that are done gave as a model folder, in fp16 shards, whole or not at all."""
    from ..pipeline import PercoPipeline

    pipeline = PercoPipeline(
        vae=run.begun(("joint", "autoencoder"), "vae"),
        hyper_enc=run.begun(("joint", "ladder"), "hyper_enc", new_ladder),
        unet=run.begun(("text", "joint"), "unet", new_unet),
        **text_parts(run),
        scheduler=new_scheduler(), default_num_inference_steps=1, default_guidance_scale=1.0,
    )  # fmt: skip
    with quiet():
        pipeline.to(torch.float16)
    with writing(folder), new_folder(folder) as partial:
        pipeline.save_pretrained(partial, max_shard_size="14MB")
        for file in partial.glob("tokenizer/tokenizer.json"):  # 330 KB, most of it spaces
            compact = json.dumps(json.loads(file.read_bytes()), ensure_ascii=False, separators=(",", ":"))
            file.write_text(compact + "\n", encoding="utf-8")
        prior = run.find(("prior",), "prior")
        if prior is not None:
            shutil.copytree(prior, partial / "prior")


TRAIN: dict[StageName, Callable[[Run], None]] = {
    "autoencoder": train_autoencoder,
    "ladder": train_ladder,
    "joint": train_joint,
    "text": train_text,
    "prior": train_prior,
}
"""What a stage's name in the settings does."""
