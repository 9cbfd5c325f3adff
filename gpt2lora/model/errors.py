"""One clear line for what transformers or PEFT raise for a model that they do not support."""

import contextlib
from collections.abc import Iterator

import torch
from safetensors import SafetensorError

from gpt2lora.pipeline.cli import StageError

COMPUTATION_ERRORS = (ValueError, TypeError, AttributeError, LookupError, RuntimeError, AssertionError, ImportError)


@contextlib.contextmanager
def library_errors(what: str, advice: str) -> Iterator[None]:
    """Turn the errors of libraries into one line: what failed, why, and what to do; not too little memory."""
    try:
        yield
    except ModuleNotFoundError:  # told by `command`
        raise
    except (*COMPUTATION_ERRORS, OSError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise StageError(f"{what} ({type(error).__name__}: {first_line(error)}); {advice}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether a GPU's or the CPU's memory was too small."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # PyTorch's, on a CPU


def first_line(error: Exception) -> str:
    """Return the first line of an error's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no message"
