"""The section `train` of params.yaml."""

import math
from dataclasses import dataclass

from gpt2lora.pipeline import params
from gpt2lora.pipeline.cli import StageError


@dataclass
class TrainParams:
    """The section `train`; params.yaml says what each key means."""

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
    compile: str
    deterministic: bool
    validations: int
    checkpoint_every: int | None

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulation_steps", "validations"):
            params.require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "an integer above 0")
        for name in ("learning_rate", "lora_plus_ratio", "clip_norm"):
            number = getattr(self, name)
            params.require(0 < number < math.inf, f"train.{name}", number, "a number above 0")
        for name in ("warmup_fraction", "base_dropout"):
            share = getattr(self, name)
            params.require(0 <= share < 1, f"train.{name}", share, "a number of at least 0, below 1")
        valid = self.checkpoint_every is None or self.checkpoint_every >= 0
        params.require(valid, "train.checkpoint_every", self.checkpoint_every, "an integer of at least 0, or null")
        params.require(0 <= self.weight_decay < math.inf, "train.weight_decay", self.weight_decay, "0 or more")
        known = self.precision in params.PRECISIONS
        params.require(known, "train.precision", self.precision, f"one of {', '.join(params.PRECISIONS)}")
        known = self.compile in ("auto", "always", "never")
        params.require(known, "train.compile", self.compile, "auto, always or never")


def choose_gpus(accumulation_steps: int, free: int) -> tuple[int, str]:
    """Return how many of the free GPUs to train on, the largest power of two that divides accumulation_steps; and why.

    Each GPU computes as many micro-batches of a step, and their number decides neither the steps nor the bytes.
    """
    count = 1
    while accumulation_steps % (2 * count) == 0 and 2 * count <= free:
        count *= 2
    reason = f"train.accumulation_steps is {accumulation_steps}, and {free} are free"
    if 2 * count <= free:
        reason += f"; to use {2 * count}, double train.accumulation_steps and halve train.batch_size"
    return count, reason


def check_processes(accumulation_steps: int, count: int) -> None:
    """Refuse a number of processes that the micro-batches of a step cannot be dealt out to."""
    largest, _ = choose_gpus(accumulation_steps, count)
    if largest != count:
        raise StageError(
            f"{count} processes were started, but train.accumulation_steps {accumulation_steps} is dealt out to "
            f"a power of two that divides it: start {largest}, or change train.accumulation_steps"
        )
