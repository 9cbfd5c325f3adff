"""Groups of processes on the CPU, forked from one that has imported everything."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from tiny import ROOT
from training_runs import run_stage


@pytest.fixture(scope="session")
def run_group() -> Callable[..., dict]:
    """A function that runs a stage in a group; see helpers/group_runs.py for arguments and result."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])
    variables = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/helpers/group_runs.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, env=variables, **pipes) as forker:
        assert forker.stdout.readline() == "ready\n"

        def run(folder: Path, stage: str, processes: int, **others) -> dict:
            job = {"folder": str(folder), "stage": stage, "processes": processes} | others
            forker.stdin.write(json.dumps(job) + "\n")
            forker.stdin.flush()
            return json.loads(forker.stdout.readline())

        yield run
        forker.stdin.close()


@pytest.fixture(scope="session")
def uneven_folder(tmp_path_factory, prepared_folder) -> Path:
    """The prepared folder with rows that differ in length, and a last step with fewer micro-batches."""
    folder = tmp_path_factory.mktemp("uneven") / "project"
    shutil.copytree(prepared_folder, folder)
    for key, value in {"tokenize.layout": "padded", "train.batch_size": 3, "train.accumulation_steps": 4}.items():
        tiny.set_param(folder, key, value)
    from stages import tokenize

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_stage(tokenize.main)
    return folder


@pytest.fixture
def copy_of(tmp_path) -> Callable[..., Path]:
    """A function that copies a folder, and changes parameters there."""

    def copy(folder: Path, name: str, changes: dict | None = None) -> Path:
        target = tmp_path / name
        shutil.copytree(folder, target)
        for key, value in (changes or {}).items():
            tiny.set_param(target, key, value)
        return target

    return copy
