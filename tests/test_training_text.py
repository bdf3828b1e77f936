"""The stage text: tokens of any text, an empty caption that adds nothing, captions of crops, going on from a model."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from perco_engine import weights
from perco_engine.engine import get_engine
from perco_engine.errors import TrainingError
from perco_engine.model_folder import load_component
from perco_engine.prompts import embed
from perco_engine.tags import labels
from perco_engine.training import text
from perco_engine.training.embedded import new_unet
from perco_engine.training.journal import read_log
from perco_engine.training.train import train
from perco_engine.training.word_vectors import new_tokenizer, token_vectors

ODD = ("Straße, naïve café", "☃ 漢字 🦩", "\x00 \x7f", "e\u0301", "𝔘𝔫𝔦 ﷽ ä", "a'b--c 42")


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return new_tokenizer(["a barn owl sits on a fence"], ["barn owl", "fence", "great grey owl"], 560)


@pytest.mark.parametrize("caption", ODD)
def test_any_text_has_tokens(tokenizer: object, caption: str) -> None:
    from unicodedata import normalize

    ids = tokenizer(caption)["input_ids"]  # type: ignore[operator]
    assert ids[0] == len(tokenizer) - 2 and ids[-1] == len(tokenizer) - 1 and len(tokenizer) - 1 not in ids[1:-1]
    told = tokenizer.decode(ids, skip_special_tokens=True)
    assert told.replace(" ", "") == normalize("NFC", caption).lower().replace(" ", "")


def test_the_same_texts_give_the_same_tokens() -> None:
    """Though many of their merges are of equal count."""
    assert len({new_tokenizer([], labels(), 1000).backend_tokenizer.to_str() for _ in range(3)}) == 1


def test_words_of_the_classes_are_tokens(tokenizer: object) -> None:
    assert tokenizer.tokenize("Great grey owl") == ["great</w>", "grey</w>", "owl</w>"]


def test_words_are_alike_that_look_alike_or_stand_together() -> None:
    names = ["cat", "dog", "car", "bus"]
    looks = torch.tensor([[1.0, 0.9, 0, 0], [0.9, 1, 0, 0], [0, 0, 1, 0.9], [0, 0, 0.9, 1]])
    texts = ["red cat the", "red dog the", "blue car the", "blue bus the", " ", *["the"] * 20]
    tokens = new_tokenizer(texts, names, 560)
    vectors = token_vectors(tokens, texts, names, looks, 4)

    def vector(word: str) -> torch.Tensor:
        return vectors[tokens.convert_tokens_to_ids(f"{word}</w>")]

    assert vector("cat") @ vector("dog") > 0.9 > 0.5 > vector("cat") @ vector("car")
    assert vector("red") @ vector("cat") > 0.5 > 0 > vector("red") @ vector("car")
    assert vector("the").norm() < 0.5
    assert torch.allclose(torch.stack([vector(name).norm() for name in names]), torch.ones(4))
    assert not vectors[tokens.bos_token_id].any()


@torch.no_grad()
def test_the_empty_caption_adds_nothing(tokenizer: object) -> None:
    torch.manual_seed(0)
    unet = new_unet()
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    extended = text.with_text(unet)
    noisy, local = torch.randn(2, 16, 6, 5), torch.randn(2, 17, 6, 5)

    def prediction(net: torch.nn.Module, told: torch.Tensor | None) -> torch.Tensor:
        return net(noisy, 999, told, local_features=local).sample  # type: ignore[no-any-return]

    before = prediction(unet, None)
    vectors = torch.randn(len(tokenizer), text.WIDTH)  # type: ignore[arg-type]
    silence = embed(text.new_text_encoder(tokenizer, vectors), tokenizer, ["", " "], torch.device("cpu"))
    assert torch.equal(prediction(extended, silence), before)
    assert torch.equal(prediction(extended, text.no_caption(extended, 2, torch.device("cpu"))), before)
    assert (prediction(extended, torch.randn(2, 7, text.WIDTH)) - before).abs().max() > 1e-3
    assert text.with_text(extended) is extended and text.no_caption(unet, 2, torch.device("cpu")) is None


@torch.no_grad()
def test_captions_differ_from_the_start(tokenizer: object, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(len(tokenizer), text.WIDTH), dim=1)  # type: ignore[arg-type]
    text.new_text_encoder(tokenizer, vectors).save_pretrained(tmp_path / "text_encoder")
    encoder = load_component(tmp_path, "text_encoder", ["transformers", "CLIPTextModel"], torch.float32)
    added = text.with_text(new_unet()).add_embedding
    told = embed(encoder, tokenizer, ["", "great grey owl", "a fence"], torch.device("cpu"))
    pooled = torch.nn.functional.normalize(added.proj(added.pool(added.norm1(told))), dim=1)
    alike = pooled @ pooled.T
    assert max(alike[0, 1], alike[0, 2], alike[1, 2]) < 0.8


def test_the_embedded_model_is_no_larger_than_it_may_be() -> None:
    folder = weights.find("embedded").folder
    assert 20_000_000 < sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 32_000_000


def test_captions_of_crops() -> None:
    seen = torch.zeros(1000)
    seen[[24, 21, 7, 8, 9]] = torch.tensor([0.9, 0.04, 0.03, 0.02, 0.01])
    drawn = [text.draw_caption(seen, None, random.Random(k)) for k in range(400)]
    assert drawn.count("great grey owl") > 130 and drawn.count("a photo of great grey owl") > 20
    told = [text.draw_caption(seen, "my owl", random.Random(k)) for k in range(400)]
    assert 200 < told.count("my owl") < 280
    for captions in (drawn, [caption for caption in told if caption != "my owl"]):
        tags = {tag for caption in captions for tag in caption.removeprefix("a photo of ").split(", ")}
        assert tags == {"great grey owl", "kite", "cock", "hen", "ostrich"}
    assert len(labels()) == 1000


def decoded(model: Path, photo: Image.Image, caption: str = "") -> Image.Image:
    engine = get_engine(model)
    return engine.decode(engine.encode(photo, caption=caption, seed=1))


def test_the_stage_alone_and_again(tiny_model: Path, photo: Image.Image, tmp_path: Path) -> None:
    """From a model without text, all of whose weights stay; then on from what comes of it, with its tokens."""
    photo.crop((0, 0, 128, 128)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a barn owl")

    def run(name: str, start: Path, stage: str) -> Path:
        crops, once = "crops = [[1, 96]]\nlearning_rate = 1e-2\nsteps = 2", "\nvocabulary = 1000"
        (tmp_path / f"{name}.toml").write_text(
            f'recipe = "embedded"\nrun = "{name}"\nstart = {json.dumps(str(start))}\nstages = ["{stage}"]\n'
            f'log_every = 1\nmixed_precision = "no"\n[data]\nsource = "folder"\nfolder = "."\nworkers = 0\n'
            f"[{stage}]\n{crops}" + (once if stage == "text" else "")
        )
        return train(tmp_path / f"{name}.toml", lambda told: None)

    first = run("first", tiny_model, "text")
    for part in ("vae", "hyper_enc", "unet"):
        before, after = (load_file(next((model / part).glob("*.safetensors"))) for model in (tiny_model, first))
        assert before and all(torch.equal(after[name], value.half()) for name, value in before.items())
        learnt = {name: value for name, value in after.items() if name not in before}
        assert all(name.startswith("add_embedding.") for name in learnt) and bool(learnt) == (part == "unet")
        assert not any(value.any() for name, value in learnt.items() if name.endswith(("bias", "positional_embedding")))
    assert decoded(first, photo, "a barn owl").tobytes() != decoded(first, photo).tobytes()
    second = run("second", first, "text")
    assert (second / "tokenizer" / "tokenizer.json").read_bytes() == (
        first / "tokenizer" / "tokenizer.json"
    ).read_bytes()
    assert [line["step"] for line in read_log(tmp_path / "second" / "text")] == [1, 2]
    third = run("third", second, "joint")
    assert (third / "text_encoder" / "config.json").is_file()
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(third / name)
    with pytest.raises(TrainingError, match="takes captions"):
        run("fourth", third, "joint")
