"""The state of a training run: its history, with one row for each validation, and what a resumed run continues from."""

import csv
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from gpt2lora.pipeline.artifacts import atomic_output


@dataclass
class History:
    """What happened in training so far."""

    rows: list[dict]  # of metrics/loss.csv, one for each validation
    start_loss: float  # validation loss before the first step, nats/token
    best: dict  # the row with the lowest validation loss
    tokens: int  # targets trained on, over all epochs
    seconds: float  # without validation

    def has_stalled(self, patience: int | None) -> bool:
        """Tell whether the last `patience` validations found no new lowest loss; None waits for ever."""
        return patience is not None and self.best in self.rows[:-patience]

    def write_csv(self, file: Path) -> None:
        """Write all rows, so that `dvc plots show` can draw a run that has not ended."""
        with atomic_output(file) as new, new.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, self.rows[0], lineterminator="\n")
            writer.writeheader()
            # Before training: nothing but a validation. Plots leave out what is no number.
            start = {"step": 0, "tokens": 0, "validation_loss": self.start_loss}
            writer.writerow(dict.fromkeys(self.rows[0], math.nan) | start)
            writer.writerows(self.rows)


@dataclass
class TrainState:
    """Where training stands after a step, apart from the model and the optimizer."""

    step: int
    history: History
    best_values: list[torch.Tensor]  # of the trained parameters at the lowest validation loss, on the CPU
    losses: list[torch.Tensor]  # of the steps since the last validation, summed over their tokens, nats; on the device
    counts: list[int]  # target tokens of these steps
    norms: list[torch.Tensor] = field(default_factory=list)  # of the gradients since the last log; on the device
    lowest_norm: float = math.inf  # lowest usual norm of the gradient
    clock: float = 0.0  # time.perf_counter() up to which history.seconds counts
    stopping: int = 0  # the signal that asked to stop
    row_norms: list[float] = field(default_factory=list)  # logged, of the steps since the last validation
    unvalidated: bool = False  # the validation after the last step is not done
    validation_seconds: float | None = None  # of the validation before training, if this process did it

    def add_step(self, loss: torch.Tensor, norm: torch.Tensor, tokens: int) -> None:
        """Add a step: its summed loss in nats, the norm of its gradient before clipping, and its target tokens."""
        self.step += 1
        self.losses.append(loss)
        self.norms.append(norm)
        self.counts.append(tokens)
        self.history.tokens += tokens

    def add_validation(self, loss: float, lr: float, trained: list[torch.Tensor]) -> None:
        """Add a row to the history; copy the trained parameters if their loss, in nats/token, is the lowest so far."""
        row = {
            "step": self.step,
            "tokens": self.history.tokens,
            "train_loss": sum(torch.stack(self.losses).tolist()) / sum(self.counts),  # mean since the row before
            "validation_loss": loss,
            "learning_rate": lr,
            "gradient_norm": math.fsum(self.row_norms) / len(self.row_norms),  # as well, before clipping
        }
        self.history.rows.append(row)
        if loss < self.history.best["validation_loss"]:
            self.history.best = row
            self.best_values = [parameter.detach().to("cpu", copy=True) for parameter in trained]
        self.losses, self.counts, self.row_norms, self.unvalidated = [], [], [], False

    def start_clock(self) -> None:
        self.clock = time.perf_counter()

    def stop_clock(self) -> None:
        """Add the time since `start_clock` to history.seconds, and start again."""
        now = time.perf_counter()
        self.history.seconds += now - self.clock
        self.clock = now
