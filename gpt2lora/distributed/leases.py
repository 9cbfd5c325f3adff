"""GPUs, and a lock for each, so that stages that run at once share the GPUs of a machine: `dvc queue start --jobs 4`.

The locks are files in the user's temporary folder, named by the GPUs' UUIDs. The operating system frees the lock of a
process that ends, however it ends.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from gpt2lora.pipeline.artifacts import lock_folder
from gpt2lora.pipeline.cli import echo

POLL_SECONDS = 0.5


def list_gpus() -> list[str]:
    """Return the UUIDs of the GPUs that this process may use, without using one; [] without nvidia-smi."""
    if not (program := shutil.which("nvidia-smi")):
        return []
    query = [program, "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else select_visible(found, visible)


def select_visible(found: list[str], visible: str) -> list[str]:
    """Return the GPUs that a value of CUDA_VISIBLE_DEVICES names, by index or by the beginning of a UUID."""
    chosen = []
    for name in filter(None, map(str.strip, visible.split(","))):
        if name.isdecimal():
            matches = found[int(name) : int(name) + 1]
        else:
            matches = [uuid for uuid in found if uuid.startswith(name)] or [name] * name.startswith("MIG-")
        if not matches:  # as CUDA, which ignores what comes after a device that does not exist
            break
        chosen.append(matches[0])
    return chosen


@contextlib.contextmanager
def leased(gpus: list[str], choose: Callable[[int], tuple[int, str]], stage: str) -> Iterator[tuple[list[str], str]]:
    """Yield some of the GPUs that no other stage uses, and why so many; wait for the first one.

    Args:
        choose: returns for a number of free GPUs how many to take, and why.
    """
    folder = lock_folder()
    waiting = False
    while not (held := _lock_free(gpus, folder)):
        if not waiting:
            echo(f"{stage}: waiting for a free GPU: all {len(gpus)} are in use by other stages (locks in {folder})")
        waiting = True
        time.sleep(POLL_SECONDS)
    try:
        count, reason = choose(len(held))
        for uuid in list(held)[count:]:
            held.pop(uuid).release()
        yield list(held), reason
    finally:
        for lock in held.values():
            lock.release()


def _lock_free(gpus: list[str], folder: Path) -> dict[str, FileLock]:
    """Take the locks that are free; return them by UUID."""
    held = {}
    for uuid in gpus:
        lock = FileLock(folder / f"{uuid.replace('/', '-')}.lock")
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
            held[uuid] = lock
    return held
