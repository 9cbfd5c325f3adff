"""The training loop: all that happens between a model with something to train and the same model, trained."""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from stages import params
from stages.command import Stop
from stages.device import PRECISIONS, compute_dtype
from stages.rows import Rows
from stages.scoring import batch, check_head, nll_sum, score

LOOK_EVERY = 10  # steps between reading the loss back from the device, which waits for it


@dataclass
class Train:
    epochs: int
    batch_size: int
    accumulation_steps: int
    learning_rate: float
    lora_plus_ratio: float
    warmup_fraction: float
    weight_decay: float
    clip_norm: float
    base_dropout: float
    precision: str
    validations: int

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulation_steps", "validations"):
            params.require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "an integer above 0")
        for name in ("learning_rate", "lora_plus_ratio", "clip_norm"):
            number = getattr(self, name)
            params.require(0 < number < math.inf, f"train.{name}", number, "a number above 0")
        for name in ("warmup_fraction", "base_dropout"):
            share = getattr(self, name)
            params.require(0 <= share < 1, f"train.{name}", share, "a number of at least 0, below 1")
        params.require(0 <= self.weight_decay < math.inf, "train.weight_decay", self.weight_decay, "0 or more")
        known = self.precision in PRECISIONS
        params.require(known, "train.precision", self.precision, f"one of {', '.join(PRECISIONS)}")


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


def fit(model: torch.nn.Module, train: Rows, validation: Rows, options: Train, seed: int) -> History:
    """Train the parameters of `model` that require gradients; leave it with the values of lowest validation loss.

    Raises:
        Stop: the loss of a step is not finite.
    """
    device = next(model.parameters()).device
    dtype = compute_dtype(options.precision, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = learning_groups(model, options.lora_plus_ratio)
    optimizer = torch.optim.AdamW(groups, options.learning_rate, weight_decay=options.weight_decay, fused=True)
    rows_a_step = options.batch_size * options.accumulation_steps
    steps = options.epochs * math.ceil(len(train) / rows_a_step)
    set_dropout(model, options.base_dropout)
    check_head(model)

    start_loss = score(model, validation, options.batch_size, dtype, "validation before training").loss
    history = History([], start_loss, {"validation_loss": math.inf}, 0, 0.0)
    best_values: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []  # summed over each step's tokens, since the last validation; on the device
    counts: list[int] = []  # those tokens
    model.train()
    started = time.perf_counter()
    with tqdm(total=steps, desc="train", unit="step", mininterval=0.5) as bar:
        for step, places in enumerate(batches(len(train), rows_a_step, options.epochs, seed), start=1):
            counts.append(train.targets_of(places))
            losses.append(accumulate(model, train, places, options.batch_size, dtype))
            norm = torch.nn.utils.clip_grad_norm_(trained, options.clip_norm)
            rate = learning_rate(step, steps, options)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["ratio"]
            optimizer.step()
            optimizer.zero_grad()

            history.tokens += counts[-1]
            bar.update()
            validate = step * options.validations // steps > (step - 1) * options.validations // steps
            if validate or step % LOOK_EVERY == 0:
                check_finite(losses, step)
                speed = history.tokens / (history.seconds + time.perf_counter() - started)
                bar.set_postfix_str(f"loss {float(losses[-1]) / counts[-1]:.4f} nats/token, {speed:,.0f} tokens/s")
            if validate:
                train_loss = sum(map(float, losses)) / sum(counts)
                history.seconds += time.perf_counter() - started
                bar.clear()
                found = score(model, validation, options.batch_size, dtype, f"validation at step {step}").loss
                if not math.isfinite(found):
                    raise diverged("validation loss", found, step)
                history.add(step, train_loss, found, rate, float(norm))
                if history.best is history.rows[-1]:
                    best_values = [parameter.detach().to("cpu", copy=True) for parameter in trained]
                losses, counts = [], []
                started = time.perf_counter()
    with torch.no_grad():
        for parameter, value in zip(trained, best_values, strict=True):
            parameter.copy_(value)
    return history


def accumulate(
    model: torch.nn.Module, train: Rows, places: np.ndarray, batch_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Add up the gradient of the mean loss over all predicted tokens of a step; return the summed loss, nats.

    Each batch's sum is divided by the step's number of tokens: a mean of the batches' means would weigh the
    tokens of a short batch more.
    """
    count = train.targets_of(places)
    total = torch.zeros((), device=next(model.parameters()).device)
    for part in np.split(places, range(batch_size, len(places), batch_size)):
        nll = nll_sum(model, *batch(train, part, total.device), dtype)
        (nll / count).backward()
        total += nll.detach()
    return total


def batches(rows: int, size: int, epochs: int, seed: int):
    """Yield the places of the rows of each step: every row once an epoch, in an order of its own."""
    random = np.random.default_rng(seed)
    for _ in range(epochs):
        yield from np.split(random.permutation(rows), range(size, rows, size))


def learning_rate(step: int, steps: int, options: Train) -> float:
    """Return the rate of a step, counted from 1: linear warm-up, then half a cosine down to 0 after the last."""
    warmup = math.ceil(options.warmup_fraction * steps)
    if step <= warmup:
        return options.learning_rate * step / warmup
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / (steps - warmup)))


def learning_groups(model: torch.nn.Module, ratio: float) -> list[dict]:
    """Return AdamW's groups: the factors B learn at `ratio` times the rate of all else (LoRA+, arXiv:2402.12354)."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in trained if ".lora_B." not in name], "ratio": 1.0},
        {"params": [parameter for name, parameter in trained if ".lora_B." in name], "ratio": ratio},
    ]


def set_dropout(model: torch.nn.Module, share: float) -> None:
    """Set the base's own dropout; the adapters' dropout, whose modules have names of their own, stays."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" not in name:
            module.p = share
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = share


def check_finite(losses: list[torch.Tensor], step: int) -> None:
    """Stop at the first loss that is not finite; `losses` are those of the last steps up to `step`."""
    finite = torch.isfinite(torch.stack(losses)).tolist()
    if not all(finite):
        bad = step - len(losses) + 1 + finite.index(False)
        raise diverged("loss", float(losses[finite.index(False)]), bad)


def diverged(what: str, loss: float, step: int) -> Stop:
    return Stop(
        f"train: the {what} is {loss} at step {step}: lower train.learning_rate, raise train.warmup_fraction, "
        "or set train.precision to fp32"
    )
