"""Rows to train on, the gradient of one step over them, and copies of a model's parameters to compare."""

import numpy as np
import pytest
import torch

from gpt2lora.dataset import blocks
from gpt2lora.model.device import pick_device
from gpt2lora.training import accumulation, execution

END = 0  # <|endoftext|> of the tiny tokenizer, which is the padding, too
LENGTHS = [17, 3, 9, 2, 12, 17, 5, 6, 8, 2, 11]
on_gpu = pytest.mark.skipif(pick_device().type != "cuda", reason="needs a GPU and TEST_ON_GPU=1")


def make_rows(lengths: list[int], seed: int = 0, block_size: int = 16, low: int = 1, high: int = 300) -> blocks.Blocks:
    """Return rows of random ids with these lengths, each ending in a real end of text, as `pad_texts` makes them."""
    random = np.random.default_rng(seed)
    texts = [np.append(random.integers(low, high, length - 1), END).astype(np.uint16) for length in lengths]
    return blocks.pad_texts(texts, block_size, END)


def trained_values(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the trainable parameters."""
    return {name: value.detach().clone() for name, value in network.named_parameters() if value.requires_grad}


def frozen_values(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the frozen parameters."""
    return {name: value.detach().clone() for name, value in network.named_parameters() if not value.requires_grad}


def all_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Tell whether both hold the same names and the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def step_gradients(
    network: torch.nn.Module,
    split: blocks.Blocks,
    rows: np.ndarray,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the summed loss of one step over some rows, in nats, and its gradients, without dropout."""
    network.eval()
    network.zero_grad()
    backward = execution.eager_backward(network, dtype)
    trained = [value for value in network.parameters() if value.requires_grad]
    batches = accumulation.split_step(rows, batch_size, 0, 1)
    nll = accumulation.accumulate_gradients(backward, trained, split, batches, split.count_targets(rows))
    return float(nll), {name: value.grad.clone() for name, value in network.named_parameters() if value.requires_grad}
