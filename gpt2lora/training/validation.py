"""Validations of a run: before its first step, and after some of the others; a signal ends one at its next batch."""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from gpt2lora.dataset.blocks import Blocks
from gpt2lora.model.computation_errors import computation_errors
from gpt2lora.pipeline.schemas import TrainParams
from gpt2lora.scoring.log_likelihood import ScoringStopped, validation_loss
from gpt2lora.training import progress
from gpt2lora.training.divergence import check_finite
from gpt2lora.training.execution import Backward
from gpt2lora.training.optimizer import lr_at_step
from gpt2lora.training.state import History, TrainState

if TYPE_CHECKING:
    from gpt2lora.training.checkpoint import Checkpoints


def first_state(
    model: torch.nn.Module,
    validation: Blocks,
    options: TrainParams,
    dtype: torch.dtype,
    steps: int,
    checkpoints: "Checkpoints | None",
) -> TrainState:
    """Return the state before the first step."""
    started = time.perf_counter()
    label = "validation before training"
    try:
        with computation_errors(model, dtype, "train.precision"):
            loss = validation_loss(model, validation, options.batch_size, dtype, label, stop_check(checkpoints))
    except ScoringStopped:
        checkpoints.stop(0, steps)
    state = TrainState(0, History([], loss, {"validation_loss": math.inf}, 0, 0.0), [], [], [])
    state.validation_seconds = time.perf_counter() - started
    progress.echo_validation_time(state.validation_seconds, options, steps)
    return state


def stop_check(checkpoints: "Checkpoints | None") -> Callable[[], bool]:
    """Return a function that tells whether a signal asked to stop."""
    return lambda: bool(checkpoints and checkpoints.caught)


def validate(
    model: torch.nn.Module,
    validation: Blocks,
    backward: Backward,
    state: TrainState,
    steps: int,
    trained: list[torch.Tensor],
    options: TrainParams,
    dtype: torch.dtype,
    stops: Callable[[], bool],
) -> None:
    """Add the validation after a step to the state; stop if its loss is not finite.

    A signal ends it at its next batch. Then `state.unvalidated` stays set, and a resumed run begins with it.
    """
    label = f"validation at step {state.step}"
    try:
        with backward.share_memory():
            loss = validation_loss(model, validation, options.batch_size, dtype, label, stops)
    except ScoringStopped:
        state.stopping = True
        return
    check_finite([loss], state.step, "validation loss")
    state.add_validation(loss, lr_at_step(state.step, steps, options), state.unvalidated, trained)
    state.unvalidated = None
