"""The adapter's own matrices in 8 or 4 bits: stored so, and trained against what is stored.

A matrix is cut into blocks of 64 consecutive values, the last filled up with zeros. Each block has one scale c in bf16,
16 / 64 = 0.25 bits a value, and each value a code:

    8 bits   c = absmax / 127, code = round(w / c) as int8, w' = c code
    4 bits   c = absmax, code = the nearest of NF4's 16 levels to w / c, two codes to a byte, w' = c level
             (Dettmers et al., 2023, arXiv:2305.14314, appendix E)

Training computes with w' and updates w as if w' were w: the straight-through estimator (Bengio et al., 2013,
arXiv:1308.3432; for networks of integers Jacob et al., 2018, arXiv:1712.05877).
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

FILE = "adapter_quantized.safetensors"
BLOCK = 64  # values that share a scale
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
        levels: NF4, (16,) fp32; copied to the matrix's device if it is not there.
    """
    flat = matrix.detach().flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
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
    """Return the fp32 matrix of the given shape that codes and scales of `quantize` stand for."""
    if codes.dtype == torch.int8:
        relative = codes.float()
    else:
        relative = levels.to(codes.device)[torch.stack((codes >> 4, codes & 15), -1).flatten(1).int()]
    return (relative * scales.float()[:, None]).flatten()[: shape.numel()].view(shape)


# An operation of its own, which torch.compile takes as it is: a compiler would leave the scale's rounding to bf16 out,
# and training would compute with other values than those that are stored.
# What torch has compiled of it lies on disk under its name: with another gradient it wants another name.
@torch.library.custom_op("stages::stored", mutates_args=())
def stored(matrix: torch.Tensor, bits: int, levels: torch.Tensor) -> torch.Tensor:
    """Return what is stored of a matrix, with the gradient of the matrix itself."""
    return dequantize(*quantize(matrix, bits, levels), matrix.shape, levels)


stored.register_fake(lambda matrix, bits, levels: torch.empty_like(matrix))
stored.register_autograd(lambda ctx, gradient: (gradient, None, None))


class FakeQuantLinear(torch.nn.Linear):
    """A linear layer without bias that computes with what will be stored of its weight, the same parameter."""

    def __init__(self, layer: torch.nn.Linear, bits: int):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bits = layer.weight, bits
        # Where the weight is: no step can be recorded as a CUDA graph that copies from the CPU.
        self.register_buffer("levels", NF4.to(layer.weight.device), persistent=False)

    def stored(self) -> torch.Tensor:
        """Return what is stored of the weight, with the weight's gradient."""
        return stored(self.weight, self.bits, self.levels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.stored())


def save(tensors: dict[str, torch.Tensor], bits: int, folder: Path) -> None:
    """Write the factors A and B among an adapter's tensors quantised, all others (DoRA's magnitudes) as they are."""
    stored, shapes = {}, {}
    for name, tensor in tensors.items():
        if is_factor(name):
            stored[f"{name}.codes"], stored[f"{name}.scales"] = (part.cpu() for part in quantize(tensor, bits))
            shapes[name] = list(tensor.shape)
        else:
            stored[name] = tensor.detach().cpu().contiguous()
    # One key of metadata: safetensors writes several in any order.
    save_file(stored, folder / FILE, metadata={"shapes": json.dumps(shapes)})


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors by PEFT's names, in fp32, from what `save` stored."""
    with safe_open(folder / FILE, "pt") as file:
        stored = {name: file.get_tensor(name) for name in sorted(file.keys())}
        shapes = json.loads(file.metadata()["shapes"])
    for name, shape in shapes.items():
        stored[name] = dequantize(stored.pop(f"{name}.codes"), stored.pop(f"{name}.scales"), torch.Size(shape))
    return stored


def is_factor(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
