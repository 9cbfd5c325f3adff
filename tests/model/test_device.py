"""The precision in which a device computes, and its peak memory."""

import subprocess
import sys

import pytest
import tiny
import torch

from gpt2lora.model import device


def test_auto_precision_is_bf16_where_the_device_supports_it(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        assert device.compute_dtype("auto", cpu) == expected
        assert device.compute_dtype("auto", gpu) == torch.bfloat16
        assert device.compute_dtype("fp32", cpu) == device.compute_dtype("fp32", gpu) == torch.float32
        assert device.compute_dtype("bf16", cpu) == torch.bfloat16


MEASURE = """
import torch
from gpt2lora.model.device import peak_memory
before = peak_memory(torch.device("cpu"))
held = torch.ones(50_000_000)  # 200 MB
print(before, peak_memory(torch.device("cpu")))
"""
PARENT = """
import subprocess, sys
held = b"x" * 1_500_000_000
print(subprocess.run([sys.executable, "-c", sys.argv[1]], capture_output=True, text=True, check=True).stdout)
"""


@pytest.mark.slow
@pytest.mark.skipif(not device.STATUS.exists(), reason="Linux tells the peak memory of a process")
def test_the_peak_memory_is_that_of_this_process_not_of_the_one_that_started_it():
    command = [sys.executable, "-c", PARENT, MEASURE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tiny.ROOT)
    before, after = map(int, done.stdout.split())
    assert 50e6 < before < 1e9
    assert 190e6 < after - before < 230e6
