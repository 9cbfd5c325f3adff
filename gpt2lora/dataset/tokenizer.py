"""The base model's tokenizer, and texts as ids: a bounded number of characters at a time."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2lora.pipeline.artifacts import need, read_json
from gpt2lora.pipeline.cli import Stop

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

    from gpt2lora.dataset.blocks import Rows

# Bounds of the memory: what is encoded at once, by all cores, and the longest text that is not encoded in pieces.
BATCH_CHARACTERS = 1_000_000
PIECE_CHARACTERS = 100_000


def longest_context(config: dict) -> int | None:
    return config.get("n_positions") or config.get("max_position_embeddings")


def load_tokenizer(base: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    file = need(base / "tokenizer.json", "base")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no other kind
        raise Stop(f"{file} is damaged: {error}: run `dvc repro --force base`") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # The characters "<|endoftext|>" in a corpus are text; only the pipeline itself ends a text.
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text(base: Path, config: dict, tokenizer: "Tokenizer") -> int:
    """Return the id that ends a text: the tokenizer's own eos token, else the one that the model's config names."""
    settings = base / "tokenizer_config.json"
    token = read_json(settings, "base").get("eos_token") if settings.is_file() else None
    if isinstance(token, dict):
        token = token.get("content")
    end = tokenizer.token_to_id(token) if isinstance(token, str) else config.get("eos_token_id")
    if isinstance(end, list) and end:
        end = end[0]
    if not isinstance(end, int) or not 0 <= end < config["vocab_size"]:
        raise Stop(f"{base}: no end-of-text token: expected eos_token in tokenizer_config.json")
    return end


def read(path: Path, longest: int = -1) -> Iterator[str]:
    """Yield a file's lines, every byte of them; a line of more than `longest` characters comes in parts."""
    from tqdm import tqdm

    size = path.stat().st_size
    with (
        path.open(encoding="utf-8", newline="\n") as file,
        tqdm(total=size, unit="B", unit_scale=True, desc=f"tokenize {path.stem}", leave=False) as bar,
    ):
        try:
            while line := file.readline(longest):
                bar.update(file.buffer.tell() - bar.n)
                yield line
        except UnicodeDecodeError as error:
            raise Stop(f"{path} is not UTF-8 ({error}): run `dvc repro --force prepare`") from error


def packed(
    tokenizer: "Tokenizer", marked: Iterable[tuple[bool, str]], end: int, dtype: type, counts: dict[str, int]
) -> "Iterator[np.ndarray]":
    """Yield one stream of ids in pieces, the articles separated by the end-of-text id; count texts and tokens.

    Args:
        marked: lines, each with whether an article begins there.
    """
    import numpy as np

    begins: list[bool] = []  # of the pieces that `encode` has taken and not yet given back

    def texts() -> Iterator[str]:
        for begin, text in pieces(tokenizer, marked):
            begins.append(begin)
            yield text

    for ids in encode(tokenizer, texts(), dtype):
        if begins.pop(0):
            if counts["texts"]:
                yield np.array([end], dtype=dtype)
            counts["texts"] += 1
        counts["tokens"] += len(ids)
        yield ids


def pieces(tokenizer: "Tokenizer", marked: Iterable[tuple[bool, str]]) -> Iterator[tuple[bool, str]]:
    """Yield the articles, each with whether it begins there: long ones come in several pieces."""
    begins, held, lines, size = True, [], [], 0
    for starts, line in marked:
        if starts:
            yield begins, "".join(held + lines)
            begins, held, lines, size = True, [], [], 0
        lines.append(line)
        size += len(line)
        if size >= PIECE_CHARACTERS:
            text = "".join(lines)
            if place := cut(tokenizer, text):
                yield begins, "".join([*held, text[:place]])
                begins, held = False, []
            held.append(text[place:])
            lines, size = [], 0
    if held or lines:
        yield begins, "".join(held + lines)


def cut(tokenizer: "Tokenizer", text: str) -> int:
    """Return the last place before white space where text can be cut and still be encoded alike, or 0."""
    words = text.rsplit(None, 2)
    place = len(words[0]) if len(words) == 3 else 0
    around = text[max(0, place - 100) : place], text[place : place + 100]
    apart = [token for part in around for token in tokenizer.encode(part, add_special_tokens=False).ids]
    return place if tokenizer.encode("".join(around), add_special_tokens=False).ids == apart else 0


def padded(
    tokenizer: "Tokenizer", lines: Iterable[str], block_size: int, end: int, dtype: type, counts: dict[str, int]
) -> "Iterator[Rows]":
    """Yield the rows of all paragraphs, each ended by the end-of-text id, some at a time; count texts and tokens."""
    import numpy as np

    from gpt2lora.dataset import blocks

    encoded = encode(tokenizer, (text for line in lines for text in paragraphs(line)), dtype)
    while texts := [np.append(ids, dtype(end)) for ids in itertools.islice(encoded, 1000)]:
        counts["texts"] += len(texts)
        counts["tokens"] += sum(map(len, texts))
        yield blocks.pad_each(texts, block_size, end)


def encode(tokenizer: "Tokenizer", texts: Iterable[str], dtype: type) -> "Iterator[np.ndarray]":
    """Yield the ids of each text as a (tokens,) array, a bounded number of characters at a time."""
    import numpy as np

    texts = iter(texts)
    while batch := list(take(texts, BATCH_CHARACTERS)):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield np.array(encoding.ids, dtype=dtype)


def take(texts: Iterator[str], characters: int) -> Iterator[str]:
    """Yield texts until they hold so many characters together, or there are no more."""
    size = 0
    while size < characters and (text := next(texts, None)) is not None:
        size += len(text)
        yield text


def paragraphs(text: str) -> list[str]:
    """Return the lines that hold more than white space."""
    return [line for line in text.split("\n") if line.strip()]
