"""Tokens, and an embedding for each, from texts alone: byte-complete BPE, and principal components of co-occurrence.

Two tokens are alike if they stand in the same lines (positive pointwise mutual information, whose singular vectors are
the embeddings: Levy and Goldberg, NeurIPS 2014).  So that names of classes are alike which look alike, each is also put
into a line with its nearest ones by the weights of a classifier's last layer.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

MAX_TOKENS = 32
"""The longest caption, with its start and end."""

NEIGHBOURS = 8
"""Classes in a line of ones that look alike."""

LABEL_WEIGHT = 50
"""How often a class' name counts as a text, so that its words become tokens of their own."""


def documents(corpus: Path | None) -> list[str]:
    """The lines of a text file, without comments; none without a file."""
    if corpus is None:
        return []
    lines = corpus.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def new_tokenizer(texts: Sequence[str], labels: Sequence[str], size: int) -> Any:
    """CLIP's kind of tokenizer with at most `size` tokens: all bytes, within a word and at its end, merges, two marks.

    Any text can be told in its tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    marks = ("<|startoftext|>", "<|endoftext|>")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    like = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = like.normalizer, like.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator([*texts, *(list(labels) * LABEL_WEIGHT)], trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    vocabulary = list(dict.fromkeys([*base, *("".join(pair) for pair in merges)]))[: size - len(marks)]
    known = set(vocabulary)
    merges = [pair for pair in merges if "".join(pair) in known]
    numbers = {token: number for number, token in enumerate([*vocabulary, *marks])}
    return CLIPTokenizer(vocab=numbers, merges=merges, model_max_length=MAX_TOKENS)


def token_vectors(
    tokenizer: Any, texts: Sequence[str], labels: Sequence[str], classifier: Tensor, width: int
) -> Tensor:
    """An embedding of unit length for each token: (tokens, width); random for those that no line has.

    classifier: (classes, features), the last layer's weights.
    """
    directions = F.normalize(classifier - classifier.mean(0), dim=1)
    near = (directions @ directions.T).topk(NEIGHBOURS).indices.tolist()
    lines = [*texts, *(", ".join(labels[other] for other in others) for others in near), *labels]
    count = len(tokenizer)
    pairs = torch.zeros(count * count)  # 100 MB for 5000 tokens
    for start in range(0, len(lines), 1000):
        found = [
            torch.tensor(sorted(set(ids)))
            for ids in tokenizer(lines[start : start + 1000], add_special_tokens=False, verbose=False)["input_ids"]
        ]
        together = torch.cat([(ids[:, None] * count + ids).flatten() for ids in found])
        pairs += torch.bincount(together, minlength=count * count)
    pairs = pairs.view(count, count).fill_diagonal_(0)
    marginal = pairs.sum(1).clamp(min=1)
    information = (pairs * pairs.sum() / marginal[:, None] / marginal).clamp_(min=1).log_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, values, _ = torch.svd_lowrank(information, width + 16, niter=4)
        vectors = left[:, :width] * values[:width].sqrt()
        unknown = vectors.norm(dim=1) < 1e-6
        vectors[unknown] = torch.randn(int(unknown.sum()), width)
    return F.normalize(vectors, dim=1)
