"""Initial values of the factors A and B of an update s B A. The default is PEFT's and LoRA's: A random, B zero.

    pissa        s B A = the r largest singular triplets of W; W keeps the rest (Meng et al., 2024, arXiv:2404.02948)
    olora        B, A = the first r columns and rows of Q, R = qr(W); W keeps W - s B A
                 (Büyükakyüz, 2024, arXiv:2406.01775)
    orthogonal   both random, B's rows orthogonal to A's columns, so that B A = 0
    loftq        s B A = the r largest singular triplets of W - Wq, the error of quantizing W; Wq stays as it is: the
                 first iteration of Li et al., 2023, arXiv:2310.08659

PEFT has these for nn.Linear, but its olora uses the wrong factor on a transposed layer such as GPT-2's Conv1D.
"""

import math

import torch
from transformers.pytorch_utils import Conv1D

from gpt2lora.pipeline import params
from gpt2lora.pipeline.schemas import FROM_BASE

Layers = dict[str, torch.nn.Module]


@torch.no_grad()
def initialize_lora(layers: Layers, init: str, floats: Layers) -> dict[str, torch.Tensor]:
    """Set the initial values of A and B. pissa and olora also subtract s B A from W.

    Args:
        layers: PEFT's LoRA layers, by their name in the base model.
        floats: the float layers of the same names, for loftq.

    Returns:
        For pissa and olora the initial factors, by their names in PEFT's state dict; else an empty dict.
    """
    initial_factors = {}
    for name, module in layers.items():
        a, b, scale = module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"]
        if init in FROM_BASE:
            check_rank(a, b)
            weight = weight_view(module.get_base_layer())
            first_a, first_b = (
                truncated_svd(weight / scale, len(a)) if init == "pissa" else truncated_qr(weight, len(a))
            )
            weight -= scale * first_b @ first_a
            prefix = f"base_model.model.{name}"
            initial_factors |= {f"{prefix}.lora_A.weight": first_a.clone(), f"{prefix}.lora_B.weight": first_b.clone()}
        elif init == "loftq":
            from peft.utils.integrations import dequantize_module_weight

            check_rank(a, b)
            error = weight_view(floats[name]) - dequantize_module_weight(module.get_base_layer()).float()
            first_a, first_b = truncated_svd(error / scale, len(a))
        elif init == "orthogonal":
            first_a, first_b = orthogonal_factors(*a.shape, len(b), a.device)
        else:
            continue
        a.copy_(first_a)
        b.copy_(first_b)
    return initial_factors


def truncated_svd(weight: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (r, in) and B (out, r) whose product B A is the best approximation of `weight` of rank r."""
    left, singular_values, right = torch.linalg.svd(weight, full_matrices=False)
    root = singular_values[:r].sqrt()
    return root[:, None] * right[:r], left[:, :r] * root


def truncated_qr(weight: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (r, in), the first r rows of R, and B (out, r), the first r columns of Q, for weight = Q R."""
    q, r_factor = torch.linalg.qr(weight)
    return r_factor[:r], q[:, :r]


def orthogonal_factors(r: int, inputs: int, outputs: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B that each span r / 2 of r orthogonal directions, so that B A = 0; scaled as in PEFT."""
    directions = torch.linalg.qr(torch.randn(r, r)).Q
    a = directions[0::2].T @ torch.randn(r // 2, inputs) / 10
    b = torch.randn(outputs, r // 2) @ directions[1::2] / 10
    return a.to(device), b.to(device)


def weight_view(layer: torch.nn.Module) -> torch.Tensor:
    """Return a float layer's weight as a view (out, in); Conv1D holds (in, out)."""
    return layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data


def check_rank(a: torch.Tensor, b: torch.Tensor) -> None:
    """Refuse a rank above the layer's own, for which there are no more singular values."""
    most = min(a.shape[1], b.shape[0])
    params.require(len(a) <= most, "lora.r", len(a), f"at most {most}, the rank of the smallest layer, with this init")


def to_standard_lora(tensors: dict, initial_factors: dict, config: dict) -> tuple[dict, dict]:
    """Convert an adapter of W - s B0 A0 into one of W with rank 2r: s B A - s B0 A0 = s [B, -B0] [A; A0].

    Args:
        initial_factors: A0 and B0, as `initialize_lora` returned them.
        config: PEFT's adapter_config.json. alpha grows with the rank, so that the scale s stays.
    """
    doubled = {
        name: torch.cat((tensor, -initial_factors[name].to(tensor)), 1)
        if ".lora_B." in name
        else torch.cat((tensor, initial_factors[name].to(tensor)), 0)
        for name, tensor in tensors.items()
        if name in initial_factors
    }
    growth = math.sqrt(2) if config["use_rslora"] else 2
    return tensors | doubled, config | {"r": 2 * config["r"], "lora_alpha": growth * config["lora_alpha"]}
