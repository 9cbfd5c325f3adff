"""A process of a group fails: one line, from the process that knows the cause, and no process stays behind."""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time

import torch.distributed as dist

from gpt2lora.distributed.launch import LAUNCHER
from gpt2lora.pipeline.cli import StageError

GRACE = 4.0  # seconds in which a process that lost another one looks for the cause
_ended = threading.Event()


class PeerError(StageError):
    """Another process of the group died, or does not answer."""


def is_first(error: BaseException, store: dist.Store) -> bool:
    """Tell whether this process is to print its error: it is the first one that failed, and knows why."""
    stop_watching()
    if isinstance(error, SystemExit) and error.code in (0, 130, 143):
        return True
    if isinstance(error, KeyboardInterrupt):
        if os.environ["RANK"] != "0":
            raise SystemExit(130) from None  # rank 0 says it
        return True
    try:
        if isinstance(error, PeerError):
            return _explain(error, store)
        time.sleep(0.3 * (os.environ["RANK"] != "0"))  # what goes wrong everywhere is said by rank 0
        first = store.add("failures", 1) == 1
        if first and holds_store():
            time.sleep(3)  # until the others have learned from the store that it failed
        return first
    except RuntimeError:  # the store is gone, with the process that held it
        if isinstance(error, PeerError):
            error.message = f"rank 0 of {os.environ['WORLD_SIZE']} ended: all others stop ({error.message})"
        return True


def holds_store() -> bool:
    """Tell whether the group's store ends with this process: rank 0 holds it, unless the launcher does."""
    return os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _explain(error: PeerError, store: dist.Store) -> bool:
    """Find out which processes are missing, and name them in the error; tell whether this process prints it."""
    number, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store.set(f"alive/{number}", "")
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline:
        if store.check(["failures"]):  # another process has said why
            return False
        time.sleep(0.2)
    alive = [each for each in range(world) if store.check([f"alive/{each}"])]
    missing = [each for each in range(world) if each not in alive]
    if number != alive[0]:
        return False
    dead = [each for each in missing if not _is_running(store, each)]
    if dead and os.environ.get(LAUNCHER):
        return False
    names = ", ".join(map(str, missing)) or "?"
    what = "ended without a word, as a process does that is killed" if dead else "does not answer"
    error.message = f"rank {names} of {world} {what}: all others stop; no output is half written ({error.message})"
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torch's launcher kills what is left by itself
        for each in missing:
            _kill(store, each)
    return True


def exit_silently() -> None:
    """End this process: another one prints why."""
    time.sleep(2)  # a launcher ends all others as soon as one has ended
    os._exit(1)  # other threads may wait for a GPU that waits for a dead process


def watch_peers(store: dist.Store) -> None:
    """Tell the others this process's id, and watch them: a GPU that waits for one of them keeps the main thread."""
    world, number = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    store.set(f"process/{number}", f"{socket.gethostname()} {os.getpid()}")
    others = [_process(store, each) for each in range(world) if each != number]
    _ended.clear()
    local = [process for process in others if process]
    threading.Thread(target=_watch, args=(store, local), daemon=True).start()


def stop_watching() -> None:
    _ended.set()


def _watch(store: dist.Store, processes: list[int]) -> None:
    """End this process if another one fails, or dies on this machine, unless the main thread ends first."""
    while not _ended.wait(1):
        with contextlib.suppress(RuntimeError):  # the store is gone: the main thread notices
            if store.check(["failures"]) and not _ended.wait(2):
                os._exit(1)
        # The main thread notices by itself, and says so, unless it waits for a GPU.
        if not all(map(_exists, processes)) and not _ended.wait(GRACE + 10):
            os._exit(1)


def _process(store: dist.Store, number: int) -> int | None:
    """Return the id of a rank's process if it runs on this machine."""
    host, process = store.get(f"process/{number}").decode().split()
    return int(process) if host == socket.gethostname() else None


def _is_running(store: dist.Store, number: int) -> bool:
    process = _process(store, number)
    return process is None or _exists(process)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError), open(f"/proc/{process}/stat", encoding="utf-8") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"  # not reaped yet
    return True


def _kill(store: dist.Store, number: int) -> None:
    process = _process(store, number)
    if process:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)


def die_with_launcher() -> None:
    """Have the operating system kill this process when the launcher that started it is killed (Linux)."""
    launcher = os.environ.get(LAUNCHER)
    if (launcher or "TORCHELASTIC_RUN_ID" in os.environ) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if launcher and os.getppid() != int(launcher):
        raise SystemExit(1)
