"""Validations of a run: before its first step, and after some of the others; a signal ends one at its next batch."""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from gpt2lora.dataset.blocks import Blocks
from gpt2lora.distributed import group
from gpt2lora.model.computation_errors import computation_errors
from gpt2lora.pipeline.schemas import TrainParams
from gpt2lora.scoring.log_likelihood import ScoringStopped, validation_loss
from gpt2lora.training import progress, reduction
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
        checkpoints.stop(0, steps, checkpoints.caught[0])
    check_finite([loss], 0, "validation loss")
    state = TrainState(0, History([], loss, {"validation_loss": math.inf}, 0, 0.0), [], [], [])
    state.validation_seconds = time.perf_counter() - started
    progress.echo_validation(state.history, steps)
    progress.echo_validation_time(state.validation_seconds, options, steps)
    return state


def stop_check(checkpoints: "Checkpoints | None") -> Callable[[], int] | None:
    """Return a function that returns the signal that asked to stop, or 0; None if nothing may end a validation.

    In a group a signal may reach one process alone, and the others would wait for its scores. They agree on it after
    the step, when the validation is done.
    """
    if not checkpoints or group.size() > 1:
        return None
    return lambda: checkpoints.caught[0] if checkpoints.caught else 0


def validate(
    model: torch.nn.Module,
    validation: Blocks,
    backward: Backward,
    state: TrainState,
    steps: int,
    trained: list[torch.Tensor],
    options: TrainParams,
    dtype: torch.dtype,
    stops: Callable[[], int] | None,
) -> None:
    """Add the validation after a step to the state; stop if its loss is not finite.

    A signal ends it at its next batch. Then `state.unvalidated` stays set, and a resumed run begins with it.
    """
    group.check_same({"values of the trained parameters": reduction.checksum([value.detach() for value in trained])})
    label = f"validation at step {state.step}"
    try:
        with computation_errors(model, dtype, "train.precision"), backward.share_memory():
            loss = validation_loss(model, validation, options.batch_size, dtype, label, stops)
    except ScoringStopped:
        state.stopping = stops()
        return
    check_finite([loss], state.step, "validation loss")
    state.add_validation(loss, lr_at_step(state.step, steps, options), trained)
    progress.echo_validation(state.history, steps)
