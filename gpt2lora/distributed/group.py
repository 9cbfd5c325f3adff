"""The group of processes that compute one result together (torch.distributed), and what it does in a single process.

A launcher, torch's or that of gpt2lora/distributed/launch.py, sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
Tensors on a GPU travel by NCCL, those on a CPU by gloo. The processes also meet on the CPU in every step, so that a
process that died or hangs is noticed although a GPU's queue holds steps that wait for it.
"""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from gpt2lora.distributed import failure, waiting
from gpt2lora.distributed.failure import PeerError
from gpt2lora.pipeline.cli import StageError, echo, out_of_memory_advice

JOIN_TIMEOUT = timedelta(seconds=45)  # until all processes have started
TIMEOUT = timedelta(minutes=3)  # until a process that does not answer is given up
_store: dist.Store | None = None  # that all processes of the group share
_turns = 0  # calls of `main_first`


def rank() -> int:
    """Return this process's number in the group, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Tell whether this process writes and prints."""
    return rank() == 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the group of the launcher that started this process; leave it at the end.

    Only rank 0 prints. Of processes that fail, the first one to do so prints why.

    Raises:
        StageError: the other processes did not come.
    """
    failure.die_with_launcher()
    streams = sys.stdout, sys.stderr
    if os.environ["RANK"] != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    store = None
    try:
        store = join()
        with waiting.beating(store):
            yield
            leave()  # not after an error: NCCL would wait for the others
            with peers():
                waiting.finish(store, TIMEOUT)
    except BaseException as error:
        sys.stdout, sys.stderr = streams
        if store is None or failure.is_first(error, store):
            raise
        failure.exit_silently()
    finally:
        sys.stdout, sys.stderr = streams
        failure.stop_watching()


def join() -> dist.Store:
    """Meet the other processes; return the store that all of them share."""
    global _store
    try:
        choose_gpu()
        wait_for_rank_0()
        store, own_rank, world = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=world, timeout=TIMEOUT)
        barrier()
    except (RuntimeError, ValueError, AssertionError) as error:
        names = ", ".join(f"{name}={os.environ.get(name)}" for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
        raise StageError(
            f"{names}, but the group of processes did not come together ({first_line(error)}): start all of them with "
            "torchrun, or unset RANK to run a single process"
        ) from error
    failure.watch_peers(store)
    _store = store
    return store


def wait_for_rank_0() -> None:
    """Return when the address at which the group meets answers. torch waits for it two to three times its timeout.

    Raises:
        ValueError: RANK is not in the group, or the port is no number.
        RuntimeError: nobody answered within JOIN_TIMEOUT.
    """
    variables = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    if not all(variables):  # torch says which one is missing
        return
    own_rank, world, host, port = int(variables[0]), int(variables[1]), variables[2], int(variables[3])
    if not 0 <= own_rank < world:
        raise ValueError(f"RANK: expected 0 to {world - 1}")
    if own_rank == 0:
        return
    deadline = time.monotonic() + JOIN_TIMEOUT.total_seconds()
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank 0 does not answer at {host}:{port}: {error}") from error
        time.sleep(0.1)


def choose_gpu() -> None:
    """Show this process only its GPU, before anything uses one; so a thread cannot take another one by mistake."""
    local_rank, visible = int(os.environ.get("LOCAL_RANK", "0")), os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible is not None else None
    if gpus is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(local_rank)
    elif local_rank < len(gpus):  # else the launcher has shown each process its own
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local_rank]


def leave() -> bool:
    """Leave the group: from here on each process is by itself. Return whether this one writes the results."""
    failure.stop_watching()
    main = is_main()
    if dist.is_initialized():
        dist.destroy_process_group()
    return main


def first_line(error: Exception) -> str:
    """Return what an error of torch.distributed says, without its place in the code and its advice."""
    line = str(error).strip().split("\n")[0].split(". This is typically")[0]
    return line.partition("] ")[2] if line.startswith("[") else line


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """Turn the errors of torch.distributed into PeerError."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory_advice(error):
            raise
        raise PeerError(first_line(error)) from error


def main_first(work: Callable[[], None]) -> None:
    """Let rank 0 do what may take longer than TIMEOUT, such as to wait for a disk, while the others wait for it."""
    global _turns
    if size() == 1:
        work()
        return
    _turns += 1
    if is_main():
        work()
        _store.set(f"turn/{_turns}", "")
    else:
        with peers():
            waiting.wait_for_key(_store, f"turn/{_turns}", TIMEOUT)


def barrier() -> None:
    """Wait until all processes are here."""
    largest([0])


def largest(values: list[int]) -> list[int]:
    """Return for each value the largest one of all processes."""
    if size() == 1:
        return values
    tensor = torch.tensor(values)
    with peers():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def combine(values: torch.Tensor) -> torch.Tensor:
    """Return the values of all processes, of which each has computed some and left 0 in the others' places."""
    if size() > 1:
        with peers():
            dist.all_reduce(values)  # to add zeros is exact, in any order
    return values


def broadcast_bytes(content: bytes | None) -> bytes | None:
    """Return what rank 0 passed."""
    if size() == 1:
        return content
    length = torch.tensor([-1 if content is None else len(content)])
    with peers():
        dist.broadcast(length, 0)
        if length.item() < 0:
            return None
        tensor = torch.empty(length.item(), dtype=torch.uint8)
        if content:
            tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.broadcast(tensor, 0)
    return tensor.numpy().tobytes()


def gather(value: object) -> list:
    """Return the values of all processes, by rank."""
    found = [value] * size()
    if size() > 1:
        with peers():
            dist.all_gather_object(found, value)
    return found


def check_same(facts: dict[str, object], device: str = "") -> None:
    """Refuse a process whose facts, such as digests, differ from those of rank 0; warn of devices that differ.

    Args:
        facts: by the name that the error shows.
        device: the name of the model.
    """
    found = gather((facts, device))
    for number, (other, _) in enumerate(found):
        for name in facts:
            if other.get(name) != found[0][0].get(name):
                raise StageError(f"rank {number} has other {name} than rank 0: give all processes the same")
    names = sorted({name for _, name in found})
    if len(names) > 1:
        echo(f"warning: devices of different models ({', '.join(names)}): bytes may differ from those of one model")
