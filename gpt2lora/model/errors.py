"""One clear line for what transformers or PEFT raise for a model that they do not support."""

import contextlib
from collections.abc import Iterator

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from gpt2lora.pipeline.cli import StageError, out_of_memory_advice

COMPUTATION_ERRORS = (
    ValueError, TypeError, AttributeError, LookupError, RuntimeError, AssertionError, ImportError, ArithmeticError
)  # fmt: skip


@contextlib.contextmanager
def library_errors(what: str, advice: str) -> Iterator[None]:
    """Turn the errors of libraries into one line: what failed, why, and what to do; not too little memory."""
    try:
        yield
    except ModuleNotFoundError:  # told by `command`
        raise
    except (*COMPUTATION_ERRORS, OSError, SafetensorError, StrictDataclassError) as error:
        if out_of_memory_advice(error):  # told by `command`
            raise
        raise StageError(f"{what} ({type(error).__name__}: {first_line(error)}); {advice}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no message"
