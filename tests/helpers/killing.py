"""Kill stages at random moments: python tests/helpers/killing.py KILLS SEED WHAT..., in a folder with params.yaml.

Each WHAT is a stage, or train with changed parameters: train:method=qlora. Prints one line of JSON for each.

Importing torch, PEFT and bitsandbytes takes ten times as long as a tiny training, so one process imports everything
and runs each stage in a fork of itself. It has one thread only: a fork would have none of the others.
"""

import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

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
CALLS = ("fsync", "rename", "replace", "unlink", "rmdir")  # by which outputs and checkpoints come and go
PLACES = {"base": 16, "prepare": 14, "tokenize": 30, "train": 50, "evaluate": 10}  # of a kill among a run's calls
LOG = Path("log.txt")
Work = Callable[[], None]


def fork(work: Work) -> int:
    """Run `work` in a child; return its process id."""
    if child := os.fork():
        return child
    code = 1
    try:
        with LOG.open("a") as log:
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
        os._exit(code)


def end(child: int) -> int:
    """Wait for a child; return its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole_run(work: Work) -> float:
    """Run `work` in a child that must succeed; return its seconds."""
    started = time.monotonic()
    assert end(fork(work)) == 0, LOG.read_text()[-3000:]
    return time.monotonic() - started


def kill_after(seconds: float, work: Work) -> int:
    child = fork(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)  # not waited for yet: its number belongs to no other process
    return end(child)


def path_of(argument: object) -> str:
    return os.readlink(f"/proc/self/fd/{argument}") if isinstance(argument, int) else str(argument)


def kill_at_call(place: int, work: Work, where: str = "") -> int:
    """Let a child kill itself at its call number `place` of those that change files: before it, or half way in.

    where: counts only calls on paths that hold it.
    """
    left, write_bytes = place, Path.write_bytes

    def dying(call: Callable) -> Callable:
        def wrapped(*arguments, **options):
            nonlocal left
            left -= where in path_of(arguments[0])
            if left < 0:
                if call is write_bytes:
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapped

    def patched() -> None:
        Path.write_bytes = dying(write_bytes)
        for name in CALLS:
            setattr(os, name, dying(getattr(os, name)))
        work()

    return end(fork(patched))


def contents(path: str) -> dict[str, bytes] | None:
    """Return the bytes of a file, or of all files of a folder, by name; None where there is nothing."""
    if not Path(path).exists():
        return None
    return {str(file): file.read_bytes() for file in [Path(path), *Path(path).rglob("*")] if file.is_file()}


def unfinished() -> list[str]:
    """Return what the stages write below names that begin with a dot, checkpoints among them."""
    return [str(path) for folder in ("data", "metrics") for path in Path(folder).rglob(".?*")]


def kill_stage(name: str, kills: int, pick: random.Random) -> dict:
    """Kill a stage until it was killed `kills` times; return what came of it.

    One kill in two strikes at a random moment, the other at a random change of a file. After each, every output must be
    absent, or the one of before, or the one that an undisturbed run writes; and so it must be when the stage ends.
    """
    main = importlib.import_module(f"stages.{name}").main

    def stage() -> None:
        main.main([], standalone_mode=False)

    seconds = whole_run(stage)
    new = {path: contents(path) for path in OUTPUTS[name]}
    assert all(new.values())
    assert unfinished() == []
    old: dict[str, dict | None] = {}
    seen, wrong, killed, code = Counter(), [], 0, 0
    while killed < kills or code != 0:
        if code == 0:  # at first, and when a run came to its end
            old = {path: make_earlier(path) for path in new}
        resumed = any(Path("data/.checkpoints").rglob("[0-9]*.safetensors"))
        kind = "killed after a time" if killed % 2 else "killed at a call"
        if killed >= kills:
            code = end(fork(stage))
        elif killed % 2:
            code = kill_after(pick.uniform(0, seconds), stage)
        else:
            within = name == "train" and killed % 4 == 0
            code = kill_at_call(pick.randrange(12 if within else PLACES[name]), stage, "/.checkpoints/" * within)
            seen["killed while writing a checkpoint"] += within and code == -signal.SIGKILL
        seen["resumed"] += resumed
        if code == 0:
            seen["ended"] += 1
            wrong += [f"{path} after the end" for path in new if contents(path) != new[path]] + unfinished()
        else:
            killed += 1
            seen[kind] += 1
            seen["killed while writing"] += any(path.endswith((".new", ".old")) for path in unfinished())
            wrong += [f"{path} after a kill" for path in new if not is_complete(path, old[path], new[path])]
        if code not in (0, -signal.SIGKILL):
            raise SystemExit(LOG.read_text()[-3000:])
    return {"seconds": round(seconds, 2), "wrong": wrong, **seen}


def is_complete(path: str, old: dict[str, bytes] | None, new: dict[str, bytes]) -> bool:
    """Tell whether an output is absent, or one of these; the losses may also be those up to some validation."""
    found = contents(path)
    if path == "metrics/loss.csv" and found and found != old:
        (rows,), (all_rows,) = found.values(), new.values()
        return rows.endswith(b"\n") and all_rows.startswith(rows)
    return found in (None, old, new)


def make_earlier(path: str) -> dict[str, bytes]:
    """Put an earlier output of other bytes in the place of an output, as many files as it has."""
    for file in contents(path):
        Path(file).write_bytes(b"earlier output")
    return contents(path)


def main() -> None:
    kills, seed, *asked = sys.argv[1:]
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
        whole_run(lambda name=name: importlib.import_module(f"stages.{name}").main.main([], standalone_mode=False))
    for what in asked:
        name, *settings = what.split(":")
        before = Path("params.yaml").read_bytes()
        for setting in settings:
            key, _, value = setting.partition("=")
            set_param(Path.cwd(), key, int(value) if value.isdigit() else value)
        found = kill_stage(name, int(kills), random.Random(f"{seed} {what}"))
        Path("params.yaml").write_bytes(before)
        print(json.dumps({"what": what, **found}), flush=True)
        shutil.rmtree("data/.checkpoints", ignore_errors=True)


if __name__ == "__main__":
    main()
