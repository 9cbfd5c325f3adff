"""Stages under torch's own launcher: rank 0 under DVC, a launcher that is killed, and processes without a launcher."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from group_runs import free_port
from tiny import ROOT

UNDER_DVC = "if [ $RANK = 0 ]; then exec dvc repro --single-item train; else exec python -m stages.train; fi"


def torchrun(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1", *arguments]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=variables | {"PYTHONPATH": str(ROOT)}, **pipes)


@pytest.mark.slow
def test_dvc_records_the_run_of_two_machines(project):
    """The recipe of docs/scale.md."""
    for key, value in {"train.accumulation_steps": 2, "train.batch_size": 8}.items():
        tiny.set_param(project, key, value)
    tiny.run(project, "dvc", "repro", "-q", "tokenize")
    other = Path(shutil.copytree(project, project.parent / "other"))
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--master-port", str(free_port()), "--no-python"]
    launchers = [
        torchrun(folder, "--node-rank", str(rank), *options, "sh", "-c", UNDER_DVC)
        for rank, folder in enumerate((project, other))
    ]
    printed = [launcher.communicate()[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], printed
    assert "train: lora on 2 x CPU" in printed[0]
    status = tiny.run(project, "dvc", "status", "train")
    assert "up to date" in status, status
    assert not (other / "data/adapter").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process that its parent ended")
def test_no_process_outlives_a_killed_launcher(training_folder):
    for key, value in {"train.accumulation_steps": 2, "train.batch_size": 8, "train.epochs": 200}.items():
        tiny.set_param(training_folder, key, value)
    launcher = torchrun(
        training_folder, "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "stages.train"
    )
    while not list(Path("data/.checkpoints").glob("*/00000*")):
        assert launcher.poll() is None, launcher.stdout.read()
        time.sleep(0.05)
    processes = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    assert len(processes) == 2
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2"}, "train: srun started 2 tasks, each of which would run the whole stage"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, "RANK=0, WORLD_SIZE=-1, MASTER_ADDR=127.0.0.1, but the group"),
        ({"WORLD_SIZE": "2"}, "Error: params.yaml: train.epochs"),
    ],
)
def test_processes_that_no_launcher_started_are_refused(training_folder, variables, expected):
    tiny.set_param(training_folder, "train.epochs", 1 if "params.yaml" not in expected else 0)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | variables
    output = tiny.run(training_folder, sys.executable, "-m", "stages.train", fails=True, **variables)
    (line,) = [line for line in output.splitlines() if "Error" in line]
    assert expected in line
    assert "Traceback" not in output
