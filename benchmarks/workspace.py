"""A folder in which the stages run without DVC, with its own params.yaml, data/ and metrics/."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpt2lora.pipeline.artifacts import digests, file_digest
from gpt2lora.pipeline.cli import StageError
from gpt2lora.pipeline.environment import package_versions

ROOT = Path(__file__).parents[1]


def settings(items: tuple[str, ...]) -> dict[str, Any]:
    """Return the values of `--set key=value`, by dotted key, read as in params.yaml.

    Raises:
        StageError: an item is not key=value, or params.yaml has no such key.
    """
    from omegaconf import OmegaConf

    known, values = OmegaConf.load(ROOT / "params.yaml"), {}
    for item in items:
        key, _, text = item.partition("=")
        if not (key and text) or OmegaConf.select(known, key, default="absent") == "absent":
            raise StageError(f"--set {item}: expected key=value, with a key of params.yaml, such as train.epochs=1")
        try:
            values[key] = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
        except Exception as error:  # OmegaConf passes on PyYAML's errors
            raise StageError(f"--set {item}: not a value of YAML: {error}") from error
    return values


def write_params(folder: Path, values: dict[str, Any]) -> None:
    """Write the project's params.yaml, with `values` by dotted key, into `folder`."""
    from omegaconf import OmegaConf

    params = OmegaConf.load(ROOT / "params.yaml")
    for key, value in values.items():
        OmegaConf.update(params, key, value)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(params, folder / "params.yaml")


def empty(folder: Path) -> Path:
    """Return `folder`, absolute, with nothing in it."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder.resolve()


def link_inputs(folder: Path, values: dict[str, Any], **inputs: Path) -> None:
    """Write params.yaml into `folder`, and into its data/ links to the outputs of earlier stages, by name."""
    write_params(folder, values)
    (folder / "data").mkdir()
    for name, target in inputs.items():
        (folder / "data" / name).symlink_to(target)


def run_stage(name: str, folder: Path, shown: bool = False, **variables: str) -> str | None:
    """Run a stage in `folder`; return None, or its last line if it failed.

    Args:
        shown: print its output instead of writing it to `folder`/log.txt.
    """
    command = [sys.executable, "-m", f"stages.{name}"]
    with (folder / "log.txt").open("a+", encoding="utf-8", errors="replace") as log:
        output = None if shown else log
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        done = subprocess.run(command, cwd=folder, env=environment_variables() | variables, **streams)
        if done.returncode == 0:
            return None
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    return f"{name}: {lines[-1]}" if lines and not shown else f"{name}: exit code {done.returncode}"


def environment_variables() -> dict[str, str]:
    """Return the environment variables with which Python finds the project from any folder."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))}


def fingerprint(path: Path) -> str:
    """Return the first 12 hex digits of the SHA-256 of a file, or of the files in a folder, with their names."""
    found = digests(path) if path.is_dir() else {path.name: file_digest(path)}
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]


def cards() -> list[str]:
    """Return the value of CUDA_VISIBLE_DEVICES for each GPU; [""] without one."""
    import torch

    visible = os.getenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    return visible.split(",")[: torch.cuda.device_count()] or [""]


def environment() -> dict[str, str]:
    """Return hardware, versions and commit."""
    from gpt2lora.evaluation.report import SHOWN_VERSIONS
    from gpt2lora.model import device

    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items() if name in SHOWN_VERSIONS)
    name = device.device_name(device.pick_device())
    return {
        "device": name,
        "versions": f"Python {platform.python_version()}, {versions}",
        "commit": commit or "unknown",
    }
