"""Captions: pictures to one sentence each, while encoding; the only module that knows a caption model.

A captioner is anything that is called with a sequence of pictures in mode RGB and returns as many texts.  Those of this
module name a model and how it runs: making one costs nothing, its weights are loaded with the first caption, shared by
all captioners that name the same, and kept within the memory budget of `devices.cache`.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache as remembered
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .bitstream.chunks import MAX_CAPTION_BYTES
from .devices import best_dtype, cache, usable_device, weights_bytes
from .errors import InvalidModel, ModelUnavailable, NotEnoughMemory, first_line
from .locks import Lock
from .memory import is_out_of_memory
from .model_folder import progress_bars_off
from .options import whole_number
from .pixels import to_rgb

Captioner = Callable[[Sequence[Image.Image]], Sequence[str]]
"""Pictures in mode RGB to one text each, in their order."""

MAX_TOKENS = 32
"""The longest caption of PerCo, in tokens of its captioner (Careil et al., section 4)."""

BLIP2 = "Salesforce/blip2-opt-2.7b-coco"
"""The captioner of PerCo (SD)."""

CHAT_PROMPT = "Describe this picture in one short sentence."

_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


class _Loaded:
    """A caption model in memory, and the processor that goes with it.  size_bytes: memory of the weights."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self.size_bytes = weights_bytes(model)
        self.lock = Lock()


@dataclass(frozen=True)
class _ModelCaptioner(ABC):
    """What the captioners of this module share: a model, and how it runs.

    model: a folder on this machine, or a name on the hub, which transformers fetches once into its own cache (with
        HF_HUB_OFFLINE set, only what is there already is used).  Weights come from safetensors alone, and code from
        transformers alone.
    device: default CUDA or MPS where there is one, else the CPU.  dtype: default what is fast there.
    quantize_8bit: keep the weights in 8 bits, a quarter of float32; needs bitsandbytes and accelerate.
    max_new_tokens: the longest caption, 1 to 32 tokens.
    """

    model: str | os.PathLike[str]
    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    quantize_8bit: bool = False
    max_new_tokens: int = MAX_TOKENS

    def __post_init__(self) -> None:
        whole_number("max_new_tokens", self.max_new_tokens, 1, MAX_TOKENS)

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """One caption for each picture, of any Pillow mode; the same picture gives the same on the same machine.

        Raises ModelUnavailable, with what to do, if the model is not on this machine and cannot be fetched,
        InvalidModel if it cannot be loaded, and NotEnoughMemory.
        """
        if not images:
            return []
        try:
            loaded: _Loaded = cache.get(self._key, self._load)
            with loaded.lock, torch.inference_mode():
                return self._captions(loaded, [to_rgb(image) for image in images])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            less = "" if self.quantize_8bit else "dtype=torch.float16, quantize_8bit=True, "
            raise NotEnoughMemory(
                f"not enough memory for the caption model {str(self.model)!r}: give the caption yourself, take a "
                f'smaller model, or a {type(self).__name__} with {less}or device="cpu"'
            ) from error

    def release(self) -> None:
        """Forgets the weights, of all captioners that share them; the next caption loads them again."""
        cache.drop(self._key)

    @property
    def _device(self) -> torch.device:
        return usable_device(self.device)

    @property
    def _dtype(self) -> torch.dtype:
        if self.dtype is None and self.quantize_8bit:
            return torch.float16  # what bitsandbytes computes in
        return self.dtype or best_dtype(self._device)

    @property
    def _key(self) -> tuple[str, ...]:
        name = str(Path(self.model).resolve()) if Path(self.model).is_dir() else str(self.model)
        return type(self).__name__, name, str(self._device), str(self._dtype), str(self.quantize_8bit)

    @abstractmethod
    def _load(self) -> _Loaded:
        """The weights and the processor.  Raises ModelUnavailable, InvalidModel."""

    @abstractmethod
    def _captions(self, loaded: _Loaded, images: list[Image.Image]) -> list[str]:
        """One caption for each of at least one RGB picture."""

    def _load_as(self, model_class: Any, processor_class: Any) -> _Loaded:
        """The model and its processor, as these classes of transformers.  Raises ModelUnavailable, InvalidModel."""
        options: dict[str, Any] = {
            "dtype": self._dtype, "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True,
        }  # fmt: skip
        if self.quantize_8bit:
            missing = [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]
            if missing:
                raise ModelUnavailable(
                    f"8-bit weights need {' and '.join(missing)}: pip install {' '.join(missing)}, "
                    f"or leave quantize_8bit out"
                )
            from transformers import BitsAndBytesConfig

            options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
            options["device_map"] = {"": self._device}
        processor = _fetch(processor_class.from_pretrained, self.model, trust_remote_code=False)
        model, info = _fetch(model_class.from_pretrained, self.model, **options)
        if info["missing_keys"]:
            some = ", ".join(sorted(info["missing_keys"])[:3])
            raise InvalidModel(f"the weights of the caption model {str(self.model)!r} are incomplete: no {some}")
        return _Loaded((model if self.quantize_8bit else model.to(self._device)).eval(), processor)


@dataclass(frozen=True)
class Blip2Captioner(_ModelCaptioner):
    """Captions by BLIP-2, as PerCo (SD) makes them: greedily, without a prompt, all pictures in one batch.

    The default model is 15 GB in float32, half of that in bfloat16 or float16, a quarter with quantize_8bit.

    Source: Li et al., ICML 2023 (arXiv 2301.12597); Körber et al., arXiv 2409.20255.
    """

    model: str | os.PathLike[str] = BLIP2

    def _load(self) -> _Loaded:
        from transformers import Blip2ForConditionalGeneration, Blip2Processor

        kind = _model_type(str(self.model))
        if kind != "blip-2":
            raise InvalidModel(f"{str(self.model)!r} is of the kind {kind}, not BLIP-2: take PipelineCaptioner for it")
        loaded = self._load_as(Blip2ForConditionalGeneration, Blip2Processor)
        config = loaded.model.config
        if config.image_token_index is None:
            # Older folders do not name the token that stands for the picture.  Its own embedding is never looked at,
            # so that any row which no text uses serves.
            config.image_token_index = loaded.processor.tokenizer.convert_tokens_to_ids("<image>")
            if config.image_token_index >= loaded.model.get_input_embeddings().num_embeddings:
                raise InvalidModel(f"{str(self.model)!r} has no token for pictures: take a newer copy of the model")
        return loaded

    def _captions(self, loaded: _Loaded, images: list[Image.Image]) -> list[str]:
        return _unprompted(loaded, images, self.max_new_tokens)


@dataclass(frozen=True)
class PipelineCaptioner(_ModelCaptioner):
    """Captions by any model of transformers' image-text-to-text pipeline, greedily, line breaks made spaces.

    Models that chat are asked about one picture after another; others take all pictures in one batch.

    prompt: what the model is asked, or, for models that do not chat, the words that its captions continue (they are
        not repeated); None: CHAT_PROMPT for models that chat, nothing for others.
    """

    prompt: str | None = None

    def _load(self) -> _Loaded:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        loaded = self._load_as(AutoModelForImageTextToText, AutoProcessor)
        if not hasattr(loaded.processor, "image_processor"):
            raise InvalidModel(
                f"the caption model {str(self.model)!r} has no processor that takes pictures and text, as those of the "
                "image-text-to-text pipeline have: take another model, or a function from pictures to texts"
            )
        return loaded

    def _captions(self, loaded: _Loaded, images: list[Image.Image]) -> list[str]:
        from transformers import ImageTextToTextPipeline

        if not self.prompt and not getattr(loaded.processor, "chat_template", None):
            return _unprompted(loaded, images, self.max_new_tokens)
        device = None if self.quantize_8bit else loaded.model.device  # 8-bit weights stay where they are
        answer = ImageTextToTextPipeline(model=loaded.model, processor=loaded.processor, device=device)
        options = {
            "return_full_text": False,
            "generate_kwargs": {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1},
        }
        if getattr(loaded.processor, "chat_template", None):
            prompt = CHAT_PROMPT if self.prompt is None else self.prompt
            answers = [answer(text=_question(image, prompt), **options)[0] for image in images]
        else:
            answers = answer(images=images, text=[self.prompt] * len(images), **options)
        return [" ".join(answered["generated_text"].split()) for answered in answers]


def _unprompted(loaded: _Loaded, images: list[Image.Image], max_new_tokens: int) -> list[str]:
    """What a model says of pictures alone, greedily, in one batch."""
    inputs = loaded.processor(images=images, return_tensors="pt").to(loaded.model.device, loaded.model.dtype)
    tokens = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    texts: list[str] = loaded.processor.batch_decode(tokens, skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def _question(image: Image.Image, prompt: str) -> list[dict[str, Any]]:
    """A chat of one turn, about one picture."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}]


def get_captioner(
    captioner: str | os.PathLike[str] | Captioner | None, device: str | torch.device | None = None
) -> Captioner | None:
    """The captioner that is meant: None for None, a callable itself, a model's name or folder as its captioner.

    captioner: "blip2" is PerCo (SD)'s, "tags" the small one of tags.py; any other BLIP-2 model (as its config.json
        says) is run as the former, any other model by transformers' image-text-to-text pipeline.
    device: where a model that is named here runs; default CUDA or MPS where there is one, else the CPU.

    Raises ValueError for anything else, ModelUnavailable and InvalidModel for a model without a readable config.json.
    """
    if captioner is None or callable(captioner):
        return captioner
    if captioner == "blip2":
        return Blip2Captioner(device=device)
    if captioner == "tags":
        from .tags import TagCaptioner

        return TagCaptioner(device)
    if not isinstance(captioner, str | os.PathLike) or not str(captioner):
        raise ValueError(f"captioner must be a model's name or folder, or a function, not {captioner!r}")
    if _model_type(str(captioner)) == "blip-2":
        return Blip2Captioner(captioner, device)
    return PipelineCaptioner(captioner, device)


def choose_captions(
    caption: str | Sequence[str | None] | None,
    captioner: str | os.PathLike[str] | Captioner | None,
    images: Sequence[Image.Image],
    device: torch.device,
) -> list[str]:
    """The caption of each picture: `caption` where it is given, for all or for each, else the captioner's, else "".

    Raises ValueError for captions that are no texts, or not one for each picture, and what get_captioner and
    caption_pictures raise.
    """
    given = [caption] * len(images) if caption is None or isinstance(caption, str) else caption
    if not isinstance(given, Sequence) or not all(text is None or isinstance(text, str) for text in given):
        raise ValueError(f"caption must be a text, or a list of texts, not {caption!r:.80}")
    if len(given) != len(images):
        raise ValueError(f"{len(given)} captions for {len(images)} pictures")
    unsaid = [k for k, text in enumerate(given) if text is None]
    if not unsaid:
        return [text or "" for text in given]
    written = caption_pictures(get_captioner(captioner, device), [images[k] for k in unsaid])
    said = dict(zip(unsaid, written, strict=True))
    return [said.get(k, text) or "" for k, text in enumerate(given)]


def caption_pictures(captioner: Captioner | None, images: Sequence[Image.Image]) -> list[str]:
    """One caption for each picture, of any Pillow mode, in one call of the captioner; without one, "" for each.

    Raises ValueError unless it returns one text for each picture, of at most 4096 bytes of UTF-8.
    """
    if captioner is None or not images:
        return [""] * len(images)
    captions = captioner([to_rgb(image) for image in images])
    if isinstance(captions, str) or not isinstance(captions, Sequence) or len(captions) != len(images):
        raise ValueError(
            f"the captioner must return a list of {len(images)} texts, one a picture, not {captions!r:.80}"
        )
    for caption in captions:
        if not isinstance(caption, str):
            raise ValueError(f"the captioner must return texts, not {caption!r:.80}")
        if len(caption.encode("utf-8", "surrogatepass")) > MAX_CAPTION_BYTES:
            raise ValueError(
                f"the captioner returned a caption of more than {MAX_CAPTION_BYTES} bytes: let it say less, or pass "
                f"caption=... yourself"
            )
    return list(captions)


@remembered
def _model_type(model: str) -> str:
    """The model_type in the config.json of a model's folder or name; remembered, for each look may ask the hub.

    Raises ModelUnavailable, InvalidModel.
    """
    from transformers import PretrainedConfig

    config, _ = _fetch(PretrainedConfig.get_config_dict, model)
    if not isinstance(config.get("model_type"), str):
        raise InvalidModel(f"{model!r} has no config.json that tells the kind of caption model")
    return str(config["model_type"])


def _fetch(load: Callable[..., Any], model: str | os.PathLike[str], **options: Any) -> Any:
    """What `load` (one of transformers' methods) makes of a model's folder or name.

    Raises ModelUnavailable where there is no such thing, InvalidModel where a folder cannot be loaded.
    """
    folder = Path(model)
    if not folder.is_dir() and (isinstance(model, os.PathLike) or not _HUB_NAME.fullmatch(model)):
        raise ModelUnavailable(f"there is no folder {str(model)!r} with a caption model: name one, or a model's name")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    # A folder is there in no time; what is fetched may take long, keeps nobody waiting, and says how far it is.
    with progress_bars_off() if folder.is_dir() else nullcontext():
        try:
            return load(str(model), local_files_only=offline or folder.is_dir(), **options)
        except Exception as error:  # the libraries raise whatever a wrong file leads them to
            reason = first_line(error)
            if folder.is_dir() or not isinstance(error, OSError):
                raise InvalidModel(f"cannot load the caption model {str(model)!r}: {reason}") from error
            raise ModelUnavailable(
                f"the caption model {str(model)!r} is not on this machine and cannot be fetched"
                f"{' while HF_HUB_OFFLINE is set' if offline else ''} ({reason}): download it where there is a network "
                f"(hf download {model}) and name its folder, or pass caption=... yourself"
            ) from error
