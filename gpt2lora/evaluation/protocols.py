"""Protocols: what of the test split is scored, from which context, and what words and bytes it counts as.

- native: the tokens as they are trained, laid out by `tokenize`. Packed, the articles are one stream, separated by
  the end-of-text token, which the model has learnt to predict: it counts as a predicted token, but as no word and
  no byte. Padded, each paragraph is scored by itself, with the end-of-text token that ends it.
- hf: the one text of the perplexity page in transformers' documentation: the hub's rows joined by two newlines.
  https://huggingface.co/docs/transformers/perplexity
- lm-eval: the task `wikitext` of EleutherAI's lm-evaluation-harness: each article by itself, rolling windows, the
  first token predicted from the end-of-text token; detokenised text is scored, the original one's words are counted.
  https://github.com/EleutherAI/lm-evaluation-harness/tree/main/lm_eval/tasks/wikitext

Words are separated by white space and bytes are those of UTF-8, both of the original text. lm-eval counts words its
own way, the empty ones at the ends of an article included.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2lora.dataset import blocks
from gpt2lora.dataset.tokenizer import encode, paragraphs
from gpt2lora.scoring import windows

# The detokeniser of lm-evaluation-harness (preprocess_wikitext.py, version 2.0 of the task), in its order and with
# its slips: the rule on digits matches slashes, and so no text; N becomes 1.
DETOKENISER = tuple(
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

    windows: windows.Windows
    words: int
    bytes: int


def native(test: blocks.Rows, layout: str, text: str, tokenizer, stride: int) -> Task:
    """Score the rows of `tokenize`: packed ones as the stream they were cut from, padded ones each by itself.

    Args:
        text: the test split, which `test` holds the tokens of.
        tokenizer: the base model's; needed only to find how much of a padded paragraph its row holds.
    """
    if layout == "packed":
        laid = windows.slide([windows.unpack(test)], test.ids.shape[1] - 1, stride)
        return Task(laid, len(text.split()), len(text.encode()))
    kept = [held(paragraph, tokenizer, test.ids.shape[1]) for paragraph in paragraphs(text)]
    return Task(windows.of_rows(test), sum(len(part.split()) for part in kept), sum(len(p.encode()) for p in kept))


def hf(text: str, tokenizer, context: int, stride: int) -> Task:
    """Score the hub's rows joined by two newlines, in windows that slide.

    The documentation's loop reads the same windows but never uses the last logits of one. Here they predict the
    token that follows, so that at a stride of `context`, too, every token but the first is predicted; and each token
    weighs the same, where the loop takes one token fewer for each window's weight. On WikiText-2 both change GPT-2's
    perplexity by less than 0.1 %.
    """
    ids = list(encode(tokenizer, ["\n\n".join(hub_rows(text))], np.uint32))
    return Task(windows.slide(ids, context, stride), len(text.split()), len(text.encode()))


def lm_eval(text: str, tokenizer, end: int, context: int) -> Task:
    """Score each page by itself in rolling windows; `end` is what its first token is predicted from."""
    found = pages(text)
    texts = [
        np.append(np.uint32(end), ids) for ids in encode(tokenizer, [detokenise(page) for page in found], np.uint32)
    ]
    words = sum(len(re.split(r"\s+", page)) for page in found)
    return Task(windows.roll(texts, context), words, sum(len(page.encode()) for page in found))


def held(paragraph: str, tokenizer, width: int) -> str:
    """Return what of a paragraph stands in a row of `width` ids."""
    encoding = tokenizer.encode(paragraph, add_special_tokens=False)
    return paragraph if len(encoding.ids) <= width else paragraph[: encoding.offsets[width - 1][1]]


def hub_rows(text: str) -> list[str]:
    """Return the rows that Salesforce/wikitext has for a file of the release: its lines, blank ones as nothing."""
    return [line if line.strip() else "" for line in re.findall(r"[^\n]*\n|[^\n]+\Z", text)]


def pages(text: str) -> list[str]:
    """Cut a text into pages as EleutherAI/wikitext_document_level does, by lines: formulas that look like a title cut.

    The test split of WikiText-2 has 62, two more than it has articles.
    """
    found, page = [], []
    for line in text.split("\n"):
        flat = line.replace("= = =", "===").replace("= =", "==").strip()
        if flat.startswith("= ") and flat.endswith(" ="):
            found.append("\n".join(page))
            page = []
        page.append(line)
    return [done for done in found if done.strip()] + ["\n".join(page)]


def detokenise(page: str) -> str:
    for pattern, replacement in DETOKENISER:
        page = pattern.sub(replacement, page)
    return page


def read(raw: Path) -> str:
    """Return the test split's text, every byte of it."""
    from gpt2lora.pipeline.artifacts import need

    return need(raw / "test.txt", "prepare").read_bytes().decode("utf-8")
