"""Start a stage's processes, one for each GPU, with torch's elastic launcher, and report how they ended."""

import logging
import os
import signal
import sys
from collections.abc import Callable

import click

from gpt2lora.distributed import leases
from gpt2lora.pipeline.cli import StageError, echo

LAUNCHER = "GPT2LORA_LAUNCHER"  # the process id of this one, for the processes that it starts

# Until processes that a signal asked to stop are killed: they finish a step and write a checkpoint.
STOP_SECONDS = 600


def run(
    stage: str, check: Callable[[], None], choose: Callable[[int], tuple[int, str]], work: Callable[[], None]
) -> None:
    """Call `work` in this process, or run the stage once more in a process for each GPU that it takes.

    If another launcher has started this process as one of a group, it joins that group.

    Args:
        check: refuses bad parameters, before a GPU is waited for; in a group one process alone prints why.
        choose: returns for a number of free GPUs how many to take, and why.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # a lost connection is reported by PeerError
        from gpt2lora.distributed import group

        with group.joined():
            check()
            work()
        return
    check()
    if (tasks := os.environ.get("SLURM_STEP_NUM_TASKS", "1")) != "1":
        raise StageError(
            f"{stage}: srun started {tasks} tasks, each of which would run the whole stage: start one task a machine, "
            "with torchrun in it (docs/scale.md)"
        )
    gpus = leases.list_gpus()
    if not gpus or not uses_gpus():
        work()
        return
    with leases.leased(gpus, choose, stage) as (taken, reason):
        if len(gpus) > 1:
            echo(f"{stage}: {len(taken)} of {len(gpus)} GPUs: {reason}")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
        if len(taken) == 1:
            work()
        else:
            run_processes(stage, len(taken))


def uses_gpus() -> bool:
    """Tell whether the installed torch can compute on a GPU."""
    import torch

    return torch.backends.cuda.is_built()


def run_processes(stage: str, count: int) -> None:
    """Run this command once more in `count` processes; return when all of them have succeeded.

    Raises:
        StageError: a process was killed. Other failures are printed by the process that failed.
        SystemExit: with the exit code of the process that failed first, or 128 + the signal that stopped this one.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # of the launcher, which reports each signal it sends
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(STOP_SECONDS))
    os.environ[LAUNCHER] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    options = [part for name, value in click.get_current_context().params.items() for part in (f"--{name}", str(value))]
    try:
        elastic_launch(config, sys.executable)("-m", f"stages.{stage}", *options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            raise SystemExit(failure.exitcode) from None
        name = signal.Signals(-failure.exitcode).name
        cause = " (as when memory runs out: see dmesg)" if name == "SIGKILL" else ""
        raise StageError(
            f"{stage}: rank {rank} of {count} was killed by {name}{cause}; no output is half written"
        ) from None
    except Exception as error:
        if type(error).__name__ != "SignalException":
            raise
        raise SystemExit(128 + error.sigval) from None
