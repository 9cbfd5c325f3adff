"""What all command lines share: a clear line for each error that a user can mend, and the settings of libraries."""

import atexit
import errno
import functools
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import click


class StageError(click.ClickException):
    """An error that the user can mend. It is printed as one line, and the exit code is 1."""

    def format_message(self) -> str:
        line = " ".join(self.message.split())
        if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":  # one process of several
            line = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: {line}"
        # A quoted value may hold control characters, or surrogates that UTF-8 cannot encode.
        return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


def command(main: Callable) -> click.Command:
    """Turn a main function into a Click command.

    Errors that the user can mend end in one line: a missing package, a full disk, a file that cannot be read or
    written, too little memory. Errors of the program itself keep their traceback.
    """

    @functools.wraps(main)
    def run(*args, **kwargs):
        configure_libraries()
        relax_garbage_collection()
        try:
            return main(*args, **kwargs)
        except ModuleNotFoundError as error:
            if error.name.partition(".")[0] in ("stages", "gpt2lora"):
                raise
            raise StageError(
                f"{sys.executable} has no package {error.name}: `make install`, then activate .venv"
            ) from error
        except OSError as error:
            if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StageError(f"{error.strerror}: {error.filename or Path.cwd()}; no output is half written") from error
        except (RuntimeError, MemoryError) as error:
            if advice := out_of_memory_advice(error):
                raise StageError(f"out of memory {advice}; no output is half written") from error
            raise
        except KeyboardInterrupt:
            echo("Stopped; no output is half written")
            raise SystemExit(130) from None

    return click.command(help=help_text(main))(run)


def out_of_memory_advice(error: Exception) -> str | None:
    """Return where the memory was too small and what to do, or None if the error is another one."""
    # The first is torch.OutOfMemoryError, without importing torch; the others are the words of the GPU's libraries.
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "_ALLOC_FAILED" in text or "CUDA error: out of memory" in text:
        return "on the GPU: lower the stage's batch_size, or end other programs that use the GPU (nvidia-smi)"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "on the CPU: lower lora.r or the stage's batch_size, or end other programs that use the memory"
    return None


def help_text(main: Callable) -> str:
    """Return the text of --help: the docstring of `main`, and the inputs and outputs in its module's docstring."""
    paragraphs = (main.__globals__["__doc__"] or "").split("\n\n")
    return "\n\n\b\n".join([main.__doc__ or "", *(text for text in paragraphs if text.startswith("in  "))])


def configure_libraries() -> None:
    """Set what libraries read when they are imported."""
    # Let idle OpenMP threads sleep. On shared cores, spinning threads made training 2.6 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Bars of reading and writing weights leave lines behind, of a second's work.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Hide warnings that appear in every run and that a user cannot act on.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def relax_garbage_collection() -> None:
    """Run the cyclic garbage collector less often, and not at exit.

    Importing torch leaves many objects and next to no garbage: searching them takes a sixth of a stage's start.
    """
    gc.set_threshold(50_000, 200, 100)
    atexit.register(gc.freeze)


def echo(message: str) -> None:
    """Print one line, and flush it, so that it appears at once in a pipe too."""
    click.echo(message)
    sys.stdout.flush()
