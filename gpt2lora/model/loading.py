"""Load the base model, in floats or quantized, and the tuned model; read and write method.json beside an adapter."""

import functools
import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from gpt2lora.model import attention, device, lora, lora_init
from gpt2lora.model.dora_forward import fuse_dora, has_peft_dora
from gpt2lora.model.errors import library_errors
from gpt2lora.model.layers import load_config, loading_errors
from gpt2lora.model.quantization import bitsandbytes_config, check_4bit_width, prepare_8bit_layer
from gpt2lora.pipeline.adapter_files import METHOD_FILE, find_start, read_method_file, verify_adapter
from gpt2lora.pipeline.artifacts import digests, verify_digests
from gpt2lora.pipeline.cli import StageError, echo
from gpt2lora.pipeline.schemas import LoraParams, QuantizationParams

transformers_logging.disable_progress_bar()  # reading weights takes a second


def load_base(folder: Path, quantization: QuantizationParams | None, dtype: torch.dtype) -> PreTrainedModel:
    """Load data/base in fp32; with `quantization`, its linear layers are stored in 4 or 8 bits.

    Args:
        dtype: the type in which quantized layers compute. Float layers compute in autocast's type.
    """
    config = load_config(folder)
    if getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"  # the same function in one kernel instead of six
    if getattr(config, "rescale_every", 0):
        # Outside training, RWKV halves states and weights in place against overflow in fp16; adapters it does not know.
        config.rescale_every = 0
    target = device.pick_device()
    if quantization is None:
        model = _load_model(folder, config).to(target)
        choose_attention(model, folder)
        return model
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    options = {"quantization_config": bitsandbytes_config(quantization, dtype), "device_map": {"": target}}
    model = _load_model(folder, config, **options)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            check_4bit_width(name, module.in_features, target)
            # Otherwise the first evaluation repacks 4-bit weights in place, and training after it crashes.
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt):
            prepare_8bit_layer(module)
    choose_attention(model, folder)
    return model


def choose_attention(model: PreTrainedModel, folder: Path) -> None:
    """Choose how the model in `folder` computes attention, and refuse one that is not causal."""
    if getattr(model.config, "attention_type", None) == "block_sparse":  # of BigBird and Pegasus
        raise StageError(
            f"{folder}: blocks of sparse attention see tokens that follow, and short texts are not: set "
            "attention_type to original_full in config.json"
        )
    for module in model.modules():
        # transformers looks for padding in each batch, which waits for the GPU, and advises a mask: none is needed.
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = lambda ids, mask: None
    quantized = " with a quantized base" if getattr(model, "hf_quantizer", None) else ""
    what = f"{folder}: {type(model).__name__} fails on a few tokens{quantized}"
    with library_errors(what, "try method lora" if quantized else "take another model"):
        attention.use_causal_attention(model)
        attention.check_causal(model)


def choose_experts(model: PreTrainedModel) -> None:
    """Let a mixture compute its experts one after another if torch does not compute experts of their sizes at once.

    It takes rows of a multiple of 16 bytes, which are 8 numbers of bf16.
    """
    sizes = {size for name, each in model.named_parameters() if lora.is_expert(name, each) for size in each.shape[1:]}
    odd = sorted(size for size in sizes if size % 8)
    if odd and "grouped_mm" in model.get_experts_implementation().values():
        model.set_experts_implementation("eager")
        name = type(model).__name__
        echo_once(f"{name} computes its experts one after another, which is slower: {odd[0]} is no multiple of 8")


@functools.cache  # a stage loads a model several times
def echo_once(line: str) -> None:
    """Print a line that this process has not printed here before."""
    echo(line)


def load_for_training(
    base: Path, method: str, quantization: QuantizationParams | None, lora_params: LoraParams, dtype: torch.dtype
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Load the base with a new adapter, or with all weights trainable for method full. The caller sets the seed.

    Returns:
        The model, and the initial factors that `lora_init.initialize_lora` returned.
    """
    model = load_base(base, quantization, dtype)
    if method == "full":
        return model, {}
    with library_errors(f"{base}: PEFT cannot attach an adapter", "set lora.target_modules to names of other layers"):
        model = lora.attach_lora(model, lora_params)
    floats = lora.linear_layers(load_base(base, None, dtype)) if lora_params.init == "loftq" else {}
    if start := find_start(lora_params):
        lora.load_start(model, start)
    initial_factors = lora_init.initialize_lora(lora.lora_layers(model), lora_params.init, floats)
    fuse_dora(model, lora_params.init)
    if not has_peft_dora(model):  # it computes norms of whole weights, which need fp32
        cast_frozen(model, dtype)
    return model, initial_factors


def cast_frozen(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen float parameters to `dtype`, in which they are computed, once instead of in each step."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def load_fp32(weights: Path, config: Path) -> PreTrainedModel:
    """Load the weights in the folder `weights` in fp32 on the CPU, with the unchanged config.json of `config`."""
    return _load_model(weights, load_config(config))


def load_tuned(base: Path, adapter: Path, dtype: torch.dtype) -> torch.nn.Module:
    """Load what `train` wrote to data/adapter: an adapter on its base, or with method full a whole model."""
    method, quantization = read_method(adapter)
    verify_adapter_and_base(base, adapter)
    if method == "full":
        return load_base(adapter, None, dtype)
    return lora.load_adapter(load_base(base, quantization, dtype), adapter)


def verify_adapter_and_base(base: Path, adapter: Path) -> None:
    """Compare the adapter and the weights of its base with the digests in method.json."""
    verify_digests(base, verify_adapter(adapter)["base"], adapter / METHOD_FILE, "base train")


def read_method(folder: Path) -> tuple[str, QuantizationParams | None]:
    """Return from method.json the method, and how the base was quantized."""
    record = read_method_file(folder)
    return record["method"], QuantizationParams(**record["quantization"]) if record["quantization"] else None


def write_method(folder: Path, method: str, quantization: QuantizationParams | None, base: Path) -> None:
    """Write method.json: on what base the adapter in `folder` was trained, so that `evaluate` loads the same."""
    record = {"method": method, "quantization": asdict(quantization) if quantization else None}
    files = {name: digest for name, digest in digests(folder).items() if name != METHOD_FILE}
    record |= {"files": files, "base": digests(base, "*.safetensors")}
    (folder / METHOD_FILE).write_text(json.dumps(record, indent=2) + "\n")


def causal_masks(folder: Path) -> set[str]:
    """Return the names of the causal masks among stored weights: GPT-Neo, GPT-J and CodeGen once saved theirs."""
    names = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118, it is no dictionary
                kind, shape = name.rpartition(".")[2], stored.get_slice(name).get_shape()
                is_square = len(shape) == 4 and shape[:2] == [1, 1] and shape[2] == shape[3]
                if (kind in ("bias", "causal_mask") and is_square) or (kind == "masked_bias" and math.prod(shape) == 1):
                    names.add(name)
    return names


def _load_model(folder: Path, config: PretrainedConfig, **quantized) -> PreTrainedModel:
    with loading_errors(folder):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below
            **quantized,
        )
    # transformers fills mismatched and missing weights with random numbers.
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise StageError(
            f"{folder}: {name} is {tuple(stored)} in *.safetensors, {tuple(expected)} by config.json: not a pair"
        )
    if missing := sorted(info["missing_keys"]):
        raise StageError(f"{folder}: *.safetensors lack {len(missing)} of the model's weights, {missing[0]} first")
    unused = set(info["unexpected_keys"])
    if unused:
        unused -= causal_masks(folder)
    if unused:
        raise StageError(
            f"{folder}: *.safetensors hold {len(unused)} weights that config.json has no place for, {min(unused)} "
            "first: not a pair; save the model again with save_pretrained"
        )
    choose_experts(model)
    return model
