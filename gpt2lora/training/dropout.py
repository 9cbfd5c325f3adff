"""The dropout of the base model, wherever a model keeps it: in modules, in their attributes, in their configuration."""

import copy

import torch
from transformers import PretrainedConfig

from gpt2lora.model.head import base_network

OTHER_NOISE = ("layerdrop", "jitter_noise")  # ends of names: layers left out at random, noise in the inputs of routers


def set_base_dropout(model: torch.nn.Module, dropout: float) -> None:
    """Set the dropout of the base model; that of the adapters, whose modules are named lora_dropout, stays.

    Other noise in training is turned off. The model's own configuration stays too: it is saved with the model.
    """
    network = base_network(model)
    copies: dict[int, PretrainedConfig] = {}  # of the parts' configurations, by id
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" not in name:
            module.p = dropout
        set_rates(module, dropout)
        config = vars(module).get("config")
        if module is not network and isinstance(config, PretrainedConfig):
            if id(config) not in copies:
                copies[id(config)] = copy.deepcopy(config)
                set_rates(copies[id(config)], dropout)
            module.config = copies[id(config)]


def set_rates(holder: torch.nn.Module | PretrainedConfig, dropout: float) -> None:
    """Set all numbers among the attributes whose name says that they are a rate of dropout, or of other noise."""
    for name, value in vars(holder).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            if "dropout" in name:
                setattr(holder, name, dropout)
            elif name.endswith(OTHER_NOISE):
                setattr(holder, name, 0.0)
