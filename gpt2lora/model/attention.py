"""Causal attention without a mask: a token attends to itself and to all before it. Rows are never padded on the left.

transformers passes a mask to attention while a CUDA graph is captured or a model is compiled. With a mask, PyTorch
cannot use its fastest kernels, and here no model needs one.
"""

import contextlib

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

ATTENTION_NAME = "causal"


def causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """Return the attention output, (batch, tokens, heads, width), in the type of `query`.

    Args:
        query: (batch, heads, tokens, width): as many tokens as key and value, or only the last one (generation).
        key, value: (batch, heads, tokens, width); fewer heads than the query means grouped-query attention.
        mask: ignored.
    """
    dtype = query.dtype
    slow = dtype == torch.bfloat16 and query.device.type == "cpu"  # fp32 is faster there, above all backward
    if slow:
        query, key, value = query.float(), key.float(), value.float()
    with torch.autocast("cpu", enabled=False) if slow else contextlib.nullcontext():
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=dropout,
            is_causal=query.shape[2] > 1,  # a single generated token attends to all before it
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return output.to(dtype).transpose(1, 2).contiguous(), None


def supports_causal_attention(model: PreTrainedModel) -> bool:
    """Tell whether all layers use full causal attention, no sliding window, and transformers' attention interface."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    full = kinds == {"full_attention"} and not getattr(config, "sliding_window", None)
    return full and model.is_backend_compatible()


AttentionInterface.register(ATTENTION_NAME, causal_attention)
