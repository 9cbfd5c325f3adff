"""What `generate` and `play` read of the base; a prompt as token ids, and whether the model has room for it."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2lora.dataset.tokenizer import end_of_text_id, load_tokenizer, text_prefix
from gpt2lora.pipeline.artifacts import read_json, verify_folder
from gpt2lora.pipeline.cli import StageError
from gpt2lora.pipeline.context import max_context

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULT_NEW = 100  # tokens
SEEDS = 2**32  # more are alike on a CPU


def read_base(base: Path) -> "tuple[dict, Tokenizer, int]":
    """Return config.json of data/base, its tokenizer, and the id that ends a text.

    Unlike in a corpus, the characters <|endoftext|> stand for the token.
    """
    verify_folder(base, "base")
    config = read_json(base / "config.json", "base", "vocab_size")
    tokenizer = load_tokenizer(base, special_tokens=True)
    return config, tokenizer, end_of_text_id(base, config, tokenizer)


def encode_prompt(tokenizer: "Tokenizer", prompt: str, end: int) -> list[int]:
    """Return the ids that a model reads for a prompt: what its tokenizer puts before a text, and the prompt's.

    An empty prompt of a tokenizer that puts nothing before a text is the id `end`: in training, a text follows the end
    of another.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise StageError("the prompt is not UTF-8") from error
    return text_prefix(tokenizer) + tokenizer.encode(prompt, add_special_tokens=False).ids or [end]


def count_room(prompt: int, config: dict) -> int | float:
    """Return how many new tokens the model has positions for after a prompt; refuse a prompt that leaves none."""
    positions = max_context(config) or math.inf
    if prompt >= positions:
        raise StageError(f"{prompt:,} tokens of the prompt, the model has {positions:,} positions: shorten the prompt")
    return positions - prompt


def choose_length(prompt: int, new: int | None, config: dict) -> int:
    """Return how many tokens to generate after a prompt: `new`, or by default DEFAULT_NEW, if there is room for them.

    Raises:
        StageError: there is no room.
    """
    room = count_room(prompt, config)
    if new and new > room:
        raise StageError(f"{prompt:,} tokens of the prompt leave room for at most {room:,} new tokens, not {new:,}")
    return new or min(DEFAULT_NEW, room)
