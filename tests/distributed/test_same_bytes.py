"""Any number of processes writes the same bytes, also after a kill and in two launchers."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from group_runs import free_port
from tiny import ROOT
from training_runs import read_outputs

VARIANTS = {
    "lora": {},
    "lora, 8 micro-batches": {"train.accumulation_steps": 8},
    "lora, 12 micro-batches": {"train.accumulation_steps": 12},
    "qlora, 4 bits": {"method": "qlora"},
    "qlora, 8 bits": {"method": "qlora", "methods.qlora.bits": 8, "methods.qlora.double_quant": False},
    "full": {"method": "full", "train.learning_rate": 1e-3},
    "lora.bits 8": {"lora.bits": 8, "train.accumulation_steps": 8},
    "dora": {"lora.use_dora": True},
}


def read_all(folder: Path) -> dict[str, bytes]:
    """Return the bytes of what `train` and `evaluate` must write alike."""
    scores = [folder / "metrics" / name for name in ("eval.json", "positions.csv")]
    return read_outputs(folder) | {file.name: file.read_bytes() for file in scores if file.exists()}


def succeed(result: dict) -> dict:
    assert not any(result["codes"]), "\n".join(result["printed"])
    return result


def test_the_last_step_has_fewer_micro_batches(uneven_folder):
    lengths = np.load(uneven_folder / "data/tokens/train.lengths.npy")
    assert len(set(lengths)) > 3
    assert len(lengths) % 12 == 4, "the last step has one micro-batch of 3 rows, and one of 1"


@pytest.mark.parametrize(
    "name", ["lora", *(pytest.param(name, marks=pytest.mark.slow, id=f"{name}, evaluated") for name in VARIANTS)]
)
def test_any_number_of_processes_writes_the_same_bytes(request, uneven_folder, copy_of, run_group, name):
    changes = {"train.validations": 2} | VARIANTS[name]
    every_stage = request.node.get_closest_marker("slow") is not None
    written = {}
    for processes in (1, 2, 4):
        folder = copy_of(uneven_folder, str(processes), changes)
        result = succeed(run_group(folder, "train", processes))
        assert all(not printed.strip() for printed in result["printed"][1:]), "only rank 0 prints"
        if every_stage:
            succeed(run_group(folder, "evaluate", processes))
        written[processes] = read_all(folder)
    assert written[2] == written[1]
    assert written[4] == written[1]
    assert len(written[1]) == len(read_outputs(folder)) + 2 * every_stage


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("first", "second"), [(4, 1), (4, 2), (1, 4)])
def test_a_killed_group_resumes_in_another_number(uneven_folder, copy_of, run_group, first, second):
    moments, resumed = random.Random(first * 10 + second), 0
    folder = copy_of(uneven_folder, "undisturbed", {"train.epochs": 3})
    seconds = succeed(run_group(folder, "train", first))["seconds"]
    expected = read_outputs(folder)
    for number in range(10):
        folder = copy_of(uneven_folder, str(number), {"train.epochs": 3})
        killed = run_group(folder, "train", first, kill_after=moments.uniform(0, 0.5) * seconds)
        resumed += "resuming after step" in succeed(run_group(folder, "train", second))["printed"][0]
        assert read_outputs(folder) == expected, killed["printed"][0]
        assert not (folder / "data/.checkpoints").exists()
        shutil.rmtree(folder)
    assert resumed >= 3


@pytest.mark.slow
def test_two_launchers_write_the_same_bytes(uneven_folder, copy_of, run_group):
    """Two machines, each with its own folder; rank 0's gets the outputs."""
    alone = copy_of(uneven_folder, "alone")
    succeed(run_group(alone, "train", 1))
    port, launchers = free_port(), []
    for node in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
        command += ["--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        folder = copy_of(uneven_folder, f"node{node}")
        variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        launchers.append(subprocess.Popen([*command, "-m", "stages.train"], cwd=folder, env=variables, **pipes))
    printed = [launcher.communicate()[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], printed
    assert read_outputs(alone.parent / "node0") == read_outputs(alone)
    assert not (alone.parent / "node1/data/adapter").exists()
