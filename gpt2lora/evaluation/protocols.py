"""Evaluation protocols: which tokens of the test split are scored, with which context, and how words and bytes count.

- native: the tokens as in training, in the layout of `tokenize`. Packed, the articles are one stream, separated by the
  end-of-text token: the model learned to predict it, so it counts as a scored token, but not as a word or byte. Padded,
  each paragraph is scored by itself, with the end-of-text token at its end; its first token is predicted from the
  prefix, or without one from the end-of-text token.
- hf: the text of the perplexity page in transformers' documentation: the hub's rows joined by two newlines.
  https://huggingface.co/docs/transformers/perplexity
- lm-eval: the task `wikitext` of EleutherAI's lm-evaluation-harness: each article by itself, in rolling windows, its
  first token predicted from the end-of-text token. Detokenized text is scored, words of the original text are counted.
  For a tokenizer that begins a text with <bos>, the harness needs `add_bos_token=False`, or it scores <bos> as well.
  https://github.com/EleutherAI/lm-evaluation-harness/tree/main/lm_eval/tasks/wikitext

If the tokenizer puts a prefix such as <bos> before a text, it stands before each window with native, and only at the
beginning of the text with hf. lm-eval predicts an article's first token from <bos>, with or without such a prefix.

Words (separated by white space) and UTF-8 bytes are those of the original text. lm-eval counts words in its own way,
with empty ones at the ends of an article.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpt2lora.dataset.blocks import Blocks, load_blocks
from gpt2lora.dataset.documents import Text, find_split, read_split, whole_texts
from gpt2lora.dataset.special_tokens import special_token
from gpt2lora.dataset.tokenizer import encode_texts, load_tokenizer, split_paragraphs
from gpt2lora.scoring.windows import Windows, block_windows, rolling_windows, sliding_windows, unpack_stream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The detokenizer of lm-evaluation-harness (preprocess_wikitext.py, version 2.0 of the task), in the same order and with
# its mistakes: the rule on digits matches slashes, so it never applies; N becomes 1.
DETOKENIZER = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"s '", "s'"),
        (r"/' [0-9]/", "/'[0-9]/"),
        (r" @-@ ", "-"),
        (r" @,@ ", ","),
        (r" @\.@ ", "."),
        *((f" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
        (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
        (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
        (r"{\s*([^}]*?)\s*}", r"{\1}"),
        (r'"\s*([^"]*?)\s*"', r'"\1"'),
        (r"'\s*([^']*?)\s*'", r"'\1'"),
        (r"= = = =", "===="),
        (r"= = =", "==="),
        (r"= =", "=="),
        (r" ° ", "°"),
        (r" \n", "\n"),
        (r"\n ", "\n"),
        (r" N ", " 1 "),
        (r" 's", "'s"),
    )
)


@dataclass
class Task:
    """What is scored, and how many words and UTF-8 bytes of the original text that is."""

    windows: Windows
    words: int
    bytes: int


def build_task(protocol: str, stride: int, manifest: dict, text: Text, tokens: Path, base: Path) -> Task:
    """Return what a protocol scores.

    Args:
        protocol: "native", "hf" or "lm-eval". stride: tokens from one window to the next.
        manifest: of the folder `tokens`, data/tokens.
        text: the test split: a text of articles, or documents.
        base: the folder of the tokenizer.
    """
    tokenizer, end = load_tokenizer(base, manifest["special_tokens"]), manifest["end_of_text_id"]
    prefix = manifest["prefix"]
    if protocol == "native":
        test = load_blocks(tokens, "test", prefix)
        if manifest["layout"] == "packed":
            return packed_task(test, text, stride, prefix)
        return padded_task(test, text, tokenizer, prefix, end)
    if protocol == "hf":
        return hf_task(text, tokenizer, manifest["block_size"], stride, prefix)
    bos = tokenizer.token_to_id(special_token(base, "bos_token") or "")
    return lm_eval_task(text, tokenizer, end if bos is None else bos, manifest["block_size"])


def packed_task(test: Blocks, text: Text, stride: int, prefix: Sequence[int]) -> Task:
    """Score packed blocks as the stream that they were cut from. text: the test split, whose tokens `test` holds."""
    windows = sliding_windows([unpack_stream(test, prefix)], test.ids.shape[1] - 1, stride, prefix)
    return Task(windows, *count_text(text))


def padded_task(test: Blocks, text: Text, tokenizer: "Tokenizer", prefix: Sequence[int], end: int) -> Task:
    """Score padded blocks each by itself.

    A row without a prefix does not predict its first token. It is predicted from `end` here, since its word and its
    bytes count.

    Args:
        tokenizer: needed to find how much of a truncated paragraph its row holds.
    """
    width = test.ids.shape[1]
    if prefix:
        windows = block_windows(test)
    else:
        rows = (ids[:length] for ids, length in zip(test.ids, test.lengths, strict=True))
        windows = rolling_windows([np.append(ids.dtype.type(end), ids) for ids in rows], width - 1)
    paragraphs = [part for each in whole_texts(text) for part in split_paragraphs(each)]
    return Task(windows, *count_text([paragraph_in_row(each, tokenizer, width - len(prefix)) for each in paragraphs]))


def hf_task(text: Text, tokenizer: "Tokenizer", context: int, stride: int, prefix: Sequence[int] = ()) -> Task:
    """Score the hub's rows joined by two newlines, in sliding windows.

    The documentation's loop reads the same windows but never uses the last logits of a window. Here they predict the
    next token, so that every token except the first is predicted, at a stride of `context` too. Here all tokens have
    the same weight; the loop weights each window by one token less than it scores. On WikiText-2 both differences
    change GPT-2's perplexity by less than 0.1 %.
    """
    (ids,) = encode_texts(tokenizer, ["\n\n".join(hub_rows(text))], np.uint32)
    ids = np.concatenate([np.array(prefix, np.uint32), ids])
    return Task(sliding_windows([ids], context, stride), *count_text(text))


def lm_eval_task(text: Text, tokenizer: "Tokenizer", first: int, context: int) -> Task:
    """Score each page by itself in rolling windows; its first token is predicted from the id `first`."""
    pages = split_pages(text)
    encoded = encode_texts(tokenizer, [detokenize(page) for page in pages], np.uint32)
    texts = [np.append(np.uint32(first), ids) for ids in encoded]
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    return Task(rolling_windows(texts, context), words, sum(len(page.encode()) for page in pages))


def count_text(text: Text) -> tuple[int, int]:
    """Return the numbers of words and UTF-8 bytes."""
    texts = whole_texts(text)
    return sum(len(each.split()) for each in texts), sum(len(each.encode()) for each in texts)


def paragraph_in_row(paragraph: str, tokenizer: "Tokenizer", width: int) -> str:
    """Return the part of a paragraph that a row of `width` ids holds."""
    encoding = tokenizer.encode(paragraph, add_special_tokens=False)
    return paragraph if len(encoding.ids) <= width else paragraph[: encoding.offsets[width - 1][1]]


def hub_rows(text: Text) -> list[str]:
    """Return the rows of Salesforce/wikitext for a file of the original release: its lines, blank ones as "".

    Documents are rows themselves.
    """
    if not isinstance(text, str):
        return text
    return [line if line.strip() else "" for line in re.findall(r"[^\n]*\n|[^\n]+\Z", text)]


def split_pages(text: Text) -> list[str]:
    """Split a text into the pages of EleutherAI/wikitext_document_level, which also splits at formulas like a title.

    The test split of WikiText-2 has 62 pages, two more than articles. Documents are pages themselves.
    """
    if not isinstance(text, str):
        return text
    pages, page = [], []
    for line in text.split("\n"):
        flat = line.replace("= = =", "===").replace("= =", "==").strip()
        if flat.startswith("= ") and flat.endswith(" ="):
            pages.append("\n".join(page))
            page = []
        page.append(line)
    return [page for page in pages if page.strip()] + ["\n".join(page)]


def detokenize(page: str) -> str:
    """Undo WikiText's tokenization as lm-evaluation-harness does."""
    for pattern, replacement in DETOKENIZER:
        page = pattern.sub(replacement, page)
    return page


def read_test_text(raw: Path) -> Text:
    """Return the test split without translating newlines: a text of articles, or documents."""
    return read_split(find_split(raw, "test"))
