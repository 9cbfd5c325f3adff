"""Brute force: each token is predicted by itself, from as many tokens before it as a protocol gives it."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def sliding_contexts(length: int, context: int, stride: int) -> list[int]:
    """Return for each token of a text except its first how many tokens the first window that reaches it holds before.

    Windows of `context` tokens start at every multiple of `stride`, and predict one token beyond their end.
    """
    starts = [
        next(start for start in itertools.count(0, stride) if start + context >= index) for index in range(length)
    ]
    return [index - starts[index] for index in range(1, length)]


def rolling_contexts(length: int, context: int) -> list[int]:
    """Return the same for the windows of lm-evaluation-harness: they do not overlap, but the last is moved left."""
    before_last = (length - 2) // context * context  # predictions of the windows before the last
    last_start = max(0, length - 1 - context)
    return [index - last_start if index > before_last else (index - 1) % context + 1 for index in range(1, length)]


def score_token(network, context: Sequence[int], target: int) -> tuple[float, int]:
    """Return the negative log-likelihood of one token after `context`, in nats, and how many others are likelier."""
    return score_pairs(network, [(context, target)])[0]


def score_pairs(network, pairs: list[tuple[Sequence[int], int]]) -> list[tuple[float, int]]:
    """Return the same for many tokens. Contexts of one length are a batch, so that nothing is padded or masked."""
    import torch

    scores = {}
    for length in {len(context) for context, _ in pairs}:
        places = [place for place, (context, _) in enumerate(pairs) if len(context) == length]
        with torch.no_grad():
            batch = torch.tensor([pairs[place][0] for place in places])
            rows = network(input_ids=batch, use_cache=False).logits[:, -1].log_softmax(-1)
        for place, row in zip(places, rows, strict=True):
            target = row[pairs[place][1]]
            scores[place] = -float(target), int((row > target).sum())
    return [scores[place] for place in range(len(pairs))]


def score_tokens(network, texts: list[list[int]], contexts: list[Sequence[int]]) -> tuple[float, np.ndarray]:
    """Score all tokens of the texts except their first ones.

    Args:
        contexts: for each text the numbers of tokens from which its tokens are predicted.

    Returns:
        The summed negative log-likelihood, and the rank of each token.
    """
    pairs = [
        (text[index - length : index], text[index])
        for text, lengths in zip(texts, contexts, strict=True)
        for index, length in enumerate(lengths, start=1)
    ]
    scores = score_pairs(network, pairs)
    return sum(nll for nll, _ in scores), np.array([rank for _, rank in scores])


def score_folder(model: Path, texts: list[list[int]], contexts: list[Sequence[int]]) -> tuple[float, np.ndarray]:
    """Score the same tokens in fp64 with the model in a folder."""
    from transformers import AutoModelForCausalLM

    return score_tokens(AutoModelForCausalLM.from_pretrained(model).double().eval(), texts, contexts)
