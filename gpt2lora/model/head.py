"""The output head of a causal language model, and the check that it is nothing but a linear layer."""

import numpy as np
import torch

from gpt2lora.pipeline.cli import Stop


def put(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Bring an array to a device, without waiting for what that is busy with."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


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
