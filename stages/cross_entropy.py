"""The output head and its cross entropy in one, a chunk of tokens at a time: the logits of a batch are never held.

Logits are by far the largest array of a small language model: with GPT-2's vocabulary, 1.6 GB in fp32 for 8 rows of
1,024 tokens, and autograd holds several such. Here the gradient with respect to the states is computed while a
chunk's logits are there, in the forward pass (as in Hsu et al., 2024, Liger Kernel, arXiv:2410.10989).
"""

import torch
import torch.nn.functional as F

IGNORED = -100  # as a target: not scored
CHUNKS = {"cuda": 2048, "cpu": 512}  # tokens


class LinearCrossEntropy(torch.autograd.Function):
    """The summed negative log-likelihood of `targets` under softmax(states weight^T), in nats.

    Args, of apply:
        states: (tokens, width), any float type. weight: (vocabulary, width). targets: (tokens,) int64, or IGNORED.
        dtype: of the matrix products. Softmax and sums are fp32, or fp64 where that is fp64.
    """

    @staticmethod
    def forward(ctx, states, weight, targets, dtype):
        exact = torch.promote_types(dtype, torch.float32)
        vocabulary = len(weight)
        # A multiple of 64 rows, or matrix products on a GPU take a slow path. The logits of the rows of zeros stay 0.
        head = F.pad(weight.to(dtype), (0, 0, 0, -vocabulary % 64))
        chunk = CHUNKS[states.device.type]
        nll = torch.zeros((), dtype=exact, device=states.device)
        needs_states, needs_weight = ctx.needs_input_grad[:2]
        states_gradient = torch.empty_like(states) if needs_states else None
        weight_gradient = torch.zeros_like(head, dtype=exact) if needs_weight else None
        for start in range(0, len(states), chunk):
            part, wanted = states[start : start + chunk].to(dtype), targets[start : start + chunk]
            scored = (wanted != IGNORED)[:, None]
            own = wanted.clamp(min=0)[:, None]
            logits = part @ head.T
            predicted = logits[:, :vocabulary].log_softmax(-1, dtype=exact)
            nll -= (predicted.gather(1, own) * scored).sum()
            if not (needs_states or needs_weight):
                continue
            predicted = predicted.exp_().scatter_add_(1, own, -torch.ones_like(own, dtype=exact))
            logits[:, :vocabulary] = predicted.mul_(scored)
            if needs_states:
                states_gradient[start : start + chunk] = logits @ head
            if needs_weight:
                weight_gradient += logits.T @ part
        ctx.save_for_backward(states_gradient, weight_gradient[:vocabulary] if needs_weight else None)
        return nll

    @staticmethod
    def backward(ctx, gradient):
        of_states, of_weight = (None if part is None else gradient * part for part in ctx.saved_tensors)
        return of_states, of_weight, None, None
