"""A folder in which the stages run without DVC: its own params.yaml, data/ and metrics/."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpt2lora.pipeline.artifacts import digests, file_digest
from gpt2lora.pipeline.cli import StageError

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def settings(items: tuple[str, ...]) -> dict[str, Any]:
    """Return what `--set key=value` asks for, by dotted key; values are read as in params.yaml.

    Raises:
        Stop: no key=value, or a key that params.yaml lacks: no stage would read it.
    """
    from omegaconf import OmegaConf

    known, found = OmegaConf.to_container(OmegaConf.load(ROOT / "params.yaml")), {}
    for item in items:
        key, equals, value = item.partition("=")
        if not (key and equals and value):
            raise StageError(f"--set {item}: expected key=value, for instance train.epochs=1")
        section = known
        try:
            asked = OmegaConf.to_container(OmegaConf.from_dotlist([item]))
        except Exception as error:  # of PyYAML, whose own kinds OmegaConf lets through
            raise StageError(f"--set {item}: not a value of YAML: {error}") from error
        for part in key.split("."):
            if not isinstance(section, dict) or part not in section:
                raise StageError(f"--set {item}: params.yaml has no {key}")
            asked, section = asked[part], section[part]
        found[key] = asked
    return found


def write_params(folder: Path, values: dict[str, Any]) -> dict:
    """Write the project's params.yaml, with `values` by dotted key, into `folder`; return all of them, nested."""
    from omegaconf import OmegaConf

    params = OmegaConf.load(ROOT / "params.yaml")
    for key, value in values.items():
        OmegaConf.update(params, key, value)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(params, folder / "params.yaml")
    return OmegaConf.to_container(params)


def empty(folder: Path) -> Path:
    """Return `folder`, absolute, with nothing in it."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder.resolve()


def lay_out(folder: Path, values: dict[str, Any], **inputs: Path) -> None:
    """Write params.yaml into `folder`, and links in its data/, by name, to what stages before have made."""
    write_params(folder, values)
    (folder / "data").mkdir()
    for name, target in inputs.items():
        (folder / "data" / name).symlink_to(target)


def run_stage(name: str, folder: Path, shown: bool = False, **variables: str) -> str | None:
    """Run a stage in `folder`; return None, or the last line that it printed where it failed.

    Args:
        shown: let it print to this process's own output instead of to `folder`/log.txt.
    """
    command = [sys.executable, "-m", f"stages.{name}"]
    with (folder / "log.txt").open("a+", encoding="utf-8", errors="replace") as log:
        output = None if shown else log
        done = subprocess.run(
            command, cwd=folder, env=surroundings() | variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        if done.returncode == 0:
            return None
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    return f"{name}: {lines[-1]}" if lines and not shown else f"{name}: exit code {done.returncode}"


def surroundings() -> dict[str, str]:
    """Return this process's environment, in which Python finds the project from any folder."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))}


def fingerprint(path: Path) -> str:
    """Return the first 12 hex digits of the SHA-256 of a file, or of the files in a folder, with their names."""
    found = digests(path) if path.is_dir() else {path.name: file_digest(path)}
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]


def cards() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES says of each GPU that is there, or, without one, [""]."""
    import torch

    visible = os.getenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    return visible.split(",")[: torch.cuda.device_count()] or [""]


def environment() -> dict[str, str]:
    """Return on what the runs are made."""
    from gpt2lora.model import device

    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True) if shutil.which("git") else None
    return {
        "device": device.device_name(device.pick_device()),
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {installed(name)}" for name in PACKAGES)]
        ),
        "commit": commit.stdout.strip() if commit and commit.returncode == 0 else "not known",
    }


def installed(package: str) -> str:
    """Return a package's version, where it came with one: a folder on PYTHONPATH may hold the code alone."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "of no known version"
