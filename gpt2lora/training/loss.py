"""The negative log-likelihood of token rows under a model: the loss that is trained.

The output head and its cross entropy are one, a chunk of tokens at a time: the logits of a batch are never held.
Logits are by far the largest array of a small language model: with GPT-2's vocabulary, 1.6 GB in fp32 for 8 rows of
1,024 tokens, and autograd holds several such. Here the gradient with respect to the states is computed while a
chunk's logits are there, in the forward pass (as in Hsu et al., 2024, Liger Kernel, arXiv:2410.10989).
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from gpt2lora.dataset.blocks import Rows
from gpt2lora.model.head import autocast, body_and_head, put

IGNORED = -100  # as a target: not scored
CHUNKS = {"cuda": 2048, "cpu": 256}  # tokens; on a CPU, what fits its cache
MULTIPLES = {"cuda": 64, "cpu": 1}  # of which a GPU wants the rows of the head, or its matrix products are slow


def to_probabilities(
    logits: torch.Tensor, own: torch.Tensor, scored: torch.Tensor, vocabulary: int, exact: torch.dtype
) -> torch.Tensor:
    """Put probabilities in the place of the logits; return the summed negative log-likelihood of the targets, nats.

    Args:
        logits: (tokens, at least `vocabulary`); the probability of what stands behind the vocabulary is 0.
        own: (tokens,) int64, the targets. scored: (tokens, 1), 1 or 0: whether a token counts.
        exact: the type to compute in.
    """
    logits[:, vocabulary:] = -torch.inf  # the softmax of whole rows, not of their beginnings, is the faster one
    predicted = logits.log_softmax(-1, dtype=exact)
    nll = -(predicted.gather(1, own[:, None]) * scored).sum()
    logits.copy_(predicted.exp_())
    return nll


class LinearCrossEntropy(torch.autograd.Function):
    """The summed negative log-likelihood of `targets` under softmax(states weight^T), in nats.

    Args, of apply:
        states: (tokens, width), any float type. weight: (vocabulary, width). targets: (tokens,) int64, or IGNORED.
        dtype: of the matrix products. Softmax and sums are fp32, or fp64 where that is fp64.
        softmax: `to_probabilities`, or what computes the same faster.
    """

    @staticmethod
    def forward(ctx, states, weight, targets, dtype, softmax=to_probabilities):
        exact = torch.promote_types(dtype, torch.float32)
        vocabulary = len(weight)
        head, missing = weight.to(dtype), -vocabulary % MULTIPLES[states.device.type]
        if missing:
            head = F.pad(head, (0, 0, 0, missing))
        chunk = CHUNKS[states.device.type]
        nll = torch.zeros((), dtype=exact, device=states.device)
        needs_states, needs_weight = ctx.needs_input_grad[:2]
        states_gradient = torch.empty_like(states) if needs_states else None
        weight_gradient = torch.zeros_like(head, dtype=exact) if needs_weight else None
        for start in range(0, len(states), chunk):
            part, wanted = states[start : start + chunk].to(dtype), targets[start : start + chunk]
            scored, own = (wanted != IGNORED).to(dtype)[:, None], wanted.clamp(min=0)
            logits = part @ head.T
            nll += softmax(logits, own, scored, vocabulary, exact)
            # The gradient of the logits is now theirs but for the 1 of the target itself.
            if needs_states:
                states_gradient[start : start + chunk] = (logits @ head - head[own]) * scored
            if needs_weight:
                kept = part * scored
                weight_gradient += logits.T @ kept
                weight_gradient.index_add_(0, own, kept.to(exact), alpha=-1)
        ctx.save_for_backward(states_gradient, weight_gradient[:vocabulary] if needs_weight else None)
        return nll

    @staticmethod
    def backward(ctx, gradient):
        # In place: the weight's is as large as the weight, and nobody else holds them.
        of_states, of_weight = (None if part is None else part.mul_(gradient) for part in ctx.saved_tensors)
        return of_states, of_weight, None, None, None


def batch(
    rows: Rows, places: np.ndarray, device: torch.device, shape: tuple[int, int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets of some rows, both (batch, longest row - 1) int64; padding is IGNORED in targets.

    No attention mask is needed: padding stands last, and a causal model never looks ahead.

    Args:
        shape: pads both up to it, with rows that are nothing but padding; no wider than the rows are.
    """
    lengths = rows.lengths[places].astype(np.int64)
    height, width = shape or (len(places), int(lengths.max()) - 1)
    inputs, targets = np.zeros((height, width), np.int64), np.full((height, width), IGNORED)
    ids = rows.ids[places, : width + 1].astype(np.int64)
    inputs[: len(places)] = ids[:, :-1]
    targets[: len(places)] = np.where(np.arange(1, width + 1) < lengths[:, None], ids[:, 1:], IGNORED)
    return put(inputs, device), put(targets, device)


def nll_sum(
    model: torch.nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    dtype: torch.dtype,
    softmax: Callable = to_probabilities,
) -> torch.Tensor:
    """Return the summed negative log-likelihood of the targets in nats, fp32, with gradients."""
    body, head = body_and_head(model)
    with autocast(head, dtype):
        states = body(input_ids=inputs, use_cache=False).last_hidden_state
    return LinearCrossEntropy.apply(states.flatten(0, 1), head.weight, targets.flatten(), dtype, softmax)
