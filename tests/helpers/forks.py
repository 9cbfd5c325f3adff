"""Run Python code in a fork of this process, which has imported what takes long. It must have a single thread."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import TextIO


def fork(work: Callable[[], None], log: TextIO) -> int:
    """Run `work` in a child process, which prints into `log`; return its process id."""
    if child := os.fork():
        return child
    code = 1
    try:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        work()
        code = 0
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
