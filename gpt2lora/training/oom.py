"""Out of memory on a GPU: measure the memory of a token, and name a batch size that fits."""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from gpt2lora.pipeline.cli import StageError
from gpt2lora.training import execution
from gpt2lora.training.accumulation import accumulate_gradients, split_step

if TYPE_CHECKING:
    from gpt2lora.dataset.blocks import Blocks
    from gpt2lora.pipeline.schemas import TrainParams

SAFETY_MARGIN = 0.05  # share of the memory for rows that is left to the allocator's fragmentation


def oom_error(model: torch.nn.Module, train: "Blocks", options: "TrainParams", dtype: torch.dtype) -> StageError:
    """Return the error for a step that did not fit, with a batch size that does."""
    batch_size, tokens = options.batch_size, train.width
    start = f"train: out of memory at train.batch_size {batch_size}"
    try:
        fixed, row, available = measure_memory(model, train, dtype)
        fits = min(batch_size - 1, max_batch_size(fixed, row, available))
    except torch.OutOfMemoryError:
        fits = 0
    if fits < 1:
        return StageError(
            f"{start}: not even a row of {tokens:,} tokens fits: lower tokenize.block_size, take a smaller model, or "
            "end other programs that use the GPU (nvidia-smi)"
        )
    step_rows = batch_size * options.accumulation_steps
    divisor = max(size for size in range(1, fits + 1) if step_rows % size == 0)
    return StageError(
        f"{start}: a token takes {row / tokens / 1e3:,.0f} kB, all else {fixed / 1e9:.2f} GB of "
        f"{available / 1e9:.2f} GB, so {fits} rows of {tokens:,} tokens fit; for the same steps: "
        f"-S train.batch_size={divisor} -S train.accumulation_steps={step_rows // divisor}"
    )


def max_batch_size(fixed: int, row: int, available: int) -> int:
    """Return how many rows of `row` bytes fit into `available` bytes beside the `fixed` ones."""
    return max(0, math.floor((available - fixed) * (1 - SAFETY_MARGIN) / row))


def measure_memory(model: torch.nn.Module, train: "Blocks", dtype: torch.dtype) -> tuple[int, int, int]:
    """Return bytes on the GPU: of a step without its rows, of each row, and all that are available.

    Raises:
        torch.OutOfMemoryError: one row does not fit.
    """
    longest = split_step(np.array([train.lengths.argmax()]), 1, 0, 1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()  # a validation that ran out of memory leaves it in evaluation mode
    execution.wait_for_compile_workers()
    model.zero_grad()  # gradients of a captured graph keep its memory reserved
    torch.cuda.empty_cache()
    available = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    backward = execution.eager_backward(model, dtype)
    accumulate_gradients(backward, trained, train, longest, 1)  # creates the gradients, and compiles layers for one row
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    accumulate_gradients(backward, trained, train, longest, 1)
    row = torch.cuda.max_memory_allocated() - allocated
    state = 2 * sum(value.numel() * value.element_size() for value in model.parameters() if value.requires_grad)
    return allocated + state, row, available
