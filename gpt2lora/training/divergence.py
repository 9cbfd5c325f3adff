"""Detect that training diverges: stop at a loss or gradient that is not finite, warn of an exploding gradient."""

import math
import statistics

from gpt2lora.pipeline.cli import StageError, echo

EXPLOSION_FACTOR = 100  # times the lowest usual gradient norm: worth a warning


def check_finite(values: list[float], step: int, what: str = "loss") -> None:
    """Stop at the first value that is not finite.

    Args:
        values: of the last steps, up to `step`.
    """
    for value_step, value in enumerate(values, start=step - len(values) + 1):
        if not math.isfinite(value):
            raise divergence_error(what, value, value_step)


def check_gradient_norms(norms: list[float], lowest: float, step: int) -> float:
    """Stop at a gradient that is not finite, warn of one that explodes; return the lowest usual norm so far.

    Args:
        norms: of the last steps, up to `step`, before clipping. Their median is the usual norm among them.
        lowest: what the last call returned.
    """
    check_finite(norms, step, "norm of the gradient")
    largest = max(norms)
    if largest > EXPLOSION_FACTOR * lowest:
        echo(
            f"train: warning: the gradient explodes: norm {largest:.3g} near step {step}, {lowest:.3g} before: lower "
            "train.learning_rate or raise train.warmup_fraction"
        )
    return min(lowest, statistics.median_low(norms))


def divergence_error(what: str, value: float, step: int) -> StageError:
    """Return the error for a loss or norm that is not finite."""
    if step == 0:
        return StageError(f"train: the {what} is {value} before any step: the base's weights are damaged, or overflow")
    return StageError(
        f"train: the {what} is {value} at step {step}: lower train.learning_rate, raise train.warmup_fraction, "
        "or set train.precision to fp32"
    )
