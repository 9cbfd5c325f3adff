"""The low-rank adapter (LoRA): which layers get one, and how it is attached, saved and loaded.

A layer y = W x becomes y = W x + s B A x with A (r, in), B (out, r), s = alpha / r (Hu et al., 2021, arXiv:2106.09685),
or alpha / sqrt(r) with use_rslora (Kalajdzievski, 2023, arXiv:2312.03732). With use_dora the rows of W + s B A are
scaled to learned norms (Liu et al., 2024, arXiv:2402.09353).
"""

import json
import math
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
from gpt2lora.model.quantization import parameter_size
from gpt2lora.pipeline import params
from gpt2lora.pipeline.artifacts import require_file
from gpt2lora.pipeline.cli import StageError

MAX_RANK = 2**16  # more than any matrix of a language model has
MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")  # of PEFT's list
MAMBA_FUSED = (".out_proj", ".conv1d")
FUSED_LAYERS = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")  # whose update `lora_forward` computes
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass
class LoraParams:
    """The section `lora` of params.yaml."""

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
        params.require(self.r <= MAX_RANK, "lora.r", self.r, f"at most {MAX_RANK:,}")
        params.require(0 < self.alpha <= 1e9, "lora.alpha", self.alpha, "a number above 0, at most 1e9")
        params.require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "a number of at least 0, below 1")
        named = isinstance(self.target_modules, list) and all(isinstance(name, str) for name in self.target_modules)
        good = self.target_modules == "all-linear" or (named and self.target_modules)
        params.require(good, "lora.target_modules", self.target_modules, "all-linear or a list of module names")
        form = "all, a range such as 6-11, or a list of numbers such as [0, 11]"
        params.require(parse_layers(self.layers) != [], "lora.layers", self.layers, form)
        params.require(self.bits in (16, 8, 4), "lora.bits", self.bits, "16 (not quantized), 8 or 4")
        known = self.init in lora_init.INITS
        params.require(known, "lora.init", self.init, f"one of {', '.join(lora_init.INITS)}")
        if self.init in lora_init.FROM_BASE:
            kept = "16: the base takes part in this init, so the adapter is converted when it is saved"
            params.require(self.bits == 16, f"lora.bits with init {self.init}", self.bits, kept)
        if self.init == "orthogonal":
            params.require(self.r % 2 == 0, "lora.r with init orthogonal", self.r, "an even number")
        if self.init == "loftq":
            fixed = "false: DoRA takes its magnitudes from the quantized base, which loftq corrects"
            params.require(not self.use_dora, "lora.use_dora with init loftq", self.use_dora, fixed)


def parse_layers(layers: Any) -> list[int] | None:
    """Return the layer numbers that lora.layers stands for: None for all, [] for an invalid value."""
    if layers == "all":
        return None
    if isinstance(layers, str) and (ends := re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", layers)):
        return list(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    numbers = layers if isinstance(layers, list) else [layers]
    return numbers if all(type(number) is int and number >= 0 for number in numbers) else []


def attach_lora(model: PreTrainedModel, lora: LoraParams) -> torch.nn.Module:
    """Freeze `model` and add a trainable update s B A, in fp32, to each target layer. The caller sets the seed.

    Before training the model computes the same as its base, except with init loftq.

    Raises:
        StageError: target_modules or layers name something that does not exist; the line lists what exists.
    """
    from peft import LoraConfig, get_peft_model

    layers = linear_layers(model)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        target_modules=select_target_layers(list(layers), lora),
        fan_in_fan_out=is_fan_in_fan_out(model),
        task_type="CAUSAL_LM",
    )
    network = get_peft_model(model, config)
    for module in lora_layers(network).values():
        # A layer with another `forward` than these may read more than x: PEFT computes it, in fp32.
        is_fused = not lora.use_dora and type(module.base_layer).__name__ in FUSED_LAYERS
        # With DoRA autocast chooses the type; otherwise PEFT first copies each input to fp32.
        module.cast_input_dtype_enabled = not is_fused and not lora.use_dora
        if lora.bits < 16:
            module.lora_A["default"] = fake_quant.FakeQuantLinear(module.lora_A["default"], lora.bits)
            module.lora_B["default"] = fake_quant.FakeQuantLinear(module.lora_B["default"], lora.bits)
        if is_fused:
            # A method, not a partial: torch.compile would compile a partial again for each layer.
            module.forward = types.MethodType(lora_forward.lora_forward, module)
    return network


def is_fan_in_fan_out(model: PreTrainedModel) -> bool:
    """Tell whether weights are (in, out), as in GPT-2's Conv1D, and not (out, in), as in nn.Linear."""
    return any(isinstance(layer, Conv1D) for layer in linear_layers(model).values())


def linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Return the layers that can have an adapter, by name: all linear layers except the output head.

    PEFT refuses layers whose weight a fused kernel of a Mamba reads, without calling the layer.
    """
    head = model.get_output_embeddings()
    fused = MAMBA_FUSED if model.config.model_type in MAMBA_TYPES else ()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head and not name.endswith(fused)
    }


def weights_without_adapter(network: torch.nn.Module) -> tuple[float, list[str]]:
    """Return how much of the weights between embedding and output head lies in layers without an adapter.

    Biases and norms do not count. With all weights trained, as with method full, it is none.

    Returns:
        The share in percent, and the names of these weights after the layer's number, such as "mlp.c_fc.weight".
    """
    if not hasattr(network, "get_base_model"):
        return 0.0, []
    base = network.get_base_model()
    embeddings = [module for module in base.modules() if isinstance(module, torch.nn.Embedding)]
    outer = {id(layer.weight) for layer in (*embeddings, base.get_output_embeddings()) if layer is not None}
    sizes = {name: parameter_size(each) for name, each in base.named_parameters() if id(each) not in outer}
    sizes = {name: size for name, size in sizes.items() if ".lora_" not in name}
    total = sum(math.prod(shape) for shape in sizes.values() if len(shape) > 1)
    rest = {name: math.prod(shape) for name, shape in sizes.items() if len(shape) > 1 and ".base_layer." not in name}
    kinds = sorted({re.split(r"\.\d+\.", name, maxsplit=1)[-1] for name in rest})
    return 100 * sum(rest.values()) / total, kinds


def select_target_layers(layers: list[str], lora: LoraParams) -> list[str]:
    """Return the names of the linear layers that target_modules and layers select.

    A target module selects the layers with this name, or with a name that ends in a dot and this name. The number of a
    layer is the first number in its name: 6 in transformer.h.6.attn.c_attn.
    """
    selected = layers
    if lora.target_modules != "all-linear":
        matches = {name: {each for each in layers if f".{each}".endswith(f".{name}")} for name in lora.target_modules}
        if unknown := [name for name, found in matches.items() if not found]:
            kinds = sorted({".".join(layer.split(".")[-2:]) for layer in layers})
            raise params.invalid("lora.target_modules", unknown[0], f"all-linear or names among {', '.join(kinds)}")
        selected = [layer for layer in layers if layer in set.union(*matches.values())]
    wanted = parse_layers(lora.layers)
    if wanted is None:
        return selected
    number = {layer: int(found[1]) for layer in layers if (found := re.search(r"\.(\d+)\.", layer))}
    if unknown := set(wanted) - set(number.values()):
        known = f"all, or numbers from 0 to {max(number.values(), default=0)}, the layers of this model"
        raise params.invalid("lora.layers", min(unknown), known)
    in_layers = [layer for layer in selected if number.get(layer) in wanted]
    params.require(in_layers, "lora.layers", lora.layers, f"a layer that has one of {', '.join(selected[:8])}")
    return in_layers


def lora_layers(network: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the layers with an adapter, by their name in the base model."""
    return {name: module for name, module in network.get_base_model().named_modules() if hasattr(module, "lora_A")}


def save_adapter(
    network: torch.nn.Module, lora: LoraParams, initial_factors: dict[str, torch.Tensor], folder: Path
) -> None:
    """Write a standard PEFT adapter: adapter_config.json and adapter_model.safetensors.

    With lora.bits 8 or 4, adapter_quantized.safetensors replaces the latter.

    Args:
        initial_factors: the result of `lora_init.initialize_lora`.
    """
    network.save_pretrained(folder)
    (folder / "README.md").unlink()  # PEFT's empty template of a model card
    tensors, config = load_file(folder / ADAPTER_WEIGHTS), json.loads((folder / ADAPTER_CONFIG).read_text())
    config["target_modules"] = sorted(config["target_modules"])  # PEFT writes a set in hash order
    if initial_factors:
        tensors, config = lora_init.to_standard_lora(tensors, initial_factors, config)
        save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    if lora.bits < 16:
        fake_quant.save_quantized(tensors, lora.bits, folder)
        (folder / ADAPTER_WEIGHTS).unlink()
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(model: PreTrainedModel, folder: Path) -> torch.nn.Module:
    """Load an adapter that `save_adapter` wrote onto a base, which may be quantized differently than in training.

    Raises:
        StageError: there are no safetensors, or they do not fit the base.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    if (folder / fake_quant.QUANTIZED_WEIGHTS).exists():
        tensors = fake_quant.load_quantized(folder)
    else:
        tensors = load_file(require_file(folder / ADAPTER_WEIGHTS, "train"))
    config = LoraConfig.from_pretrained(folder)
    config.fan_in_fan_out = is_fan_in_fan_out(model)
    config.base_model_name_or_path = model.name_or_path  # otherwise PEFT warns if the folder has another name
    try:
        network = get_peft_model(model, config)
        unexpected = set_peft_model_state_dict(network, tensors).unexpected_keys
    except (ValueError, RuntimeError) as error:  # a layer is missing, or has another shape
        unexpected = [str(error)]
    if unexpected:
        raise StageError(f"{folder} does not fit the base, was it trained on another? {unexpected[0][:200]}")
    return network.eval()
