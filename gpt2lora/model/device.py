"""The device that computes, its precision, and its memory."""

import os
import resource
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def pick_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the number of a CPU's threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def warm_up() -> None:
    """Initialise the GPU's driver, which takes half a second."""
    torch.zeros(1, device=pick_device())


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the type of matrix products. "auto" is bf16 on GPUs, and on CPUs with bf16 instructions (AVX512_BF16)."""
    if precision == "auto":
        native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        precision = "bf16" if native else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def make_deterministic() -> None:
    """Use only deterministic GPU kernels, at some cost in speed. Call this before anything is computed."""
    import torch._inductor.config as compiler

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling protects code that reads uninitialised memory
    compiler.deterministic = True  # do not choose kernels by measured times


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: reserved by CUDA's allocator, or of the whole process on a CPU.

    Reserved, not allocated: the memory of a CUDA graph counts as allocated only during the capture.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if STATUS.exists():  # Linux, whose ru_maxrss counts the process that started this one, too
        return 1024 * int(next(line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")))
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
