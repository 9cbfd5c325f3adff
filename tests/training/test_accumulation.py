"""The sum over a step's micro-batches: its order, its random numbers, and what it keeps in memory."""

import weakref

import numpy as np
import pytest
import torch
from training_steps import make_rows

from gpt2lora.training import accumulation, reduction
from gpt2lora.training.execution import Backward

SPLIT = make_rows([17] * 64)


def random_backward(trained: list[torch.Tensor], overwrites: bool = False) -> Backward:
    """Return a backward pass whose gradients are random numbers of the micro-batch, so that their order shows in sums.

    overwrites: write them into the same memory each time, as a CUDA graph does.
    """
    static = [torch.zeros_like(parameter) for parameter in trained]

    def compute(inputs, targets, count):
        new = [torch.randn(parameter.shape) * 10 ** torch.randn(parameter.shape) for parameter in trained]
        if overwrites:
            new = [buffer.copy_(value) for buffer, value in zip(static, new, strict=True)]
        for parameter, value in zip(trained, new, strict=True):
            if parameter.grad is None:
                parameter.grad = value
            else:
                parameter.grad = parameter.grad + value
        return torch.randn(())

    return Backward(compute, torch.device("cpu"), None, overwrites=overwrites)


def sum_step(accumulation_steps: int, present: int, processes: int, overwrites: bool = False) -> list[torch.Tensor]:
    """Return gradients and loss of a step with so many micro-batches, as so many processes sum them."""
    trained = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 5)]
    batches = accumulation.split_step(np.arange(2 * present), 2, seed=0, step=1)
    block, sums = accumulation_steps // processes, []
    for start in range(0, present, block):
        own = batches[start : start + block]
        backward = random_backward(trained, overwrites)
        length = accumulation.run_length(accumulation_steps)
        loss = accumulation.accumulate_gradients(backward, trained, SPLIT, own, 1, length)
        sums.append([*(parameter.grad.clone() for parameter in trained), loss])
        for parameter in trained:
            parameter.grad = None
    return [reduction.tree_sum(torch.stack(parts)) for parts in zip(*sums, strict=True)]


@pytest.mark.parametrize("accumulation_steps", [1, 2, 3, 4, 6, 8, 12, 16])
def test_the_sum_does_not_depend_on_the_number_of_processes(accumulation_steps):
    for present in range(1, accumulation_steps + 1):
        expected = sum_step(accumulation_steps, present, 1)
        for processes in (2, 4, 8, 16):
            if accumulation_steps % processes == 0:
                found = sum_step(accumulation_steps, present, processes)
                assert all(map(torch.equal, found, expected)), (present, processes)


@pytest.mark.parametrize("accumulation_steps", [1, 2, 4, 8])
def test_gradients_that_each_call_overwrites_are_summed(accumulation_steps):
    for present in range(1, accumulation_steps + 1):
        found = sum_step(accumulation_steps, present, 1, overwrites=True)
        assert all(map(torch.equal, found, sum_step(accumulation_steps, present, 1))), present


def test_the_sum_is_a_binary_tree():
    one, other = torch.tensor([1e8, 0.0]), torch.tensor([1.0, 0.0])
    rows = torch.stack([one, other, -one, other])
    assert reduction.tree_sum(rows).tolist() == [0.0, 0.0], "(1e8 + 1) + (-1e8 + 1) in fp32"
    assert sum(rows).tolist() == [1.0, 0.0], "one after the other"


@pytest.mark.parametrize(("accumulation_steps", "copies"), [(1, 1), (2, 2), (3, 1), (4, 3), (8, 4), (16, 5), (12, 3)])
def test_a_step_holds_few_copies_of_the_gradients(accumulation_steps, copies):
    parameter, alive, most = torch.nn.Parameter(torch.zeros(2)), weakref.WeakSet(), 0

    def compute(inputs, targets, count):
        nonlocal most
        if parameter.grad is None:
            parameter.grad = torch.ones(2)
            alive.add(parameter.grad)
        most = max(most, len(alive))
        return torch.zeros(())

    batches = accumulation.split_step(np.arange(accumulation_steps), 1, 0, 1)
    length = accumulation.run_length(accumulation_steps)
    backward = Backward(compute, torch.device("cpu"), None)
    accumulation.accumulate_gradients(backward, [parameter], SPLIT, batches, 1, length)
    assert most == copies


def test_each_micro_batch_has_random_numbers_of_its_own():
    seeds = {
        accumulation.micro_batch_seed(*key) for key in [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0), (2**64 - 1, 1, 0)]
    }
    assert len(seeds) == 5
    assert accumulation.micro_batch_seed(0, 1, 0) in seeds
