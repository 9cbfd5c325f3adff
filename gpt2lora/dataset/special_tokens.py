"""Special tokens in a text: which are tokens there, which are letters, and how often each occurs.

Control tokens, such as <|endoftext|>, begin, end or pad a text, or stand for what is unknown. In a corpus their letters
are text, since only `tokenize` knows where a text ends. All other special tokens are content: <sep>, added by a user,
or the marks of a chat's turns.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2lora.pipeline.artifacts import read_json
from gpt2lora.pipeline.cli import echo

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTROL_ROLES = ("bos", "eos", "unk", "pad")


@dataclass
class Occurrences:
    """How often special tokens occur in a text: as tokens, by id, and as letters, by their text; and what is lost."""

    tokens: dict[int, int]
    letters: dict[str, int]
    unknown_id: int | None = None  # of the token that stands for what the tokenizer lacks
    decode: Callable[[list[int]], str] | None = None  # None if a tokenizer keeps every character
    unknown: int = 0  # tokens with unknown_id
    changed: int = 0  # texts that their ids do not give back, white space aside

    def add(self, text: str, ids: list[int]) -> None:
        """Count those in a text and its ids."""
        if self.unknown_id is not None:
            self.unknown += ids.count(self.unknown_id)
        if self.decode:
            self.changed += "".join(self.decode(ids).split()) != "".join(text.split())
        if not self.tokens.keys().isdisjoint(ids):
            for id in ids:
                if id in self.tokens:
                    self.tokens[id] += 1
        for token in self.letters:
            self.letters[token] += text.count(token)


def special_token(base: Path, name: str) -> str | None:
    """Return the text of a special token, such as "bos_token", or None.

    As transformers 5 has it: special_tokens_map.json goes before tokenizer_config.json, unless the latter has a key
    `added_tokens_decoder`, with which it is complete.
    """
    settings = read_settings(base / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= read_settings(base / "special_tokens_map.json")
    token = settings.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def read_settings(file: Path) -> dict:
    """Return a JSON file of the base; {} if there is none."""
    return read_json(file, "base") if file.is_file() else {}


def control_tokens(base: Path, tokenizer: "Tokenizer", prefix: Iterable[int]) -> set[str]:
    """Return the texts of the control tokens. prefix: ids that the tokenizer puts before every text."""
    named = {special_token(base, f"{role}_token") for role in CONTROL_ROLES}
    config = read_settings(base / "config.json")
    ids = [*prefix]
    for role in CONTROL_ROLES:
        found = config.get(f"{role}_token_id")
        ids += found if isinstance(found, list) else [found]
    named |= {tokenizer.id_to_token(id) for id in ids if type(id) is int and id >= 0}
    return {token for token in named if token}


def make_control_letters(tokenizer: "Tokenizer", control: set[str]) -> "Tokenizer":
    """Return the tokenizer, for which control tokens in a text are letters, and its other added tokens are tokens."""
    from tokenizers import Tokenizer

    added = tokenizer.get_added_tokens_decoder().values()
    if any(token.special != (token.content in control) for token in added):
        # `encode_special_tokens` holds for all special tokens. So only the control tokens may be special.
        settings = json.loads(tokenizer.to_str())
        for token in settings["added_tokens"]:
            token["special"] = token["content"] in control
        tokenizer = Tokenizer.from_str(json.dumps(settings))
    tokenizer.encode_special_tokens = True
    cut_control_tokens(tokenizer, control & {token.content for token in added})
    return tokenizer


def cut_control_tokens(tokenizer: "Tokenizer", control: set[str]) -> None:
    """Cut control tokens after their first letter where the model would find them in its own vocabulary.

    `encode_special_tokens` keeps only added tokens from being matched. The models of GPT-2 and Llama need no cut.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Sequence, Split

    cuts = []
    for token in sorted(control):
        first, rest = token[:1], token[1:]
        if is_matched(tokenizer, token, token) and rest and not is_matched(tokenizer, token, first, rest):
            pattern = Regex(f"{re.escape(first)}(?={re.escape(rest)})")
            cuts.append(Split(pattern, "merged_with_previous"))
    if cuts:  # after the pre-tokenizer's other steps: what is cut then is what the model sees
        tokenizer.pre_tokenizer = Sequence([*filter(None, [tokenizer.pre_tokenizer]), *cuts])


def is_matched(tokenizer: "Tokenizer", token: str, *words: str) -> bool:
    """Tell whether the tokenizer's model, without its added tokens, finds a token in words that it sees."""
    try:
        found = [each.id for word in words for each in tokenizer.model.tokenize(word)]
    except Exception:  # a model without a token for what it lacks; the library raises plain Exception
        return True
    return tokenizer.model.token_to_id(token) in found


def watch_special_tokens(base: Path, tokenizer: "Tokenizer", end: int) -> Occurrences:
    """Return counts of zero for the special tokens of tokenizer.json and the end-of-text id.

    Args:
        tokenizer: as `load_tokenizer` returns it.
    """
    settings = read_json(base / "tokenizer.json", "base")
    added = settings.get("added_tokens") or []
    special = {token["content"]: token["id"] for token in added if token.get("special")}
    now = tokenizer.get_added_tokens_decoder()
    control = [token for token, id in special.items() if tokenizer.encode_special_tokens and now[id].special]
    # Some cannot be letters: one that is a single letter, or the token for what a model lacks.
    letters = [
        token for token in control if special[token] not in tokenizer.encode(token, add_special_tokens=False).ids
    ]
    model = settings["model"]
    unknown = tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else model.get("unk_id")
    lossless = not settings.get("normalizer") and (settings.get("decoder") or {}).get("type") == "ByteLevel"
    decode = None if lossless else functools.partial(tokenizer.decode, skip_special_tokens=False)
    uncounted = {*letters, *(token for token in control if special[token] == unknown)}
    tokens = {id: 0 for token, id in special.items() if token not in uncounted}
    if end not in special.values():
        tokens[end] = 0
    return Occurrences(tokens, dict.fromkeys(letters, 0), unknown, decode)


def describe_special_tokens(found: Occurrences, tokenizer: "Tokenizer", split: str) -> dict[str, dict[str, int] | int]:
    """Print which special tokens occur in a split, as tokens and as letters, and what is lost; return it."""
    counts = {tokenizer.id_to_token(id): count for id, count in found.tokens.items() if count}
    letters = {token: count for token, count in found.letters.items() if count}
    if counts:
        echo(f"tokenize: {split:10} special tokens in the text: {list_counts(counts)}")
    if letters:
        echo(
            f"tokenize: {split:10} encoded as letters: {list_counts(letters)}: if they separate documents, set "
            "prepare.document_separator; tokenize.special_tokens: true makes them tokens"
        )
    beyond = "figures by byte and word compare with no other model"
    if found.unknown:
        token = tokenizer.id_to_token(found.unknown_id)
        echo(
            f"tokenize: warning: {split}: {found.unknown:,} tokens are {token}, for what the tokenizer lacks: {beyond}"
        )
    if found.changed:
        echo(
            f"tokenize: warning: {split}: the tokenizer changes or drops characters of {found.changed:,} texts: "
            f"capitals, accents or what it lacks: {beyond}"
        )
    named = {"special_tokens": counts, "control_tokens_as_letters": letters}
    named |= {"unknown_tokens": found.unknown, "changed_texts": found.changed}
    return {name: values for name, values in named.items() if values}


def list_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} times {token}" for token, count in counts.items())
