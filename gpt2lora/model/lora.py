"""The low-rank adapter (LoRA): which layers get one, and how it is attached, saved and loaded.

A layer y = W x becomes y = W x + s B A x with A (r, in), B (out, r), s = alpha / r (Hu et al., 2021, arXiv:2106.09685),
or alpha / sqrt(r) with use_rslora (Kalajdzievski, 2023, arXiv:2312.03732). With use_dora the rows of W + s B A are
scaled to learned norms (Liu et al., 2024, arXiv:2402.09353).
"""

import json
import math
import re
import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gpt2lora.model import fake_quant, lora_forward, lora_init
from gpt2lora.model.layers import adapts_experts, linear_layers, select_target_layers
from gpt2lora.model.quantization import parameter_size
from gpt2lora.pipeline.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, QUANTIZED_WEIGHTS
from gpt2lora.pipeline.artifacts import require_file
from gpt2lora.pipeline.cli import StageError
from gpt2lora.pipeline.schemas import LoraParams


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
        target_parameters=expert_weights(model) if adapts_experts(lora) else None,
        fan_in_fan_out=is_fan_in_fan_out(model),
        task_type="CAUSAL_LM",
    )
    network = get_peft_model(model, config)
    for module in lora_layers(network).values():
        # A layer with another `forward` than these may read more than x: PEFT computes it, in fp32.
        is_fused = not lora.use_dora and type(module.base_layer).__name__ in lora_forward.FUSED_LAYERS
        # With DoRA autocast chooses the type; otherwise PEFT first copies each input to fp32.
        module.cast_input_dtype_enabled = not is_fused and not lora.use_dora
        if lora.bits < 16:
            module.lora_A["default"] = fake_quant.FakeQuantLinear(module.lora_A["default"], lora.bits)
            module.lora_B["default"] = fake_quant.FakeQuantLinear(module.lora_B["default"], lora.bits)
        if is_fused:
            # A method, not a partial: torch.compile would compile a partial again for each layer.
            module.forward = types.MethodType(lora_forward.lora_forward, module)
    return network


def expert_weights(model: PreTrainedModel) -> list[str]:
    """Return the names of a mixture's experts."""
    return [name for name, each in model.named_parameters() if is_expert(name, each)]


def is_expert(name: str, parameter: torch.nn.Parameter) -> bool:
    """Tell whether it is the weight of a mixture's experts, of the shape (experts, in, out) or (experts, out, in)."""
    return ".experts." in name and parameter.dim() == 3


def is_fan_in_fan_out(model: PreTrainedModel) -> bool:
    """Tell whether weights are (in, out), as in GPT-2's Conv1D, and not (out, in), as in nn.Linear."""
    return any(isinstance(layer, Conv1D) for layer in linear_layers(model).values())


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
    for key in ("target_modules", "target_parameters"):
        config[key] = config[key] and sorted(config[key])  # PEFT writes a set in hash order
    if initial_factors:
        tensors, config = lora_init.to_standard_lora(tensors, initial_factors, config)
        save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    if lora.bits < 16:
        fake_quant.save_quantized(tensors, lora.bits, folder)
        (folder / ADAPTER_WEIGHTS).unlink()
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors by their names in PEFT's state dict, dequantized if they were stored in few bits."""
    if (folder / QUANTIZED_WEIGHTS).exists():
        return fake_quant.load_quantized(folder)
    return load_file(require_file(folder / ADAPTER_WEIGHTS, "train"))


def load_start(network: torch.nn.Module, folder: Path) -> None:
    """Replace the initial values of a new adapter by those of the adapter in `folder`.

    Raises:
        StageError: a value is not finite, or tensors are missing or too many.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    tensors = read_adapter(folder)
    if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise StageError(f"params.yaml: lora.start_from: {folder}: {broken[0]} holds values that are not finite")
    expected = {name: value.shape for name, value in get_peft_model_state_dict(network).items()}
    found = {name: value.shape for name, value in tensors.items()}
    if found != expected:
        name = min({name for name, _ in expected.items() ^ found.items()})
        shapes = f"{tuple(found.get(name, ())) or 'missing'}, {tuple(expected.get(name, ())) or 'nothing'} was expected"
        raise StageError(f"params.yaml: lora.start_from: {folder}: {name} is {shapes}")
    set_peft_model_state_dict(network, tensors)


def load_adapter(model: PreTrainedModel, folder: Path) -> torch.nn.Module:
    """Load an adapter that `save_adapter` wrote onto a base, which may be quantized differently than in training.

    Raises:
        StageError: there are no safetensors, or they do not fit the base.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    tensors = read_adapter(folder)
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
