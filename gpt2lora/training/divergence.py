"""Where training diverges: it stops at a loss or a gradient that is not finite, and warns of one that explodes."""

import math
import statistics

from gpt2lora.pipeline.cli import Stop, say

EXPLOSION = 100  # times the lowest usual norm of the gradient: worth a warning


def check_finite(numbers: list[float], step: int, what: str = "loss") -> None:
    """Stop at the first loss that is not finite; `numbers` are those of the last steps up to `step`."""
    for place, number in enumerate(numbers, start=step - len(numbers) + 1):
        if not math.isfinite(number):
            raise diverged(what, number, place)


def check_norms(norms: list[float], lowest: float, step: int) -> float:
    """Stop at a gradient that is not finite, warn of one that explodes; return the lowest usual norm so far.

    Args:
        norms: of the last steps up to `step`, before clipping; their median is what was usual among them.
    """
    check_finite(norms, step, "norm of the gradient")
    largest = max(norms)
    if largest > EXPLOSION * lowest:
        say(
            f"train: warning: the gradient explodes: norm {largest:.3g} near step {step}, {lowest:.3g} before: lower "
            "train.learning_rate or raise train.warmup_fraction"
        )
    return min(lowest, statistics.median_low(norms))


def diverged(what: str, found: float, step: int) -> Stop:
    return Stop(
        f"train: the {what} is {found} at step {step}: lower train.learning_rate, raise train.warmup_fraction, "
        "or set train.precision to fp32"
    )
