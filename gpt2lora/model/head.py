"""The output head of a causal language model, and the check that it is nothing but a linear layer."""

import numpy as np
import torch

from gpt2lora.pipeline.cli import StageError


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to a device without waiting for the device's other work."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def autocast(head: torch.nn.Linear, dtype: torch.dtype) -> torch.autocast:
    """Return the context in which layers compute in `dtype`; weights that are already in it need no cast."""
    return torch.autocast(head.weight.device.type, dtype, enabled=dtype == torch.bfloat16 != head.weight.dtype)


def body_and_head(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Linear]:
    """Return the model without its output head, adapters included, and the head."""
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    return network.base_model, network.get_output_embeddings()


@torch.no_grad()
def check_head(model: torch.nn.Module, width: int) -> None:
    """Refuse a model whose logits are not `hidden @ head.weight.T`, or that is not causal.

    Args:
        width: a number of tokens that the model can read.
    """
    body, head = body_and_head(model)
    inputs = torch.arange(min(8, width, len(head.weight)), device=head.weight.device)[None]
    was_training = model.training
    model.eval()
    expected = model(input_ids=inputs, use_cache=False).logits.float()
    half = inputs.shape[1] // 2
    ours, start = (
        (body(input_ids=ids, use_cache=False).last_hidden_state.to(head.weight.dtype) @ head.weight.T).float()
        for ids in (inputs, inputs[:, :half])
    )
    model.train(was_training)
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    if (ours - expected).abs().max() > 1e-3 * expected.abs().max():
        raise StageError(
            f"{name} does more to its logits than its last layer does: expected a model like GPT-2 or Llama"
        )
    # Inputs of another length may use other kernels, which round differently.
    if half and (ours[:, :half] - start).abs().max() > 0.05 * expected.abs().max():
        raise StageError(
            f"{name} looks ahead: its logits depend on the tokens that follow; expected a causal language model"
        )
