"""Captions, by the real classes of transformers with tiny random weights; nothing is fetched."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import pillow_perco
from perco_engine import get_engine
from perco_engine.captioner import Blip2Captioner, PipelineCaptioner, caption_pictures, get_captioner
from perco_engine.devices import cache
from perco_engine.errors import InvalidModel, ModelUnavailable, NotEnoughMemory
from perco_engine.pipeline import progress_bars_off
from pillow_perco.cli import main

SIDE = 28
WORDS = 60
IMAGE_TOKEN = 64
TINY: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
VISION = {**TINY, "image_size": SIDE, "patch_size": 14}
TEXT = {**TINY, "vocab_size": 72, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
CHAT_TEMPLATE = (
    "{% for turn in messages %}{% for part in turn['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else ' ' + part['text'] }}"
    "{% endfor %}{% endfor %}{{ ' w1' if add_generation_prompt }}"
)


def tokenizer(template: str, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, so that the words of a caption are its tokens."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{k}" for k in range(WORDS))]
    made = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", **special)


def saved(model: Any, processor: Any, words: torch.nn.Embedding, folder: Path) -> Path:
    """Writes the model with random weights under which it never ends a caption by itself, nor says special tokens."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.4)
        words.weight[:4] = 0
        words.weight[4 + WORDS :] = 0
    with progress_bars_off():
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a BLIP-2 with an OPT, of 4 queries and words w0 to w59."""
    config = Blip2Config(
        vision_config=VISION,
        qformer_config={**TINY, "vocab_size": 8, "encoder_hidden_size": 16},
        text_config={
            **TEXT, "model_type": "opt", "bos_token_id": 2, "ffn_dim": 32, "word_embed_proj_dim": 16,
            "max_position_embeddings": 128,
        },
        num_query_tokens=4,
        image_token_index=IMAGE_TOKEN,
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config)
    pictures = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    processor = Blip2Processor(pictures, tokenizer("</s> $A", bos_token="</s>", eos_token="</s>"), num_query_tokens=4)
    return saved(model, processor, model.get_input_embeddings(), tmp_path_factory.mktemp("captioners") / "blip2")


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a captioner that continues a text and does not chat: a BLIP."""
    text = {**TEXT, "sep_token_id": 2, "encoder_hidden_size": 16, "projection_dim": 16}
    config = BlipConfig(text_config=text, vision_config=VISION, projection_dim=16, image_text_hidden_size=16)
    model = BlipForConditionalGeneration(config)
    pictures = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    processor = BlipProcessor(pictures, tokenizer("<s> $A </s>", cls_token="<s>", sep_token="</s>"))
    words = model.text_decoder.get_input_embeddings()
    return saved(model, processor, words, tmp_path_factory.mktemp("captioners") / "blip")


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a captioner that chats: a LLaVA."""
    config = LlavaConfig(
        vision_config={**VISION, "model_type": "clip_vision_model", "projection_dim": 16},
        text_config={**TEXT, "model_type": "llama", "tie_word_embeddings": True},
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    words = tokenizer("<s> $A", bos_token="<s>", eos_token="</s>", additional_special_tokens=["<image>"])
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        words, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE, image_token="<image>",
    )  # fmt: skip
    return saved(model, processor, model.get_input_embeddings(), tmp_path_factory.mktemp("captioners") / "chatting")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Three pictures of unlike sizes and contents, mode RGB."""
    random = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return [Image.fromarray(random), Image.linear_gradient("L").convert("RGB"), Image.new("RGB", (30, 20), "red")]


def copied(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a model folder with other values in its config.json."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def greedy(folder: Path, picture: Image.Image, steps: int) -> str:
    """What a BLIP-2 says word by word: its forward pass alone, on pixels that are made here."""
    small = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255
    small = (small - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    pixels = torch.from_numpy(small.transpose(2, 0, 1)[None]).float()
    with progress_bars_off(), torch.no_grad():
        model = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
        tokens = [IMAGE_TOKEN] * 4 + [2]
        for _ in range(steps):
            tokens.append(int(model(pixels, torch.tensor([tokens])).logits[0, -1].argmax()))
    return " ".join(f"w{token - 4}" for token in tokens[5:])


def test_blip2_says_greedily_what_its_forward_pass_says(blip2: Path, pictures: list[Image.Image]) -> None:
    captions = Blip2Captioner(blip2)(pictures)
    assert captions == [greedy(blip2, picture, 32) for picture in pictures]
    assert len(set(captions)) == 3


def test_a_caption_has_32_tokens_at_most(blip2: Path, pictures: list[Image.Image]) -> None:
    long = Blip2Captioner(blip2)(pictures)
    assert [len(caption.split()) for caption in long] == [32, 32, 32]
    short = Blip2Captioner(blip2, max_new_tokens=5)(pictures)
    assert short == [" ".join(caption.split()[:5]) for caption in long]
    for limit in (0, 33, True, 2.0):
        with pytest.raises(ValueError, match="1 to 32"):
            Blip2Captioner(blip2, max_new_tokens=limit)


def test_batches_say_what_singles_say_and_so_do_other_modes(blip2: Path, pictures: list[Image.Image]) -> None:
    captioner = Blip2Captioner(blip2)
    assert captioner([]) == []
    assert captioner(pictures) == captioner(pictures) == [captioner([picture])[0] for picture in pictures]
    gradient = Image.linear_gradient("L")
    transparent = pictures[1].copy()
    transparent.putalpha(gradient)
    assert captioner([gradient, transparent, gradient.convert("P")]) == [captioner(pictures)[1]] * 3


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed here")
def test_the_processor_does_without_torchvision(blip2: Path) -> None:
    processor = Blip2Captioner(blip2)._load().processor
    assert type(processor.image_processor).__name__ == "BlipImageProcessorPil"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_halves_the_memory(blip2: Path, dtype: torch.dtype, pictures: list[Image.Image]) -> None:
    captioner = Blip2Captioner(blip2, "cpu", dtype)
    assert [len(caption.split()) for caption in captioner(pictures)] == [32, 32, 32]
    assert captioner._load().size_bytes < 0.8 * Blip2Captioner(blip2, "cpu")._load().size_bytes


def test_older_folders_do_not_name_the_token_of_the_picture(
    blip2: Path, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    older = copied(blip2, tmp_path / "older", image_token_index=None)
    assert Blip2Captioner(older)(pictures) == Blip2Captioner(blip2)(pictures)


def test_weights_are_shared_kept_and_released(
    blip2: Path, tiny_model: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.clear()
    captioner = Blip2Captioner(blip2, "cpu")
    assert cache.size_bytes == 0
    captioner(pictures[:1])
    size = cache.size_bytes
    assert size == sum(value.nbytes for value in load_file(blip2 / "model.safetensors").values())
    Blip2Captioner(str(blip2), "cpu", max_new_tokens=3)(pictures[:1])
    assert cache.size_bytes == size
    engine = get_engine(tiny_model, "cpu")
    assert cache.size_bytes == size + engine.size_bytes
    captioner.release()
    assert cache.size_bytes == engine.size_bytes
    monkeypatch.setattr(cache, "budget_bytes", size)
    captioner(pictures[:1])
    assert cache.size_bytes == size


def test_models_that_cannot_be_loaded(
    blip2: Path, blip: Path, tmp_path: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for missing in (tmp_path / "none", str(tmp_path / "none"), "./none", "a/b/c"):
        for look in (get_captioner, lambda model: Blip2Captioner(model)(pictures)):
            with pytest.raises(ModelUnavailable, match="there is no folder"):
                look(missing)
    for captioner in (Blip2Captioner("nobody/none"), PipelineCaptioner("nobody/none"), Blip2Captioner()):
        with pytest.raises(ModelUnavailable, match=r"while HF_HUB_OFFLINE is set .*\(hf download \w+/.* caption="):
            captioner(pictures)
    with pytest.raises(ModelUnavailable, match="hf download nobody/none"):
        get_captioner("nobody/none")
    with pytest.raises(InvalidModel, match=r"no config\.json"):
        get_captioner(tmp_path)
    with pytest.raises(InvalidModel, match="of the kind blip, not BLIP-2"):
        Blip2Captioner(blip)(pictures)
    pickled = copied(blip2, tmp_path / "pickled")
    torch.save({}, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(InvalidModel, match="safetensors"):
        Blip2Captioner(pickled)(pictures)
    partial = copied(blip2, tmp_path / "partial")
    weights = load_file(partial / "model.safetensors")
    del weights["query_tokens"]
    save_file(weights, partial / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidModel, match="incomplete: no query_tokens"):
        Blip2Captioner(partial)(pictures)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed here")
def test_8_bit_weights_need_bitsandbytes(blip2: Path, pictures: list[Image.Image]) -> None:
    with pytest.raises(ModelUnavailable, match="pip install bitsandbytes"):
        Blip2Captioner(blip2, quantize_8bit=True)(pictures)


def test_8_bit_weights(blip2: Path, pictures: list[Image.Image]) -> None:
    """Runs where bitsandbytes is installed; its CPU build does."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    captioner, plain = Blip2Captioner(blip2, "cpu", quantize_8bit=True), Blip2Captioner(blip2, "cpu")
    assert all(captioner(pictures)) and captioner(pictures) == captioner(pictures)
    plain(pictures)
    model, other = (cache.get(one._key, pytest.fail) for one in (captioner, plain))
    assert sum(isinstance(part, bitsandbytes.nn.Linear8bitLt) for part in model.model.modules()) > 10
    assert model.size_bytes < 0.6 * other.size_bytes


def test_a_model_without_a_chat_continues_the_prompt(blip: Path, pictures: list[Image.Image]) -> None:
    captioner = PipelineCaptioner(blip)
    captions = captioner(pictures)
    assert [len(caption.split()) for caption in captions] == [32, 32, 32] and len(set(captions)) > 1
    assert captions == [captioner([picture])[0] for picture in pictures]
    with progress_bars_off():
        model, processor = BlipForConditionalGeneration.from_pretrained(blip), BlipProcessor.from_pretrained(blip)
    alone = model.generate(**processor(images=pictures[0], return_tensors="pt"), max_new_tokens=32)
    assert captions[0] == processor.decode(alone[0], skip_special_tokens=True)  # nothing is continued
    tokens = model.generate(**processor(images=pictures[0], return_tensors="pt", text="w3"), max_new_tokens=6)
    words = processor.decode(tokens[0], skip_special_tokens=True)
    assert words.startswith("w3 ")
    assert PipelineCaptioner(blip, prompt="w3", max_new_tokens=6)(pictures)[0] == words.removeprefix("w3 ")


def test_a_model_that_chats_is_asked(chatting: Path, pictures: list[Image.Image]) -> None:
    captioner = PipelineCaptioner(chatting)
    captions = captioner(pictures)
    assert [len(caption.split()) for caption in captions] == [32, 32, 32] and len(set(captions)) > 1
    assert captions == [captioner([picture])[0] for picture in pictures]
    with progress_bars_off():
        model, processor = (
            LlavaForConditionalGeneration.from_pretrained(chatting),
            LlavaProcessor.from_pretrained(chatting),
        )
    inputs = processor(images=pictures[0], text="<image> w3 w4 w1", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=6)[:, inputs.input_ids.shape[1] :]
    told = PipelineCaptioner(chatting, prompt="w3 w4", max_new_tokens=6)(pictures[:1])
    assert told == processor.batch_decode(tokens) != captions[:1]


def test_which_captioner_is_meant(blip2: Path, blip: Path, chatting: Path) -> None:
    def function(images: Sequence[Image.Image]) -> list[str]:
        return [""] * len(images)

    assert get_captioner(None) is None
    assert get_captioner(function) is function
    assert get_captioner("blip2", "cpu") == Blip2Captioner("Salesforce/blip2-opt-2.7b-coco", "cpu")
    assert get_captioner(str(blip2)) == Blip2Captioner(str(blip2))
    assert get_captioner(blip) == PipelineCaptioner(blip)
    assert get_captioner(chatting, "cpu") == PipelineCaptioner(chatting, "cpu")
    for wrong in (5, "", b"blip2"):
        with pytest.raises(ValueError, match="captioner must be"):
            get_captioner(wrong)


def test_one_call_gives_every_picture_of_a_batch_its_caption(tiny_model: Path, pictures: list[Image.Image]) -> None:
    calls = []

    def sizes(images: Sequence[Image.Image]) -> list[str]:
        calls.append([image.mode for image in images])
        return [f"{image.width} by {image.height}" for image in images]

    engine = get_engine(tiny_model)
    files = engine.encode_batch([*pictures, pictures[0].convert("CMYK")], captioner=sizes)
    assert [engine.codes(data).caption for data in files] == ["50 by 40", "256 by 256", "30 by 20", "50 by 40"]
    assert calls == [["RGB"] * 4]
    assert engine.encode_batch([], captioner=sizes) == [] and len(calls) == 1


def test_a_given_caption_always_wins(tiny_model: Path, photo: Image.Image) -> None:
    def never(images: Sequence[Image.Image]) -> list[str]:
        raise AssertionError("the captioner was run")

    engine = get_engine(tiny_model)
    none = engine.encode(photo)
    assert engine.codes(none).caption == ""
    for captioner in (never, "there/is no such", 5):
        assert engine.codes(engine.encode(photo, caption="an owl", captioner=captioner)).caption == "an owl"
        assert engine.encode(photo, caption="", captioner=captioner) == none
    with pytest.raises(AssertionError, match="was run"):
        engine.encode(photo, captioner=never)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ("a", "a list of 1 texts"),
        (None, "a list of 1 texts"),
        ([], "a list of 1 texts"),
        (["a", "b"], "a list of 1 texts"),
        ([b"a"], "must return texts"),
        ([None], "must return texts"),
        (["ü" * 2049], "more than 4096 bytes"),
    ],
)
def test_what_a_captioner_may_not_return(returned: Any, says: str, photo: Image.Image) -> None:
    with pytest.raises(ValueError, match=says):
        caption_pictures(lambda images: returned, [photo])


def test_captions_may_have_4096_bytes_or_none(photo: Image.Image) -> None:
    assert caption_pictures(None, [photo, photo]) == ["", ""]
    assert caption_pictures(lambda images: ["ü" * 2048], [photo]) == ["ü" * 2048]


def test_the_plugin_and_the_command_line_take_a_captioner(blip2: Path, photo: Image.Image, tmp_path: Path) -> None:
    expected = Blip2Captioner(blip2)([photo])[0]
    photo.save(tmp_path / "photo.png")
    photo.save(tmp_path / "saved.perco", captioner=blip2)
    pillow_perco.save(photo, tmp_path / "owl.perco", captioner=blip2, caption="an owl")
    command = ["encode", str(tmp_path / "photo.png"), str(tmp_path / "encoded.perco"), "--captioner"]
    assert CliRunner().invoke(main, [*command, str(blip2)]).exit_code == 0
    for name, caption in (("saved", expected), ("owl", "an owl"), ("encoded", expected)):
        with Image.open(tmp_path / f"{name}.perco") as image:
            assert image.info["perco"]["caption"] == caption
    with pytest.raises(OSError, match="there is no folder"):
        photo.save(tmp_path / "none.perco", captioner=tmp_path / "none")
    told = CliRunner().invoke(main, [*command, str(tmp_path / "none")])
    assert told.exit_code == 1 and "there is no folder" in told.output


def test_models_without_a_processor_for_both_are_refused(
    blip: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a ViT with a GPT-2, say, transformers makes a tokenizer where the processor should be."""
    monkeypatch.setattr(AutoProcessor, "from_pretrained", AutoTokenizer.from_pretrained)
    captioner = PipelineCaptioner(blip)
    captioner.release()
    with pytest.raises(InvalidModel, match="no processor that takes pictures and text"):
        captioner(pictures[:1])


def test_a_model_that_does_not_fit_in_memory_says_what_takes_less(
    blip: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 320 MiB")

    monkeypatch.setattr(BlipForConditionalGeneration, "generate", generate)
    with pytest.raises(NotEnoughMemory, match=r"give the caption yourself, .* quantize_8bit=True"):
        PipelineCaptioner(blip)(pictures[:1])
