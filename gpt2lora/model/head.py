"""The output head of a causal language model, and the check that it is computed exactly."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from gpt2lora.pipeline.cli import echo

# Keys of config.json. Some models scale their logits (Cohere, Falcon-H1; Granite divides), some cap them (Gemma 2).
SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISOR = "logits_scaling"
MULTIPLIES_BY_DIVISOR = ("hyperclovax",)  # model types that multiply by `logits_scaling` instead
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

PROBE_LOGIT = 300.0  # at which a soft cap, which is 15 to 50 in practice, shows
# Largest difference of a probed logit, as a share of the largest: rounding of one matrix product and of its result.
PROBE_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass
class OutputHead:
    """The logits of hidden states h: z = scale (W h + bias), and with a soft cap c, c tanh(z / c)."""

    weight: torch.Tensor  # (vocabulary, width)
    bias: torch.Tensor | None  # (vocabulary,)
    scale: float
    softcap: float | None


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to a device without waiting for the device's other work."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def autocast(weight: torch.Tensor, dtype: torch.dtype) -> torch.autocast:
    """Return the context in which layers compute in `dtype`; weights that are already in it need no cast.

    Args:
        weight: a weight of the model.
    """
    return torch.autocast(weight.device.type, dtype, enabled=dtype == torch.bfloat16 != weight.dtype)


def body_and_head(model: torch.nn.Module) -> tuple[torch.nn.Module, OutputHead | None]:
    """Return the model without its output head, adapters included, and the head.

    If `check_head` found another kind of head, return the whole model and None.
    """
    network = base_network(model)
    if getattr(network, "computes_own_logits", False):
        return network, None
    linear, config = network.get_output_embeddings(), network.config.get_text_config()
    return network.base_model, OutputHead(linear.weight, linear.bias, logit_scale(config), soft_cap(config))


def base_network(model: torch.nn.Module) -> PreTrainedModel:
    """Return transformers' model, adapters included, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def logit_scale(config: PreTrainedConfig) -> float:
    """Return the number by which a model multiplies its logits, 1 for most models."""
    scale = 1.0
    for key in SCALES:
        scale *= getattr(config, key, None) or 1.0
    divisor = getattr(config, DIVISOR, None) or 1.0
    return scale * divisor if config.model_type in MULTIPLIES_BY_DIVISOR else scale / divisor


def soft_cap(config: PreTrainedConfig) -> float | None:
    """Return the bound of a model's logits (Gemma 2, 2024, arXiv:2408.00118, section 2), or None."""
    caps = [cap for key in SOFT_CAPS if (cap := getattr(config, key, None))]
    return float(caps[0]) if caps else None


@torch.no_grad()
def check_head(model: torch.nn.Module, width: int) -> None:
    """Choose how logits are computed.

    If `OutputHead` does not describe the model's head, `body_and_head` returns the whole model from now on.

    Args:
        width: a number of tokens that the model can read.
    """
    network = base_network(model)
    was_training = model.training
    model.eval()
    inputs = torch.arange(min(8, width, network.config.get_text_config().vocab_size), device=network.device)[None]
    network.computes_own_logits = not is_head_known(network, inputs)
    model.train(was_training)
    if network.computes_own_logits:
        name = type(network).__name__
        echo(f"{name} computes more than a linear output head: all its logits are computed at once, which is slower")


def is_head_known(network: PreTrainedModel, inputs: torch.Tensor) -> bool:
    """Tell whether `OutputHead` gives the model's own logits."""
    network.computes_own_logits = False
    if not isinstance(network.get_output_embeddings(), torch.nn.Linear) or network.base_model is network:
        return False
    body, head = body_and_head(network)
    return not probe_head(network, body, head, inputs) > PROBE_TOLERANCE[head.weight.dtype]  # NaN shows in the loss


def body_outputs(body: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return what `body_and_head`'s body gives: hidden states, (rows, tokens, width), or logits, if it has a head."""
    outputs = body(input_ids=ids, use_cache=False)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def probe_head(network: torch.nn.Module, body: torch.nn.Module, head: OutputHead, inputs: torch.Tensor) -> float:
    """Return how far the model's logits are from `head`, as a share of the largest, at logits of PROBE_LOGIT.

    A hook scales the hidden states between body and head, so that both heads read the same states. The states of the
    body itself may give logits too small to show a soft cap.
    """
    seen = []

    def scale_states(module, arguments, outputs):
        states = outputs.last_hidden_state
        largest = (states.to(head.weight.dtype) @ head.weight.T * head.scale).abs().max()
        outputs.last_hidden_state = states * (PROBE_LOGIT / largest.clamp(min=1e-6)).to(states.dtype)
        seen.append(module)
        return outputs

    # OPT, and the decoders of BART and its kin, call the body's only part themselves instead of the body.
    for part in (body, body.decoder) if hasattr(body, "decoder") else (body,):
        hook = part.register_forward_hook(scale_states)
        try:
            logits = network(input_ids=inputs, use_cache=False).logits.float()
            if len(seen) == 1:
                states = body_outputs(body, inputs)
                expected = finish_logits(states.float() @ head.weight.float().T, head, vocab_dim=-1)
                return float((logits - expected).abs().max() / logits.abs().max().clamp(min=1e-6))
        finally:
            hook.remove()
    return float("inf")  # the head reads something else


def finish_logits(products: torch.Tensor, head: OutputHead, vocab_dim: int) -> torch.Tensor:
    """Turn W h into logits in place: add the bias, scale, and cap.

    Args:
        products: (tokens, vocabulary) with `vocab_dim` -1, or (vocabulary, tokens) with 0. Padding may follow the
            vocabulary.
    """
    if head.bias is not None:
        bias = head.bias.to(products.dtype)
        products.narrow(vocab_dim, 0, len(bias)).add_(bias if vocab_dim == -1 else bias[:, None])
    if head.scale != 1:
        products.mul_(head.scale)
    if head.softcap:
        products.div_(head.softcap).tanh_().mul_(head.softcap)
    return products
