"""What decides the bytes of a result, apart from the number of processes: all processes of a group must agree on it."""

import hashlib
import json
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch

from gpt2lora.pipeline import environment
from gpt2lora.pipeline.artifacts import digests, file_digest

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "numpy")  # their versions decide the bits of a result


def run_facts(parameters: dict, folders: Iterable[Path], code: Iterable[Path]) -> dict[str, str]:
    """Return digests, by name, of everything that decides a run's result, apart from the hardware.

    Args:
        parameters: all parameters that the run reads.
        folders: the inputs; the name and the content of each file count.
        code: Python files; name and content count.
    """
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    facts = {"parameters in params.yaml": parameters, "versions of packages": versions}
    facts |= {f"files in {folder}": digests(folder) for folder in folders}
    facts["code"] = [[file.name, file_digest(file)] for file in sorted(code)]
    return {name: short_digest(json.dumps(fact, sort_keys=True).encode()) for name, fact in facts.items()}


def code_files(script: Path) -> set[Path]:
    """Return the script of a stage, and all imported modules of the stages and of the library."""
    modules = [module for name, module in sys.modules.items() if name.startswith(("stages.", "gpt2lora."))]
    return {script, *(Path(module.__file__) for module in modules)}


def cpu_kernels() -> list[str]:
    """Return what decides the kernels of a CPU, apart from its threads: its model, and the instructions torch uses."""
    return [environment.cpu_name(), torch.backends.cpu.get_cpu_capability()]


def describe_device(device: torch.device, name: str) -> str:
    """Return the name of a device, with all that decides its kernels."""
    return name if device.type == "cuda" else ", ".join([name, *cpu_kernels()])


def short_digest(content: bytes) -> str:
    """Return the first 16 hex digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]
