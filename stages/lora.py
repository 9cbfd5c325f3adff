"""The low-rank adapter: which layers get one, and how it is written (Hu et al., 2021, arXiv:2106.09685)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages import params
from stages.command import Stop, need

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class Lora:
    r: int
    alpha: float
    dropout: float
    target_modules: Any  # "all-linear", or a list of names

    def __post_init__(self):
        params.require(self.r > 0, "lora.r", self.r, "an integer above 0")
        params.require(self.alpha > 0, "lora.alpha", self.alpha, "a number above 0")
        params.require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "a number of at least 0, below 1")
        named = isinstance(self.target_modules, list) and all(isinstance(name, str) for name in self.target_modules)
        good = self.target_modules == "all-linear" or (named and self.target_modules)
        params.require(good, "lora.target_modules", self.target_modules, "all-linear or a list of module names")


def attach(model: PreTrainedModel, lora: Lora) -> torch.nn.Module:
    """Freeze `model` and give each target layer W the trainable update (alpha / r) B A, in fp32.

    A (r, in) is random, B (out, r) zero: at first the model computes what its base computes. The caller seeds.

    Raises:
        Stop: a name in target_modules matches no linear layer; the line lists those that exist.
    """
    from peft import LoraConfig, get_peft_model

    layers = linear_layers(model)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets(list(layers), lora.target_modules),
        fan_in_fan_out=holds_in_out(model),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def load(base_model: PreTrainedModel, folder: Path) -> "PeftModel":
    """Put the adapter that `save` wrote on a base, which need not be quantised as the one that it was trained on is.

    Raises:
        Stop: there are no safetensors (PEFT would look for a pickle, then on the hub), or they do not fit the base.
    """
    from peft import PeftConfig, PeftModel

    need(folder / "adapter_model.safetensors", "train")
    config = PeftConfig.from_pretrained(folder)
    config.fan_in_fan_out = holds_in_out(base_model)
    try:
        return PeftModel.from_pretrained(base_model, folder, config=config)
    except (ValueError, RuntimeError) as error:  # no such layer; another shape
        raise Stop(f"{folder} does not fit the base, was it trained on another? {str(error)[:200]}") from error


def holds_in_out(model: PreTrainedModel) -> bool:
    """Tell whether the model's matrices are (in, out), as in GPT-2's Conv1D, and not (out, in), as in all others."""
    return any(isinstance(layer, Conv1D) for layer in linear_layers(model).values())


def linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Return the layers that can take an adapter, by name: every matrix but the embeddings and the output head."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }


def targets(layers: list[str], wanted: str | list[str]) -> list[str]:
    """Return the layers whose name is, or ends in a dot and, one of the wanted names."""
    if wanted == "all-linear":
        return layers
    for name in wanted:
        if not any(f".{layer}".endswith(f".{name}") for layer in layers):
            kinds = sorted({".".join(layer.split(".")[-2:]) for layer in layers})
            raise params.wrong("lora.target_modules", name, f"all-linear or names among {', '.join(kinds)}")
    return [layer for layer in layers if any(f".{layer}".endswith(f".{name}") for name in wanted)]


def save(model: torch.nn.Module, folder: Path) -> None:
    """Write an ordinary PEFT adapter: adapter_config.json and adapter_model.safetensors."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink()  # an empty form for a model card
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["target_modules"] = sorted(config["target_modules"])  # PEFT writes a set, in hash order
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
