"""What a stage ran on, with what, and how long: a record beside its output, for people. No stage depends on one.

`base`, `prepare`, `tokenize` and `train` leave theirs in data/environment/STAGE.json; `evaluate` gathers them in
metrics/environment.json. They are outputs for DVC, kept in its cache: with a stage's other outputs they come back from
the run cache and go into experiments, so that a record is always that of the run which made what lies beside it.
"""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from gpt2lora.pipeline.artifacts import whole
from gpt2lora.pipeline.cli import Stop

PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "dvc",
    "huggingface-hub",
    "matplotlib",
    "numpy",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)


def write(out: Path, stage: str, started: float, **facts) -> None:
    """Write the record of a stage whose output is `out`, beside it.

    Args:
        started: what time.perf_counter() said when the stage began.
        facts: what else is worth knowing of this run, by name, as JSON can hold it.
    """
    with whole(_place(out, stage)) as file:
        file.write_text(json.dumps(describe(started, **facts), indent=2) + "\n", encoding="utf-8")


def read(out: Path, stage: str) -> dict | None:
    """Return the record of the stage that made `out`, None where there is none: it came from elsewhere."""
    file = _place(out, stage)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Stop(f"{file} is damaged ({error}): delete it, or run `dvc repro --force {stage}`") from error


def describe(started: float, **facts) -> dict:
    """Return this process's record. What needs torch is null in a stage that does not use it."""
    torch = sys.modules.get("torch")
    used = torch is not None and torch.cuda.is_initialized()
    return {
        "seconds": round(time.perf_counter() - started, 3),
        **facts,
        **_git(),
        "system": platform.platform(),
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "gpu": torch.cuda.get_device_name() if used else None,
        "cuda": torch.version.cuda if used else None,
        "python": platform.python_version(),
        "versions": _versions(),
    }


def _place(out: Path, stage: str) -> Path:
    return out.parent / "environment" / f"{stage}.json"


def _git() -> dict:
    """Return the commit and whether tracked files differ from it, as in every experiment with a value of its own."""
    try:
        commit, changes = (
            subprocess.run(["git", "--no-optional-locks", *words], capture_output=True, check=True, text=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return {"commit": None, "uncommitted_changes": None}
    return {"commit": commit.strip(), "uncommitted_changes": bool(changes.strip())}


def cpu() -> str:
    """Return the processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
