"""Adapters in 8 or 4 bits: the error of quantization, training with the stored values, and the file."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_models import IDS, NF4, load, logits, random_adapter

from gpt2lora.model import fake_quant, loading, lora
from gpt2lora.training.loss import nll_sum


def quantize_and_restore(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    return fake_quant.dequantize(*fake_quant.quantize(matrix, bits), matrix.shape)


def block_absmax(matrix: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value of each block of 64 values."""
    return torch.nn.functional.pad(matrix.flatten(), (0, -matrix.numel() % 64)).view(-1, 64).abs().amax(1)


# Quantization


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(16, 768), (768, 16), (5, 7), (1, 64), (3, 43)], ids=str)
def test_the_error_is_at_most_half_a_gap_between_levels(bits, shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.rand(shape).exp()
    restored = quantize_and_restore(matrix, bits)
    assert restored.shape == matrix.shape
    # Half the widest gap between levels, and the rounding of the scale to bf16.
    half_gap = {8: 0.5 / 127, 4: 0.5 * float((fake_quant.NF4[1:] - fake_quant.NF4[:-1]).max())}[bits]
    error = block_absmax(restored - matrix)
    assert (error <= (half_gap + 2**-8) * block_absmax(matrix)).all()
    assert error.max() > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_quantizing_a_second_time_changes_nothing(bits):
    torch.manual_seed(0)
    once = quantize_and_restore(torch.randn(64, 48) * 1e-3, bits)
    assert torch.equal(once, quantize_and_restore(once, bits))


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zeros(bits):
    assert torch.equal(quantize_and_restore(torch.zeros(4, 64), bits), torch.zeros(4, 64))


def test_the_levels_of_nf4_are_those_of_bitsandbytes():
    from bitsandbytes.functional import get_4bit_type

    assert torch.equal(fake_quant.NF4, get_4bit_type("nf4", device="cpu"))


# Training


@pytest.mark.parametrize("bits", [8, 4])
def test_the_model_uses_stored_values_and_passes_gradients_on(model_folder, bits):
    network, _, _ = random_adapter(model_folder, bits=bits)
    unquantized, _, _ = random_adapter(model_folder, bits=16)
    with torch.no_grad():  # set its factors to the values that the other stores
        for name, module in lora.lora_layers(unquantized).items():
            for factor, other in (
                (module.lora_A, lora.lora_layers(network)[name].lora_A),
                (module.lora_B, lora.lora_layers(network)[name].lora_B),
            ):
                value = other["default"].weight
                factor["default"].weight.copy_(quantize_and_restore(value, bits))
                assert not torch.equal(factor["default"].weight, value)
    assert torch.equal(logits(network), logits(unquantized))
    for model in (network, unquantized):
        nll_sum(model, IDS[:, :-1], IDS[:, 1:], torch.float32).backward()
    gradients, expected = (
        {n: p.grad for n, p in model.named_parameters() if p.requires_grad} for model in (network, unquantized)
    )
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name
        assert gradient.abs().max() > 0


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("bits", [8, 4])
def test_compiled_layers_use_the_stored_values_too(bits):
    torch.manual_seed(0)
    layer = fake_quant.FakeQuantLinear(torch.nn.Linear(96, 16, bias=False), bits)
    stored = torch.compile(lambda: layer.fake_quantized_weight() * 1.0, dynamic=False)()
    matrix = layer.weight
    assert torch.equal(stored, quantize_and_restore(matrix, bits))
    stored.backward(matrix.detach())
    assert torch.equal(matrix.grad, matrix)


# The file


@pytest.mark.parametrize("quantization", [None, NF4], ids=["float", "nf4"])
@pytest.mark.parametrize("changes", [{"bits": 8}, {"bits": 4}, {"bits": 8, "use_dora": True}], ids=str)
def test_the_stored_values_are_those_of_training_bit_for_bit(model_folder, tmp_path, quantization, changes):
    network, lora_params, initial_factors = random_adapter(model_folder, quantization, **changes)
    expected = logits(network)
    lora.save_adapter(network, lora_params, initial_factors, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", fake_quant.QUANTIZED_WEIGHTS}
    stored = fake_quant.load_quantized(tmp_path)
    for name, module in lora.lora_layers(network).items():
        for factor in ("lora_A", "lora_B"):
            trained = getattr(module, factor)["default"].fake_quantized_weight()
            assert torch.equal(stored[f"base_model.model.{name}.{factor}.weight"].to(IDS.device), trained)
    loaded = lora.load_adapter(load(model_folder, quantization), tmp_path)
    assert torch.equal(logits(loaded), expected)


def test_the_file_holds_the_factors_as_codes_and_scales_only(model_folder, tmp_path):
    for bits, kind in ((8, torch.int8), (4, torch.uint8)):
        network, lora_params, _ = random_adapter(model_folder, bits=bits)
        lora.save_adapter(network, lora_params, {}, tmp_path)
        tensors = load_file(tmp_path / fake_quant.QUANTIZED_WEIGHTS)
        assert {tensor.dtype for name, tensor in tensors.items() if name.endswith(".codes")} == {kind}
        assert {tensor.dtype for name, tensor in tensors.items() if name.endswith(".scales")} == {torch.bfloat16}
        assert all(name.endswith((".codes", ".scales")) for name in tensors)


@pytest.mark.parametrize(("bits", "factor"), [(8, 1.9), (4, 3.5)])
def test_the_file_is_smaller_than_one_of_16_bits(tmp_path, bits, factor):
    shapes = {"attn.c_attn": (768, 2304), "attn.c_proj": (768, 768), "mlp.c_fc": (768, 3072), "mlp.c_proj": (3072, 768)}
    tensors = {}
    for layer in range(12):
        for name, (inputs, outputs) in shapes.items():
            prefix = f"base_model.model.transformer.h.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(16, inputs)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, 16)
    fake_quant.save_quantized(tensors, bits, tmp_path)
    values = sum(tensor.numel() for tensor in tensors.values())
    assert 2 * values / (tmp_path / fake_quant.QUANTIZED_WEIGHTS).stat().st_size >= factor
    assert sum(map(torch.Tensor.numel, fake_quant.load_quantized(tmp_path).values())) == values


def test_a_tuned_model_is_loaded_from_the_stored_values_alone(model_folder, tmp_path):
    network, lora_params, _ = random_adapter(model_folder, bits=8)
    lora.save_adapter(network, lora_params, {}, tmp_path)
    loading.write_method(tmp_path, "lora", None, model_folder)
    expected = logits(network)
    del network
    assert torch.equal(logits(loading.load_tuned(model_folder, tmp_path, torch.float32)), expected)
    tensors = fake_quant.load_quantized(tmp_path)
    fake_quant.save_quantized({name: 2 * tensor for name, tensor in tensors.items()}, 8, tmp_path)
    loading.write_method(tmp_path, "lora", None, model_folder)
    assert not torch.equal(logits(loading.load_tuned(model_folder, tmp_path, torch.float32)), expected)
    assert json.loads((tmp_path / "method.json").read_text())["method"] == "lora"
