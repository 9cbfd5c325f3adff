"""The forward pass of a layer with a low-rank update, y = W x + s B A dropout(x), in few kernels and little memory.

PEFT's own computes the same in twice as many steps and keeps dropout(x), a copy of each layer's input, for the backward
pass. Here that is computed again from x, which several layers may share, and a mask: on a GPU one byte a value.
"""

import torch

from gpt2lora.model.fake_quant import FakeQuantLinear


class LowRankUpdate(torch.autograd.Function):
    """y + s (mask x) A^T B^T.

    Args, of apply:
        y: (tokens, out), what the base layer has just computed; it is overwritten.
        x: (tokens, in). a: (r, in). b: (out, r). All of y's type.
        mask: (tokens, in), 1 for the values that dropout keeps and 0 for the others, or None.
        scale: s, divided by the share that dropout keeps.
    """

    @staticmethod
    def forward(ctx, y, x, a, b, mask, scale):
        inner = (x if mask is None else x * mask) @ a.T
        ctx.save_for_backward(x, a, b, mask, inner)
        ctx.scale = scale
        if torch.compiler.is_compiling():
            return y + scale * (inner @ b.T)  # a sum that the compiler makes part of the next kernel
        return y.detach().addmm_(inner, b.T, alpha=scale)  # y is new, and nothing keeps it for its gradient

    @staticmethod
    def backward(ctx, gradient):
        x, a, b, mask, inner = ctx.saved_tensors
        of_inner = gradient @ b * ctx.scale
        of_b = gradient.T @ inner * ctx.scale
        of_a = of_inner.T @ (x if mask is None else x * mask)
        of_x = None
        if ctx.needs_input_grad[1]:
            of_x = of_inner @ a
            of_x = of_x if mask is None else of_x.mul_(mask)
        return gradient, of_x, of_a, of_b, None, None


def forward(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compute one of PEFT's LoRA layers, without DoRA, in the place of its own `forward`."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))  # once, for the layer and for its update
    y = layer.base_layer(x)
    a, b = (factor(part["default"]).to(y.dtype) for part in (layer.lora_A, layer.lora_B))
    share = getattr(layer.lora_dropout["default"], "p", 0.0) if layer.training else 0.0
    flat = x.to(y.dtype).flatten(0, -2)
    mask = keep(flat, share) if share else None
    updated = LowRankUpdate.apply(y.flatten(0, -2), flat, a, b, mask, layer.scaling["default"] / (1 - share))
    return updated.view(y.shape)


def keep(x: torch.Tensor, share: float) -> torch.Tensor:
    """Return a mask of the shape of x, (tokens, in), that drops that share of its values."""
    if torch.compiler.is_compiling():
        return hashed(x, share)  # part of the kernel that makes x, and made anew in the backward pass, not kept
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - share)
    # A CPU draws one number after the other: one of 64 bits does for four values, three times as fast as `bernoulli_`.
    # A mask of floats multiplies eight times as fast as one of bools.
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return drawn[: x.numel()].ge_(round(share * 2**16) - 2**15).view(x.shape).to(x.dtype)  # in place: half the time


def hashed(x: torch.Tensor, share: float) -> torch.Tensor:
    """Return such a mask from a hash of each value's place and of two random numbers, 32 bits each.

    A compiler's own random numbers take five times as many operations a value (Philox, 10 rounds). The hash is
    `lowbias32` of Wellons, 2018, https://github.com/skeeto/hash-prospector.
    """
    tokens, columns = (torch.arange(size, dtype=torch.int32, device=x.device) for size in x.shape)
    first, second = torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32, device=x.device)
    bits = (tokens * -1640531527)[:, None] + columns * -2048144789 ^ first
    bits = (bits ^ bits >> 16 & 0xFFFF) * 0x7FEB352D ^ second
    bits = (bits ^ bits >> 15 & 0x1FFFF) * -0x7B935975
    bits = bits ^ bits >> 16 & 0xFFFF
    return bits >= round(share * 2**32) - 2**31


def factor(linear: torch.nn.Linear) -> torch.Tensor:
    return linear.stored() if isinstance(linear, FakeQuantLinear) else linear.weight
