"""Fake quantization (lora.bits): the adapter's matrices are stored in 8 or 4 bits, and trained with the stored values.

A matrix is cut into blocks of 64 consecutive values; the last block is padded with zeros. Each block has one scale c in
bf16, which adds 16 / 64 = 0.25 bits a value, and each value has a code:

    8 bits   c = absmax / 127, code = round(w / c) as int8, w' = c code
    4 bits   c = absmax, code = the nearest of NF4's 16 levels to w / c, two codes to a byte, w' = c level
             (Dettmers et al., 2023, arXiv:2305.14314, appendix E)

Training computes with w' and applies the gradient of w' to w: the straight-through estimator (Bengio et al., 2013,
arXiv:1308.3432; for integer networks Jacob et al., 2018, arXiv:1712.05877).
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from gpt2lora.pipeline.adapter_files import QUANTIZED_WEIGHTS

BLOCK_SIZE = 64  # values that share a scale
NF4 = torch.tensor(
    [
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453],
        [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0],
        [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224],
        [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    ]
).flatten()


def quantize(matrix: torch.Tensor, bits: int, levels: torch.Tensor = NF4) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of an fp32 matrix, (blocks, 64) int8 or (blocks, 32) uint8, and the scales, (blocks,) bf16.

    Args:
        levels: the levels of NF4, (16,) fp32, best on the matrix's device.
    """
    flat = matrix.detach().flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    absmax = blocks.abs().amax(1)
    scales = (absmax / 127 if bits == 8 else absmax).bfloat16()
    relative = blocks / scales.float().where(scales > 0, 1.0)[:, None]
    if bits == 8:
        return relative.round().clamp(-127, 127).to(torch.int8), scales
    levels = levels.to(matrix.device)
    codes = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2], scales


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, shape: torch.Size, levels: torch.Tensor = NF4
) -> torch.Tensor:
    """Return the fp32 matrix of the given shape that the codes and scales of `quantize` stand for."""
    if codes.dtype == torch.int8:
        relative = codes.float()
    else:
        relative = levels.to(codes.device)[torch.stack((codes >> 4, codes & 15), -1).flatten(1).int()]
    return (relative * scales.float()[:, None]).flatten()[: shape.numel()].view(shape)


# A custom operator, so that torch.compile does not look inside: the compiler would omit rounding the scale to bf16, and
# training would use other values than those that are stored. torch caches compiled code on disk by the operator's name:
# rename the operator whenever its gradient changes.
@torch.library.custom_op("gpt2lora::fake_quantize", mutates_args=())
def fake_quantize(matrix: torch.Tensor, bits: int, levels: torch.Tensor) -> torch.Tensor:
    """Return dequantize(quantize(matrix)); its gradient passes to the matrix unchanged."""
    return dequantize(*quantize(matrix, bits, levels), matrix.shape, levels)


fake_quantize.register_fake(lambda matrix, bits, levels: torch.empty_like(matrix))
fake_quantize.register_autograd(lambda ctx, gradient: (gradient, None, None))


class FakeQuantLinear(torch.nn.Linear):
    """A linear layer without bias that computes with its fake-quantized weight; the weight stays the same parameter."""

    def __init__(self, layer: torch.nn.Linear, bits: int):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bits = layer.weight, bits
        # On the weight's device: a CUDA graph cannot capture a copy from the CPU.
        self.register_buffer("levels", NF4.to(layer.weight.device), persistent=False)

    def fake_quantized_weight(self) -> torch.Tensor:
        """Return the weight as it will be stored, (out, in) fp32."""
        return fake_quantize(self.weight, self.bits, self.levels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.fake_quantized_weight())


def save_quantized(tensors: dict[str, torch.Tensor], bits: int, folder: Path) -> None:
    """Write an adapter's tensors: the factors A and B quantized, all others (DoRA's magnitudes) unchanged."""
    stored, shapes = {}, {}
    for name, tensor in tensors.items():
        if is_factor(name):
            stored[f"{name}.codes"], stored[f"{name}.scales"] = (part.cpu() for part in quantize(tensor, bits))
            shapes[name] = list(tensor.shape)
        else:
            stored[name] = tensor.detach().cpu().contiguous()
    # A single metadata key: safetensors writes several keys in a random order.
    save_file(stored, folder / QUANTIZED_WEIGHTS, metadata={"shapes": json.dumps(shapes)})


def load_quantized(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors that `save_quantized` wrote, dequantized to fp32, by their names in PEFT's state dict."""
    with safe_open(folder / QUANTIZED_WEIGHTS, "pt") as file:
        stored = {name: file.get_tensor(name) for name in sorted(file.keys())}
        shapes = json.loads(file.metadata()["shapes"])
    for name, shape in shapes.items():
        stored[name] = dequantize(stored.pop(f"{name}.codes"), stored.pop(f"{name}.scales"), torch.Size(shape))
    return stored


def is_factor(name: str) -> bool:
    """Tell whether a tensor of PEFT's state dict is a factor A or B."""
    return ".lora_A." in name or ".lora_B." in name
