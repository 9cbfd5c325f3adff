"""The picture of a passage: which one, the text and colour of each token, and the same bytes each time."""

import itertools
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from pictures import record_axes
from PIL import Image
from tokenizers import Tokenizer

from gpt2lora.evaluation import passage
from gpt2lora.scoring.windows import sliding_windows

LINES = "".join(f"the river reached line {number} of\nthe valley\n" for number in range(200))
MIXED = (  # Cyrillic, Chinese, Korean, emoji, Hebrew, Arabic, Hindi, and what cannot be seen
    "Москва — столица\n東京は日本 한국어 \U0001f600\U0001f469\u200d\U0001f467 $x$ and $y$ \\alpha\n"
    "\u05e9\u05dc\u05d5\u05dd العربية हिन्दी\t\x00\x07\u202e\xa0 end\n"
)
WIDE = f"{'W' * 2000}\n{'中' * 300}\n"


@pytest.fixture(scope="module")
def tokenizer(tiny_model) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


def score(tokenizer: Tokenizer, text: str, gain: float = 0.5) -> tuple:
    """Return windows over a text, and scores by which the tuned model predicts each token `gain` nats better."""
    windows = sliding_windows([np.array(tokenizer.encode(text).ids, np.uint16)], 32, 32)
    base = np.random.default_rng(0).gamma(2, 2, len(windows.targets))
    return windows, {name: SimpleNamespace(nll=nll) for name, nll in {"base": base, "tuned": base - gain}.items()}


def choose(tokenizer: Tokenizer, text: str, seed: int = 0, gain: float = 0.5) -> passage.Passage:
    return passage.choose_passage(*score(tokenizer, text, gain), tokenizer, 0, seed)


def test_the_seed_chooses_a_passage_that_begins_a_line(tokenizer):
    found = [choose(tokenizer, LINES, seed) for seed in range(5)]
    assert found[0].first == choose(tokenizer, LINES).first
    assert len({each.first for each in found}) > 1
    for each in found:
        assert "".join(each.texts).startswith(("the river reached line", "the valley\n"))


def test_each_text_has_the_scores_of_its_tokens(tokenizer):
    windows, scores = score(tokenizer, MIXED)
    found = passage.choose_passage(windows, scores, tokenizer, 0, 0)
    count = sum(found.counts)
    assert "".join(found.texts) == tokenizer.decode(windows.targets[:count].tolist())
    assert max(found.counts) > 1  # characters of several tokens
    starts = np.cumsum([0, *found.counts])
    for name, values in (("base", found.base), ("tuned", found.tuned)):
        sums = [scores[name].nll[start:end].sum() for start, end in itertools.pairwise(starts)]
        assert values == pytest.approx(sums)


@pytest.mark.parametrize(
    "text", [MIXED, WIDE, "hi", "\n\n\n \n", "\x00\x01"], ids=["mixed", "wide", "short", "blank", "control"]
)
def test_any_text_is_drawn_inside_the_picture_without_warnings(tokenizer, text, tmp_path, monkeypatch):
    with warnings.catch_warnings(), record_axes(monkeypatch) as drawn:
        warnings.simplefilter("error")  # matplotlib warns of each missing glyph
        passage.draw_passage(choose(tokenizer, text), tmp_path / "a.png")
    (axes,) = drawn
    renderer = axes.figure.canvas.get_renderer()
    for shown in (*axes.texts, *axes.figure.axes[1].texts):
        box = shown.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= 800 and box.y0 >= 0, shown.get_text()
    lines = {round(shown.get_position()[1]) for shown in axes.texts[1:]}
    assert 1 <= len(lines) <= passage.MAX_LINES
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width == 800


def test_dollar_signs_begin_no_formula(tmp_path):
    one = np.ones(1)
    passage.draw_passage(passage.Passage(0, [r"$\nonsense{$"], [1], one, one), tmp_path / "a.png")


def test_characters_without_a_glyph_are_shown_by_their_codes():
    assert passage.show_text("я中\x00a\u202e") == "я\\u4e2d\\x00a\\u202e"
    assert passage.show_text("a\tb\n") == "a⇥b↵"
    assert not passage.has_undrawable(passage.Passage(0, ["я a", "\t\n"], [1, 1], np.zeros(2), np.zeros(2)))
    assert passage.has_undrawable(passage.Passage(0, ["a", "中"], [1, 1], np.zeros(2), np.zeros(2)))


def test_lines_break_where_the_text_does_and_blank_ones_take_no_room():
    texts = [passage.show_text(text) for text in ("a", " b\n", "\n", "  ", "\n", "    ", "c", "d\n")]
    lines = passage.wrap_texts(texts, 500)
    assert ["".join(text for _, text in line) for line in lines] == ["a b↵↵  ↵", "    cd↵"]  # indented
    joined = passage.wrap_texts(["a:↵    ", "b"], 500)  # a token of a line break and spaces
    assert ["".join(text for _, text in line) for line in joined] == ["a:↵    ", "b"]
    narrow = passage.wrap_texts(["one", " two", "fold", " three"], passage.text_width("one twof"))
    assert ["".join(text for _, text in line) for line in narrow] == ["one", " twofold", " three"]


def test_better_tokens_are_blue_and_worse_ones_orange(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(passage, "MAX_LINES", 3)
    for gain in (5.0, -5.0):
        passage.draw_passage(choose(tokenizer, LINES, gain=gain), tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as picture:
            colors = np.asarray(picture.convert("RGB"), int)
        blue, orange = ((sign * (colors[..., 2] - colors[..., 0]) > 40).mean() for sign in (1, -1))
        assert (blue > 3 * orange, orange > 3 * blue) == (gain > 0, gain < 0)


def test_the_same_scores_give_the_same_bytes(tokenizer, tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setattr(passage, "MAX_LINES", 3)
    files = [tmp_path / name for name in ("a.png", "b.png")]
    passage.draw_passage(choose(tokenizer, LINES), files[0])
    with matplotlib.rc_context({"font.size": 30, "font.family": "serif", "text.hinting": "default"}):
        passage.draw_passage(choose(tokenizer, LINES), files[1])
        assert matplotlib.rcParams["text.hinting"] == "default"
    assert files[0].read_bytes() == files[1].read_bytes()
