"""The training loop: all that happens between a model with something to train and the same model, trained."""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from gpt2lora.dataset.blocks import Rows
from gpt2lora.model.device import compute_dtype
from gpt2lora.model.head import check_head
from gpt2lora.pipeline.cli import say
from gpt2lora.scoring import log_likelihood
from gpt2lora.training import execution
from gpt2lora.training.config import Train
from gpt2lora.training.divergence import check_finite, check_norms, diverged
from gpt2lora.training.loss import batch
from gpt2lora.training.optimizer import learning_groups, learning_rate

if TYPE_CHECKING:
    from gpt2lora.training.checkpoint import Checkpoints

LOOK_EVERY = 10  # steps between two looks, each of which waits for the device


@dataclass
class History:
    """What training did. rows: one dict a validation, as in metrics/loss.csv."""

    rows: list[dict]
    start_loss: float  # validation loss before the first step, nats
    best: dict  # the row with the lowest validation loss
    tokens: int  # trained on, over all epochs
    seconds: float  # without validation

    def add(self, step: int, train_loss: float, validation_loss: float, rate: float, gradient_norm: float) -> None:
        self.rows.append(
            {
                "step": step,
                "tokens": self.tokens,
                "train_loss": train_loss,  # mean since the row before
                "validation_loss": validation_loss,
                "learning_rate": rate,
                "gradient_norm": gradient_norm,  # of this step, before clipping
            }
        )
        if validation_loss < self.best["validation_loss"]:
            self.best = self.rows[-1]


@dataclass
class State:
    """Where training stands after a step, beside what model and optimizer hold."""

    step: int
    history: History
    best_values: list[torch.Tensor]  # of the trained parameters, on the CPU
    losses: list[torch.Tensor]  # of the steps since the last validation, summed over their tokens, nats; on the device
    counts: list[int]  # those tokens
    norms: list[torch.Tensor] = field(default_factory=list)  # of the gradient, since the last look; on the device
    lowest_norm: float = math.inf  # of a gradient that was usual

    def add(self, step: int, loss: torch.Tensor, norm: torch.Tensor, tokens: int) -> None:
        self.step = step
        self.losses.append(loss)
        self.norms.append(norm)
        self.counts.append(tokens)
        self.history.tokens += tokens

    def take_train_loss(self) -> float:
        """Return the mean loss a token since the last validation, nats, and begin anew."""
        mean = sum(torch.stack(self.losses).tolist()) / sum(self.counts)
        self.losses, self.counts = [], []
        return mean


def fit(
    model: torch.nn.Module,
    train: Rows,
    validation: Rows,
    options: Train,
    seed: int,
    checkpoints: "Checkpoints | None" = None,
) -> History:
    """Train the parameters of `model` that require gradients; leave it with the values of lowest validation loss.

    Args:
        checkpoints: where to go on from, if there is one, and where to write more.

    Raises:
        Stop: a loss or the gradient of a step is not finite; the model is none that `scoring` can score; the disk is
            full.
        SystemExit: a signal asked to stop; a checkpoint is written.
    """
    device = next(model.parameters()).device
    dtype = compute_dtype(options.precision, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = learning_groups(model, options.lora_plus_ratio)
    optimizer = torch.optim.AdamW(groups, options.learning_rate, weight_decay=options.weight_decay, fused=True)
    rows_a_step = options.batch_size * options.accumulation_steps
    steps = options.epochs * math.ceil(len(train) / rows_a_step)
    set_dropout(model, options.base_dropout)

    state = resume(checkpoints, trained, optimizer, steps)
    if state is None:
        check_head(model, validation.width)
        loss = log_likelihood.loss(model, validation, options.batch_size, dtype, "validation before training")
        state = State(0, History([], loss, {"validation_loss": math.inf}, 0, 0.0), [], [], [])
    history = state.history
    model.train()
    add = execution.prepare(model, train, options.batch_size, options.compile, steps, dtype)
    started, stopping = time.perf_counter(), False
    order = itertools.islice(batches(len(train), rows_a_step, options.epochs, seed), state.step, None)
    with tqdm(total=steps, initial=state.step, desc="train", unit="step", mininterval=0.5) as bar:
        for step, places in enumerate(order, start=state.step + 1):
            rate = learning_rate(step, steps, options)
            # Asked before a step and read when it is begun, so that the device has work while Python reads.
            numbers = ask(state) if state.norms and state.step % LOOK_EVERY == 0 else None
            loss, norm = take_step(optimizer, trained, add, train, places, rate, options)
            if numbers:
                look(state, numbers, started, bar)
            state.add(step, loss, norm, train.targets_of(places))
            bar.update()
            validate = step * options.validations // steps > (step - 1) * options.validations // steps
            if validate:
                look(state, ask(state), started, bar)
                history.seconds += time.perf_counter() - started
                train_loss = state.take_train_loss()
                bar.clear()
                with add.between():
                    label = f"validation at step {step}"
                    found = log_likelihood.loss(model, validation, options.batch_size, dtype, label)
                if not math.isfinite(found):
                    raise diverged("validation loss", found, step)
                history.add(step, train_loss, found, rate, float(norm))
                if history.best is history.rows[-1]:
                    state.best_values = [parameter.detach().to("cpu", copy=True) for parameter in trained]
                started = time.perf_counter()
            stopping = bool(checkpoints and checkpoints.caught)
            if checkpoints and checkpoints.due(step, stopping):
                if state.norms:  # or a run would go on from NaN
                    look(state, ask(state), started, bar)
                history.seconds += time.perf_counter() - started
                started = time.perf_counter()
                record = {"counts": state.counts, "history": asdict(history)}
                checkpoints.write(step, trained, optimizer, state.best_values, state.losses, record)
            if stopping:
                break
    if stopping:
        checkpoints.stop(state.step, steps)
    with torch.no_grad():
        for parameter, value in zip(trained, state.best_values, strict=True):
            parameter.copy_(value)
    return history


def resume(
    checkpoints: "Checkpoints | None",
    trained: list[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
) -> State | None:
    """Put parameters and optimizer where the newest checkpoint has them; return the rest of it, or None without one."""
    found = checkpoints and checkpoints.resume(trained, optimizer)
    if not found:
        return None
    step, best_values, losses, record = found
    say(f"train: going on after step {step} of {steps}, from {checkpoints.folder}")
    return State(step, History(**record["history"]), best_values, losses, record["counts"])


def take_step(
    optimizer: torch.optim.Optimizer,
    trained: list[torch.Tensor],
    add: execution.Gradient,
    train: Rows,
    places: np.ndarray,
    rate: float,
    options: Train,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Train on the rows at `places`; return their summed loss, nats, and the norm of the gradient before clipping."""
    loss = accumulate(add, train, places, options.batch_size)
    norm = torch.nn.utils.clip_grad_norm_(trained, options.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


def ask(state: State) -> Callable[[], tuple[list[float], list[float], float]]:
    """Begin to bring from the device the losses and the gradients' norms of the steps that no look has seen.

    Returns:
        What waits for these steps, not for those begun since, and returns the losses, the norms, and the time at which
        they were there.
    """
    numbers = torch.stack([*state.losses[-len(state.norms) :], *state.norms]).view(2, -1)
    if numbers.device.type != "cuda":
        found = (*numbers.tolist(), time.perf_counter())
        return lambda: found
    here, arrived = numbers.to("cpu", non_blocking=True), torch.cuda.Event()  # into pinned memory: Python goes on
    arrived.record()

    def wait() -> tuple[list[float], list[float], float]:
        arrived.synchronize()
        return (*here.tolist(), time.perf_counter())

    return wait


def look(state: State, numbers: Callable, started: float, bar: tqdm) -> None:
    """Check and show how the steps up to `state.step` went that no look has seen.

    Args:
        numbers: what `ask` returned; no step has been added to `state` since.
        started: when training began, or went on after a validation or a checkpoint.

    Raises:
        Stop: one of them diverged.
    """
    losses, norms, now = numbers()
    check_finite(losses, state.step)
    state.lowest_norm, state.norms = check_norms(norms, state.lowest_norm, state.step), []
    speed = state.history.tokens / (state.history.seconds + now - started)
    bar.set_postfix_str(f"loss {losses[-1] / state.counts[-1]:.4f} nats/token, {speed:,.0f} tokens/s")


def accumulate(add: execution.Gradient, train: Rows, places: np.ndarray, batch_size: int) -> torch.Tensor:
    """Add up the gradient of the mean loss over all predicted tokens of a step; return the summed loss, nats.

    Each batch's sum is divided by the step's number of tokens: a mean of the batches' means would weigh the
    tokens of a short batch more.
    """
    count = torch.full((), train.targets_of(places), dtype=torch.float32, device=add.device)
    total = torch.zeros((), device=add.device)
    for part in np.split(places, range(batch_size, len(places), batch_size)):
        total += add(*batch(train, part, add.device, add.shape), count)
    return total


def batches(rows: int, size: int, epochs: int, seed: int):
    """Yield the places of the rows of each step: every row once an epoch, in an order of its own."""
    random = np.random.default_rng(seed)
    for _ in range(epochs):
        yield from np.split(random.permutation(rows), range(size, rows, size))


def set_dropout(model: torch.nn.Module, share: float) -> None:
    """Set the base's own dropout; the adapters' dropout, whose modules have names of their own, stays."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" not in name:
            module.p = share
        for key, value in vars(module).items():
            if "dropout" in key and isinstance(value, float):  # what a module hands to a function
                setattr(module, key, share)
