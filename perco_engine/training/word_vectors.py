"""Tokens, and an embedding for each of how it looks: byte-complete BPE, a classifier's weights, and company in texts.

Names of classes that look alike are alike: their tokens' embeddings sum up to what the last layer of a classifier looks
for.  Other tokens look like those that they stand together with, by positive pointwise mutual information (Levy and
Goldberg, NeurIPS 2014).
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

RIDGE = 0.03
"""Keeps the embeddings of tokens tame that few names have."""

COMMON = 0.05
"""In so many of the texts stand words, such as "a", that look like nothing of their own."""

LABEL_WEIGHT = 50
"""How often a class' name counts as a text, so that its words become tokens of their own."""


def documents(corpus: Path | None) -> list[str]:
    """The lines of a text file, without comments; none without a file."""
    if corpus is None:
        return []
    lines = corpus.read_text(encoding="utf-8-sig").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def new_tokenizer(texts: Sequence[str], labels: Sequence[str], size: int) -> Any:
    """CLIP's kind of tokenizer with at most `size` tokens: all bytes, within a word and at its end, merges, two marks.

    Any text can be told in its tokens.  The same texts give the same tokenizer.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    marks = ("<|startoftext|>", "<|endoftext|>")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [byte + "</w>" for byte in alphabet]
    like = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = like.normalizer, like.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False,
        special_tokens=ends,  # numbers decide between merges of equal count: otherwise these get theirs in any order
    )  # fmt: skip
    learner.train_from_iterator([*texts, *(list(labels) * LABEL_WEIGHT)], trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    vocabulary = list(dict.fromkeys([*alphabet, *ends, *("".join(pair) for pair in merges)]))[: size - len(marks)]
    known = set(vocabulary)
    merges = [pair for pair in merges if "".join(pair) in known]
    numbers = {token: number for number, token in enumerate([*vocabulary, *marks])}
    return CLIPTokenizer(vocab=numbers, merges=merges, model_max_length=MAX_TOKENS)


def token_vectors(
    tokenizer: Any, texts: Sequence[str], labels: Sequence[str], classifier: Tensor, width: int
) -> Tensor:
    """An embedding for each token: (tokens, width), of unit length for those of the classes' names, else at most that.

    classifier: (classes, features), the last layer's weights.
    """
    count = len(tokenizer)
    names = torch.stack([_counts(ids, count) / len(ids) for ids in _tokens(tokenizer, labels)])
    together = torch.zeros(count * count)  # 20 MB for 2300 tokens
    seen = torch.zeros(count)
    for start in range(0, len(texts), 1000):
        lines = _tokens(tokenizer, texts[start : start + 1000])
        found = [torch.tensor(sorted(set(ids)), dtype=torch.long) for ids in lines]
        pairs = torch.cat([(ids[:, None] * count + ids).flatten() for ids in found])
        together += torch.bincount(pairs, minlength=count * count)
        seen += torch.bincount(torch.cat(found), minlength=count)
    together = together.view(count, count).fill_diagonal_(0)
    marginal = together.sum(1).clamp(min=1)
    information = (together * together.sum() / marginal[:, None] / marginal).clamp_(min=1).log_()

    directions = F.normalize(classifier - classifier.mean(0), dim=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, _, components = torch.svd_lowrank(directions, width + 16, niter=6)
    looks = directions @ components[:, :width]
    ridge = names @ names.T + RIDGE * torch.eye(len(names))
    told = ((names.sum(0) > 0) & (seen <= COMMON * max(1, len(texts))))[:, None]
    vectors = F.normalize(names.T @ torch.linalg.solve(ridge, looks), dim=1) * told
    company = information * told.T
    return torch.where(told, vectors, company @ vectors / company.sum(1, keepdim=True).clamp(min=1e-6))


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The numbers of each text's tokens, without start and end."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _counts(ids: Sequence[int], count: int) -> Tensor:
    """How often each of `count` tokens is among these."""
    return torch.bincount(torch.tensor(ids), minlength=count).float()
