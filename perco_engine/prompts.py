"""Captions as text embeddings, which are kept: the empty one is needed by every guided picture."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .locks import Lock

KEPT = 64
"""Captions that are kept besides the empty one: about 10 MB of embeddings of Stable Diffusion 2.1 in 16 bits."""


class PromptEmbeddings:
    """Text embeddings by caption; those that were not used for longest go first, the empty caption never.

    text_encoder, tokenizer: CLIP's, whose weights must not change any more.
    """

    def __init__(self, text_encoder: Any, tokenizer: Any) -> None:
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = Lock()

    def __call__(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """Captions to text embeddings (b, tokens, cross_attention_dim); what is over the token limit is cut off.

        device: where the text encoder runs, and where the embeddings are wanted.
        """
        with self._lock:
            for prompt in prompts:
                if prompt not in self._kept:
                    self._kept[prompt] = self._encode(prompt, device)
                self._kept.move_to_end(prompt)
            embeddings = torch.cat([self._kept[prompt].to(device) for prompt in prompts])
            for prompt in [prompt for prompt in self._kept if prompt][:-KEPT]:
                del self._kept[prompt]
        return embeddings

    def _encode(self, prompt: str, device: torch.device) -> Tensor:
        """One caption's embeddings, (1, tokens, dim).  Alone, so that they do not depend on what came along with it."""
        # What is kept must be of use outside of the caller's inference mode too.
        with torch.inference_mode(False):
            return embed(self.text_encoder, self.tokenizer, [prompt], device)


@torch.no_grad()
def embed(text_encoder: Any, tokenizer: Any, prompts: Sequence[str], device: torch.device) -> Tensor:
    """Captions to text embeddings (b, tokens, dim), all in one batch; what is over the token limit is cut off."""
    return embed_with_gradient(text_encoder, tokenizer, prompts, device)


def embed_with_gradient(text_encoder: Any, tokenizer: Any, prompts: Sequence[str], device: torch.device) -> Tensor:
    """What `embed` returns, for a text encoder that learns.

    Stable Diffusion attends to the padding too.  Where the text encoder's configuration has use_attention_mask, the
    padding is hidden from the words, and the embeddings of all that is no word, start and end included, are zero.
    """
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_special_tokens_mask=True,
        return_tensors="pt",
    ).to(device)
    embeddings: Tensor
    if getattr(text_encoder.config, "use_attention_mask", False):
        is_word: Tensor = 1 - tokens.special_tokens_mask
        embeddings = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0] * is_word[..., None]
    else:
        embeddings = text_encoder(tokens.input_ids)[0]
    return embeddings
