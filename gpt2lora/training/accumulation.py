"""The gradient of a step as a sum over its micro-batches, in an order that does not depend on who computes them.

A step has up to `accumulation_steps` micro-batches. Each has random numbers of its own, from (seed, step, index), and
their gradients are summed in a fixed binary tree. With accumulation_steps = run_length * 2^k and an odd run_length, the
leaves are runs of run_length micro-batches, each summed one after the other. Any 2^j processes, j <= k, each compute a
contiguous block of the leaves, which is a whole subtree, and add the subtrees in the same order
(gpt2lora/training/reduction.py). So the sum is the same bits for any number of processes.
"""

from dataclasses import dataclass

import numpy as np
import torch

from gpt2lora.dataset.blocks import Blocks
from gpt2lora.training.execution import Backward
from gpt2lora.training.loss import make_batch


@dataclass
class MicroBatch:
    """Rows whose gradient is computed at once, and the seed of their random numbers."""

    rows: np.ndarray
    seed: int


def split_step(rows: np.ndarray, batch_size: int, seed: int, step: int) -> list[MicroBatch]:
    """Return the micro-batches of a step; the last one may be smaller.

    Args:
        seed: of the run. step: counted from 1.
    """
    parts = np.split(rows, range(batch_size, len(rows), batch_size))
    return [MicroBatch(part, micro_batch_seed(seed, step, index)) for index, part in enumerate(parts)]


def micro_batch_seed(seed: int, step: int, index: int) -> int:
    """Return 64 random bits for a micro-batch."""
    return int(np.random.SeedSequence(seed, spawn_key=(step, index)).generate_state(1, np.uint64)[0])


def run_length(accumulation_steps: int) -> int:
    """Return the largest odd divisor: so many micro-batches are summed one after the other."""
    return accumulation_steps // (accumulation_steps & -accumulation_steps)


def accumulate_gradients(
    backward: Backward,
    trained: list[torch.Tensor],
    train: Blocks,
    batches: list[MicroBatch],
    count: int,
    length: int = 1,
) -> torch.Tensor:
    """Set the gradients to those of the summed loss of some micro-batches / count; return the sum in nats.

    The parameters have no gradients yet. At most log2 of the number of runs copies of the gradients are held besides.

    Args:
        batches: whole runs of a step, except that a step's last run may be shorter.
        count: number of targets of the whole step. A mean of the batches' means would give the targets of a batch with
            fewer of them more weight.
        length: of a run.
    """
    divisor = torch.full((), count, dtype=torch.float32, device=backward.device)
    sums: list[tuple[int, list]] = []  # runs in a subtree, and its gradients and loss; each larger than the next one
    for start in range(0, len(batches), length):
        loss = torch.zeros((), device=backward.device)
        for batch in batches[start : start + length]:
            # A CUDA graph's kernels read the seed of the GPU's generator at each replay.
            torch.manual_seed(batch.seed)
            loss += backward(*make_batch(train, batch.rows, backward.device, backward.shape), divisor)
        runs, values = 1, [*take_gradients(trained), loss]
        while sums and sums[-1][0] == runs:
            runs, values = 2 * runs, add_values(sums.pop()[1], values)
        if runs == 1 and backward.overwrites and start + length < len(batches):
            values = [value if value is None else value.clone() for value in values]
        sums.append((runs, values))
    while len(sums) > 1:  # of a last step with fewer micro-batches
        _, values = sums.pop()
        sums[-1] = (0, add_values(sums[-1][1], values))
    if not sums:
        return torch.zeros((), device=backward.device)
    *gradients, loss = sums[0][1]
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    return loss


def take_gradients(trained: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """Return the gradients, and leave none."""
    gradients = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    return gradients


def add_values(left: list, right: list) -> list:
    """Return the sums, in place of `left`. None, of a parameter that had no part in a loss, adds nothing."""
    pairs = [(one, other) for one, other in zip(left, right, strict=True) if one is not None and other is not None]
    if pairs:
        torch._foreach_add_([one for one, _ in pairs], [other for _, other in pairs])
    return [other if one is None else one for one, other in zip(left, right, strict=True)]
