"""What to do when a GPU's memory is too small for a step: how many rows fit, from the bytes that a token takes."""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from gpt2lora.pipeline.cli import Stop
from gpt2lora.training import execution
from gpt2lora.training.loop import accumulate

if TYPE_CHECKING:
    from gpt2lora.dataset.blocks import Rows
    from gpt2lora.training.config import Train


SPARE = 0.05  # share of the room for rows that is left for what the allocator cannot use


def too_large(model: torch.nn.Module, train: "Rows", options: "Train", dtype: torch.dtype) -> Stop:
    """Return the line for a step that did not fit, with a batch size that does."""
    batch_size, tokens = options.batch_size, train.width
    asked = f"train: out of memory at train.batch_size {batch_size}"
    try:
        fixed, row, room = measure(model, train, dtype)
        fits = min(batch_size - 1, largest(fixed, row, room))
    except torch.OutOfMemoryError:
        fits = 0
    if fits < 1:
        return Stop(
            f"{asked}: not even a row of {tokens:,} tokens fits: lower tokenize.block_size, take a smaller model, or "
            "end what else uses the GPU (nvidia-smi)"
        )
    step = batch_size * options.accumulation_steps
    even = max(size for size in range(1, fits + 1) if step % size == 0)
    return Stop(
        f"{asked}: a token takes {row / tokens / 1e3:,.0f} kB, all else {fixed / 1e9:.2f} GB of {room / 1e9:.2f} GB, "
        f"so {fits} rows of {tokens:,} tokens fit; for the same steps: -S train.batch_size={even} "
        f"-S train.accumulation_steps={step // even}"
    )


def largest(fixed: int, row: int, room: int) -> int:
    """Return how many rows of `row` bytes each fit into `room` bytes beside the `fixed` ones."""
    return max(0, math.floor((room - fixed) * (1 - SPARE) / row))


def measure(model: torch.nn.Module, train: "Rows", dtype: torch.dtype) -> tuple[int, int, int]:
    """Return bytes on the GPU: those of a step whatever its rows, those that each row adds, and all that may be used.

    Raises:
        torch.OutOfMemoryError: one row does not fit.
    """
    longest = np.array([train.lengths.argmax()])
    model.train()  # a validation that ran out of memory has left it in evaluation mode
    execution.wait_for_helpers()
    model.zero_grad()  # what a recorded step left keeps that step's memory from all others
    torch.cuda.empty_cache()
    room = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    add = execution.plain(model, dtype)
    accumulate(add, train, longest, 1)  # makes the gradients, which stay, and compiles for one row what is compiled
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    accumulate(add, train, longest, 1)
    row = torch.cuda.max_memory_allocated() - held
    state = 2 * sum(value.numel() * value.element_size() for value in model.parameters() if value.requires_grad)
    return held + state, row, room
