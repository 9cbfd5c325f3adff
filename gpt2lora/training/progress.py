"""What a run is about to do, and how long it will take: said before it costs hours."""

import time

from gpt2lora.dataset.blocks import Blocks
from gpt2lora.pipeline.cli import echo
from gpt2lora.pipeline.schemas import TrainParams
from gpt2lora.training.state import History, TrainState

FIRST, LAST = 3, 10  # steps of a run between which the time of a step is measured; the first ones take longer
LONG_VALIDATION = 30  # seconds


def echo_plan(train: Blocks, validation: Blocks, options: TrainParams, steps: int) -> None:
    """Print the numbers of steps, tokens and validations, and whether a batch is more than the data."""
    rows = options.batch_size * options.accumulation_steps
    if rows > len(train):
        echo(
            f"train: warning: batch_size {options.batch_size:,} x accumulation_steps {options.accumulation_steps:,} is "
            f"more than the {len(train):,} rows of train: each step reads them all"
        )
    epochs = "1 epoch" if options.epochs == 1 else f"{options.epochs:,} epochs"
    echo(
        f"train: {epochs} of {steps // options.epochs:,} steps, {steps:,} steps in all, on "
        f"{options.epochs * train.targets:,} tokens; {1 + min(options.validations, steps):,} validations on "
        f"{validation.targets:,} tokens each"
    )


def echo_validation_time(seconds: float, options: TrainParams, steps: int) -> None:
    """Print how long the validation before training took, if that is long."""
    if seconds > LONG_VALIDATION:
        count = min(options.validations, steps)
        echo(f"train: a validation takes {format_seconds(seconds)}; {count:,} more are to come: train.validations")


def echo_validation(history: History, steps: int) -> None:
    """Print the loss of the last validation."""
    row = history.rows[-1] if history.rows else {"step": 0, "validation_loss": history.start_loss}
    is_lowest = row is history.best and row["validation_loss"] < history.start_loss
    lowest = ", the lowest so far" if is_lowest else ""
    echo(f"train: step {row['step']:,} of {steps:,}: validation loss {row['validation_loss']:.4f} nats/token{lowest}")


def echo_early_end(history: History, patience: int, steps: int) -> None:
    """Print that training ends before its last step, and why."""
    echo(
        f"train: ends early, after step {history.rows[-1]['step']:,} of {steps:,}: no validation loss below that of "
        f"step {history.best['step']:,} in {patience:,} validations (train.patience)"
    )


class TimeLeft:
    """Tells once, after LAST steps of this process, how long the rest of the run takes."""

    def __init__(self, state: TrainState):
        self.start, self.seconds = state.step, 0.0

    def after_step(self, state: TrainState, steps: int, validations: int) -> str | None:
        """Return the line to print after a step, or None. validations: those of the whole run."""
        if state.step not in (self.start + FIRST, self.start + LAST) or state.step == steps:
            return None
        float(state.losses[-1] if state.losses else 0)  # waits for the device
        seconds = state.history.seconds + time.perf_counter() - state.clock  # of training, without validations
        if state.step == self.start + FIRST:
            self.seconds = seconds
            return None
        left = (steps - state.step) * (seconds - self.seconds) / (LAST - FIRST)
        count = min(validations, steps) - len(state.history.rows)
        text = f"{count:,} validations not counted"
        if state.validation_seconds is not None:
            left += count * state.validation_seconds
            text = f"{format_seconds(count * state.validation_seconds)} of it in {count:,} validations"
        return f"train: about {format_seconds(left)} left after step {state.step:,} of {steps:,}, {text}"


def format_seconds(seconds: float) -> str:
    """Return a duration in words: "5 s", "12 min" or "3.4 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
