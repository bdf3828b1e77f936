"""Trains the embedded model from nothing, in four stages, each restartable from its last checkpoint.

    python -m perco_engine.training.embedded autoencoder --photos FOLDER --run FOLDER --minutes 15
    python -m perco_engine.training.embedded ladder      --photos FOLDER --run FOLDER --minutes 12
    python -m perco_engine.training.embedded joint       --photos FOLDER --run FOLDER --minutes 80
    python -m perco_engine.training.embedded export      --run FOLDER --out MODEL
    python -m perco_engine.training.embedded prior       --photos FOLDER --run FOLDER --minutes 15 --start MODEL
    python -m perco_engine.training.embedded export-prior --run FOLDER --out MODEL

autoencoder: principal components, least squares, then L1 + feature distance.
ladder: k-means on what each level has to say, then the error of the latents, in pixels' units.
joint: ladder, decoder and U-Net together, through the decoded picture: L1, squared error, SSIM and feature distance
    of the U-Net's one-step estimate from pure noise, and of the ladder's own; beside it, the error of the latents at
    every level below, and the plain diffusion loss at every noise level, so that more steps stay valid.
prior: what the indices of the finished ladder tell of each other, which makes files smaller and changes no picture.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..models.autoencoder import PatchAutoencoder
from ..models.ladder import HyperLadder
from ..models.perceptual import FeatureDistance
from . import photos
from .prior import export_prior, train_prior
from .stage import Stage, autocast, channels_last

LATENT_CHANNELS = 16

FEATURE_WEIGHTS = (0.5, 0.4, 0.25, 0.2, 0.14)
"""What the feature distance weighs in the loss at each level: most where pixels cannot be right anyway."""

CROPS = ((2, 384), (3, 320), (4, 256), (8, 192), (8, 192))
"""Crops of a batch and their side at each level: the coarser the codes, the more of a photo they must be seen in."""

WALK = (999, 749, 499, 249)
"""The timesteps of decoding in four steps; the first alone is decoding in one."""

M = TypeVar("M", bound=nn.Module)


def similarity(output: Tensor, target: Tensor) -> Tensor:
    """SSIM (Wang et al., 2004), the mean over the full, half, quarter and eighth size of pictures in -1..1.

    A mean, where MS-SSIM is a product of powers: their slope has no bound where a scale has next to no structure left.
    """
    from pytorch_msssim import ssim

    scales = []
    with torch.autocast(output.device.type, enabled=False):  # differences of squares need float32
        for _ in range(4):
            scales.append(ssim(output / 2 + 0.5, target / 2 + 0.5, data_range=1.0))
            output, target = F.avg_pool2d(output, 2), F.avg_pool2d(target, 2)
    return torch.stack(scales).mean()


def picture_loss(
    distance: FeatureDistance, output: Tensor, target: Tensor, weight: float = 0.12
) -> tuple[Tensor, dict[str, Tensor]]:
    """L1 + 2 x squared error + 0.3 x (1 - SSIM of four scales) + weight x feature distance, and the figures by name.

    Pictures in -1..1 of at least 88 pixels a side.
    """
    output = output.float()
    mse, features, ssim = F.mse_loss(output, target), distance(output, target), similarity(output, target)
    loss = F.l1_loss(output, target) + 2 * mse + 0.3 * (1 - ssim) + weight * features
    return loss, {"features": features, "psnr": -10 * torch.log10(mse / 4), "ssim": ssim}


def finished(run: Path, stage: str, name: str, module: M) -> M:
    """Loads the averaged weights of a finished stage into `module`, frozen."""
    state = torch.load(run / f"{stage}.pt", weights_only=True)["averaged"]
    module.load_state_dict({k.removeprefix(name + "."): v for k, v in state.items() if k.startswith(name + ".")})
    return module.requires_grad_(False).eval()


def train_autoencoder(run: Path, pictures: list[Any], minutes: float, side: int, size: int) -> None:
    vae = PatchAutoencoder(LATENT_CHANNELS)
    if not (run / "autoencoder.pt").exists():
        sample = next(photos.batches(pictures, 256, 600, 0))
        vae.fit_analysis(F.unfold(sample, 8, stride=8).transpose(1, 2).reshape(-1, 3, 8, 8))
        with torch.no_grad():
            vae.fit_synthesis(vae.analysis(sample[:300]), sample[:300])
    vae.analysis.requires_grad_(False)
    vae.synthesis.requires_grad_(False)
    distance = channels_last(FeatureDistance())
    stage = Stage(run, "autoencoder", minutes, {"vae": channels_last(vae)}, 6e-4)
    data = photos.batches(pictures, side, size, random.randrange(2**31))
    for _ in stage.steps():
        x = next(data).contiguous(memory_format=torch.channels_last)
        with autocast():
            z = vae.encode(x).latents
            y = vae.decode(z).sample
            loss, figures = picture_loss(distance, y, x)
        spread = (z.float().pow(2).mean((0, 2, 3)) - 1).pow(2).mean()
        stage.update(loss + 0.01 * spread, spread=spread, **figures)
    # The encoder is final from here on: solve the linear decoder once more, for the latents that it really makes.
    vae = finished(run, "autoencoder", "vae", vae)
    sample = next(photos.batches(pictures, 256, 300, 1))
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latents for part in sample.split(50)])
        vae.fit_synthesis(latents, sample)
        torch.save({"vae": vae.state_dict(), "deviation": pixel_deviation(vae)}, run / "autoencoder-final.pt")


def pixel_deviation(vae: PatchAutoencoder) -> Tensor:
    """How much a unit of each latent channel moves the pixels: root mean square of its response, (c, 1, 1)."""
    response = vae.synthesis.weight.detach().float().pow(2).sum((2, 3)).mean(0).sqrt()
    return (response / response.mean()).view(-1, 1, 1)


def load_autoencoder(run: Path) -> tuple[PatchAutoencoder, Tensor]:
    """The autoencoder of the finished first stage, and its `pixel_deviation`."""
    state = torch.load(run / "autoencoder-final.pt", weights_only=True)
    vae = PatchAutoencoder(LATENT_CHANNELS)
    vae.load_state_dict(state["vae"])
    return vae.requires_grad_(False), state["deviation"]


@torch.no_grad()
def cache_latents(vae: PatchAutoencoder, pictures: list[Any], scales: tuple[float, ...]) -> list[Tensor]:
    """The latents of whole photos at several scales, (c, h/8, w/8) fp16 each."""
    cached = []
    for picture in pictures:
        for scale in scales:
            width, height = (round(side * scale) // 8 * 8 for side in picture.size)
            if min(width, height) < 256:
                continue
            x = photos.to_tensor(picture.resize((width, height)))[None]
            with autocast():
                cached.append(vae.encode(x.contiguous(memory_format=torch.channels_last)).latents[0].half())
    return cached


def latent_batch(cached: list[Tensor], side: int, size: int, rng: random.Random) -> Tensor:
    """Random squares (size, c, side, side) of cached latents."""
    crops = []
    for z in rng.choices(cached, k=size):
        top, left = rng.randint(0, z.shape[1] - side), rng.randint(0, z.shape[2] - side)
        crops.append(z[:, top : top + side, left : left + side].float())
    return torch.stack(crops)


def latent_error(estimate: Tensor, latents: Tensor, deviation: Tensor) -> Tensor:
    """Mean squared error of latents, mostly in pixels' units (`pixel_deviation`): these alone would neglect detail."""
    return ((deviation.pow(2) + 0.2) * (estimate.float() - latents).pow(2)).mean()


def mind_codebooks(ladder: HyperLadder, cells: int) -> None:
    """Sets how codebooks follow batches of so many latents: a code with 1/20 of the mean use starts again elsewhere."""
    for rung in ladder.levels:
        codebook = rung.quantizer._codebook
        mean = cells / 4**rung.halvings / codebook.codebook_size
        codebook.threshold_ema_dead_code, codebook.reset_cluster_size, codebook.decay = mean / 20, mean / 2, 0.995


def train_ladder(run: Path, pictures: list[Any], minutes: float) -> None:
    vae, deviation = load_autoencoder(run)
    ladder = HyperLadder(LATENT_CHANNELS)
    for rung in ladder.levels:
        rung.metric.copy_(deviation**0.75)
    mind_codebooks(ladder, 24 * 32 * 32)
    rng = random.Random(random.randrange(2**31))
    if not (run / "latents.pt").exists():
        cached = cache_latents(channels_last(vae).eval(), pictures, (1.0, 0.6))
        torch.save(cached, run / "latents.pt")
    cached = torch.load(run / "latents.pt", weights_only=True)
    if not (run / "ladder.pt").exists():
        with torch.no_grad(), autocast():
            ladder.train().climb(latent_batch(cached, 32, 384, rng), len(ladder.levels) - 1)
    stage = Stage(run, "ladder", minutes, {"ladder": channels_last(ladder)}, 6e-4)
    ladder.train()
    for _ in stage.steps():
        z = latent_batch(cached, 32, 24, rng).contiguous(memory_format=torch.channels_last)
        with autocast():
            estimates, _, commitment = ladder.climb(z, len(ladder.levels) - 1)
        errors = [latent_error(y, z, deviation) for y in estimates]
        named = {f"e{k + 1}": e for k, e in enumerate(errors)}
        stage.update(torch.stack(errors).sum() + 0.5 * commitment, commitment=commitment, **named)


def new_unet() -> nn.Module:
    """The embedded model's U-Net, freshly initialised to add nothing to the ladder's estimate."""
    from ..models.unet import UNet2DConditionModel

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


def new_scheduler() -> Any:
    """DDIM with zero terminal SNR, trailing steps (Lin et al., 2024), and a network that predicts the latents."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="sample",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def train_joint(run: Path, pictures: list[Any], minutes: float, start: Path, frozen_codes: bool) -> None:
    from ..pipeline import PercoPipeline

    earlier = PercoPipeline.from_pretrained(start)
    vae, ladder, unet = (
        module.float().requires_grad_(False) for module in (earlier.vae, earlier.hyper_enc, earlier.unet)
    )
    deviation = pixel_deviation(vae)
    for module in (vae.decoder, unet):
        module.requires_grad_(True)
    ladder.requires_grad_(not frozen_codes)
    mind_codebooks(ladder, 2 * 48**2)
    scheduler = new_scheduler()
    distance = channels_last(FeatureDistance())
    modules: dict[str, nn.Module] = {"vae": vae, "ladder": ladder, "unet": unet}
    stage = Stage(run, "joint", minutes, {k: channels_last(m) for k, m in modules.items()}, 3e-4)
    vae.eval()
    ladder.train(not frozen_codes)
    unet.train()
    seed = random.randrange(2**31)
    data = [photos.batches(pictures, side, size, seed + side) for size, side in CROPS]
    for step in stage.steps():
        level = random.randrange(len(ladder.levels))
        x = next(data[level]).contiguous(memory_format=torch.channels_last)
        with autocast():
            with torch.no_grad():
                z = vae.encode(x).latents.float()
            estimates, _, commitment = ladder.climb(z, level)
            local = ladder.with_level(estimates[-1].float(), level)
            noise = torch.randn_like(z)
            guess = walk(unet, scheduler, noise, local, WALK[: random.choice((1, 1, 1, 1, 2, 3, 4))])
            picture, measured = picture_loss(distance, vae.decode(guess).sample, x, FEATURE_WEIGHTS[level])
        figures = {f"{name}{level + 1}": value for name, value in measured.items()}
        errors = [latent_error(y, z, deviation) for y in estimates]
        figures |= {f"e{k + 1}": e for k, e in enumerate(errors)}
        loss = picture + 0.1 * torch.stack(errors).sum() + 0.2 * commitment
        if step % 4 == 0:
            t = torch.randint(0, WALK[0] + 1, (len(z),))
            with autocast():
                noisy = scheduler.add_noise(z, noise, t)
                denoised = unet(noisy, t, None, local_features=local.detach()).sample
            figures["diffusion"] = latent_error(denoised, z, deviation)
            loss = loss + 0.2 * figures["diffusion"]
        if step % 4 == 2:
            with autocast():
                preview, measured = picture_loss(distance, vae.decode(estimates[-1]).sample, x, FEATURE_WEIGHTS[level])
            figures[f"preview{level + 1}"] = measured["features"]
            loss = loss + preview
        stage.update(loss, commitment=commitment / len(errors), **figures)


def walk(unet: nn.Module, scheduler: Any, noise: Tensor, local: Tensor, timesteps: Sequence[int]) -> Tensor:
    """Latents as DDIM finds them in these timesteps from pure noise, with a gradient through the last one alone."""
    guess = noise
    for k, timestep in enumerate(timesteps):
        t = torch.full((len(noise),), timestep)
        with torch.set_grad_enabled(k == len(timesteps) - 1):
            noisy = scheduler.add_noise(guess, noise, t)  # DDIM's step: the noise that it finds is the first one
            guess = unet(noisy, t, None, local_features=local).sample.float()
    return guess


def export(run: Path, folder: Path) -> None:
    """Writes the averaged weights of the joint stage as a model folder, in fp16 shards."""
    from ..pipeline import PercoPipeline

    vae, ladder, unet = PatchAutoencoder(LATENT_CHANNELS), HyperLadder(LATENT_CHANNELS), new_unet()
    for name, module in (("vae", vae), ("ladder", ladder), ("unet", unet)):
        finished(run, "joint", name, module)
    pipeline = PercoPipeline(
        vae=vae, hyper_enc=ladder, unet=unet, scheduler=new_scheduler(),
        default_num_inference_steps=1, default_guidance_scale=1.0,
    )  # fmt: skip
    pipeline.to(torch.float16).save_pretrained(folder, max_shard_size="14MB")


@click.group()
def main() -> None:
    """Trains the embedded model, a stage at a time."""


def _stage(name: str, minutes: float) -> Any:
    """A subcommand for one stage, with the options that all of them have."""

    def decorate(function: Any) -> Any:
        for option in (
            click.option("--photos", "folder", type=click.Path(path_type=Path, exists=True), required=True),
            click.option("--run", type=click.Path(path_type=Path), required=True, help="Checkpoints and logs."),
            click.option("--minutes", type=float, default=minutes, show_default=True),
            click.option("--limit", type=int, default=None, help="Only so many photos (for a quick try)."),
        ):
            function = option(function)
        return main.command(name)(function)

    return decorate


def _open(folder: Path, run: Path, limit: int | None) -> list[Any]:
    run.mkdir(parents=True, exist_ok=True)
    return photos.load(photos.manifest(folder, "train")[:limit])


@_stage("autoencoder", 15)
def _autoencoder(folder: Path, run: Path, minutes: float, limit: int | None) -> None:
    train_autoencoder(run, _open(folder, run, limit), minutes, side=160, size=12)


@_stage("ladder", 12)
def _ladder(folder: Path, run: Path, minutes: float, limit: int | None) -> None:
    train_ladder(run, _open(folder, run, limit), minutes)


@_stage("joint", 80)
@click.option(
    "--start", type=click.Path(path_type=Path, exists=True), required=True, help="Model folder to go on from."
)
@click.option("--frozen-codes", is_flag=True, help="Leave the ladder as it is: the codes of a photo stay the same.")
def _joint(folder: Path, run: Path, minutes: float, limit: int | None, start: Path, frozen_codes: bool) -> None:
    train_joint(run, _open(folder, run, limit), minutes, start, frozen_codes)


@_stage("prior", 15)
@click.option(
    "--start", type=click.Path(path_type=Path, exists=True), required=True, help="The model folder it is for."
)
@click.option("--crops", default=3000, show_default=True, help="How many crops to learn from.")
def _prior(folder: Path, run: Path, minutes: float, limit: int | None, start: Path, crops: int) -> None:
    train_prior(run, _open(folder, run, limit), minutes, start, crops)


@main.command("export-prior")
@click.option("--run", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", "folder", type=click.Path(path_type=Path, exists=True), required=True)
def _export_prior(run: Path, folder: Path) -> None:
    export_prior(run, folder)


@main.command("export")
@click.option("--run", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", "folder", type=click.Path(path_type=Path), required=True)
def _export(run: Path, folder: Path) -> None:
    export(run, folder)


if __name__ == "__main__":
    main()
