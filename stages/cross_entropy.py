"""The output head and its cross entropy in one, a chunk of tokens at a time: the logits of a batch are never held.

Logits are by far the largest array of a small language model: with GPT-2's vocabulary, 1.6 GB in fp32 for 8 rows of
1,024 tokens, and autograd holds several such. Here the gradient with respect to the states is computed while a
chunk's logits are there, in the forward pass (as in Hsu et al., 2024, Liger Kernel, arXiv:2410.10989).
"""

import torch
import torch.nn.functional as F

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
