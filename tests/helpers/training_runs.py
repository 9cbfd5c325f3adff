"""A folder for a training of 16 steps, and what a training leaves in it."""

import shutil
from pathlib import Path

import click
import tiny
from click.testing import CliRunner


def make_training_folder(folder: Path, model: Path, corpus: Path) -> Path:
    """Make a folder with a params.yaml for a training of 16 steps that draws random numbers in every step."""
    folder.mkdir()
    shutil.copyfile(tiny.ROOT / "params.yaml", folder / "params.yaml")
    for key, value in {
        "preset": "local",
        "presets.local.model": str(model),
        "presets.local.dataset": str(corpus),
        "tokenize.block_size": 32,
        "train.precision": "fp32",
        "train.epochs": 1,
        "train.batch_size": 16,
        "train.validations": 5,
        "train.base_dropout": 0.1,
        "train.checkpoint_every": 2,
        "evaluate.precision": "fp32",
    }.items():
        tiny.set_param(folder, key, value)
    return folder


def run_stage(stage: click.Command, *arguments, code: int = 0) -> str:
    """Run a stage that must exit with `code`; return what it printed, or its errors if `code` is 1."""
    result = CliRunner().invoke(stage, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stderr if code == 1 else result.stdout


def read_outputs(folder: Path) -> dict[str, bytes]:
    """Return the bytes of the outputs of `train` that must be the same in two runs, by name."""
    files = [*folder.glob("data/adapter/*"), folder / "metrics/loss.csv", folder / "metrics/train.json"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(files)}


def checkpoint_files() -> list[Path]:
    """Return the checkpoints of all runs in the working directory, by run and step."""
    return sorted(Path("data/.checkpoints").glob("*/*"))
