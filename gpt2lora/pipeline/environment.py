"""The record of a stage's run: hardware, versions, commit and duration. It is for people; no stage reads it as input.

`base`, `prepare`, `tokenize` and `train` write data/environment/STAGE.json; `evaluate` collects them in
metrics/environment.json. The records are DVC outputs: the run cache restores them, and experiments carry them, together
with the stage's other outputs. So a record always describes the run that made the files beside it.
"""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from gpt2lora.pipeline.artifacts import atomic_output
from gpt2lora.pipeline.cli import StageError

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


def write_record(out: Path, stage: str, started: float, **facts) -> None:
    """Write the record of a stage beside its output `out`.

    Args:
        started: time.perf_counter() at the start of the stage.
        facts: more values to record, by name, that JSON can hold.
    """
    with atomic_output(_record_file(out, stage)) as file:
        file.write_text(json.dumps(describe_run(started, **facts), indent=2) + "\n", encoding="utf-8")


def read_record(out: Path, stage: str) -> dict | None:
    """Return the record of the stage that wrote `out`, or None if there is none: then `out` came from elsewhere."""
    file = _record_file(out, stage)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StageError(f"{file} is damaged ({error}): delete it, or run `dvc repro --force {stage}`") from error


def describe_run(started: float, **facts) -> dict:
    """Return the record of this process. Values that need torch are None in a stage that does not import it."""
    torch = sys.modules.get("torch")
    gpu_used = torch is not None and torch.cuda.is_initialized()
    return {
        "seconds": round(time.perf_counter() - started, 3),
        **facts,
        **_git_state(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "gpu": torch.cuda.get_device_name() if gpu_used else None,
        "cuda": torch.version.cuda if gpu_used else None,
        "python": platform.python_version(),
        "versions": package_versions(),
    }


def _record_file(out: Path, stage: str) -> Path:
    return out.parent / "environment" / f"{stage}.json"


def _git_state() -> dict:
    """Return the commit, and whether tracked files differ from it, as they do in an experiment with changed values."""
    try:
        commit, changes = (
            subprocess.run(["git", "--no-optional-locks", *words], capture_output=True, check=True, text=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return {"commit": None, "uncommitted_changes": None}
    return {"commit": commit.strip(), "uncommitted_changes": bool(changes.strip())}


def cpu_name() -> str:
    """Return the processor's name as the operating system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def package_versions() -> dict[str, str | None]:
    """Return the version of each of PACKAGES, None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
