"""A stage or a command that is started in another folder says from where to run it."""

import subprocess
import sys

import pytest
import tiny
from bad_input import error_line
from click.testing import CliRunner

from gpt2lora.commands import dequantize, generate
from stages import train

SHADOWED = "Error: run stages and commands from the repository's root, stages as python -m stages.NAME\n"


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("stages", ["-m", "stages.train"]),  # stages/tokenize.py comes before the standard library's tokenize
        ("stages", ["-m", "gpt2lora", "compare"]),
        ("stages", ["train.py"]),
        (".", ["stages/train.py"]),
        (".", ["stages/tokenize.py"]),
    ],
    ids=lambda words: words if isinstance(words, str) else " ".join(words),
)
def test_a_start_that_shadows_tokenize_is_refused(folder, words):
    environment = tiny.environment() | {"PYTHONPATH": str(tiny.ROOT)}
    run = subprocess.run(
        [sys.executable, *words], cwd=tiny.ROOT / folder, env=environment, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (1, "", SHADOWED)


def test_a_stage_names_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = error_line(train.main)
    assert line == f"params.yaml not found in {tmp_path}: run it from the repository's root ({tiny.ROOT})"


@pytest.mark.parametrize("command", [[generate.main, "a prompt"], [dequantize.main, "--out", "new"]])
def test_a_command_names_the_folder_it_was_started_in(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(command[0], command[1:])
    assert result.exit_code == 1
    assert f"is missing, seen from {tmp_path}: run it from the repository's root" in result.output
