"""Continuations of the test split's own beginnings: what a model writes, beside what the article says."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gpt2lora.dataset import articles
from gpt2lora.dataset.tokenizer import paragraphs

if TYPE_CHECKING:
    from tokenizers import Tokenizer


COUNT, PROMPT, NEW = 3, 32, 48  # samples, tokens of a prompt, new tokens
TOP_K, SEED = 50, 0  # as `python -m stages.generate` draws
CHARACTERS = 4000  # of an article, which hold its first PROMPT tokens
CANDIDATES = 100  # articles, at most about, that are looked at


@dataclass
class Prompts:
    ids: list[list[int]]  # (prompts, tokens of a prompt)
    new: int  # tokens that follow


def choose(text: str, tokenizer: "Tokenizer", context: int) -> Prompts:
    """Return the beginnings of the test split's first, middle and last article, all of the same length.

    They and what follows fit into `context` tokens. Of a text with fewer articles, paragraphs are taken.
    """
    pieces = articles.split(text)
    if len(pieces) < COUNT:
        pieces = paragraphs(text)
    pieces = pieces[:: max(1, len(pieces) // CANDIDATES)]
    most = max(1, min(PROMPT, context // 2))
    encoded = (tokenizer.encode(piece[:CHARACTERS], add_special_tokens=False).ids[:most] for piece in pieces)
    found = [ids for ids in encoded if ids]
    length = sorted(map(len, found), reverse=True)[:COUNT][-1]
    found = [ids[:length] for ids in found if len(ids) >= length]
    chosen = sorted({round(place * (len(found) - 1) / (COUNT - 1)) for place in range(COUNT)})
    return Prompts([found[place] for place in chosen], max(1, min(NEW, context - length)))


def write(model: torch.nn.Module, prompts: Prompts, end: int) -> list[list[int]]:
    """Return the tokens that a model puts behind each prompt, up to the end of the text; the same at every call."""
    inputs = torch.tensor(prompts.ids, device=next(model.parameters()).device)
    torch.manual_seed(SEED)
    found = model.eval().generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        pad_token_id=end,
        eos_token_id=end,
        max_new_tokens=prompts.new,
        do_sample=True,
        top_k=TOP_K,
        top_p=1.0,
        temperature=1.0,
    )
    written = found[:, inputs.shape[1] :].tolist()
    return [ids[: ids.index(end)] if end in ids else ids for ids in written]
