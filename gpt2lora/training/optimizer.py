"""The optimizer, AdamW, and its learning rate schedule."""

import math

import torch

from gpt2lora.pipeline.schemas import TrainParams


def make_optimizer(model: torch.nn.Module, options: TrainParams) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter, 2017, arXiv:1711.05101) for the parameters that require gradients.

    With LoRA+ the factors B learn at `lora_plus_ratio` times the learning rate (Hayou et al., 2024, arXiv:2402.12354).
    Only matrices decay: biases, norms and DoRA's magnitudes do not.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    factors_b = [parameter for name, parameter in trained if ".lora_B." in name]
    others = [parameter for name, parameter in trained if ".lora_B." not in name]
    groups = [
        {"params": [each for each in others if each.dim() > 1], "ratio": 1.0},
        {"params": [each for each in others if each.dim() < 2], "ratio": 1.0, "weight_decay": 0.0},
        {"params": factors_b, "ratio": options.lora_plus_ratio},
    ]
    return torch.optim.AdamW(groups, options.learning_rate, weight_decay=options.weight_decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of each parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["ratio"]


def lr_at_step(step: int, steps: int, options: TrainParams) -> float:
    """Return the scheduled learning rate of a step, counted from 1: linear warm-up, then cosine decay to 0.

    transformers' get_cosine_schedule_with_warmup is one step behind: its first step has a rate of 0 and trains nothing.
    """
    warmup = math.ceil(options.warmup_fraction * steps)
    if step <= warmup:
        return options.learning_rate * step / warmup
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / (steps - warmup)))
