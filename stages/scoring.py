"""The negative log-likelihood of token rows under a model: the loss that is trained."""

from collections.abc import Callable

import numpy as np
import torch

from stages.command import Stop
from stages.cross_entropy import IGNORED, LinearCrossEntropy, to_probabilities
from stages.rows import Rows


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


def put(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Bring an array to a device, without waiting for what that is busy with."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


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


def autocast(head: torch.nn.Linear, dtype: torch.dtype) -> torch.autocast:
    """Let layers compute in `dtype`; weights that are held in it need no casts."""
    return torch.autocast(head.weight.device.type, dtype, enabled=dtype == torch.bfloat16 != head.weight.dtype)


def body_and_head(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Linear]:
    """Return what makes states of tokens, adapters included, and the head that makes logits of states."""
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    return network.base_model, network.get_output_embeddings()


@torch.no_grad()
def check_head(model: torch.nn.Module, width: int) -> None:
    """Stop at a model that does more to its logits than its last layer does, a bias, a scale or a cap, say, or whose
    tokens see the tokens after them. `width`: tokens that it can read at least.
    """
    body, head = body_and_head(model)
    inputs = torch.arange(min(8, width, len(head.weight)), device=head.weight.device)[None]
    was_training = model.training
    model.eval()
    whole = model(input_ids=inputs, use_cache=False).logits.float()
    half = inputs.shape[1] // 2
    ours, start = (
        (body(input_ids=ids, use_cache=False).last_hidden_state.to(head.weight.dtype) @ head.weight.T).float()
        for ids in (inputs, inputs[:, :half])
    )
    model.train(was_training)
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    if (ours - whole).abs().max() > 1e-3 * whole.abs().max():
        raise Stop(f"{name} does more to its logits than its last layer does: expected a model like GPT-2 or Llama")
    # Other lengths may take other kernels, which round otherwise.
    if half and (ours[:, :half] - start).abs().max() > 0.05 * whole.abs().max():
        raise Stop(f"{name} looks ahead: its logits depend on the tokens that follow; expected a causal language model")
