"""The base model's tokenizer, and texts encoded as token ids, a bounded number of characters at a time."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2lora.dataset.special_tokens import Occurrences, control_tokens, make_control_letters, special_token
from gpt2lora.pipeline.artifacts import require_file
from gpt2lora.pipeline.cli import StageError

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

    from gpt2lora.dataset.blocks import Blocks

# Both bound the memory: what all cores encode at once, and the longest text that is encoded in one piece.
BATCH_CHARACTERS = 1_000_000
PIECE_CHARACTERS = 100_000


def load_tokenizer(base: Path, special_tokens: bool = False) -> "Tokenizer":
    """Load tokenizer.json, without truncation or padding.

    Tokens that were added to a tokenizer, such as <sep>, are encoded as these tokens. Control tokens in a text, such as
    <|endoftext|>, are encoded as plain characters.

    Args:
        special_tokens: encode control tokens in a text as tokens, too.
    """
    from tokenizers import Tokenizer

    file = require_file(base / "tokenizer.json", "base")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise StageError(f"{file} is damaged: {error}: run `dvc repro --force base`") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if special_tokens:
        return tokenizer
    # The characters "<|endoftext|>" in a corpus are text; only `tokenize` puts the token between articles.
    return make_control_letters(tokenizer, control_tokens(base, tokenizer, text_prefix(tokenizer)))


def end_of_text_id(base: Path, config: dict, tokenizer: "Tokenizer") -> int:
    """Return the id that ends a text: eos_token of the tokenizer, else eos_token_id of config.json."""
    token = special_token(base, "eos_token")
    end = tokenizer.token_to_id(token) if token is not None else config.get("eos_token_id")
    if isinstance(end, list) and end:
        end = end[0]
    if not isinstance(end, int) or not 0 <= end < config["vocab_size"]:
        raise StageError(f"{base}: no end-of-text token: expected eos_token in tokenizer_config.json")
    return end


def text_prefix(tokenizer: "Tokenizer") -> list[int]:
    """Return the ids that the tokenizer puts before every text, such as <bos>: [] for GPT-2.

    The post-processor of tokenizer.json is asked by encoding a text. transformers 5 does not read `add_bos_token` of
    tokenizer_config.json where there is a tokenizer.json.
    """
    text = "a"
    if not tokenizer.encode(text, add_special_tokens=False).ids:  # no letter of this alphabet
        tokens = tokenizer.get_vocab(with_added_tokens=False)
        text = next((token for token in tokens if tokenizer.encode(token, add_special_tokens=False).ids), "")
    plain = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.encode(text, add_special_tokens=True).ids
    starts = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
    return whole[: starts[-1]] if starts else []


def encode_articles(
    tokenizer: "Tokenizer",
    lines: Iterable[tuple[bool, str]],
    end: int,
    dtype: type,
    counts: dict[str, int],
    found: Occurrences | None = None,
) -> "Iterator[np.ndarray]":
    """Yield one stream of ids in pieces, (tokens,) each, with the end-of-text id between articles.

    Args:
        lines: lines, each with whether an article starts there.
        counts: "texts" and "tokens" are added to.
        found: the special tokens in the text are added to it.
    """
    import numpy as np

    starts: list[bool] = []  # of the pieces that are being encoded

    def texts() -> Iterator[str]:
        for is_start, text in split_long_articles(tokenizer, lines):
            starts.append(is_start)
            yield text

    for ids in encode_texts(tokenizer, texts(), dtype, found):
        if starts.pop(0):
            if counts["texts"]:
                yield np.array([end], dtype=dtype)
            counts["texts"] += 1
        counts["tokens"] += len(ids)
        yield ids


def split_long_articles(tokenizer: "Tokenizer", lines: Iterable[tuple[bool, str]]) -> Iterator[tuple[bool, str]]:
    """Yield the articles, a long one in several pieces, each with whether an article starts there."""
    is_start, kept, recent, size = True, [], [], 0
    for starts, line in lines:
        if starts:
            yield is_start, "".join(kept + recent)
            is_start, kept, recent, size = True, [], [], 0
        recent.append(line)
        size += len(line)
        if size >= PIECE_CHARACTERS:
            text = "".join(recent)
            if edge := find_cut(tokenizer, text):
                yield is_start, "".join([*kept, text[:edge]])
                is_start, kept = False, []
            kept.append(text[edge:])
            recent, size = [], 0
    if kept or recent:
        yield is_start, "".join(kept + recent)


def find_cut(tokenizer: "Tokenizer", text: str) -> int:
    """Return the last position before white space where cutting the text does not change its tokens, or 0."""
    words = text.rsplit(None, 2)
    edge = len(words[0]) if len(words) == 3 else 0
    around = text[max(0, edge - 100) : edge], text[edge : edge + 100]
    separate = [token for part in around for token in tokenizer.encode(part, add_special_tokens=False).ids]
    return edge if tokenizer.encode("".join(around), add_special_tokens=False).ids == separate else 0


def encode_paragraphs(
    tokenizer: "Tokenizer",
    lines: Iterable[str],
    block_size: int,
    end: int,
    dtype: type,
    counts: dict[str, int],
    prefix: Sequence[int],
    found: Occurrences | None = None,
) -> "Iterator[Blocks]":
    """Yield blocks of one paragraph each, between the prefix and the end-of-text id, 1,000 at a time.

    Args:
        counts: "texts" and "tokens" are added to, and "cut_tokens", those that their block has no room for.
        found: the special tokens in the text are added to it.
    """
    import numpy as np

    from gpt2lora.dataset import blocks

    encoded = encode_texts(tokenizer, (text for line in lines for text in split_paragraphs(line)), dtype, found)
    room = block_size + 1 - len(prefix)
    while texts := [np.append(ids, dtype(end)) for ids in itertools.islice(encoded, 1000)]:
        counts["texts"] += len(texts)
        counts["tokens"] += sum(map(len, texts))
        counts["cut_tokens"] += sum(max(0, len(text) - room) for text in texts)
        yield blocks.pad_texts(texts, block_size, end, prefix)


def encode_texts(
    tokenizer: "Tokenizer", texts: Iterable[str], dtype: type, found: Occurrences | None = None
) -> "Iterator[np.ndarray]":
    """Yield the ids of each text, (tokens,), encoding about BATCH_CHARACTERS at a time on all cores.

    Args:
        found: the special tokens in the texts are added to it.
    """
    import numpy as np

    texts = iter(texts)
    while batch := list(take_characters(texts, BATCH_CHARACTERS)):
        for text, encoding in zip(batch, tokenizer.encode_batch_fast(batch, add_special_tokens=False), strict=True):
            ids = encoding.ids
            if found:
                found.add(text, ids)
            yield np.array(ids, dtype=dtype)


def take_characters(texts: Iterator[str], characters: int) -> Iterator[str]:
    """Yield texts until together they have at least `characters` characters."""
    size = 0
    while size < characters and (text := next(texts, None)) is not None:
        size += len(text)
        yield text


def split_paragraphs(text: str) -> list[str]:
    """Return the lines that are not blank."""
    return [line for line in text.split("\n") if line.strip()]
