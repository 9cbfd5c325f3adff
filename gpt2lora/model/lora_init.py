"""How the factors A and B of an update s B A start. PEFT's own start, the default, is A random and B zero (LoRA).

    pissa        s B A = the r largest singular triplets of W; W keeps the rest (Meng et al., 2024, arXiv:2404.02948)
    olora        B, A = the first r columns and rows of Q, R = qr(W); W keeps W - s B A
                 (Büyükakyüz, 2024, arXiv:2406.01775)
    orthogonal   both random, B's rows orthogonal to A's columns, so that B A = 0
    loftq        s B A = the r largest singular triplets of W - Wq, the error of quantising W; Wq stays as it is, the
                 first round of Li et al., 2023, arXiv:2310.08659

PEFT has these for nn.Linear; its olora takes the wrong factor on a transposed layer such as GPT-2's Conv1D.
"""

import math

import torch
from transformers.pytorch_utils import Conv1D

from gpt2lora.pipeline import params

FROM_BASE = ("pissa", "olora")  # move a part of W into the adapter
INITS = ("default", *FROM_BASE, "orthogonal", "loftq")
Layers = dict[str, torch.nn.Module]


def check(init: str, quantized: bool) -> None:
    """Stop at an init that needs another base."""
    others = f"default, orthogonal or loftq with method qlora: {init} takes floats out of the base"
    params.require(init not in FROM_BASE or not quantized, "lora.init", init, others)
    others = "another init with method lora: loftq corrects the error of a quantised base"
    params.require(init != "loftq" or quantized, "lora.init", init, others)


@torch.no_grad()
def start(adapted: Layers, init: str, floats: Layers) -> dict[str, torch.Tensor]:
    """Set the first values of A and B. With pissa and olora, take them out of W and return them by PEFT's names.

    Args:
        adapted: PEFT's layers, by their name in the base model.
        floats: the float layers of the same names, for loftq.
    """
    taken = {}
    for name, module in adapted.items():
        a, b, scale = module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"]
        if init in FROM_BASE:
            check_rank(a, b)
            weight = matrix(module.get_base_layer())
            first_a, first_b = halves(weight / scale, len(a)) if init == "pissa" else first_of_qr(weight, len(a))
            weight -= scale * first_b @ first_a
            prefix = f"base_model.model.{name}"
            taken |= {f"{prefix}.lora_A.weight": first_a.clone(), f"{prefix}.lora_B.weight": first_b.clone()}
        elif init == "loftq":
            from peft.utils.integrations import dequantize_module_weight

            check_rank(a, b)
            error = matrix(floats[name]) - dequantize_module_weight(module.get_base_layer()).float()
            first_a, first_b = halves(error / scale, len(a))
        elif init == "orthogonal":
            first_a, first_b = orthogonal(*a.shape, len(b), a.device)
        else:
            continue
        a.copy_(first_a)
        b.copy_(first_b)
    return taken


def halves(weight: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (r, in) and B (out, r), whose product B A is the best approximation of rank r."""
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    root = sizes[:r].sqrt()
    return root[:, None] * right[:r], left[:, :r] * root


def first_of_qr(weight: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    q, upper = torch.linalg.qr(weight)
    return upper[:r], q[:, :r]


def orthogonal(r: int, inputs: int, outputs: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B that each span r / 2 of r orthogonal directions, A the odd and B the even; size as PEFT has it."""
    directions = torch.linalg.qr(torch.randn(r, r)).Q
    a = directions[0::2].T @ torch.randn(r // 2, inputs) / 10
    b = torch.randn(outputs, r // 2) @ directions[1::2] / 10
    return a.to(device), b.to(device)


def matrix(layer: torch.nn.Module) -> torch.Tensor:
    """Return a view of a float layer's weight as (out, in); Conv1D holds (in, out)."""
    return layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data


def check_rank(a: torch.Tensor, b: torch.Tensor) -> None:
    most = min(a.shape[1], b.shape[0])
    params.require(len(a) <= most, "lora.r", len(a), f"at most {most}, the rank of the smallest layer, with this init")


def ordinary(tensors: dict, taken: dict, config: dict) -> tuple[dict, dict]:
    """Turn an adapter of W - s B0 A0 into one of W, of rank 2r: s B A - s B0 A0 = s [B, -B0] [A; A0].

    Args:
        taken: A0 and B0, what `start` returned.
        config: PEFT's; alpha grows with the rank, so that the scale stays.
    """
    doubled = {
        name: torch.cat((tensor, -taken[name].to(tensor)), 1)
        if ".lora_B." in name
        else torch.cat((tensor, taken[name].to(tensor)), 0)
        for name, tensor in tensors.items()
        if name in taken
    }
    growth = math.sqrt(2) if config["use_rslora"] else 2
    return tensors | doubled, config | {"r": 2 * config["r"], "lora_alpha": growth * config["lora_alpha"]}
