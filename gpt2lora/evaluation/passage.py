"""metrics/plots/passage.png: a passage of the test split, each token coloured by what tuning changed for it.

The passage is chosen by the seed. The same scores give the same bytes: the only font is the one that comes with
matplotlib. Characters that it lacks, such as Chinese ones, are drawn as their codes; the report has them as text.
"""

import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpt2lora.evaluation import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ft2font import FT2Font
    from tokenizers import Tokenizer

    from gpt2lora.scoring.log_likelihood import TokenScores
    from gpt2lora.scoring.windows import Windows

FILE = plots.PASSAGE
MAX_TOKENS, MAX_LINES = 320, 14
SEARCHED = 1000  # tokens among which a line's start is looked for
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # at the end of a decoded text: its last character lacks bytes
MARKS = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}  # both break no cell
WIDTH, MARGIN, LINE, FONT_SIZE = plots.SIZE[0] * 72, 18.0, 20.0, 10.5  # points
HEAD, FOOT = 40.0, 64.0  # points above and below the text
WORSE, ALIKE, BETTER = "#ef8a62", "#ffffff", "#67a9cf"  # black text is readable on all of them
LIMITS = (0.5, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 50, 100)  # nats, at the ends of the colour scale


@dataclass
class Passage:
    """Consecutive scored tokens of the test split."""

    first: int  # number of the first token among all scored ones, from 0
    texts: list[str]  # of each token; tokens that share a character are one
    counts: list[int]  # tokens of each text
    base: np.ndarray  # (texts,) negative log-likelihood of each text under the base, nats
    tuned: np.ndarray  # the same under the tuned model


def choose_passage(
    windows: "Windows", scores: "dict[str, TokenScores]", tokenizer: "Tokenizer", end: int, seed: int
) -> Passage:
    """Return a passage that begins where a line of the text begins, if one does near the place that `seed` draws.

    Args:
        scores: of "base" and "tuned".
        end: the id that ends a text.
    """
    targets = windows.targets
    last = max(0, len(targets) - MAX_TOKENS)
    drawn = int(np.random.default_rng(seed).integers(last + 1))
    first = find_line_start(targets[drawn : min(last, drawn + SEARCHED) + 1], tokenizer, end) + drawn
    ids = targets[first : first + MAX_TOKENS].tolist()
    texts, counts = decode_tokens(tokenizer, ids)
    starts = first + np.cumsum([0, *counts[:-1]])
    base, tuned = (np.add.reduceat(scores[name].nll[: first + len(ids)], starts) for name in ("base", "tuned"))
    return Passage(first, texts, counts, base, tuned)


def find_line_start(ids: np.ndarray, tokenizer: "Tokenizer", end: int) -> int:
    """Return the index of the first id that begins a line with something in it, or 0 without any."""
    before = None
    for index, token in enumerate(ids.tolist()):
        text = "\n" if token == end else tokenizer.decode([token], skip_special_tokens=False)
        if before is not None and before.endswith("\n") and text.strip():
            return index
        before = text if text.strip(" ") or before is None else before  # spaces after a break change nothing
    return 0


def decode_tokens(tokenizer: "Tokenizer", ids: list[int]) -> tuple[list[str], list[int]]:
    """Return the text of each token, and how many tokens each text is made of: several if they share a character."""
    texts, counts, shown, done = [], [], "", 0
    for stop in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:stop], skip_special_tokens=False)
        if text.endswith(UNFINISHED) and stop < len(ids) and stop - done < 4:  # a character has at most 4 bytes
            continue
        alone = tokenizer.decode(ids[done:stop], skip_special_tokens=False)
        texts.append(text[len(shown) :] if text.startswith(shown) else alone)
        counts.append(stop - done)
        shown, done = text, stop
    return texts, counts


def draw_passage(passage: Passage, file: Path) -> None:
    """Draw the passage as a picture of 800 pixels' width; what does not fit into MAX_LINES is left out."""
    lines = wrap_texts([show_text(text) for text in passage.texts], WIDTH - 2 * MARGIN)[:MAX_LINES]
    height = HEAD + LINE * len(lines) + FOOT
    shown = slice(lines[-1][-1][0] + 1)
    tokens, base, tuned = (each[shown] for each in (passage.counts, passage.base, passage.tuned))
    gains, count = base - tuned, sum(tokens)
    limit = next((each for each in LIMITS if each >= np.percentile(np.abs(gains), 95)), LIMITS[-1])
    title = (
        f"Test split, tokens {passage.first + 1:,} to {passage.first + count:,}: "
        f"{base.sum() / count:.2f} nats/token under the base, {tuned.sum() / count:.2f} tuned"
    )
    with plots.new_picture(file, "", (plots.SIZE[0], height / 72)) as axes:
        from matplotlib import rcParams
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LinearSegmentedColormap, Normalize

        colors = ScalarMappable(
            Normalize(-limit, limit), LinearSegmentedColormap.from_list("gain", [WORSE, ALIKE, BETTER], 41)
        )
        rcParams["text.hinting"] = "none"  # else a text is wider than `text_width` says
        figure = axes.figure
        figure.set_layout_engine("none")
        axes.set_position((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        axes.axis("off")
        axes.text(MARGIN, HEAD / 2, title, fontsize=11.5, verticalalignment="center")
        draw_lines(axes, lines, [colors.to_rgba(gain) for gain in gains])
        scale = figure.add_axes((MARGIN / WIDTH, 40 / height, 1 - 2 * MARGIN / WIDTH, 10 / height))
        bar = figure.colorbar(colors, scale, orientation="horizontal", extend="both", format="{x:+g}")
        bar.outline.set_linewidth(0.5)
        label = "nats by which the tuned model predicts the token worse (below 0) or better (above 0) than the base"
        bar.set_label(label, fontsize=9.5)
        scale.tick_params(labelsize=9.5)


def draw_lines(axes: "Axes", lines: list[list[tuple[int, str]]], colors: list) -> None:
    """Draw each part of a text on its color. Coordinates are points from the upper left corner."""
    from matplotlib.patches import Rectangle

    for row, line in enumerate(lines):
        x, y = MARGIN, HEAD + LINE * row
        for index, text in line:
            width = text_width(text)
            box = {"facecolor": colors[index], "edgecolor": "#ffffff", "linewidth": 0.6}
            axes.add_patch(Rectangle((x, y + 1), width, LINE - 2, **box))
            # parse_math: else two dollar signs begin a formula
            options = {"fontfamily": "DejaVu Sans", "fontsize": FONT_SIZE, "parse_math": False}
            axes.text(x, y + 0.71 * LINE, text, verticalalignment="baseline", **options)
            x += width


def wrap_texts(texts: list[str], width: float) -> list[list[tuple[int, str]]]:
    """Break texts into lines of at most `width` points, if possible where a word begins, and after each line break.

    Returns:
        For each line its parts: the index of a text, and what of it stands there.
    """
    lines: list[list[tuple[int, str]]] = [[]]
    used, ended = 0.0, False  # whether a line break stands after the last visible text
    for word in split_words(texts, width):
        size = sum(text_width(text) for _, text in word)
        shown = "".join(text for _, text in word)
        blank = not shown.strip(" " + MARKS["\n"])
        if ended and not blank:  # blank lines take no room
            lines.append([])
            used = 0.0
        ended = ends_line(shown) or (ended and blank)
        for part in [word] if size <= width else [[piece] for piece in word]:
            size = sum(text_width(text) for _, text in part)
            if lines[-1] and used + size > width:
                lines.append([])
                used = 0.0
            lines[-1] += part
            used += size
    return lines


def split_words(texts: list[str], width: float) -> list[list[tuple[int, str]]]:
    """Return the parts of each word, as `wrap_texts` returns those of a line. No part is wider than `width`."""
    words: list[list[tuple[int, str]]] = []
    for index, text in enumerate(texts):
        room = max(1, int(width / FONT_SIZE / 1.5))  # characters, none of which is wider than 1.5 times its size
        whole = text_width(text) <= width
        pieces = [text] if whole else [text[start : start + room] for start in range(0, len(text), room)]
        for piece in filter(None, pieces):
            if not words or piece[0].isspace() or ends_line(words[-1][-1][1]):
                words.append([])
            words[-1].append((index, piece))
    return words


def ends_line(shown: str) -> bool:
    """Tell whether nothing visible follows a line break in what is drawn; spaces after it may be of the same token."""
    return shown.rstrip(" ").endswith(MARKS["\n"])


def show_text(text: str) -> str:
    """Return what is drawn for a text: characters that the font lacks, or that cannot be seen, as their codes."""
    return "".join(MARKS.get(each) or (each if is_drawable(each) else escape(each)) for each in text)


def has_undrawable(passage: Passage) -> bool:
    """Tell whether the picture shows characters by their codes."""
    return any(each not in MARKS and not is_drawable(each) for text in passage.texts for each in text)


def is_drawable(character: str) -> bool:
    """Tell whether the font has a character, which is no control character."""
    return unicodedata.category(character)[0] != "C" and ord(character) in characters()


def escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def text_width(text: str) -> float:
    """Return the width of a text in points, spaces at its ends included."""
    return sum(character_width(each) for each in text)


@lru_cache(10_000)
def character_width(character: str) -> float:
    return font().load_char(ord(character)).linearHoriAdvance / 65536


@lru_cache(1)
def characters() -> frozenset[int]:
    return frozenset(font().get_charmap())


@lru_cache(1)
def font() -> "FT2Font":
    plots.import_matplotlib()
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    found = FT2Font(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf")
    found.set_size(FONT_SIZE, 72)
    return found
