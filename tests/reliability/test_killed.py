"""Stages that are killed: outputs stay complete, and a resumed run writes the bytes of an undisturbed one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from training_runs import checkpoint_files, make_training_folder, read_outputs, run_stage

from stages import train

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", 20))
TRAIN_RUNS = ["train", "train:method=qlora", "train:lora.bits=8"]
OTHER_STAGES = ["base", "prepare", "tokenize", "evaluate"]


@pytest.fixture(scope="module")
def kill_results(tmp_path_factory, tiny_model, tiny_corpus) -> dict[str, dict]:
    """The counts and errors after killing each stage, and training by several methods."""
    folder = make_training_folder(tmp_path_factory.mktemp("killed") / "project", tiny_model, tiny_corpus)
    script = str(tiny.ROOT / "tests/helpers/killing.py")
    process = subprocess.run(
        [sys.executable, script, str(KILLS), "0", *TRAIN_RUNS, *OTHER_STAGES],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(tiny.ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    print(process.stdout)
    results = [json.loads(line) for line in process.stdout.splitlines()]
    return {result["run"]: result for result in results}


@pytest.mark.parametrize("run", [*TRAIN_RUNS, *OTHER_STAGES])
def test_outputs_survive_kills_at_random_moments(kill_results, run):
    result = kill_results[run]
    assert result["errors"] == []
    assert result["kills at a random time"] + result["kills at a file call"] >= KILLS
    assert result["kills while writing"] > 0
    assert result["kills while writing a checkpoint"] >= KILLS / 4 or run in OTHER_STAGES
    assert result["completed runs"] > 0
    assert result["resumed runs"] > KILLS / 4 or run in OTHER_STAGES


def test_dvc_repro_resumes_a_killed_training(project, prepared_folder, monkeypatch):
    shutil.copy(prepared_folder / "params.yaml", project)
    shutil.copytree(prepared_folder / "data", project / "data", dirs_exist_ok=True)
    for key, value in {"train.epochs": 8, "train.checkpoint_every": 1}.items():
        tiny.set_param(project, key, value)
    monkeypatch.chdir(project)
    run_stage(train.main)
    expected = read_outputs(project)
    tiny.run(project, "dvc", "repro", "sources")
    command = ["dvc", "repro", "--single-item", "train"]
    process = subprocess.Popen(command, env=tiny.environment(), text=True, stdout=subprocess.PIPE)
    while len(checkpoint_files()) < 2:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    stage, *_ = training_processes(process.pid)  # a shell may follow, if DVC starts one
    os.kill(stage, signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0
    assert not Path("data/adapter").exists()
    assert "train: resuming after step" in tiny.run(project, *command)
    assert read_outputs(project) == expected
    assert checkpoint_files() == []


def training_processes(parent: int) -> list[int]:
    """Return the ids of the processes that run train, `parent` or below it, the innermost first."""
    children = [int(number) for number in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    processes = [number for child in children for number in training_processes(child)]
    command_line = Path(f"/proc/{parent}/cmdline").read_bytes()
    return [*processes, parent] if b"stages.train" in command_line and b"dvc" not in command_line else processes
