"""The learning rate of each step and of each group of parameters."""

import math

import torch

from gpt2lora.training.config import Train


def learning_rate(step: int, steps: int, options: Train) -> float:
    """Return the rate of a step, counted from 1: linear warm-up, then half a cosine down to 0 after the last."""
    warmup = math.ceil(options.warmup_fraction * steps)
    if step <= warmup:
        return options.learning_rate * step / warmup
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / (steps - warmup)))


def learning_groups(model: torch.nn.Module, ratio: float) -> list[dict]:
    """Return AdamW's groups: the factors B learn at `ratio` times the rate of all else (LoRA+, arXiv:2402.12354)."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in trained if ".lora_B." not in name], "ratio": 1.0},
        {"params": [parameter for name, parameter in trained if ".lora_B." in name], "ratio": ratio},
    ]
