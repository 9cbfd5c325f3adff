"""The metrics of metrics/eval.json and metrics/positions.csv, and warnings about unusual ones."""

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2lora.pipeline.cli import StageError, echo

if TYPE_CHECKING:
    from gpt2lora.evaluation.protocols import Task
    from gpt2lora.scoring.log_likelihood import TokenScores
    from gpt2lora.scoring.windows import Windows

POSITION_BUCKETS = 32  # rows of metrics/positions.csv
LEAK_PERPLEXITY = 1.5  # no model reaches a lower perplexity on real text
# A model that knows nothing but a large dictionary, and guesses, has this word perplexity: more tells nothing.
MAX_WORD_PERPLEXITY = 100_000
MAX_EXPONENT = 700.0  # nats: the exponential of more comes near what a float can hold


def compute_metrics(scores: "TokenScores", task: "Task") -> dict[str, float]:
    """Return loss (nats/token), perplexity, word_perplexity, bits_per_byte, accuracy and top5_accuracy (shares)."""
    nll = float(scores.nll.sum())
    loss = nll / len(scores.nll)
    if not math.isfinite(loss):
        raise StageError(f"evaluate: the loss is {loss}: the model is broken; train again with a lower learning rate")
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, MAX_EXPONENT)),
        "word_perplexity": math.exp(min(nll / task.words, MAX_EXPONENT)),
        "bits_per_byte": nll / math.log(2) / task.bytes,
        "accuracy": float((scores.ranks < 1).mean()),
        "top5_accuracy": float((scores.ranks < 5).mean()),
    }


def count_scored(task: "Task") -> dict[str, int]:
    """Return the numbers of tokens, words, bytes and windows behind the metrics."""
    return {
        "predicted_tokens": int(task.windows.counts.sum()),
        "words": task.words,
        "bytes": task.bytes,
        "windows": len(task.windows),
    }


def shows_words(*metrics: dict[str, float]) -> bool:
    """Tell whether word perplexities mean something to a reader: where a word is many tokens of a tiny vocabulary, a
    few tenths of a nat a token are a factor of 10. eval.json holds them in any case.
    """
    return max(each["word_perplexity"] for each in metrics) <= MAX_WORD_PERPLEXITY


def describe_metrics(metrics: dict[str, float]) -> str:
    """Return the metrics of a model in one line, with their units."""
    words = f", word perplexity {metrics['word_perplexity']:,.2f}" if shows_words(metrics) else ""
    return (
        f"loss {metrics['loss']:.4f} nats/token, perplexity {format_perplexity(metrics['perplexity'])}{words}, "
        f"{metrics['bits_per_byte']:.4f} bits/byte, share of tokens right {metrics['accuracy']:.4f}, "
        f"among the first five {metrics['top5_accuracy']:.4f}"
    )


def format_perplexity(perplexity: float) -> str:
    """Return a perplexity as text, short also if it was capped."""
    return f"{perplexity:,.2f}" if perplexity < 1e9 else f"{perplexity:.2e}"


def warn_about_metrics(name: str, metrics: dict[str, float]) -> None:
    """Print a warning about a perplexity that is too low to be true, or that was capped."""
    perplexity = metrics["perplexity"]
    if perplexity < LEAK_PERPLEXITY:
        echo(
            f"evaluate: warning: the {name} model's perplexity, {perplexity:.4f}, is below {LEAK_PERPLEXITY}: on real "
            "text its labels probably leak: padding is counted, or the model sees what it predicts"
        )
    for metric in ("perplexity", "word_perplexity"):
        if metrics[metric] == math.exp(MAX_EXPONENT):
            cap = f"{metrics[metric]:.1e}, exp({MAX_EXPONENT:.0f})"
            echo(f"evaluate: warning: the {name} model's {metric} is capped at {cap}")


def write_positions(file: Path, windows: "Windows", scores: "dict[str, TokenScores]", block_size: int) -> None:
    """Write mean loss and accuracy by the number of tokens before a token in its window, in buckets of equal width.

    The column `position` is the smallest number of tokens in a bucket. Empty buckets are left out.
    """
    import numpy as np

    count = min(POSITION_BUCKETS, block_size)
    buckets = (windows.contexts - 1) * count // block_size
    tokens = np.bincount(buckets, minlength=count)
    columns = {f"{name}_loss": scored.nll for name, scored in scores.items()}
    columns |= {f"{name}_accuracy": scored.ranks < 1 for name, scored in scores.items()}
    sums = {name: np.bincount(buckets, values, minlength=count) for name, values in columns.items()}
    with file.open("w", newline="") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(["position", "tokens", *sums])
        for bucket in np.flatnonzero(tokens):
            first = -(-int(bucket) * block_size // count) + 1
            means = [float(values[bucket] / tokens[bucket]) for values in sums.values()]
            table.writerow([first, int(tokens[bucket]), *means])
