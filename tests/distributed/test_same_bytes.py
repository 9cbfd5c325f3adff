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
    "ends early": {"train.validations": 9, "train.patience": 1, "train.learning_rate": 0.1},
}

# As if a CUDA graph could be captured in one process alone.
CAPTURED = """
from gpt2lora.training import execution

def capture(model, compiled, shape, dtype):
    if rank == 1:
        raise ValueError("a test")
    return execution.Backward(None, None, None)

execution.choose_execution = lambda *_: ("captured", "a test")
execution.captured_backward = capture
execution.restore_eager = lambda *_: None
"""
# The last process gets a signal as its first validation begins.
SIGNAL = """
import os, signal
from gpt2lora.training import loop

def validate_after_signal(*args):
    if rank == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    validate(*args)

validate, loop.validate = loop.validate, validate_after_signal
"""


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
def test_a_model_that_computes_its_own_logits(uneven_folder, copy_of, run_group):
    written = []
    for processes in (1, 2):
        folder = copy_of(uneven_folder, str(processes))
        for stage in ("train", "evaluate"):
            setup = "from gpt2lora.model import head\nhead.is_head_known = lambda *_: False"
            printed = succeed(run_group(folder, stage, processes, setup=setup))["printed"]
            assert "computes more than a linear output head" in printed[0]
        written.append(read_all(folder))
    assert written[1] == written[0]


@pytest.mark.slow
def test_all_processes_compute_steps_in_the_same_way(uneven_folder, copy_of, run_group):
    written = []
    for processes in (1, 2):
        folder = copy_of(uneven_folder, str(processes))
        printed = succeed(run_group(folder, "train", processes, setup=CAPTURED * (processes > 1)))["printed"][0]
        written.append(read_outputs(folder))
    assert "train: eager steps: captured ones fail: in another process" in printed
    assert written[1] == written[0]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1), (2, 2)])
def test_a_signal_in_a_validation(uneven_folder, copy_of, run_group, first, second):
    undisturbed, folder = (copy_of(uneven_folder, name, {"train.validations": 2}) for name in ("undisturbed", "other"))
    succeed(run_group(undisturbed, "train", 1))
    stopped = run_group(folder, "train", first, setup=SIGNAL)
    assert stopped["codes"] == [143] * first, stopped["printed"]
    assert "resuming after step" in succeed(run_group(folder, "train", second))["printed"][0]
    assert read_outputs(folder) == read_outputs(undisturbed)


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
