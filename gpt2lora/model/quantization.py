"""The frozen base in 4 or 8 bits (bitsandbytes): parameters, limits, size in memory, and conversion back to floats.

8-bit layers compute with dequantized weights in every mode and on every device, as 4-bit layers do. bitsandbytes itself
also rounds activations to 8 bits on a GPU and in evaluation (LLM.int8(), Dettmers et al., 2022, arXiv:2208.07339): no
float model computes the same, its search for outliers waits for the GPU, and one outlier token changes others.
"""

import contextlib
import math
import types
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from transformers import BitsAndBytesConfig, PreTrainedModel

from gpt2lora.pipeline.cli import StageError
from gpt2lora.pipeline.schemas import QuantizationParams


def check_4bit_width(name: str, width: int, device: torch.device) -> None:
    """Refuse a 4-bit layer that bitsandbytes 0.50 would silently dequantize to wrong values."""
    if device.type == "cpu" and width % 64:
        raise StageError(
            f"{name} has {width} inputs: on a CPU bitsandbytes mixes up the scales of 4-bit layers whose inputs are no "
            "multiple of 64; set methods.qlora.bits to 8 and double_quant to false, or use a GPU"
        )


class Linear8bit(torch.autograd.Function):
    """x W^T + bias with W = codes * absmax / 127, dequantized again in the backward pass instead of being kept.

    Args of apply:
        x: (..., in). codes: (out, in) int8. absmax: (out,) fp32, of each row. bias: (out,) or None. Only x gets a
            gradient.
    """

    @staticmethod
    def forward(ctx, x, codes, absmax, bias):
        ctx.save_for_backward(codes, absmax)
        return F.linear(x, dequantize_8bit(codes, absmax).to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        codes, absmax = ctx.saved_tensors
        return gradient @ dequantize_8bit(codes, absmax).to(gradient.dtype), None, None, None


def dequantize_8bit(codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """Return the fp32 weights, (out, in), that PEFT and an export get from bitsandbytes too."""
    return codes * absmax[:, None] * (1 / 127)


def linear_8bit_forward(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compute an 8-bit layer of bitsandbytes instead of its own `forward`. x: (..., in); returns (..., out)."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return Linear8bit.apply(x, layer.weight, layer.absmax, layer.bias)


def prepare_8bit_layer(layer: torch.nn.Module) -> None:
    """Initialise the 8-bit state once, and let the layer compute with dequantized weights.

    On a CPU, PEFT replaces the weight by one without scales whenever DoRA reads it, and the layer would take that one
    over.
    """
    layer.init_8bit_state()
    layer.init_8bit_state = lambda: None
    layer.register_buffer("absmax", layer.state.SCB, persistent=False)
    # A method, not a partial: torch.compile would compile a partial again for each layer.
    layer.forward = types.MethodType(linear_8bit_forward, layer)


@contextlib.contextmanager
def computing_in_fp32(model: torch.nn.Module) -> Iterator[None]:
    """Let 4-bit layers compute in fp32, from the same weights."""
    from bitsandbytes.nn import Linear4bit

    layers = {module: module.compute_dtype for module in model.modules() if isinstance(module, Linear4bit)}
    for layer in layers:
        layer.compute_dtype = torch.float32
    try:
        yield
    finally:
        for layer, dtype in layers.items():
            layer.compute_dtype = dtype


def count_frozen_parameters(model: torch.nn.Module) -> int:
    """Return the number of frozen weights, which is not numel for 4-bit parameters: they hold two weights a byte."""
    frozen = (parameter for parameter in model.parameters() if not parameter.requires_grad)
    return sum(math.prod(parameter_size(parameter)) for parameter in frozen)


def count_frozen_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all frozen weights in memory, with all scales of quantized ones."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    tensors = [tensor for parameter in frozen for tensor in (parameter, *_scales(parameter))]
    # An initialised 8-bit layer holds the scales itself, no longer its weight.
    states = (getattr(module, "state", None) for module in model.modules())
    tensors += [state.SCB for state in states if getattr(state, "SCB", None) is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def parameter_size(parameter: torch.nn.Parameter) -> torch.Size:
    """Return the shape of a weight, whether or not it is stored in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return parameter.shape if state is None else state.shape


def _scales(parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    state = getattr(parameter, "quant_state", None)
    nested = getattr(state, "state2", None)
    parts = [getattr(level, name, None) for level in (state, nested) for name in ("absmax", "code", "offset")]
    return [tensor for tensor in parts if isinstance(tensor, torch.Tensor)]


def bitsandbytes_config(quantization: QuantizationParams, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the configuration with which transformers quantizes a model; 4-bit layers compute in `dtype`."""
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def dequantize_into(network: PreTrainedModel, quantized: PreTrainedModel) -> None:
    """Copy the dequantized weights of `quantized` into the same layers of the float `network`.

    Quantized layers hold (out, in), a Conv1D holds (in, out). The type of the float layer decides whether to transpose:
    the shape does not, since a square matrix fits both.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    with torch.no_grad():
        for name, layer in quantized.named_modules():
            if isinstance(layer, Linear4bit | Linear8bitLt):
                target, values = network.get_submodule(name), dequantize_module_weight(layer)
                target.weight.copy_(values.T if isinstance(target, Conv1D) else values)
