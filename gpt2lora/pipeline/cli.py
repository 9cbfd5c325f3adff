"""What every stage's command line has in common: one clear line when something is wrong."""

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


class Stop(click.ClickException):
    """Something the user can put right: printed as one line, exit code 1."""

    def format_message(self) -> str:
        line = " ".join(self.message.split())
        # What an error quotes may hold what no terminal should act on and no UTF-8 can hold.
        return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


def stage(main: Callable) -> click.Command:
    """Make a stage's main function its Click command.

    What a user can put right ends in one line: a missing package, a full disk, a file that cannot be read or
    written. Errors of the program itself keep their traceback.
    """

    @functools.wraps(main)
    def run(*args, **kwargs):
        set_up_libraries()
        collect_less()
        try:
            return main(*args, **kwargs)
        except ModuleNotFoundError as error:
            if error.name.partition(".")[0] in ("stages", "gpt2lora"):
                raise
            raise Stop(f"{sys.executable} has no package {error.name}: `make install`, then activate .venv") from error
        except OSError as error:
            if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise Stop(f"{error.strerror}: {error.filename or Path.cwd()}; no output is half written") from error
        except (RuntimeError, MemoryError) as error:
            if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
                advice = "on the GPU: lower the stage's batch_size, or end what else uses the GPU (nvidia-smi)"
            elif isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                advice = "on the CPU: lower lora.r or the stage's batch_size, or end what else uses the memory"
            else:
                raise
            raise Stop(f"out of memory {advice}; no output is half written") from error
        except KeyboardInterrupt:
            say("Stopped; no output is half written")
            raise SystemExit(130) from None

    return click.command(help=help_of(main))(run)


def help_of(main: Callable) -> str:
    """Return what --help says: the function's docstring, and from its module's what goes in and out, line for line."""
    of_module = (main.__globals__["__doc__"] or "").split("\n\n")
    return "\n\n\b\n".join([main.__doc__ or "", *(text for text in of_module if text.startswith("in  "))])


def set_up_libraries() -> None:
    """Settle what libraries read when they are imported."""
    # Idle threads sleep: on cores that others use too, threads that spin made training 2.6 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # What libraries say on every run and a user can do nothing about.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def collect_less() -> None:
    """Have Python look for garbage in cycles less often, and at the exit not at all.

    There is next to none, and to look through all that importing torch leaves takes a sixth of a stage's start.
    """
    gc.set_threshold(50_000, 200, 100)
    atexit.register(gc.freeze)


def say(message: str) -> None:
    """Print one line at once, also into a pipe."""
    click.echo(message)
    sys.stdout.flush()
