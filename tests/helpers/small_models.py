"""Small models with random weights: written to a folder, loaded with an adapter, and run on fixed ids."""

from pathlib import Path

import pytest
import tiny
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from gpt2lora.model import loading, lora, lora_init
from gpt2lora.model.device import pick_device
from gpt2lora.pipeline.schemas import LoraParams, QuantizationParams
from gpt2lora.training.loss import nll_sum

LAYERS, WIDTH = 2, 64  # of the tiny model, and of `write_gpt2`
# Their linear layers: names, inputs and outputs.
PROJECTIONS = {"attn.c_attn": (64, 192), "attn.c_proj": (64, 64), "mlp.c_fc": (64, 256), "mlp.c_proj": (256, 64)}
NF4 = QuantizationParams(bits=4, quant_type="nf4", double_quant=True)
INT8 = QuantizationParams(bits=8, quant_type="nf4", double_quant=False)
NF4_SINGLE_QUANT = QuantizationParams(bits=4, quant_type="nf4", double_quant=False)
FP4 = QuantizationParams(bits=4, quant_type="fp4", double_quant=True)
BASES = {"float": None, "nf4": NF4, "nf4-single-quant": NF4_SINGLE_QUANT, "fp4": FP4, "int8": INT8}
on_every_base = pytest.mark.parametrize("quantization", BASES.values(), ids=BASES)
on_quantized_bases = pytest.mark.parametrize("quantization", list(BASES.values())[1:], ids=list(BASES)[1:])
IDS = (torch.arange(3 * 40).reshape(3, 40) * 7 % 300).to(pick_device())
# A deviation of the weights at which attention, activations and updates all show in the logits.
COMMON = {"vocab_size": 300, "initializer_range": 0.3}


def write_gpt2(folder: Path, **changes) -> Path:
    """Write a GPT-2 of two layers; its linear layers are Conv1D, with weights (in, out)."""
    size = {"n_positions": 64, "n_layer": 2, "n_embd": 64, "n_head": 2}
    return _write(GPT2LMHeadModel, GPT2Config(**COMMON | size | changes), folder)


def write_llama(folder: Path, **changes) -> Path:
    """Write a Llama of two layers; its linear layers are nn.Linear, with weights (out, in)."""
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = {"max_position_embeddings": 64, "tie_word_embeddings": False}
    return _write(LlamaForCausalLM, LlamaConfig(**COMMON | size | shape | changes), folder)


def write_mixtral(folder: Path, **changes) -> Path:
    """Write a mixture of one layer, whose experts are parameters and not layers."""
    size = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 4}
    shape = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 300, "initializer_range": 0.3}
    return _write(MixtralForCausalLM, MixtralConfig(**size | shape | changes), folder)


def write_bloom(folder: Path) -> Path:
    """Write a Bloom of two layers, whose attention needs a mask of its own: with ours it would look ahead."""
    return _write(BloomForCausalLM, BloomConfig(hidden_size=32, n_layer=2, n_head=4, **COMMON), folder)


def _write(kind: type, config: PretrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    return folder


def load(
    folder: Path, quantization: QuantizationParams | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Load a base, by default in floats."""
    return loading.load_base(folder, quantization, dtype)


def new_adapter(
    folder: Path, quantization: QuantizationParams | None = None, seed: int = 0, **changes
) -> torch.nn.Module:
    """Load a base with a new adapter; `changes` are of the section lora."""
    base = load(folder, quantization)
    torch.manual_seed(seed)
    return lora.attach_lora(base, tiny.low_rank(**changes))


def random_adapter(
    folder: Path, quantization: QuantizationParams | None = None, **changes
) -> tuple[torch.nn.Module, LoraParams, dict[str, torch.Tensor]]:
    """Load a base with an adapter whose factors are both random, or as an init sets them.

    Returns:
        The arguments of `save_adapter` before the folder: the model, its LoraParams and the initial factors.
    """
    lora_params = tiny.low_rank(**changes)
    network = new_adapter(folder, quantization, **changes)
    floats = lora.linear_layers(load(folder))
    initial_factors = lora_init.initialize_lora(lora.lora_layers(network), lora_params.init, floats)
    if lora_params.init == "default":
        change_trained(network)
    return network, lora_params, initial_factors


def fill_factors_b(network: torch.nn.Module, deviation: float) -> None:
    """Fill the factors B, which are 0 in a new adapter, with random values."""
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=deviation)


def change_trained(network: torch.nn.Module) -> None:
    """Change every trainable value, as training does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def train_one_step(network: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Move every trainable value by 0.1 against its gradient's sign; layers compute in `dtype`."""
    network.train()
    nll_sum(network, IDS, IDS, dtype).backward()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter -= 0.1 * parameter.grad.sign()
                parameter.grad = None


def logits(network: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the logits of IDS without dropout; layers compute in `dtype`."""
    network.eval()
    with torch.no_grad(), torch.autocast(IDS.device.type, dtype, enabled=dtype != torch.float32):
        return network(input_ids=IDS, use_cache=False).logits


def float_weight(layer: torch.nn.Module) -> torch.Tensor:
    """Return the weight of a float layer as (out, in), in fp64."""
    return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach().double()
