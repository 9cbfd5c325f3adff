"""Causal attention without a mask: each token attends to itself and to all before it, and rows are never padded left.

transformers hands a mask to attention while a CUDA graph is recorded or a model is compiled. With a mask, PyTorch
cannot take its fastest kernels; here nothing needs one.
"""

import contextlib

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

NAME = "causal"


def causal(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """Return what the tokens read, (batch, tokens, heads, width), in the type of `query`.

    Args:
        query: (batch, heads, tokens, width), as many tokens as key and value have, or the last one of theirs.
        key, value: (batch, heads, tokens, width), of which there may be fewer heads that several of the query share.
        mask: not looked at.
    """
    dtype = query.dtype
    slow = dtype == torch.bfloat16 and query.device.type == "cpu"  # where fp32 is faster, backward above all
    if slow:
        query, key, value = query.float(), key.float(), value.float()
    with torch.autocast("cpu", enabled=False) if slow else contextlib.nullcontext():
        read = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=dropout,
            is_causal=query.shape[2] > 1,  # a single token, generated after others, attends to them all
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return read.to(dtype).transpose(1, 2).contiguous(), None


def fits(model: PreTrainedModel) -> bool:
    """Tell whether all layers of a model attend so, none to a sliding window, say, and let others do it for them."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    full = kinds == {"full_attention"} and not getattr(config, "sliding_window", None)
    return full and model.is_backend_compatible()


AttentionInterface.register(NAME, causal)
