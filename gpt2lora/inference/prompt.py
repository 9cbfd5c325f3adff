"""A prompt as token ids, and whether the model has room for it and for what is to follow."""

import math
from typing import TYPE_CHECKING

from gpt2lora.dataset.tokenizer import text_prefix
from gpt2lora.pipeline.cli import StageError
from gpt2lora.pipeline.context import max_context

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def encode_prompt(tokenizer: "Tokenizer", prompt: str, end: int) -> list[int]:
    """Return the ids that a model reads for a prompt: what its tokenizer puts before a text, and the prompt's.

    Unlike in a corpus, the characters <|endoftext|> stand for the token. An empty prompt of a tokenizer that puts
    nothing before a text is the id `end`: in training, a text follows the end of another.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise StageError("the prompt is not UTF-8") from error
    tokenizer.encode_special_tokens = False
    return text_prefix(tokenizer) + tokenizer.encode(prompt, add_special_tokens=False).ids or [end]


def check_length(prompt: int, new: int, config: dict) -> None:
    """Refuse a prompt that together with the new tokens is longer than the model's context."""
    positions = max_context(config) or math.inf
    if prompt + new > positions:
        advice = f"at most {positions - prompt:,} new tokens" if prompt < positions else "shorten the prompt"
        raise StageError(
            f"{prompt:,} tokens of the prompt and {new:,} new ones are {prompt + new:,}, the model has {positions:,} "
            f"positions: {advice}"
        )
