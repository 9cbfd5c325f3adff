"""The stage starts its own processes where it finds several GPUs: pretended ones here, the processes use the CPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from tiny import ROOT
from training_runs import read_outputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TRAIN = """
from gpt2lora.distributed import launch

launch.uses_gpus = lambda: True  # the processes will not: torch is a build for CPUs, or CUDA finds no such GPU

from stages import train

train.main()
"""


@pytest.fixture
def start_train(training_folder, tmp_path):
    """A function that starts train on a machine with four pretended GPUs."""
    program = tmp_path / "bin/nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf 'GPU-aa\\nGPU-ab\\nGPU-ba\\nGPU-bb\\n'\n")
    program.chmod(0o755)
    variables = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
    variables |= {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    for key, value in {"train.accumulation_steps": 2, "train.batch_size": 8}.items():
        tiny.set_param(training_folder, key, value)

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", TRAIN], env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return start


def wait_for_checkpoint(train: subprocess.Popen) -> None:
    while not list(Path("data/.checkpoints").glob("*/00000004*")):
        assert train.poll() is None, train.stdout.read()
        time.sleep(0.05)


def children(process: subprocess.Popen) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def lines(train: subprocess.Popen) -> list[str]:
    return [line for line in train.communicate()[0].replace("\r", "\n").splitlines() if line and "%|" not in line]


def test_the_stage_takes_two_of_four_gpus(start_train, training_folder, run_group):
    train = start_train()
    printed = lines(train)
    assert train.returncode == 0, printed
    assert printed[0].startswith("train: 2 of 4 GPUs: train.accumulation_steps is 2, and 4 are free; to use 4, double")
    written = read_outputs(training_folder)
    assert not any(run_group(training_folder, "train", 1)["codes"])
    assert read_outputs(training_folder) == written


def test_a_signal_reaches_all_processes(start_train, training_folder):
    train = start_train()
    wait_for_checkpoint(train)
    train.send_signal(signal.SIGTERM)
    printed = lines(train)
    assert train.returncode == 143, printed
    assert printed[-1].startswith("train: stopped after step ")
    assert not Path("data/adapter").exists()


def test_a_killed_process_is_named_in_one_line(start_train, training_folder):
    train = start_train()
    wait_for_checkpoint(train)
    started = time.monotonic()
    os.kill(children(train)[1], signal.SIGKILL)
    printed = lines(train)
    assert time.monotonic() - started < 30
    assert train.returncode == 1
    (line,) = [line for line in printed if "Error" in line]
    assert line.startswith("Error: train: rank 1 of 2 was killed by SIGKILL (as when memory runs out: see dmesg); no ")
    assert not any("Traceback" in line for line in printed)


def test_no_process_outlives_a_killed_stage(start_train, training_folder):
    train = start_train()
    wait_for_checkpoint(train)
    processes = children(train)
    train.kill()
    train.communicate()
    deadline = time.monotonic() + 10
    while any(is_running(process) for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
