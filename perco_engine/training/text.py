"""The stage text: a small text encoder, and what brings its embeddings of captions into the U-Net.

The text encoder is CLIP's, tiny: one layer of attention over byte-complete BPE tokens.  Their embeddings are
made of what a classifier looks for and of the company that words keep (word_vectors.py), so that a word which no photo
showed lies near those that some did, and then learn with the rest.
The U-Net adds an attention-pooled caption to the embedding of its timestep (diffusers' addition_embed_type "text").
All else stays as it is, and the empty caption adds exactly nothing: a picture without a caption is what it was.

Captions are those beside the photos, in turn with tags by EfficientNet-Lite0 (tags.py); without one, tags alone.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..errors import InvalidModel, TrainingError
from ..files import new_folder
from ..model_folder import load_component, progress_bars_off
from ..models.ladder import HyperLadder
from ..models.perceptual import FeatureDistance
from ..models.unet import UNet2DConditionModel
from ..prompts import embed_with_gradient
from ..tags import SIDE_PX, labels
from .denoising import autoencoder, diffusion_error, new_scheduler, picture_loss, some_timesteps, walk
from .embedded_settings import TextSettings
from .sources import read_text
from .stage import Run, Stage, channels_last
from .word_vectors import documents, new_tokenizer, token_vectors

WIDTH, HEADS = 24, 4
"""Dimensions of the text embeddings, and heads of every attention to them."""

CLASSES = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}

LIKELY_TAGS = 5
"""A crop's tags are drawn from so many, the most probable ones."""

TOLD = 0.6
"""How often a crop's caption is what is beside its photo, where there is a text: sentences and tags are both learnt."""


def new_text_encoder(tokenizer: Any, vectors: Tensor) -> Any:
    """A text encoder whose tokens have these embeddings (tokens, width), of unit length or less; the rest is random.

    Tokens see no padding, which all captions have in common.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=WIDTH,
        num_hidden_layers=1, num_attention_heads=HEADS, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        use_attention_mask=True,
    )  # fmt: skip
    text_encoder = CLIPTextModel(config)
    text_encoder.get_input_embeddings().weight.data.copy_(0.5 * WIDTH**0.5 * vectors)  # as large as what attention adds
    return text_encoder


def with_text(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A U-Net with the same weights that also takes captions, and at first makes of them whatever comes.

    unet: without text, or with it, which is returned itself.
    """
    if unet.config.addition_embed_type == "text":
        return unet
    added = {"addition_embed_type": "text", "addition_embed_type_num_heads": HEADS, "cross_attention_dim": WIDTH}
    config = {k: v for k, v in unet.config.items() if not k.startswith("_")}  # among them: what to leave at its default
    extended: UNet2DConditionModel = UNet2DConditionModel.from_config(config | added)
    for constant in constants(extended):
        nn.init.zeros_(constant)
    extended.load_state_dict(
        unet.state_dict() | {k: v for k, v in extended.state_dict().items() if k.startswith("add_embedding.")}
    )
    return extended


def constants(unet: UNet2DConditionModel) -> list[nn.Parameter]:
    """What a U-Net adds to every caption, and to the zeros of the empty one.

    While they are zero, the empty caption adds exactly nothing; learnt, they would soon drown all that captions say.
    """
    added = unet.add_embedding
    biases = [value for name, value in added.named_parameters() if name.endswith(".bias")]
    return [added.pool.positional_embedding, *biases]


def text_parts(run: Run) -> dict[str, Any]:
    """The text encoder, in float32, frozen, and its tokenizer, as `Run.find` finds them; {} where there are none.

    Raises TrainingError where they cannot be loaded.
    """
    found = run.find(("text",), "text_encoder")
    return {} if found is None else _load(found.parent)


def _load(folder: Path) -> dict[str, Any]:
    """The parts in a folder, see `text_parts`."""
    try:
        parts = {
            name: load_component(folder, name, ["transformers", kind], torch.float32) for name, kind in CLASSES.items()
        }
    except InvalidModel as error:
        raise TrainingError(str(error)) from error
    parts["text_encoder"].requires_grad_(False)
    return parts


def freeze_text(run: Run, unet: UNet2DConditionModel) -> None:
    """Keeps what captions add to a U-Net as it is: that is this stage's to teach.

    Raises TrainingError where a U-Net takes captions, and there is no text encoder beside it.
    """
    if unet.config.addition_embed_type != "text":
        return
    if not text_parts(run):
        raise TrainingError("the U-Net takes captions, and there is no text_encoder beside it: name another start")
    unet.add_embedding.requires_grad_(False)


def no_caption(unet: UNet2DConditionModel, count: int, device: torch.device) -> Tensor | None:
    """The embeddings (count, 1, width) of empty captions; None for a U-Net without text."""
    if unet.config.addition_embed_type != "text":
        return None
    return torch.zeros(count, 1, unet.config.cross_attention_dim, device=device)


def beginning(run: Run, classifier: FeatureDistance) -> dict[str, Any]:
    """The text encoder and tokenizer to begin with: the start folder's, else fresh ones, the same whenever it goes on.

    Raises InvalidSettings where the corpus cannot be read.
    """
    found = text_parts(run)
    if found:
        return found
    folder = run.folder("text") / "beginning"
    if run.accelerator.is_main_process and not folder.is_dir():
        run.tell("text: makes a text encoder")
        with progress_bars_off(), new_folder(folder) as partial:
            for name, part in fresh(run.settings.text, classifier).items():
                part.save_pretrained(partial / name)
    run.accelerator.wait_for_everyone()
    return _load(folder)


def fresh(settings: TextSettings, classifier: FeatureDistance) -> dict[str, Any]:
    """A new text encoder and its tokenizer, of the words of the classes and of the corpus."""
    texts = documents(settings.corpus)
    tokenizer = new_tokenizer(texts, labels(), settings.vocabulary)
    vectors = token_vectors(tokenizer, texts, labels(), classifier.net._fc.weight.detach().cpu().float(), WIDTH)
    return {"text_encoder": new_text_encoder(tokenizer, vectors), "tokenizer": tokenizer}


def draw_caption(probabilities: Tensor, sidecar: str | None, rng: random.Random) -> str:
    """A crop's caption: what is beside the photo (TOLD), or one to three of its LIKELY_TAGS, in any order.

    probabilities: of the 1000 classes.
    """
    if sidecar and rng.random() < TOLD:
        return sidecar
    values, numbers = (part.tolist() for part in probabilities.topk(LIKELY_TAGS))
    chosen: list[int] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        (drawn,) = rng.choices(range(LIKELY_TAGS), [0 if k in chosen else values[k] + 1e-6 for k in range(LIKELY_TAGS)])
        chosen.append(drawn)
    text = ", ".join(labels()[numbers[k]] for k in chosen)
    return f"a photo of {text}" if rng.random() < 0.2 else text


@torch.no_grad()
def captions_of(
    classifier: FeatureDistance, crops: Tensor, sidecars: Sequence[str | None], rng: random.Random
) -> list[str]:
    """A caption for each crop (b, 3, s, s) in -1..1."""
    small = F.interpolate(crops, (SIDE_PX, SIDE_PX), mode="bilinear", antialias=True)
    seen = classifier.probabilities(small).cpu()
    return [draw_caption(one, sidecar, rng) for one, sidecar in zip(seen, sidecars, strict=True)]


def train_text(run: Run) -> None:
    """Teaches the text encoder, and the U-Net's way in for it, with the losses of the joint stage; all else stays."""
    settings = run.settings.text
    vae, deviation = autoencoder(run, "joint", "autoencoder")
    ladder: HyperLadder = channels_last(run.begun(("joint", "ladder"), "hyper_enc")).to(run.accelerator.device)
    distance = FeatureDistance().to(run.accelerator.device)  # before the stage restores random numbers
    parts = beginning(run, distance)
    tokenizer, text_encoder = parts["tokenizer"], parts["text_encoder"].requires_grad_(True)
    unet = with_text(run.begun(("joint",), "unet")).requires_grad_(False)
    unet.add_embedding.requires_grad_(True)
    for constant in constants(unet):
        constant.requires_grad_(False)
    scheduler = new_scheduler()
    channels_last(vae)
    stage = Stage(run, "text", {"unet": channels_last(unet), "text_encoder": text_encoder})
    text_encoder.train()

    def level_of(step: int) -> int:  # the same in all processes, and when a run goes on
        return settings.draw_level(run.rng("text", step), len(ladder.levels))

    data = stage.by_level(settings.crops, level_of)
    for step in stage.steps():
        level, rng = level_of(step), stage.rng(step)
        batch = next(data)
        x = batch["pixels"]
        captions = captions_of(distance, x, batch["sidecar"], rng)
        with run.autocast():
            with torch.no_grad():
                z = vae.encode(x).latents.float()
                estimates, _, _ = ladder.climb(z, level)
                local = ladder.with_level(estimates[-1].float(), level)
            text = embed_with_gradient(text_encoder, tokenizer, captions, stage.device)
            noise = torch.randn_like(z)
            guess = walk(unet, scheduler, noise, local, some_timesteps(rng), text)
            loss, measured = picture_loss(distance, vae.decode(guess).sample, x, settings.feature_weight(level))
        figures = {f"{name}{level + 1}": value for name, value in measured.items()}
        if step % 4 == 0:
            with run.autocast():
                figures["diffusion"] = diffusion_error(unet, scheduler, z, noise, local, text, deviation)
            loss = loss + 0.2 * figures["diffusion"]
        stage.update(loss, **figures)
    averaged = stage.averaged
    stage.finish(unet=averaged["unet"], text_encoder=averaged["text_encoder"], tokenizer=tokenizer)


def check_corpus(path: Path | None) -> None:
    """Raises InvalidSettings unless there is no corpus, or one that can be read."""
    if path is not None:
        read_text(path, "text.corpus")
