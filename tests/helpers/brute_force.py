"""Brute force: every token predicted by itself, in fp64, from as many tokens before it as a protocol gives it."""

import itertools
from pathlib import Path

import numpy as np


def slid(length: int, context: int, stride: int) -> list[int]:
    """For each token of a text but its first: how many tokens the first window that reaches it holds before it.

    Windows of `context` tokens start at every multiple of `stride`, and predict one token beyond their end.
    """
    starts = [
        next(start for start in itertools.count(0, stride) if start + context >= place) for place in range(length)
    ]
    return [place - starts[place] for place in range(1, length)]


def rolled(length: int, context: int) -> list[int]:
    """The same with lm-evaluation-harness's windows: they do not overlap, but the last is filled from before it."""
    before_last = (length - 2) // context * context  # predictions of the windows before the last
    filled = max(0, length - 1 - context)
    return [place - filled if place > before_last else (place - 1) % context + 1 for place in range(1, length)]


def scored(model: Path, texts: list[list[int]], contexts: list[list[int]]) -> tuple[float, np.ndarray]:
    """Return the nats of all tokens but each text's first under the model in a folder, and how many are likelier."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model).double().eval()
    nll, ranks = 0.0, []
    for text, lengths in zip(texts, contexts, strict=True):
        for place, length in enumerate(lengths, start=1):
            with torch.no_grad():
                scores = network(input_ids=torch.tensor([text[place - length : place]])).logits[0, -1].log_softmax(-1)
            nll -= float(scores[text[place]])
            ranks.append(int((scores > scores[text[place]]).sum()))
    return nll, np.array(ranks)
