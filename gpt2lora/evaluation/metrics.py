"""The figures of metrics/eval.json and metrics/positions.csv, and warnings about odd ones."""

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2lora.pipeline.cli import Stop, say

if TYPE_CHECKING:
    from gpt2lora.evaluation.protocols import Task
    from gpt2lora.scoring.log_likelihood import Likelihood
    from gpt2lora.scoring.windows import Windows

BUCKETS = 32  # rows of metrics/positions.csv
LEAK = 1.5  # a perplexity that no model reaches on real text
HIGHEST = 700.0  # nats: exp of more is, or comes near, more than a float holds


def figures(found: "Likelihood", task: "Task") -> dict[str, float]:
    nll = float(found.nll.sum())
    loss = nll / len(found.nll)
    if not math.isfinite(loss):
        raise Stop(f"evaluate: the loss is {loss}: the model is broken; train again with a lower learning rate")
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, HIGHEST)),
        "word_perplexity": math.exp(min(nll / task.words, HIGHEST)),
        "bits_per_byte": nll / math.log(2) / task.bytes,
        "accuracy": float((found.ranks < 1).mean()),
        "top5_accuracy": float((found.ranks < 5).mean()),
    }


def counts(task: "Task") -> dict[str, int]:
    predicted = int(task.windows.counts.sum())
    return {
        "predicted_tokens": predicted,
        "words": task.words,
        "bytes": task.bytes,
        "windows": len(task.windows),
    }


def warn(name: str, scores: dict[str, float]) -> None:
    """Say what is odd about a model's figures."""
    if scores["perplexity"] < LEAK:
        say(
            f"evaluate: warning: the {name} model's perplexity, {scores['perplexity']:.4f}, is below {LEAK}: on real "
            "text its labels probably leak: padding is counted, or the model sees what it predicts"
        )
    for figure in ("perplexity", "word_perplexity"):
        if scores[figure] == math.exp(HIGHEST):
            say(f"evaluate: warning: the {name} model's {figure} is capped at {scores[figure]:.1e}, exp({HIGHEST:.0f})")


def write_positions(file: Path, windows: "Windows", found: "dict[str, Likelihood]", block_size: int) -> None:
    """Write the means of the tokens that were predicted from as many tokens, in buckets of equal width.

    `position` is the smallest number of tokens that a bucket's were predicted from. Buckets without any are left out.
    """
    import numpy as np

    buckets = min(BUCKETS, block_size)
    places = (windows.contexts - 1) * buckets // block_size
    tokens = np.bincount(places, minlength=buckets)
    columns = {f"{name}_loss": scored.nll for name, scored in found.items()}
    columns |= {f"{name}_accuracy": scored.ranks < 1 for name, scored in found.items()}
    sums = {name: np.bincount(places, values, minlength=buckets) for name, values in columns.items()}
    with file.open("w", newline="") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(["position", "tokens", *sums])
        for bucket in np.flatnonzero(tokens):
            first = -(-int(bucket) * block_size // buckets) + 1
            means = [float(values[bucket] / tokens[bucket]) for values in sums.values()]
            table.writerow([first, int(tokens[bucket]), *means])
