"""A GPU with too little memory for a batch: one line, with a batch size that fits."""

import re

import pytest
import tiny
import torch
from click.testing import CliRunner
from training_runs import run_stage
from training_steps import on_gpu

from benchmarks import random_inputs, workspace
from gpt2lora.training import loop, oom
from stages import train


@pytest.fixture
def occupied_gpu():
    """A GPU on which 1 GB is free."""
    free, _ = torch.cuda.mem_get_info()
    occupied = torch.empty(free - 10**9, dtype=torch.uint8, device="cuda")
    yield
    occupied.untyped_storage().resize_(0)  # a test that fails keeps the tensor
    torch.cuda.empty_cache()


@on_gpu
def test_too_little_memory_names_a_batch_size_that_fits(occupied_gpu, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"method": "lora", "train.epochs": 1, "train.validations": 1}
    tokens = random_inputs.tokens(tmp_path, tiny_model, 64, 8192)
    workspace.link_inputs(tmp_path, settings | {"train.batch_size": 8192}, base=tiny_model, tokens=tokens)
    refused = CliRunner().invoke(train.main)
    assert refused.exit_code == 1, refused.output
    advice = re.search(r"-S train\.batch_size=(\d+) -S train\.accumulation_steps=(\d+)$", refused.output.strip())
    assert advice, refused.output
    batch_size, steps = map(int, advice.groups())
    assert batch_size * steps == 8192
    assert batch_size >= 64
    workspace.write_params(tmp_path, settings | {"train.batch_size": batch_size, "train.accumulation_steps": steps})
    assert CliRunner().invoke(train.main).exit_code == 0


@pytest.fixture
def small_gpu(monkeypatch):
    """A simulated GPU on which steps of more than 4 rows do not fit: a row takes 1 MB, all else 2 MB."""

    def limited_accumulate(backward, trained, train, batches, *others):
        if len(batches[0].rows) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return accumulate(backward, trained, train, batches, *others)

    accumulate = loop.accumulate_gradients
    monkeypatch.setattr(loop, "accumulate_gradients", limited_accumulate)
    monkeypatch.setattr(oom, "measure_memory", lambda *_: (2_000_000, 1_000_000, 8_000_000))


def test_the_error_names_a_batch_size_that_fits(training_folder, small_gpu):
    line = run_stage(train.main, code=1).splitlines()[-1]
    assert line == (
        "Error: train: out of memory at train.batch_size 16: a token takes 31 kB, all else 0.00 GB of 0.01 GB, so 5 "
        "rows of 32 tokens fit; for the same steps: -S train.batch_size=4 -S train.accumulation_steps=4"
    )
    for key, value in {"train.batch_size": 4, "train.accumulation_steps": 4}.items():
        tiny.set_param(training_folder, key, value)
    run_stage(train.main)


@pytest.mark.parametrize("available", [2_500_000, None], ids=["measured", "out of memory again"])
def test_the_error_says_that_no_single_row_fits(training_folder, small_gpu, monkeypatch, available):
    def measure_memory(*_):
        if available is None:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 2_000_000, 1_000_000, available

    monkeypatch.setattr(oom, "measure_memory", measure_memory)
    line = run_stage(train.main, code=1).splitlines()[-1]
    assert line.startswith("Error: train: out of memory at train.batch_size 16: not even a row of 32 tokens fits: ")


def test_the_largest_batch_leaves_some_memory_unused():
    assert oom.max_batch_size(fixed=10, row=10, available=100) == 8
    assert oom.max_batch_size(fixed=200, row=10, available=100) == 0
