"""Splitting a text in WikiText's format into articles."""

import re

from hypothesis import example, given
from hypothesis import strategies as st

from gpt2lora.dataset import articles

LINES = (
    " \n",
    "\n",
    " = A = \n",
    " = B ( c ) = \n",
    " = = Part = = \n",
    " = = = Deep = = = \n",
    " text , \n",
    " = x\n",
    "y",
)
texts = st.lists(st.sampled_from(LINES), max_size=30).map("".join) | st.text(alphabet=" =\nab")


@given(texts)
def test_the_joined_articles_are_the_text(text):
    pieces = articles.split_articles(text)
    assert "".join(pieces) == text
    assert all(pieces)


def test_an_article_begins_with_its_title_and_keeps_its_sections():
    first = " \n = One = \n \n Text . \n \n = = Part = = \n \n More . \n \n = = = Deep = = = \n \n"
    assert articles.split_articles(first + " = Two = \n \n Text . \n") == [first, " = Two = \n \n Text . \n"]


def test_a_formula_that_looks_like_a_title_starts_no_article():
    text = " \n = One = \n \n where \n = mass times c = \n and so on . \n \n = = Part = = \n \n"
    assert articles.split_articles(text) == [text]


def test_a_text_without_titles_is_one_article():
    assert articles.split_articles("one\n\ntwo\n") == ["one\n\ntwo\n"]
    assert articles.split_articles("") == []


@given(texts)
@example("text \n \n = A = \n \n = A = \n \n")  # one blank line cannot belong to two titles
def test_reading_line_by_line_gives_the_same_articles(text):
    pieces = []
    for is_start, line in articles.mark_article_starts(re.findall(r".*\n|.+", text)):
        if is_start or not pieces:
            pieces.append("")
        pieces[-1] += line
    assert pieces == articles.split_articles(text)
