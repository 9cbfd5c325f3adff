"""One clear line for a forward or backward pass that fails, which tells whether fp32 helps."""

import contextlib
from collections.abc import Iterator

import torch

from gpt2lora.model.errors import COMPUTATION_ERRORS, first_line
from gpt2lora.model.head import base_network
from gpt2lora.model.quantization import computing_in_fp32
from gpt2lora.pipeline.cli import StageError, out_of_memory_advice


@contextlib.contextmanager
def computation_errors(model: torch.nn.Module, dtype: torch.dtype, setting: str) -> Iterator[None]:
    """Turn the errors of a model's forward or backward pass into one line, which tells whether fp32 helps.

    Args:
        setting: the key of params.yaml that chose `dtype`.
    """
    try:
        yield
    except COMPUTATION_ERRORS as error:
        if out_of_memory_advice(error):
            raise
        name, precision = type(base_network(model)).__name__, str(dtype).removeprefix("torch.")
        line = f"{name} cannot be computed in {precision} ({type(error).__name__}: {first_line(error)})"
        # An index out of range is one in any type.
        helps = dtype == torch.bfloat16 and not isinstance(error, LookupError) and can_compute_in_fp32(model)
        advice = f"in fp32 it can: -S {setting}=fp32" if helps else "take another model, or another method"
        raise StageError(f"{line}; {advice}") from error


def can_compute_in_fp32(model: torch.nn.Module) -> bool:
    """Tell whether a forward and a backward pass of a few tokens work in fp32. It changes the model's types."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    ids = torch.arange(4, device=next(model.parameters()).device)[None]
    try:
        with torch.enable_grad(), computing_in_fp32(model):
            model(input_ids=ids, use_cache=False).logits.sum().backward()
    except COMPUTATION_ERRORS:
        return False
    return True
