"""The precision in which a device computes."""

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
