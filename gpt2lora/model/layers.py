"""A model's configuration and its linear layers, without its weights: what can be checked before any is loaded."""

import re
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.pytorch_utils import Conv1D

from gpt2lora.model.errors import library_errors
from gpt2lora.pipeline import params
from gpt2lora.pipeline.adapter_files import read_layers, start_path
from gpt2lora.pipeline.artifacts import require_file
from gpt2lora.pipeline.schemas import LoraParams, parse_layers

MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")  # of PEFT's list
MAMBA_FUSED = (".out_proj", ".conv1d")


def load_config(folder: Path) -> PretrainedConfig:
    """Return the configuration of the model in `folder`."""
    require_file(folder / "config.json", "base")
    with loading_errors(folder):
        # Without trust_remote_code=False, transformers asks at the keyboard whether to run a model's own code.
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config.return_dict = True
    config.output_attentions = config.output_hidden_states = False  # nobody reads them, and most attention has none
    return config


def load_on_meta(folder: Path) -> PreTrainedModel:
    """Return the model in `folder` without its weights, to check its layers quickly."""
    config = load_config(folder)
    with torch.device("meta"), loading_errors(folder):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def check_target_layers(folder: Path, lora: LoraParams) -> None:
    """Refuse lora.target_modules and lora.layers that the model in `folder` lacks; its weights may be missing."""
    layers = linear_layers(load_on_meta(folder))
    selected = select_target_layers(list(layers), lora)
    if (start := start_path(lora)) and start.exists():
        found = read_layers(start)
        experts = [name for name in found if name not in layers and ".experts" in name]
        if experts and not adapts_experts(lora):
            needed = "lora.dropout 0, lora.bits 16, use_dora false, target_modules all-linear and layers all"
            what = f"an adapter without experts, or {needed}, with which PEFT adapts experts"
            raise params.invalid("lora.start_from", f"one with {', '.join(experts[:4])}", what)
        # The shapes of experts are compared when the adapter is loaded, with those that PEFT gives them.
        others = {name: shape for name, shape in found.items() if name not in experts}
        check_start_layers({name: layer_shape(layers[name]) for name in selected}, others)


def adapts_experts(lora: LoraParams) -> bool:
    """Tell whether PEFT can adapt a mixture's experts with these settings: it computes W + s B A of all experts."""
    everything = lora.target_modules == "all-linear" and lora.layers == "all" and lora.init == "default"
    return everything and not (lora.dropout or lora.use_dora) and lora.bits == 16


def layer_shape(layer: torch.nn.Module) -> tuple[int, int]:
    """Return a layer's numbers of inputs and outputs."""
    outputs, inputs = layer.weight.T.shape if isinstance(layer, Conv1D) else layer.weight.shape
    return inputs, outputs


def check_start_layers(selected: dict[str, tuple[int, int]], start: dict[str, tuple[int, int]]) -> None:
    """Refuse an adapter to start from, `start`, that has other layers than the ones `selected`."""
    key, of = "lora.start_from", "an adapter of the layers that lora.target_modules and lora.layers select"
    if lacking := [name for name in selected if name not in start]:
        raise params.invalid(key, f"one without {', '.join(lacking[:4])}", of)
    if more := [name for name in start if name not in selected]:
        raise params.invalid(key, f"one with {', '.join(more[:4])}", of)
    for name, (inputs, outputs) in selected.items():
        found = "{} x {} for {}".format(*start[name], name)
        params.require(start[name] == (inputs, outputs), key, found, f"layers of the base, {inputs} x {outputs}")


def linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Return the layers that can have an adapter, by name: all linear layers except the output head.

    PEFT refuses layers whose weight a fused kernel of a Mamba reads, without calling the layer. It takes others for
    experts (`replaced_by_experts`), and does not find others again in a file (`renamed_on_loading`).
    """
    head = model.get_output_embeddings()
    fused = MAMBA_FUSED if model.config.model_type in MAMBA_TYPES else ()
    layers = {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and module is not head and not name.endswith(fused)
    }
    if get_checkpoint_conversion_mapping(model.config.model_type) is None:  # PEFT renames nothing
        return layers
    left_out = replaced_by_experts(model, list(layers)) | renamed_on_loading(model, list(layers))
    return {name: module for name, module in layers.items() if name not in left_out}


def is_linear(module: torch.nn.Module) -> bool:
    """Tell whether a module is a linear layer, and not a router or groups of layers that are derived from one."""
    if not isinstance(module, torch.nn.Linear) or type(module) is torch.nn.Linear:
        return isinstance(module, torch.nn.Linear | Conv1D)
    if not module.weight.is_floating_point():
        return True  # quantized
    try:
        with torch.no_grad():
            outputs = module(module.weight.new_zeros(1, 2, module.in_features))
    except Exception:  # what a layer of another kind raises is its own
        return False
    return isinstance(outputs, torch.Tensor) and outputs.shape == (1, 2, module.out_features)


def replaced_by_experts(model: PreTrainedModel, names: list[str]) -> set[str]:
    """Return which layers PEFT would leave without an adapter, for one on the experts of a mixture.

    In older versions of transformers, experts were linear layers, with names such as gate_proj. In models with such
    experts, PEFT takes all layers of these names for them, dense ones and shared experts too.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=names)
    convert_peft_config_for_transformers(config, model, None)
    return set(names) - set(config.target_modules)


def renamed_on_loading(model: PreTrainedModel, names: list[str]) -> set[str]:
    """Return for which modules PEFT would not find the adapter again that it saved.

    When PEFT loads an adapter, it renames the tensors as transformers renames the weights of published checkpoints.
    Where the pattern of an old name matches the new name too, it makes a third one of it: of Laguna's shared_experts.
    shared_experts.. since shared_expert. is meant. PEFT then leaves out what it has no place for, with a warning.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    stored = {name: f"base_model.model.{name}.lora_A.weight" for name in names}
    tensors = {key: torch.empty(1, 2, device="meta") for key in stored.values()}
    loaded = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), tensors)
    return {name for name, key in stored.items() if loaded.get(key) is not tensors[key]}


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


def loading_errors(folder: Path) -> AbstractContextManager[None]:
    """Turn the errors that transformers raises for a folder without a causal language model into one line."""
    return library_errors(
        f"{folder}: transformers itself cannot load this model", "code that comes with a model is never run"
    )
