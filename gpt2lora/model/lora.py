"""The low-rank adapter: which layers get one, how it starts, and how it is written.

A layer y = W x becomes y = W x + s B A x with A (r, in), B (out, r), s = alpha / r (Hu et al., 2021, arXiv:2106.09685),
or alpha / sqrt(r) with use_rslora (Kalajdzievski, 2023, arXiv:2312.03732). With use_dora the sum W + s B A is scaled to
learned lengths of its rows (Liu et al., 2024, arXiv:2402.09353).
"""

import json
import re
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gpt2lora.model import fake_quant, lora_forward, lora_init
from gpt2lora.pipeline import params
from gpt2lora.pipeline.artifacts import need
from gpt2lora.pipeline.cli import Stop

HIGHEST_RANK = 2**16  # no matrix of a language model has so high a one
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass
class Lora:
    r: int
    alpha: float
    dropout: float
    target_modules: Any  # "all-linear", or a list of names
    layers: Any  # "all", a number, a range such as "6-11", or a list of numbers
    bits: int
    use_rslora: bool
    use_dora: bool
    init: str

    def __post_init__(self):
        params.require(self.r > 0, "lora.r", self.r, "an integer above 0")
        params.require(self.r <= HIGHEST_RANK, "lora.r", self.r, f"at most {HIGHEST_RANK:,}")
        params.require(0 < self.alpha <= 1e9, "lora.alpha", self.alpha, "a number above 0, at most 1e9")
        params.require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "a number of at least 0, below 1")
        named = isinstance(self.target_modules, list) and all(isinstance(name, str) for name in self.target_modules)
        good = self.target_modules == "all-linear" or (named and self.target_modules)
        params.require(good, "lora.target_modules", self.target_modules, "all-linear or a list of module names")
        form = "all, a range such as 6-11, or a list of numbers such as [0, 11]"
        params.require(layer_numbers(self.layers) != [], "lora.layers", self.layers, form)
        params.require(self.bits in (16, 8, 4), "lora.bits", self.bits, "16 (not quantised), 8 or 4")
        known = self.init in lora_init.INITS
        params.require(known, "lora.init", self.init, f"one of {', '.join(lora_init.INITS)}")
        if self.init in lora_init.FROM_BASE:
            kept = "16: the base takes part in this init, so the adapter is converted when it is saved"
            params.require(self.bits == 16, f"lora.bits with init {self.init}", self.bits, kept)
        if self.init == "orthogonal":
            params.require(self.r % 2 == 0, "lora.r with init orthogonal", self.r, "an even number")
        if self.init == "loftq":
            fixed = "false: DoRA takes its magnitudes from the quantised base, which loftq corrects"
            params.require(not self.use_dora, "lora.use_dora with init loftq", self.use_dora, fixed)


def layer_numbers(layers: Any) -> list[int] | None:
    """Return the numbers that lora.layers means, None for all, and [] for what is none of its forms."""
    if layers == "all":
        return None
    if isinstance(layers, str) and (ends := re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", layers)):
        return list(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    numbers = layers if isinstance(layers, list) else [layers]
    return numbers if all(type(number) is int and number >= 0 for number in numbers) else []


def attach(model: PreTrainedModel, lora: Lora) -> torch.nn.Module:
    """Freeze `model` and give each target layer a trainable update s B A, in fp32. The caller seeds.

    Whatever the init but loftq, the model at first computes what its base computes.

    Raises:
        Stop: target_modules or layers name what does not exist; the line lists what does.
    """
    from peft import LoraConfig, get_peft_model

    layers = linear_layers(model)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        target_modules=targets(list(layers), lora),
        fan_in_fan_out=holds_in_out(model),
        task_type="CAUSAL_LM",
    )
    network = get_peft_model(model, config)
    for module in adapted(network).values():
        # Autocast picks the type to compute in; PEFT would have each input copied to fp32 first.
        module.cast_input_dtype_enabled = False
        if lora.bits < 16:
            module.lora_A["default"] = fake_quant.FakeQuantLinear(module.lora_A["default"], lora.bits)
            module.lora_B["default"] = fake_quant.FakeQuantLinear(module.lora_B["default"], lora.bits)
        if not lora.use_dora:
            # A method, not a partial: that would be compiled anew for each layer.
            module.forward = types.MethodType(lora_forward.forward, module)
    return network


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


def targets(layers: list[str], lora: Lora) -> list[str]:
    """Return those of the named linear layers that target_modules and layers choose.

    A name chooses the layers that are called so, or that end in a dot and it. The number of a layer is the first that
    stands in its name: 6 in transformer.h.6.attn.c_attn.
    """
    chosen = layers
    if lora.target_modules != "all-linear":
        called = {name: {each for each in layers if f".{each}".endswith(f".{name}")} for name in lora.target_modules}
        if absent := [name for name, found in called.items() if not found]:
            kinds = sorted({".".join(layer.split(".")[-2:]) for layer in layers})
            raise params.wrong("lora.target_modules", absent[0], f"all-linear or names among {', '.join(kinds)}")
        chosen = [layer for layer in layers if layer in set.union(*called.values())]
    wanted = layer_numbers(lora.layers)
    if wanted is None:
        return chosen
    number = {layer: int(found[1]) for layer in layers if (found := re.search(r"\.(\d+)\.", layer))}
    if absent := set(wanted) - set(number.values()):
        held = f"all, or numbers from 0 to {max(number.values(), default=0)}, the layers of this model"
        raise params.wrong("lora.layers", min(absent), held)
    meeting = [layer for layer in chosen if number.get(layer) in wanted]
    params.require(meeting, "lora.layers", lora.layers, f"a layer that has one of {', '.join(chosen[:8])}")
    return meeting


def adapted(network: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the layers that have an adapter, by their name in the base model."""
    return {name: module for name, module in network.get_base_model().named_modules() if hasattr(module, "lora_A")}


def save(network: torch.nn.Module, lora: Lora, taken: dict[str, torch.Tensor], folder: Path) -> None:
    """Write an ordinary PEFT adapter, adapter_config.json and adapter_model.safetensors.

    Below 16 bits, adapter_quantized.safetensors takes the place of the latter. `taken` is what `lora_init.start` gave.
    """
    network.save_pretrained(folder)
    (folder / "README.md").unlink()  # an empty form for a model card
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    config["target_modules"] = sorted(config["target_modules"])  # PEFT writes a set, in hash order
    if taken:
        tensors, config = lora_init.ordinary(tensors, taken, config)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    if lora.bits < 16:
        fake_quant.save(tensors, lora.bits, folder)
        (folder / WEIGHTS).unlink()
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(model: PreTrainedModel, folder: Path) -> torch.nn.Module:
    """Put an adapter that `save` wrote on a base, which need not be quantised as the one that it was trained on is.

    Raises:
        Stop: there are no safetensors, or they do not fit the base.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    if (folder / fake_quant.FILE).exists():
        tensors = fake_quant.load(folder)
    else:
        tensors = load_file(need(folder / WEIGHTS, "train"))
    config = LoraConfig.from_pretrained(folder)
    config.fan_in_fan_out = holds_in_out(model)
    config.base_model_name_or_path = model.name_or_path  # else PEFT warns where the folder's name is another
    try:
        network = get_peft_model(model, config)
        strange = set_peft_model_state_dict(network, tensors).unexpected_keys
    except (ValueError, RuntimeError) as error:  # no such layer; another shape
        strange = [str(error)]
    if strange:
        raise Stop(f"{folder} does not fit the base, was it trained on another? {strange[0][:200]}")
    return network.eval()
