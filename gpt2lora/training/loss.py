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
from gpt2lora.model.head import autocast, body_and_head, body_outputs, to_device

IGNORE_INDEX = -100  # as a target: not scored
CHUNK_TOKENS = {"cuda": 2048, "cpu": 256}
VOCABULARY_MULTIPLE = {"cuda": 64, "cpu": 1}  # to which the head's rows are padded: GPU products are slow otherwise


def softmax_nll(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scored: torch.Tensor,
    vocabulary: int,
    dtype: torch.dtype,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the summed negative log-likelihood of the targets in nats; replace logits by part of its gradient.

    The gradient of a logit is its probability, minus 1 at the target. With a soft cap c, both are multiplied by the
    derivative of c tanh(z / c), 1 - tanh(z / c)^2. `logits` become the first term.

    Args:
        logits: (tokens, at least `vocabulary`); what lies beyond the vocabulary gets the probability 0.
        targets: (tokens,) int64. scored: (tokens, 1), 1 or 0: whether a token counts.
        dtype: the type in which to compute.

    Returns:
        The sum, and with a soft cap the derivative at the targets, (tokens, 1).
    """
    capped = logits
    if softcap:
        squashed = (logits.to(dtype) / softcap).tanh()
        derivative, capped = 1 - squashed.square(), softcap * squashed
    capped[:, vocabulary:] = -torch.inf  # a softmax of whole rows is faster than one of slices
    predicted = capped.log_softmax(-1, dtype=dtype)
    nll = -(predicted.gather(1, targets[:, None]) * scored).sum()
    if softcap:
        logits.copy_(predicted.exp_() * derivative)
        return nll, derivative.gather(1, targets[:, None])
    logits.copy_(predicted.exp_())
    return nll, None


class LinearCrossEntropy(torch.autograd.Function):
    """The summed negative log-likelihood of `targets` under softmax(states weight^T + bias), in nats.

    Args of apply:
        states: (tokens, width), any float type. weight: (vocabulary, width). bias: (vocabulary,) or None.
        targets: (tokens,) int64, or IGNORE_INDEX.
        dtype: of the matrix products. Softmax and sums are fp32, or fp64 if dtype is.
        softmax: `softmax_nll`, or a compiled version of it.
        softcap: of the logits (gpt2lora/model/head.py), or None.
    """

    @staticmethod
    def forward(ctx, states, weight, bias, targets, dtype, softmax=softmax_nll, softcap=None):
        sum_dtype = torch.promote_types(dtype, torch.float32)
        vocabulary = len(weight)
        head, missing = weight.to(dtype), -vocabulary % VOCABULARY_MULTIPLE[states.device.type]
        if missing:
            head = F.pad(head, (0, 0, 0, missing))
        padded_bias = None if bias is None else F.pad(bias.to(dtype), (0, missing))
        chunk = CHUNK_TOKENS[states.device.type]
        nll = torch.zeros((), dtype=sum_dtype, device=states.device)
        needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        states_gradient = torch.empty_like(states) if needs_states else None
        weight_gradient = torch.zeros_like(head, dtype=sum_dtype) if needs_weight else None
        bias_gradient = torch.zeros_like(padded_bias, dtype=sum_dtype) if needs_bias else None
        for start in range(0, len(states), chunk):
            part, labels = states[start : start + chunk].to(dtype), targets[start : start + chunk]
            scored, labels = (labels != IGNORE_INDEX).to(dtype)[:, None], labels.clamp(min=0)
            logits = part @ head.T
            if bias is not None:
                logits += padded_bias
            chunk_nll, derivative = softmax(logits, labels, scored, vocabulary, sum_dtype, softcap)
            nll += chunk_nll
            # The gradient of the logits is now in them, except for what is to be subtracted at the target.
            if needs_states:
                at_target = head[labels] if derivative is None else head[labels] * derivative.to(dtype)
                states_gradient[start : start + chunk] = (logits @ head - at_target) * scored
            if needs_weight:
                kept = part * scored
                weight_gradient += logits.T @ kept
                at_target = kept.to(sum_dtype) if derivative is None else kept.to(sum_dtype) * derivative
                weight_gradient.index_add_(0, labels, at_target, alpha=-1)
            if needs_bias:
                bias_gradient += (logits * scored).sum(0, dtype=sum_dtype)
                at_target = scored.to(sum_dtype) if derivative is None else scored.to(sum_dtype) * derivative
                bias_gradient.index_add_(0, labels, at_target[:, 0], alpha=-1)
        gradients = (states_gradient, weight_gradient, bias_gradient)
        ctx.save_for_backward(gradients[0], *(None if part is None else part[:vocabulary] for part in gradients[1:]))
        return nll

    @staticmethod
    def backward(ctx, gradient):
        # In place: the weight's gradient is as large as the weight, and nothing else uses it.
        states, weight, bias = (None if part is None else part.mul_(gradient) for part in ctx.saved_tensors)
        return states, weight, bias, None, None, None, None


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
    place = np.arange(1, width + 1)  # of each target in its row
    is_target = (place >= blocks.context) & (place < lengths[:, None])
    targets[: len(rows)] = np.where(is_target, ids[:, 1:], IGNORE_INDEX)
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
    with autocast(next(model.parameters()), dtype):
        outputs = body_outputs(body, inputs).flatten(0, 1)
    if head is None:
        return F.cross_entropy(outputs.float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    states, bias = outputs, head.bias
    if head.scale != 1:  # scale (W h + bias) = W (scale h) + scale bias
        states, bias = states * head.scale, None if bias is None else bias * head.scale
    return LinearCrossEntropy.apply(states, head.weight, bias, targets.flatten(), dtype, softmax, head.softcap)
