"""Run stages in groups of processes: python tests/helpers/group_runs.py, with jobs as lines of JSON on standard input.

Importing torch, PEFT and bitsandbytes takes ten times as long as a tiny training. So one process imports everything and
each process of a group is a fork of it. It has a single thread, since a fork has only the thread that called it.
"""

import importlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from forks import fork

MODULES = (
    *("stages.train", "stages.evaluate", "gpt2lora.distributed.group", "gpt2lora.model.loading"),
    *("gpt2lora.training.loop", "gpt2lora.training.oom", "gpt2lora.training.summary"),
    *("gpt2lora.evaluation.samples", "gpt2lora.dataset.tokenizer"),
    *("transformers.models.gpt2.modeling_gpt2", "bitsandbytes.nn", "omegaconf", "torch._dynamo", "matplotlib.figure"),
)


def main() -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # as gpt2lora.distributed.launch sets it
    for name in MODULES:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run_group(**json.loads(line))), flush=True)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_group(folder: str, stage: str, processes: int, setup: str = "", kill_after: float | None = None) -> dict:
    """Run a stage in so many processes; return their exit codes, what they printed, and the seconds it took.

    Args:
        setup: Python code that each process runs first; `rank` is its number.
        kill_after: seconds after the first checkpoint at which all of them are killed.
    """
    port, started = free_port(), time.monotonic()
    children = [start(Path(folder), stage, rank, processes, port, setup) for rank in range(processes)]
    if kill_after is not None:
        while not list(Path(folder).glob("data/.checkpoints/*/[0-9]*")) and time.monotonic() < started + 120:
            time.sleep(0.01)
        time.sleep(kill_after)
        for child in children:  # not waited for yet, so no other process has its id
            os.kill(child, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    printed = [(Path(folder) / f"rank{rank}.txt").read_text(errors="replace") for rank in range(processes)]
    return {"codes": codes, "printed": printed, "seconds": time.monotonic() - started}


def start(folder: Path, stage: str, rank: int, processes: int, port: int, setup: str) -> int:
    """Run a stage in a child process, one of a group if there are several; return its process id."""

    def work() -> None:
        os.chdir(folder)
        if processes > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        exec(setup, {"rank": rank})
        importlib.import_module(f"stages.{stage}").main.main([])

    with open(folder / f"rank{rank}.txt", "w") as log:
        return fork(work, log)


if __name__ == "__main__":
    main()
