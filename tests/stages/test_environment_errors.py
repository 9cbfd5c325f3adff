"""Missing packages and too little memory: one line. Errors of the program itself keep their traceback."""

import os
import subprocess
import sys

import pytest
import tiny
import torch
from bad_input import error_line
from click.testing import CliRunner
from training_runs import run_stage

from gpt2lora.model import loading
from stages import prepare, train

BARE = {"PATH": os.environ["PATH"], "PYTHONPATH": ""}  # environment variables that add no packages

# Packages


def test_an_interpreter_without_click_says_what_to_activate():
    # -S: without site-packages, like an interpreter outside the virtual environment.
    arguments = [sys.executable, "-S", "-m", "stages.train"]
    process = subprocess.run(arguments, cwd=tiny.ROOT, env=BARE, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "has no click and no ruamel: activate the environment first" in line


@pytest.mark.parametrize("package", ["torch", "transformers", "peft"])
def test_a_missing_package_is_named(stage_folder, inputs, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("model.lora", "model.layers", "model.loading", "model.head", "model.device", "training.loop"):
        folder, _, file = name.partition(".")
        monkeypatch.delitem(sys.modules, f"gpt2lora.{name}", raising=False)
        monkeypatch.delattr(sys.modules[f"gpt2lora.{folder}"], file, raising=False)
    line = error_line(train.main, *inputs["train"])
    assert line == f"{sys.executable} has no package {package}: `make install`, then activate .venv"


# Memory


def fail_to_allocate(*_, **options):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")


def test_too_little_cpu_memory_is_reported(stage_folder, inputs, monkeypatch):
    monkeypatch.setattr(loading, "load_for_training", fail_to_allocate)
    assert error_line(train.main, *inputs["train"]).startswith("out of memory on the CPU: lower lora.r or ")


def test_too_little_cpu_memory_while_loading_is_reported(stage_folder, inputs, monkeypatch):
    """It is not taken for a model that cannot be loaded."""
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", fail_to_allocate)
    assert error_line(train.main, *inputs["train"]).startswith("out of memory on the CPU: lower lora.r or ")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_too_little_gpu_memory_is_reported_by_any_stage(stage_folder, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(prepare, "write_corpus", fail)
    errors = run_stage(prepare.main, code=1)
    assert errors.startswith("Error: out of memory on the GPU: lower the stage's batch_size, or end ")


# What is printed


def test_a_user_error_prints_only_its_line(stage_folder):
    tiny.set_param(stage_folder, "preset", "typo")
    environment = BARE | {"PYTHONPATH": str(tiny.ROOT)}
    process = subprocess.run([sys.executable, "-m", "stages.base"], env=environment, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stdout == ""
    assert process.stderr == "Error: params.yaml: preset: expected one of gpt2, sample, local, not 'typo'\n"


def test_an_error_of_the_program_keeps_its_traceback(stage_folder, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(prepare, "write_corpus", fail)
    with pytest.raises(ZeroDivisionError):
        CliRunner().invoke(prepare.main, catch_exceptions=False)
