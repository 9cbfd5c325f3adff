"""Samples: how the base and the tuned model continue the beginnings of articles of the test split."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gpt2lora.dataset.documents import Text, split_documents, whole_texts
from gpt2lora.dataset.tokenizer import split_paragraphs
from gpt2lora.evaluation.generation import generate

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 3, 32, 48
TOP_K, SEED = 50, 0  # the defaults of `gpt2lora generate`
CHARACTERS = 4000  # of an article, enough for PROMPT_TOKENS tokens
CANDIDATES = 100  # about as many articles are encoded


@dataclass
class Prompts:
    """Token ids of prompts, (prompts, tokens of a prompt), and how many new tokens follow."""

    ids: list[list[int]]
    new_tokens: int
    prefix: list[int]  # ids that the model reads before each prompt


def choose_prompts(text: Text, tokenizer: "Tokenizer", context: int, prefix: list[int]) -> Prompts:
    """Return the beginnings of the first, the middle and the last article of the test split, all of the same length.

    Prefix, prompt and new tokens fit into `context` tokens. If the text has fewer articles, paragraphs are used.
    """
    texts = split_documents(text)
    if len(texts) < SAMPLES:
        texts = [part for each in whole_texts(text) for part in split_paragraphs(each)]
    texts = texts[:: max(1, len(texts) // CANDIDATES)]
    context -= len(prefix)
    longest = max(1, min(PROMPT_TOKENS, context // 2))
    encoded = (tokenizer.encode(each[:CHARACTERS], add_special_tokens=False).ids[:longest] for each in texts)
    prompts = [ids for ids in encoded if ids]
    length = sorted(map(len, prompts), reverse=True)[:SAMPLES][-1]
    prompts = [ids[:length] for ids in prompts if len(ids) >= length]
    chosen = sorted({round(number * (len(prompts) - 1) / (SAMPLES - 1)) for number in range(SAMPLES)})
    return Prompts([prompts[index] for index in chosen], max(1, min(NEW_TOKENS, context - length)), prefix)


def generate_samples(model: torch.nn.Module, prompts: Prompts, end: int) -> list[list[int]]:
    """Return the token ids that a model generates after each prompt, up to the id `end`; the same at every call."""
    inputs = torch.tensor([prompts.prefix + ids for ids in prompts.ids], device=next(model.parameters()).device)
    torch.manual_seed(SEED)
    sampling = {"do_sample": True, "top_k": TOP_K, "top_p": 1.0, "temperature": 1.0}
    outputs = generate(model, inputs, end, max_new_tokens=prompts.new_tokens, **sampling)
    generated = outputs[:, inputs.shape[1] :].tolist()
    return [ids[: ids.index(end)] if end in ids else ids for ids in generated]
