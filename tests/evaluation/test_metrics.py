"""Metrics by position, and warnings about unusual metrics."""

import json
import math

import numpy as np
import pandas
import pytest

from gpt2lora.evaluation import metrics, protocols
from gpt2lora.scoring import windows
from gpt2lora.scoring.log_likelihood import TokenScores

BLOCK_SIZE = 32


@pytest.mark.parametrize(
    ("block_size", "contexts", "expected"),
    [
        (1024, [1, 32, 33, 1024], [(1, 2), (33, 1), (993, 1)]),
        (50, [1, 2, 3, 4, 50], [(1, 2), (3, 2), (50, 1)]),
        (3, [1, 3, 3], [(1, 1), (3, 2)]),
    ],
)
def test_positions_are_grouped_into_at_most_32_buckets(tmp_path, block_size, contexts, expected):
    """A bucket is named by its first position."""
    count = len(contexts)
    skips = np.array(contexts) - 1
    task_windows = windows.Windows(np.zeros(2000, np.uint16), np.zeros(count, int), skips + 2, skips + 1)
    scores = TokenScores(np.arange(count) + 1.0, np.zeros(count, int))
    file = tmp_path / "positions.csv"
    metrics.write_positions(file, task_windows, {"base": scores, "tuned": scores}, block_size)
    table = pandas.read_csv(file)
    assert list(zip(table.position, table.tokens, strict=True)) == expected
    assert (table.tokens * table.base_loss).sum() == pytest.approx(count * (count + 1) / 2)


def make_task(tokens: int, words: int) -> protocols.Task:
    """Return a task of so many scored tokens and words, and 10 bytes."""
    ids = np.zeros(tokens + 1, np.uint16)
    return protocols.Task(windows.sliding_windows([ids], BLOCK_SIZE, BLOCK_SIZE), words, 10)


@pytest.mark.parametrize(("loss", "warned"), [(math.log(1.49), True), (math.log(1.51), False)])
def test_an_implausibly_low_perplexity_prints_a_warning(capsys, loss, warned):
    scores = metrics.compute_metrics(TokenScores(np.full(4, loss), np.zeros(4, int)), make_task(4, 4))
    metrics.warn_about_metrics("tuned", scores)
    printed = capsys.readouterr().out
    assert ("warning: the tuned model's perplexity" in printed and "labels probably leak" in printed) is warned


def test_a_perplexity_that_overflows_is_capped_with_a_warning(capsys):
    scores = metrics.compute_metrics(TokenScores(np.full(8, 650.0), np.full(8, 7)), make_task(8, 2))
    assert scores["perplexity"] == math.exp(650)
    assert scores["word_perplexity"] == math.exp(700)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    metrics.warn_about_metrics("base", scores)
    assert capsys.readouterr().out.count("word_perplexity is capped at 1.0e+304") == 1
