"""How surprising a text's tokens are: numbers as transformers computes them, and the HTML that shows them."""

import re

import numpy as np
import pytest
import tiny
import torch
from transformers import GPT2LMHeadModel

from gpt2lora.dataset.tokenizer import load_tokenizer
from gpt2lora.inference.surprise import (
    MAX_CHARACTERS,
    Surprise,
    draw_surprise,
    measure_surprise,
    split_pieces,
    token_color,
)
from gpt2lora.model import loading
from gpt2lora.pipeline.cli import StageError

CONTEXT = 64
TEXT = 'the river reached the old town .\n\n🦆 & <b>"boats"</b> 日本'


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_corpus):
    return tiny.write_model(tmp_path_factory.mktemp("surprise") / "base", tiny_corpus, spread=0.1)


def measure(base, text: str, prefix: list[int] | None = None) -> Surprise:
    model = loading.load_base(base, None, torch.float32)
    return measure_surprise(
        {"base": model}, load_tokenizer(base), text, prefix or [], model.config.eos_token_id, CONTEXT
    )


def expected_nll(base, ids: list[int]) -> np.ndarray:
    """Return the negative log-likelihood of each id after the first, in one forward pass of transformers' model."""
    with torch.no_grad():
        logits = GPT2LMHeadModel.from_pretrained(base)(torch.tensor([ids[:-1]])).logits[0]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").numpy()


@pytest.mark.parametrize("prefix", [[], [0, 7]], ids=["no prefix", "a prefix"])
def test_each_token_of_a_short_text_has_the_score_of_transformers(base, prefix):
    ids = load_tokenizer(base).encode(TEXT).ids
    assert len(ids) < CONTEXT - 2
    surprise = measure(base, TEXT, prefix)
    end = GPT2LMHeadModel.from_pretrained(base).config.eos_token_id
    expected = expected_nll(base, (prefix or [end]) + ids)[-len(ids) :]
    starts = np.cumsum([0, *surprise.counts[:-1]])
    np.testing.assert_allclose(surprise.nll["base"], np.add.reduceat(expected, starts), rtol=1e-4)
    assert surprise.loss("base") == pytest.approx(expected.mean(), rel=1e-5)


def test_a_long_text_is_read_in_windows_that_overlap_by_half(base):
    text = "the river reached the old town . " * 40
    ids = load_tokenizer(base).encode(text).ids
    surprise = measure(base, text)
    assert surprise.counts == [1] * len(ids) and len(ids) > 3 * CONTEXT
    end = GPT2LMHeadModel.from_pretrained(base).config.eos_token_id
    first = expected_nll(base, [end, *ids[:CONTEXT]])
    np.testing.assert_allclose(surprise.nll["base"][:CONTEXT], first, rtol=1e-4)
    second = expected_nll(base, ids[CONTEXT // 2 - 1 : CONTEXT // 2 + CONTEXT])[-CONTEXT // 2 :]
    np.testing.assert_allclose(surprise.nll["base"][CONTEXT : CONTEXT + CONTEXT // 2], second, rtol=1e-4)


@pytest.mark.parametrize("text", [TEXT, "🦆🦆", "é", "\n", " a  b\t\r\n"])
def test_the_pieces_are_the_text(base, text):
    surprise = measure(base, text)
    assert "".join(surprise.pieces) == text
    assert sum(surprise.counts) == len(load_tokenizer(base).encode(text).ids)


def test_tokens_of_one_character_are_one_piece(base):
    assert measure(base, "a🦆").pieces[-1] == "🦆"
    assert measure(base, "a🦆").counts[-1] == 4


def test_characters_that_no_token_holds_belong_to_the_next_one():
    assert split_pieces("  a b ", [(2, 3), (4, 5)]) == (["  a", " b "], [1, 1])
    assert split_pieces("ab", [(0, 0), (0, 1), (1, 2)]) == (["", "a", "b"], [1, 1, 1])


def test_the_page_shows_the_text_itself(base):
    """A text that is HTML is shown as it is written."""
    drawn = draw_surprise(measure(base, TEXT), "base")
    body = drawn.partition('<div class="surprise">')[2]
    assert "<b>" not in body and "&lt;" in body and "&quot;" in body
    assert len(re.findall("<span", drawn)) == len(measure(base, TEXT).pieces)
    assert "↵\n" in body


def test_the_perplexity_is_that_of_all_tokens():
    surprise = Surprise(["a", "b"], [1, 3], {"base": np.array([2.0, 6.0]), "tuned": np.array([1.0, 3.0])})
    assert "base: perplexity 7.39</b> (2.0000 nats/token, 4 tokens)" in draw_surprise(surprise, "base")
    assert "tuned: perplexity 2.72</b>" in draw_surprise(surprise, "tuned")
    assert 'title="base 6.00, tuned 3.00 nats, 3 tokens"' in draw_surprise(surprise, "tuned")


def test_the_more_surprising_the_darker():
    def lightness(nats: float) -> int:
        return sum(map(int, re.findall(r"\d+", token_color(nats))))

    shades = [lightness(nats) for nats in (0, 1, 2, 5, 10)]
    assert shades == sorted(set(shades), reverse=True)
    assert token_color(10) == token_color(50)


@pytest.mark.parametrize(
    ("text", "line"),
    [("", "there is no text"), ("a" * (MAX_CHARACTERS + 1), "the text has 50,001 characters: at most 50,000 are read")],
)
def test_no_text_and_too_much_are_refused(base, text, line):
    with pytest.raises(StageError, match=line):
        measure(base, text)
