"""Where the computation runs, and in what precision."""

import os
import resource
import sys

import torch


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def wake() -> None:
    """Have a GPU's driver ready for the first computation, for which it takes half a second."""
    torch.zeros(1, device=pick_device())


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the type of the matrix products. "auto" is bf16 on GPUs, and on CPUs that have instructions for it."""
    if precision == "auto":
        native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        precision = "bf16" if native else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def make_deterministic() -> None:
    """Have a GPU give the same bits each time, at some cost in speed; to be called before it computes anything."""
    import torch._inductor.config as compiler

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a safeguard for code that reads what it never wrote
    compiler.deterministic = True  # no choice of kernels by their measured times


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were held at once: by CUDA's allocator, or by the whole process on a CPU.

    Held, not allocated: what a recorded step needs stays with its CUDA graph, and counts as allocated only while it is
    recorded.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
