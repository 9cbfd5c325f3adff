"""How surprising each token of a text is to a model: its negative log-likelihood, as colours behind the text."""

import html
import math
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from gpt2lora.evaluation.passage import MARKS, WORSE
from gpt2lora.pipeline.cli import StageError
from gpt2lora.scoring.log_likelihood import score_windows
from gpt2lora.scoring.windows import sliding_windows

MAX_CHARACTERS = 50_000  # a page with more colours is slow
COLOR = tuple(bytes.fromhex(WORSE.removeprefix("#")))  # RGB of the most surprising tokens
MAX_NATS = 10.0  # nats from which a token has this colour
LINE_BREAK = MARKS["\n"] + "\n"


@dataclass
class Surprise:
    """A text in pieces. A piece is a token, or several that share a character."""

    pieces: list[str]
    counts: list[int]  # tokens of each piece
    nll: dict[str, np.ndarray]  # for each model (pieces,), negative log-likelihood in nats

    def loss(self, model: str) -> float:
        """Return the mean negative log-likelihood in nats/token."""
        return float(self.nll[model].sum() / sum(self.counts))


def measure_surprise(
    models: dict[str, torch.nn.Module], tokenizer: Tokenizer, text: str, prefix: list[int], end: int, context: int
) -> Surprise:
    """Score every token of a text under each model, in windows of `context` tokens that overlap by half.

    The first token is predicted from the prefix; without one from the end of another text, as in training.

    Args:
        prefix: ids that the tokenizer puts before each text.
        end: the id that ends a text.

    Raises:
        StageError: there is no text, or too much.
    """
    if len(text) > MAX_CHARACTERS:
        raise StageError(f"the text has {len(text):,} characters: at most {MAX_CHARACTERS:,} are read")
    encoding = tokenizer.encode(text, add_special_tokens=False)
    if not encoding.ids:
        raise StageError("there is no text: type or paste one")
    pieces, counts = split_pieces(text, encoding.offsets)
    ids = np.array(encoding.ids if prefix else [end, *encoding.ids], np.uint32)
    windows = sliding_windows([ids], context, max(1, context // 2), prefix)
    starts = np.cumsum([0, *counts[:-1]])
    nll = {}
    for name, model in models.items():
        scores = score_windows(model, windows, None, torch.float32, f"play: {name}")
        nll[name] = np.add.reduceat(scores.nll, starts)
    return Surprise(pieces, counts, nll)


def split_pieces(text: str, offsets: list[tuple[int, int]]) -> tuple[list[str], list[int]]:
    """Return the pieces of a text, which together are the text, and the number of tokens of each.

    Args:
        offsets: where each token begins and ends in the text. Several tokens may make up one character, and a
            tokenizer may leave out characters: these belong to the token after them.
    """
    pieces, counts, done = [], [], 0
    for _, stop in offsets:
        if pieces and stop <= done:
            counts[-1] += 1
        else:
            pieces.append(text[done:stop])
            counts.append(1)
            done = stop
    pieces[-1] += text[done:]
    return pieces, counts


def draw_surprise(surprise: Surprise, model: str) -> str:
    """Return the text as HTML, each piece on the colour of its surprise under a model, below the perplexity.

    Beside the pointer a piece shows its surprise under all models.
    """
    spans = []
    for index, (piece, count) in enumerate(zip(surprise.pieces, surprise.counts, strict=True)):
        nats = ", ".join(f"{name} {nll[index]:.2f}" for name, nll in surprise.nll.items())
        title = f"{nats} nats" + (f", {count} tokens" if count > 1 else "")
        shown = html.escape(piece).replace("\n", LINE_BREAK)
        color = token_color(surprise.nll[model][index] / count)
        spans.append(f'<span title="{html.escape(title)}" style="background:{color}">{shown}</span>')
    loss, tokens = surprise.loss(model), sum(surprise.counts)
    head = f"<b>{html.escape(model)}: perplexity {math.exp(min(loss, 700)):,.2f}</b> ({loss:.4f} nats/token"
    return f'<p>{head}, {tokens:,} tokens)</p><div class="surprise">{"".join(spans)}</div>'


def token_color(nats: float) -> str:
    """Return a CSS colour between white, for 0 nats, and COLOR, for MAX_NATS and more."""
    share = min(1.0, max(0.0, nats / MAX_NATS))
    return "rgb({})".format(",".join(str(round(255 + share * (value - 255))) for value in COLOR))


def draw_legend() -> str:
    """Return the colour scale as HTML."""
    scale = f"linear-gradient(to right, {token_color(0)}, {token_color(MAX_NATS)})"
    return (
        f'<div class="legend">0 <span style="background:{scale}"></span> {MAX_NATS:.0f} or more nats: the negative '
        "log-likelihood of a token, given those before it. A pointer on a token shows its numbers.</div>"
    )
