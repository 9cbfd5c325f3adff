"""The forward pass of a LoRA layer, y = W x + s B A dropout(x), in few kernels and little memory.

PEFT's forward pass takes twice as many steps, and keeps dropout(x), a copy of each layer's input, for the backward
pass. This one keeps x, which several layers may share, and a dropout mask of one byte a value on a GPU.
"""

import torch

from gpt2lora.model.fake_quant import FakeQuantLinear

FUSED_LAYERS = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")  # whose update is computed here


class LowRankUpdate(torch.autograd.Function):
    """y + s (mask x) A^T B^T.

    Args of apply:
        y: (tokens, out), the base layer's output; it is overwritten.
        x: (tokens, in). a: (r, in). b: (out, r). All in y's type.
        mask: (tokens, in), 1 for the values that dropout keeps and 0 for the others, or None.
        scale: s, divided by the share of values that dropout keeps.
    """

    @staticmethod
    def forward(ctx, y, x, a, b, mask, scale):
        inner = (x if mask is None else x * mask) @ a.T
        ctx.save_for_backward(x, a, b, mask, inner)
        ctx.scale = scale
        if torch.compiler.is_compiling():
            return y + scale * (inner @ b.T)  # the compiler fuses the sum into the next kernel
        return y.detach().addmm_(inner, b.T, alpha=scale)  # in place: nothing else keeps y

    @staticmethod
    def backward(ctx, gradient):
        x, a, b, mask, inner = ctx.saved_tensors
        inner_gradient = gradient @ b * ctx.scale
        b_gradient = gradient.T @ inner * ctx.scale
        a_gradient = inner_gradient.T @ (x if mask is None else x * mask)
        x_gradient = None
        if ctx.needs_input_grad[1]:
            x_gradient = inner_gradient @ a
            x_gradient = x_gradient if mask is None else x_gradient.mul_(mask)
        return gradient, x_gradient, a_gradient, b_gradient, None, None


def lora_forward(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compute a LoRA layer of PEFT instead of its own `forward`. x: (..., in); returns (..., out)."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        x = x.to(torch.get_autocast_dtype(device_type))  # once, for the base layer and for the update
    y = layer.base_layer(x)
    a, b = (factor_weight(factors["default"]).to(y.dtype) for factors in (layer.lora_A, layer.lora_B))
    dropout = getattr(layer.lora_dropout["default"], "p", 0.0) if layer.training else 0.0
    flat = x.to(y.dtype).flatten(0, -2)
    mask = dropout_mask(flat, dropout) if dropout else None
    updated = LowRankUpdate.apply(y.flatten(0, -2), flat, a, b, mask, layer.scaling["default"] / (1 - dropout))
    return updated.view(y.shape)


def factor_weight(linear: torch.nn.Linear) -> torch.Tensor:
    """Return the matrix A or B with which to compute, fake-quantized if lora.bits is 8 or 4."""
    return linear.fake_quantized_weight() if isinstance(linear, FakeQuantLinear) else linear.weight


def dropout_mask(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """Return a random mask of the shape of x, (tokens, in), in which the share `dropout` of values is 0."""
    if torch.compiler.is_compiling():
        return hash_dropout_mask(x, dropout)  # fused into a kernel, and computed again in the backward pass
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout)
    # A CPU draws numbers one after the other: one of 64 bits for four values is three times as fast as `bernoulli_`.
    # Multiplying by a mask of floats is eight times as fast as by one of bools.
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return drawn[: x.numel()].ge_(round(dropout * 2**16) - 2**15).view(x.shape).to(x.dtype)  # in place: half the time


def hash_dropout_mask(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """Return such a mask from a 32-bit hash of each value's position and two random numbers.

    The compiler's own random numbers (Philox, 10 rounds) take five times as many operations a value. The hash is
    `lowbias32` of Wellons, 2018, https://github.com/skeeto/hash-prospector.
    """
    rows, columns = (torch.arange(size, dtype=torch.int32, device=x.device) for size in x.shape)
    first, second = torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32, device=x.device)
    bits = (rows * -1640531527)[:, None] + columns * -2048144789 ^ first
    bits = (bits ^ bits >> 16 & 0xFFFF) * 0x7FEB352D ^ second
    bits = (bits ^ bits >> 15 & 0x1FFFF) * -0x7B935975
    bits = bits ^ bits >> 16 & 0xFFFF
    return bits >= round(dropout * 2**32) - 2**31
