"""Kill stages at random moments: python tests/helpers/killing.py KILLS SEED RUN..., in a folder with params.yaml.

Each RUN is a stage, or train with changed parameters: train:method=qlora. Prints one line of JSON for each.

Importing torch, PEFT and bitsandbytes takes ten times as long as a tiny training. So one process imports everything and
runs each stage in a fork of itself. It has a single thread, since a fork has only the thread that called it.
"""

import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from forks import fork

OUTPUTS = {
    "base": ["data/base"],
    "prepare": ["data/raw"],
    "tokenize": ["data/tokens"],
    "train": ["data/adapter", "metrics/loss.csv", "metrics/train.json"],
    "evaluate": [
        "metrics/eval.json",
        "metrics/positions.csv",
        "metrics/plots/loss_by_position.png",
        "metrics/plots/loss_by_step.png",
    ],
}
FILE_CALLS = ("fsync", "rename", "replace", "unlink", "rmdir")  # of os; they write and remove outputs and checkpoints
CALL_RANGES = {"base": 16, "prepare": 14, "tokenize": 30, "train": 50, "evaluate": 10}  # a kill hits one of the first
CHECKPOINT_CALL_RANGE = 12  # the same for calls on checkpoints
LOG = Path("log.txt")
Work = Callable[[], None]


def start(work: Work) -> int:
    """Run `work` in a child process, which adds to LOG; return its process id."""
    with LOG.open("a") as log:
        return fork(work, log)


def wait_for(child: int) -> int:
    """Wait for a child; return its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_undisturbed(work: Work) -> float:
    """Run `work` in a child that must succeed; return its duration in seconds."""
    started = time.monotonic()
    assert wait_for(start(work)) == 0, LOG.read_text()[-3000:]
    return time.monotonic() - started


def kill_after(seconds: float, work: Work) -> int:
    """Run `work` in a child, kill it after so many seconds, and return what `wait_for` returns."""
    child = start(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)  # until it is waited for, no other process gets its id
    return wait_for(child)


def path_of(argument: object) -> str:
    """Return the path of a file descriptor, or of a path."""
    return os.readlink(f"/proc/self/fd/{argument}") if isinstance(argument, int) else str(argument)


def kill_at_call(index: int, work: Work, path_part: str = "") -> int:
    """Run `work` in a child that kills itself at one of its calls that change files; return what `wait_for` returns.

    It dies before the call, or after half of the bytes of a write.

    Args:
        index: of the call, counted from 0.
        path_part: only calls on paths that contain it are counted.
    """
    remaining, write_bytes = index, Path.write_bytes

    def with_kill(call: Callable) -> Callable:
        def wrapped(*arguments, **options):
            nonlocal remaining
            remaining -= path_part in path_of(arguments[0])
            if remaining < 0:
                if call is write_bytes:
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapped

    def patched_work() -> None:
        Path.write_bytes = with_kill(write_bytes)
        for name in FILE_CALLS:
            setattr(os, name, with_kill(getattr(os, name)))
        work()

    return wait_for(start(patched_work))


def read_output(path: str) -> dict[str, bytes] | None:
    """Return the bytes of a file, or of all files in a folder, by name; None if the path does not exist."""
    if not Path(path).exists():
        return None
    return {str(file): file.read_bytes() for file in [Path(path), *Path(path).rglob("*")] if file.is_file()}


def temporary_files() -> list[str]:
    """Return the files and folders that begin with a dot: unfinished outputs, and checkpoints."""
    return [str(path) for folder in ("data", "metrics") for path in Path(folder).rglob(".?*")]


def kill_stage(name: str, kills: int, random_numbers: random.Random) -> dict:
    """Run a stage again and again until it was killed `kills` times and then succeeded; return counts and errors.

    Every second kill comes at a random time, the others at a random call that changes a file. After each kill, every
    output must be absent, or the earlier one, or the one that an undisturbed run writes. After each run that succeeds,
    every output must be that of an undisturbed run.
    """
    main = importlib.import_module(f"stages.{name}").main

    def stage() -> None:
        main.main([], standalone_mode=False)

    seconds = run_undisturbed(stage)
    new = {path: read_output(path) for path in OUTPUTS[name]}
    assert all(new.values())
    assert temporary_files() == []
    earlier: dict[str, dict | None] = {}
    counts, errors, killed, code = Counter(), [], 0, 0
    while killed < kills or code != 0:
        if code == 0:  # the first run, or the last one succeeded
            earlier = {path: write_earlier_output(path) for path in new}
        has_checkpoint = any(Path("data/.checkpoints").rglob("[0-9]*.safetensors"))
        kind = "kills at a random time" if killed % 2 else "kills at a file call"
        if killed >= kills:
            code = wait_for(start(stage))
        elif killed % 2:
            code = kill_after(random_numbers.uniform(0, seconds), stage)
        else:
            at_checkpoint = name == "train" and killed % 4 == 0
            index = random_numbers.randrange(CHECKPOINT_CALL_RANGE if at_checkpoint else CALL_RANGES[name])
            code = kill_at_call(index, stage, "/.checkpoints/" * at_checkpoint)
            counts["kills while writing a checkpoint"] += at_checkpoint and code == -signal.SIGKILL
        counts["resumed runs"] += has_checkpoint
        if code == 0:
            counts["completed runs"] += 1
            errors += [f"{path} after a run" for path in new if read_output(path) != new[path]] + temporary_files()
        else:
            killed += 1
            counts[kind] += 1
            counts["kills while writing"] += any(path.endswith((".new", ".old")) for path in temporary_files())
            errors += [f"{path} after a kill" for path in new if not is_complete(path, earlier[path], new[path])]
        if code not in (0, -signal.SIGKILL):
            raise SystemExit(LOG.read_text()[-3000:])
    return {"seconds": round(seconds, 2), "errors": errors, **counts}


def is_complete(path: str, earlier: dict[str, bytes] | None, new: dict[str, bytes]) -> bool:
    """Tell whether an output is absent, `earlier` or `new`. The losses may also end at any validation."""
    content = read_output(path)
    if path == "metrics/loss.csv" and content and content != earlier:
        (rows,), (all_rows,) = content.values(), new.values()
        return rows.endswith(b"\n") and all_rows.startswith(rows)
    return content in (None, earlier, new)


def write_earlier_output(path: str) -> dict[str, bytes]:
    """Overwrite each file of an output, as if an earlier run had written other bytes."""
    for file in read_output(path):
        Path(file).write_bytes(b"earlier output")
    return read_output(path)


def main() -> None:
    kills, seed, *runs = sys.argv[1:]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from gpt2lora.pipeline import cli

    cli.configure_libraries()
    import bitsandbytes  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import torch
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401
    from dvc_yaml import imported_files
    from peft import get_peft_model  # noqa: F401
    from tiny import ROOT, set_param

    for name in sorted(set.union(*(imported_files(stage, ROOT) for stage in OUTPUTS))):
        importlib.import_module(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))

    torch.set_num_threads(1)
    for name in ("base", "prepare", "tokenize"):
        stage = importlib.import_module(f"stages.{name}").main
        run_undisturbed(lambda stage=stage: stage.main([], standalone_mode=False))
    for run in runs:
        name, *settings = run.split(":")
        original = Path("params.yaml").read_bytes()
        for setting in settings:
            key, _, value = setting.partition("=")
            set_param(Path.cwd(), key, int(value) if value.isdigit() else value)
        result = kill_stage(name, int(kills), random.Random(f"{seed} {run}"))
        Path("params.yaml").write_bytes(original)
        print(json.dumps({"run": run, **result}), flush=True)
        shutil.rmtree("data/.checkpoints", ignore_errors=True)


if __name__ == "__main__":
    main()
