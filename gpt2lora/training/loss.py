"""The training loss: the negative log-likelihood of blocks of tokens, with the output head and its loss fused.

Logits are by far the largest array of a small language model: with GPT-2's vocabulary, 1.6 GB in fp32 for 8 rows of
1,024 tokens, and autograd keeps several such arrays. Here the logits are computed for a chunk of tokens at a time, and
the gradient with respect to the hidden states is computed in the forward pass, while the chunk's logits are there
(as in Hsu et al., 2024, Liger Kernel, arXiv:2410.10989).
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from gpt2lora.dataset.blocks import Blocks
from gpt2lora.model.head import autocast, body_and_head, to_device

IGNORE_INDEX = -100  # as a target: not scored
CHUNK_TOKENS = {"cuda": 2048, "cpu": 256}
VOCABULARY_MULTIPLE = {"cuda": 64, "cpu": 1}  # to which the head's rows are padded: GPU products are slow otherwise


def softmax_nll(
    logits: torch.Tensor, targets: torch.Tensor, scored: torch.Tensor, vocabulary: int, dtype: torch.dtype
) -> torch.Tensor:
    """Replace logits by probabilities; return the summed negative log-likelihood of the targets in nats.

    Args:
        logits: (tokens, at least `vocabulary`); what lies beyond the vocabulary gets the probability 0.
        targets: (tokens,) int64. scored: (tokens, 1), 1 or 0: whether a token counts.
        dtype: the type in which to compute.
    """
    logits[:, vocabulary:] = -torch.inf  # a softmax of whole rows is faster than one of slices
    predicted = logits.log_softmax(-1, dtype=dtype)
    nll = -(predicted.gather(1, targets[:, None]) * scored).sum()
    logits.copy_(predicted.exp_())
    return nll


class LinearCrossEntropy(torch.autograd.Function):
    """The summed negative log-likelihood of `targets` under softmax(states weight^T), in nats.

    Args of apply:
        states: (tokens, width), any float type. weight: (vocabulary, width). targets: (tokens,) int64, or IGNORE_INDEX.
        dtype: of the matrix products. Softmax and sums are fp32, or fp64 if dtype is.
        softmax: `softmax_nll`, or a compiled version of it.
    """

    @staticmethod
    def forward(ctx, states, weight, targets, dtype, softmax=softmax_nll):
        sum_dtype = torch.promote_types(dtype, torch.float32)
        vocabulary = len(weight)
        head, missing = weight.to(dtype), -vocabulary % VOCABULARY_MULTIPLE[states.device.type]
        if missing:
            head = F.pad(head, (0, 0, 0, missing))
        chunk = CHUNK_TOKENS[states.device.type]
        nll = torch.zeros((), dtype=sum_dtype, device=states.device)
        needs_states, needs_weight = ctx.needs_input_grad[:2]
        states_gradient = torch.empty_like(states) if needs_states else None
        weight_gradient = torch.zeros_like(head, dtype=sum_dtype) if needs_weight else None
        for start in range(0, len(states), chunk):
            part, labels = states[start : start + chunk].to(dtype), targets[start : start + chunk]
            scored, labels = (labels != IGNORE_INDEX).to(dtype)[:, None], labels.clamp(min=0)
            logits = part @ head.T
            nll += softmax(logits, labels, scored, vocabulary, sum_dtype)
            # The gradient of the logits is now in them, except for the 1 to be subtracted at the target.
            if needs_states:
                states_gradient[start : start + chunk] = (logits @ head - head[labels]) * scored
            if needs_weight:
                kept = part * scored
                weight_gradient += logits.T @ kept
                weight_gradient.index_add_(0, labels, kept.to(sum_dtype), alpha=-1)
        ctx.save_for_backward(states_gradient, weight_gradient[:vocabulary] if needs_weight else None)
        return nll

    @staticmethod
    def backward(ctx, gradient):
        # In place: the weight's gradient is as large as the weight, and nothing else uses it.
        states_gradient, weight_gradient = (None if part is None else part.mul_(gradient) for part in ctx.saved_tensors)
        return states_gradient, weight_gradient, None, None, None


def make_batch(
    blocks: Blocks, rows: np.ndarray, device: torch.device, shape: tuple[int, int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs and targets of some rows, both (rows, longest row - 1) int64, padded with IGNORE_INDEX.

    No attention mask is needed: padding is on the right, where a causal model does not look.

    Args:
        shape: pad both to this shape, with rows of padding only; not wider than a row.
    """
    lengths = blocks.lengths[rows].astype(np.int64)
    height, width = shape or (len(rows), int(lengths.max()) - 1)
    inputs, targets = np.zeros((height, width), np.int64), np.full((height, width), IGNORE_INDEX)
    ids = blocks.ids[rows, : width + 1].astype(np.int64)
    inputs[: len(rows)] = ids[:, :-1]
    targets[: len(rows)] = np.where(np.arange(1, width + 1) < lengths[:, None], ids[:, 1:], IGNORE_INDEX)
    return to_device(inputs, device), to_device(targets, device)


def nll_sum(
    model: torch.nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    dtype: torch.dtype,
    softmax: Callable = softmax_nll,
) -> torch.Tensor:
    """Return the summed negative log-likelihood of the targets in nats, fp32, with its graph.

    Args:
        inputs, targets: (rows, tokens) int64, as `make_batch` returns them.
        dtype: of layers and matrix products.
    """
    body, head = body_and_head(model)
    with autocast(head, dtype):
        states = body(input_ids=inputs, use_cache=False).last_hidden_state
    return LinearCrossEntropy.apply(states.flatten(0, 1), head.weight, targets.flatten(), dtype, softmax)
