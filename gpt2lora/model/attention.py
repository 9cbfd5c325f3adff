"""Causal attention without a mask: a token attends to itself and to those before it. Rows are never padded on the left.

transformers makes a mask in each forward pass, which a CUDA graph cannot capture. With a mask, PyTorch cannot use its
fastest kernels, and most models need none. Sliding windows, soft caps and attention sinks are computed here too.
"""

import contextlib

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from gpt2lora.model.quantization import computing_in_fp32
from gpt2lora.pipeline.cli import StageError

ATTENTION_NAME, PROBE_NAME = "causal", "causal-probe"
LAYER_TYPES = {"full_attention", "sliding_attention"}  # of config.json: those that `causal_attention` computes
PROBE_TOKENS = 8
PROBE_TOLERANCE = 1e-3  # of logits computed in fp32, as a share: other kernels and shapes round differently


def causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """Return the attention output, (batch, tokens, heads, width), in the type of `query`.

    Args:
        query: (batch, heads, tokens, width): as many tokens as key and value, or only the last ones (generation).
        key, value: (batch, heads, tokens, width); fewer heads than the query means grouped-query attention.
        attention_mask: of padding, (batch, tokens); it is ignored, since there is no padding before a token.
        sliding_window: a token attends to so many tokens, itself included (Mistral 7B, arXiv:2310.06825).
        softcap: bound of the scores (Gemma 2, arXiv:2408.00118).
        s_aux: (heads,), a score for attending to nothing (gpt-oss, arXiv:2508.10925).

    Raises:
        NotImplementedError: the model asks for something else, which would be left out.
    """
    values = {name for name, given in others.items() if isinstance(given, torch.Tensor | float)}
    unknown = values - {"position_ids", "cache_position"}
    if unknown or (attention_mask is not None and attention_mask.dim() != 2) or others.get("is_causal") is False:
        raise NotImplementedError(f"attention with {', '.join(sorted(unknown)) or 'a mask'}")
    dtype, tokens = query.dtype, key.shape[2]
    slow = dtype == torch.bfloat16 and query.device.type == "cpu"  # fp32 is faster there, above all backward
    if slow:
        query, key, value = query.float(), key.float(), value.float()
    is_last = query.shape[2] == 1  # a single generated token attends to all before it
    allowed = None
    if (sliding_window and sliding_window < tokens) or (query.shape[2] != tokens and not is_last):
        allowed = allowed_positions(query.shape[2], tokens, sliding_window, query.device)
    with torch.autocast("cpu", enabled=False) if slow else contextlib.nullcontext():
        if softcap or s_aux is not None:
            if allowed is None and not is_last:
                allowed = allowed_positions(tokens, tokens, None, query.device)
            output = unfused_attention(query, key, value, allowed, dropout, scaling, softcap, s_aux)
        else:
            if allowed is not None and query.device.type == "cuda":
                # Flash takes no mask, the memory-efficient kernel no fewer heads of keys: without cuDNN, what is left
                # is the kernel that writes all scores to memory.
                key, value = repeat_heads(key, value, query.shape[1])
            output = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=allowed,
                dropout_p=dropout,
                is_causal=allowed is None and not is_last,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
    return output.to(dtype).transpose(1, 2).contiguous(), None


def allowed_positions(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return which of `keys` tokens each of the last `queries` attends to, (queries, keys) bool."""
    positions = torch.arange(keys, device=device)
    distance = positions[keys - queries :, None] - positions
    return (distance >= 0) & (distance < (window or keys))


def repeat_heads(key: torch.Tensor, value: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values with as many heads as the query, each head as often as its group is large."""
    groups = heads // key.shape[1]
    return key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)


def unfused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """Return attention with capped scores or a sink, (batch, heads, tokens, width); it holds all scores at once."""
    key, value = repeat_heads(key, value, query.shape[1])
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    if s_aux is not None:
        sink = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    shares = scores.softmax(-1, dtype=torch.float32).to(value.dtype)[..., : key.shape[2]]
    return F.dropout(shares, dropout) @ value


def use_causal_attention(model: PreTrainedModel) -> None:
    """Let a loaded model compute attention here, if that gives its own logits; else leave it as it is."""
    config, own = model.config, model.config._attn_implementation
    kinds = getattr(config, "layer_types", None) or []
    if not model.is_backend_compatible() or not set(kinds) <= LAYER_TYPES:
        return
    windows: list[int | None] = []  # of each layer

    def recording_attention(*arguments, **options) -> tuple[torch.Tensor, None]:
        windows.append(options.get("sliding_window"))
        return causal_attention(*arguments, **options)

    AttentionInterface.register(PROBE_NAME, recording_attention)
    try:
        model.set_attn_implementation("eager")
        expected = probe_logits(model)
        model.set_attn_implementation(PROBE_NAME)
        equal = not is_different(probe_logits(model), expected) and windows == expected_windows(config, kinds)
    except NotImplementedError:
        equal = False
    model.set_attn_implementation(ATTENTION_NAME if equal else own)


def check_causal(model: PreTrainedModel) -> None:
    """Refuse a model whose logits depend on the tokens that follow.

    Raises:
        StageError: says so.
    """
    whole, beginning = probe_logits(model), probe_logits(model, PROBE_TOKENS // 2)
    if is_different(whole[:, : beginning.shape[1]], beginning):
        name = type(model).__name__
        raise StageError(
            f"{name} looks ahead: its logits depend on the tokens that follow; expected a causal language model"
        )


@torch.no_grad()
def probe_logits(model: PreTrainedModel, tokens: int = PROBE_TOKENS) -> torch.Tensor:
    """Return the logits of a few tokens, (1, tokens, vocabulary), computed in fp32."""
    ids = torch.arange(min(tokens, model.config.get_text_config().vocab_size), device=model.device)[None]
    with computing_in_fp32(model):
        return model(input_ids=ids, use_cache=False).logits.float()


def is_different(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether the root mean square of the difference is more than rounding; NaN is left to the loss to show."""
    difference = (logits - expected).square().mean().sqrt()
    return bool(difference > PROBE_TOLERANCE * expected.square().mean().sqrt())


def expected_windows(config: PreTrainedConfig, kinds: list[str]) -> list[int | None]:
    """Return each layer's sliding window by config.json: a few tokens do not show whether the model passes it on."""
    window, layers = getattr(config, "sliding_window", None), config.get_text_config().num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds] if kinds else [window] * layers


AttentionInterface.register(ATTENTION_NAME, causal_attention)
