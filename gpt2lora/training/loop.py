"""The training loop: `fit` trains the parameters that require gradients, and keeps the best by validation loss."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from gpt2lora.dataset.blocks import Blocks
from gpt2lora.distributed import group
from gpt2lora.model.computation_errors import computation_errors
from gpt2lora.model.device import compute_dtype
from gpt2lora.model.head import check_head
from gpt2lora.pipeline.cli import echo
from gpt2lora.pipeline.progress_bar import progress_bar
from gpt2lora.pipeline.schemas import TrainParams
from gpt2lora.training import progress, reduction
from gpt2lora.training.accumulation import MicroBatch, accumulate_gradients, run_length, split_step
from gpt2lora.training.divergence import check_finite, check_gradient_norms
from gpt2lora.training.dropout import set_base_dropout
from gpt2lora.training.execution import Backward, prepare_backward
from gpt2lora.training.optimizer import lr_at_step, make_optimizer, set_lr
from gpt2lora.training.state import History, TrainState
from gpt2lora.training.validation import first_state, stop_check, validate

if TYPE_CHECKING:
    from tqdm import tqdm

    from gpt2lora.training.checkpoint import Checkpoints

LOG_INTERVAL = 10  # steps between two logs, each of which waits for the device


def fit(
    model: torch.nn.Module,
    train: Blocks,
    validation: Blocks,
    options: TrainParams,
    seed: int,
    checkpoints: "Checkpoints | None" = None,
    loss_file: Path | None = None,
) -> History:
    """Train the parameters of `model` that require gradients, and leave them at their lowest validation loss.

    Args:
        checkpoints: where to resume from, and where to write checkpoints.
        loss_file: a CSV file that is written at each validation.

    Raises:
        StageError: a loss or gradient is not finite, the model cannot be scored, or the disk is full.
        SystemExit: a signal asked to stop; a checkpoint was written.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dtype = compute_dtype(options.precision, trained[0].device)
    optimizer = make_optimizer(model, options)
    set_base_dropout(model, options.base_dropout)
    rows_per_step = options.batch_size * options.accumulation_steps
    steps = count_steps(len(train), options)
    progress.echo_plan(train, validation, options, steps)
    stops = stop_check(checkpoints)
    with computation_errors(model, dtype, "train.precision"):
        check_head(model, train.width)
    state = resume_state(checkpoints, trained, optimizer, steps)
    state = state or first_state(model, validation, options, dtype, steps, checkpoints)
    model.train()
    count = steps * options.accumulation_steps
    backward = prepare_backward(model, train, options.batch_size, options.compile, count, dtype)
    batches = itertools.islice(shuffled_batches(len(train), rows_per_step, options.epochs, seed), state.step, None)
    if state.unvalidated:  # the run that stopped had not validated its last step
        validate(model, validation, backward, state, steps, trained, options, dtype, stops)
        batches = () if state.stopping else batches
    if state.history.has_stalled(options.patience):  # the run that stopped had come to its early end
        batches = ()
    time_left = progress.TimeLeft(state)
    state.start_clock()

    with progress_bar("train", steps, "steps", initial=state.step) as bar:
        for rows in batches:
            # Copy the losses before this step and read them after it is launched: so the device is never idle.
            losses = fetch_losses_async(state) if state.norms and state.step % LOG_INTERVAL == 0 else None
            lr = lr_at_step(state.step + 1, steps, options)
            micro_batches = split_step(rows, options.batch_size, seed, state.step + 1)
            loss, norm = train_step(backward, optimizer, trained, train, micro_batches, lr, options)
            if losses:
                log_progress(state, losses, bar)
            state.add_step(loss, norm, train.count_targets(rows))
            if line := time_left.after_step(state, steps, options.validations):
                bar.clear()
                echo(line)
            bar.update()
            if is_validation_step(state.step, steps, options.validations):
                log_progress(state, fetch_losses_async(state), bar)
                state.stop_clock()
                bar.clear()
                state.unvalidated = True
                validate(model, validation, backward, state, steps, trained, options, dtype, stops)
                state.start_clock()
                if loss_file and group.is_main() and not state.stopping:
                    state.history.write_csv(loss_file)
            state.stopping = checkpoints.stop_requested() if checkpoints else 0
            if checkpoints and checkpoints.is_due(state.step, bool(state.stopping)):
                save_checkpoint(checkpoints, state, trained, optimizer, bar)
            if state.stopping or state.history.has_stalled(options.patience):
                break
    if state.stopping:
        checkpoints.stop(state.step, steps, state.stopping)
    if state.step < steps:
        progress.echo_early_end(state.history, options.patience, steps)
    load_values(trained, state.best_values)
    return state.history


def count_steps(rows: int, options: TrainParams) -> int:
    """Return the planned number of steps, by which the learning rate decays; train.patience may end a run earlier."""
    return options.epochs * math.ceil(rows / (options.batch_size * options.accumulation_steps))


def resume_state(
    checkpoints: "Checkpoints | None", trained: list[torch.Tensor], optimizer: torch.optim.Optimizer, steps: int
) -> TrainState | None:
    """Load the newest checkpoint into parameters and optimizer; return its state, or None without a checkpoint."""
    found = checkpoints and checkpoints.resume(trained, optimizer)
    if not found:
        return None
    step, best_values, losses, record = found
    echo(f"train: resuming after step {step} of {steps} from {checkpoints.folder}")
    state = TrainState(step, History(**record["history"]), best_values, losses, record["counts"])
    state.row_norms, state.unvalidated = record["row_norms"], record["unvalidated"]
    return state


def train_step(
    backward: Backward,
    optimizer: torch.optim.Optimizer,
    trained: list[torch.Tensor],
    train: Blocks,
    batches: list[MicroBatch],
    lr: float,
    options: TrainParams,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Train on some micro-batches; return their summed loss in nats and the norm of the gradient before clipping."""
    count = sum(train.count_targets(batch.rows) for batch in batches)
    block = options.accumulation_steps // group.size()  # micro-batches of a process
    own = batches[group.rank() * block : (group.rank() + 1) * block]
    loss = accumulate_gradients(backward, trained, train, own, count, run_length(options.accumulation_steps))
    reduction.sum_over_processes(trained, loss, present=math.ceil(len(batches) / block))
    norm = torch.nn.utils.clip_grad_norm_(trained, options.clip_norm)
    set_lr(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


def fetch_losses_async(state: TrainState) -> Callable[[], tuple[list[float], list[float], float]]:
    """Start copying the losses and gradient norms not yet logged to the host.

    Returns:
        A function that waits for the copy, not for steps launched since. It returns the losses, the norms, and the time
        of the copy.
    """
    values = torch.stack([*state.losses[-len(state.norms) :], *state.norms]).view(2, -1)
    if values.device.type != "cuda":
        result = (*values.tolist(), time.perf_counter())
        return lambda: result
    copy, copied = values.to("cpu", non_blocking=True), torch.cuda.Event()  # into pinned memory, without waiting
    copied.record()

    def wait() -> tuple[list[float], list[float], float]:
        copied.synchronize()
        return (*copy.tolist(), time.perf_counter())

    return wait


def log_progress(state: TrainState, fetched: Callable, bar: "tqdm") -> None:
    """Check the steps since the last log for divergence; update the progress bar.

    Args:
        fetched: the result of `fetch_losses_async`; no step was added to `state` since.

    Raises:
        StageError: a loss or gradient is not finite.
    """
    losses, norms, now = fetched()
    check_finite(losses, state.step)
    state.lowest_norm, state.norms = check_gradient_norms(norms, state.lowest_norm, state.step), []
    state.row_norms += norms
    speed = state.history.tokens / (state.history.seconds + now - state.clock)
    bar.set_postfix_str(f"loss {losses[-1] / state.counts[-1]:.4f} nats/token, {speed:,.0f} tokens/s", False)


def is_validation_step(step: int, steps: int, validations: int) -> bool:
    """Tell whether to validate after this step: `validations` times in all, evenly spaced, the last time at the end."""
    return step * validations // steps > (step - 1) * validations // steps


def save_checkpoint(
    checkpoints: "Checkpoints",
    state: TrainState,
    trained: list[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    bar: "tqdm",
) -> None:
    """Write a checkpoint, unless a step since the last log diverged: a run would resume from NaN."""
    if state.norms:
        log_progress(state, fetch_losses_async(state), bar)
    state.stop_clock()
    record = {"counts": state.counts, "row_norms": state.row_norms, "unvalidated": state.unvalidated}
    record["history"] = asdict(state.history)
    checkpoints.write(state.step, trained, optimizer, state.best_values, state.losses, record)


def load_values(trained: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Copy values into the trained parameters."""
    with torch.no_grad():
        for parameter, value in zip(trained, values, strict=True):
            parameter.copy_(value)


def shuffled_batches(rows: int, size: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the row numbers of each step: every row once an epoch, in another random order each epoch."""
    random = np.random.default_rng(seed)
    for _ in range(epochs):
        yield from np.split(random.permutation(rows), range(size, rows, size))
