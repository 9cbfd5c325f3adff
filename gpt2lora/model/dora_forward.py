"""The forward pass of a DoRA layer, y = m (W + s B A) x / ‖W + s B A‖, without a matrix of W's size.

The norm of row i needs W only through sums that do not change and a product with the r rows of A:

    ‖W + s B A‖²ᵢ = ‖W‖²ᵢ + 2 s Bᵢ·(W Aᵀ)ᵢ + s² Bᵢ (A Aᵀ) Bᵢᵀ

PEFT's forward pass builds s B A and adds it to W, in fp32, in each step. In both the norm counts as a constant: no
gradient flows through it (Liu et al., 2024, arXiv:2402.09353, section 4.3).
"""

import types

import torch

from gpt2lora.model.lora_forward import FUSED_LAYERS, factor_weight, lora_forward
from gpt2lora.pipeline.cli import StageError
from gpt2lora.pipeline.schemas import FROM_BASE

# A bias may be larger than all else, as in Qwen2's keys, and bf16 rounds its sum with the product. Beside 2^20 times
# the product it does not count. A power of two costs no bit.
OVER_BIAS = 2.0**20


class ScaledOutputs(torch.autograd.Function):
    """g (y - bias) + bias.

    Args of apply:
        y: (tokens, out). scale: g, (out,) in fp32.
        bias: (out,), frozen, or None.
    """

    @staticmethod
    def forward(ctx, y, scale, bias):
        ctx.save_for_backward(y, scale, bias)
        return scale_columns(y, scale, 0 if bias is None else (1 - scale) * bias)

    @staticmethod
    def backward(ctx, gradient):
        y, scale, bias = ctx.saved_tensors
        scale_gradient = gradient * (y if bias is None else y - bias)
        return scale_columns(gradient, scale, 0), scale_gradient.sum(0, dtype=torch.float32), None


def scale_columns(y: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | int) -> torch.Tensor:
    """Return y * scale + shift, computed in fp32 and stored in y's type, without a copy of y in fp32."""
    if torch.compiler.is_compiling():
        scaled = y * scale + shift
        # torch 2.11 gives no gradients through a function that returns x.to(x.dtype).
        return scaled if scaled.dtype == y.dtype else scaled.to(y.dtype)
    return torch.mul(y, scale, out=torch.empty_like(y)).add_(shift)


def fuse_dora(network: torch.nn.Module, init: str) -> None:
    """Give DoRA layers the forward pass of this module, where it computes the same as PEFT's.

    Call it when the initial values are set, and before the base is cast to a shorter type. With dropout, PEFT's pass
    stays: it computes the base's part from dropped inputs, too. It also stays with init olora and pissa: W keeps what
    s B A takes, and the sum of terms that nearly cancel each other would be wrong in bf16, or negative.

    Args:
        init: lora.init.

    Raises:
        StageError: a row of W is 0, and with it the norm by which DoRA divides.
    """
    for layer in dora_layers(network):
        if not layer.lora_magnitude_vector["default"].weight.all():
            name = next(name for name, module in network.named_modules() if module is layer)
            raise StageError(
                f"{name.removeprefix('base_model.model.')} has a row of zeros, by whose norm DoRA divides: set "
                "lora.use_dora to false, or lora.target_modules to other layers"
            )
        has_dropout = not isinstance(layer.lora_dropout["default"], torch.nn.Identity)
        if type(layer.base_layer).__name__ in FUSED_LAYERS and not has_dropout and init not in FROM_BASE:
            layer.register_buffer("base_norms_squared", base_norms_squared(layer), persistent=False)
            layer.forward = types.MethodType(dora_forward, layer)


def has_peft_dora(network: torch.nn.Module) -> bool:
    """Tell whether PEFT computes a DoRA layer."""
    return any(not hasattr(layer, "base_norms_squared") for layer in dora_layers(network))


def dora_layers(network: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers with a DoRA adapter."""
    return [module for module in network.modules() if any(getattr(module, "use_dora", {}).values())]


def base_norms_squared(layer: torch.nn.Module) -> torch.Tensor:
    """Return the squared norms of the rows of W, (out,) in fp32."""
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(layer.base_layer).detach().float()
    return weight.square().sum(0 if layer.fan_in_fan_out else 1)


def dora_forward(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compute a DoRA layer of PEFT instead of its own `forward`. x: (..., in); returns (..., out)."""
    y = lora_forward(layer, x)
    bias = layer.base_layer.bias
    scale = layer.lora_magnitude_vector["default"].weight / norms(layer, y.dtype)
    return ScaledOutputs.apply(y.flatten(0, -2), scale, bias).view(y.shape)


@torch.no_grad()
def norms(layer: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Return the norms of the rows of W + s B A, (out,) in fp32. The base layer computes in `dtype`."""
    a, b = (factor_weight(factors["default"]) for factors in (layer.lora_A, layer.lora_B))
    product = layer.base_layer((a * OVER_BIAS).to(dtype)).float()  # A W^T and the bias, (r, out)
    if layer.base_layer.bias is not None:
        product = product - layer.base_layer.bias.float()
    s, cross = layer.scaling["default"], (b.T * product).sum(0) / OVER_BIAS
    a, b = a.double(), b.double()  # autocast would compute their products in bf16, but leaves fp64 alone
    return (layer.base_norms_squared + 2 * s * cross + s**2 * (b @ (a @ a.T) * b).sum(1)).sqrt().float()
