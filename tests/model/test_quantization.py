"""A base in 4 or 8 bits: which layers are quantized, how well they compute, and how many bytes they take."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from small_models import (
    IDS,
    INT8,
    LAYERS,
    NF4,
    PROJECTIONS,
    WIDTH,
    load,
    logits,
    new_adapter,
    on_every_base,
    on_quantized_bases,
    train_one_step,
    write_gpt2,
)
from transformers import AutoModelForCausalLM

from gpt2lora.model.quantization import count_frozen_bytes, count_frozen_parameters, dequantize_into
from gpt2lora.pipeline.cli import StageError

BLOCK, NESTED_BLOCK = 64, 256  # weights that share a scale, and scales that share a scale


@pytest.mark.parametrize("quantization", [NF4, INT8], ids=["nf4", "int8"])
def test_the_48_projections_of_gpt2_are_quantized_and_no_more(tmp_path, quantization):
    base = load(write_gpt2(tmp_path, n_layer=12), quantization)
    kind = Linear4bit if quantization.bits == 4 else Linear8bitLt
    assert sum(type(module) is kind for module in base.modules()) == 48
    integers = {torch.uint8, torch.int8}
    assert sum(parameter.dtype in integers for parameter in base.parameters()) == 48
    float_matrices = {name.split(".")[-2] for name, parameter in base.named_parameters() if parameter.dim() == 2} - {
        name.split(".")[-2] for name, parameter in base.named_parameters() if parameter.dtype in integers
    }
    assert float_matrices == {"wte", "wpe"}


@on_quantized_bases
def test_a_quantized_base_keeps_embeddings_and_head_in_floats(tiny_model, quantization):
    base = load(tiny_model, quantization)
    kind = Linear8bitLt if quantization.bits == 8 else Linear4bit
    quantized = {name.removeprefix("transformer.h.") for name, module in base.named_modules() if type(module) is kind}
    assert quantized == {f"{layer}.{name}" for layer in range(LAYERS) for name in PROJECTIONS}
    stored = torch.int8 if quantization.bits == 8 else torch.uint8
    for name, parameter in base.named_parameters():
        matrix = name.endswith(tuple(f"{projection}.weight" for projection in PROJECTIONS))
        assert parameter.dtype == (stored if matrix else torch.float32), name
    assert type(base.lm_head) is torch.nn.Linear
    assert base.lm_head.weight is base.transformer.wte.weight
    if quantization.bits == 4:
        state = base.transformer.h[0].mlp.c_fc.weight.quant_state
        assert (state.quant_type, state.nested) == (quantization.quant_type, quantization.double_quant)


@on_quantized_bases
@torch.no_grad()
def test_quantized_layers_compute_nearly_what_float_layers_do(gpt2_folder, quantization):
    exact, quantized = load(gpt2_folder).transformer.h[1], load(gpt2_folder, quantization).transformer.h[1]
    for projection, (inputs, _) in PROJECTIONS.items():
        x = torch.randn(20, inputs, device=IDS.device)
        expected = exact.get_submodule(projection)(x)
        error = float((quantized.get_submodule(projection)(x) - expected).norm() / expected.norm())
        assert 0 < error < (0.02 if quantization.bits == 8 else 0.2), "1.4 where a square matrix is transposed"


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_8_bit_layers_compute_with_dequantized_weights(tmp_path, training):
    """Not with activations rounded to 8 bits: the float layer with the same weights gives the same values."""
    folder = write_gpt2(tmp_path)
    quantized, floats = load(folder, INT8).train(training), load(folder).train(training)
    dequantize_into(floats, quantized)
    for name, (inputs, _) in PROJECTIONS.items():
        ours, expected = (network.transformer.h[1].get_submodule(name) for network in (quantized, floats))
        x = torch.randn(3, 7, inputs, device=IDS.device)
        x[0, 0, 0] = 30.0  # LLM.int8() treats such an outlier in another way
        values = []
        for layer in (ours, expected):
            x = x.detach().requires_grad_()
            y = layer(x)
            y.square().sum().backward()
            values.append((y.detach(), x.grad))
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes it")
def test_a_4_bit_layer_that_a_cpu_computes_wrongly_is_refused(tmp_path):
    write_gpt2(tmp_path, n_layer=1, n_embd=32)
    with pytest.raises(StageError, match=r"transformer\.h\.0\.attn\.c_attn has 32 inputs"):
        load(tmp_path, NF4)
    load(tmp_path, INT8)


@on_quantized_bases
def test_frozen_bytes_count_every_byte_of_the_base(tiny_model, quantization):
    network = new_adapter(tiny_model, quantization)
    count = 4 * (300 + 64) * WIDTH  # wte, which is the head, too; wpe
    count += 4 * 2 * WIDTH * (2 * LAYERS + 1)  # layer norms
    for inputs, outputs in PROJECTIONS.values():
        weights = inputs * outputs
        blocks = weights // BLOCK
        each = 4 * outputs  # bias
        if quantization.bits == 8:
            each += weights + 4 * outputs
        elif quantization.double_quant:
            each += weights // 2 + 16 * 4  # two weights a byte; the 16 levels
            each += blocks + 4 * -(-blocks // NESTED_BLOCK) + 256 * 4 + 4  # scales, their scales, levels and offset
        else:
            each += weights // 2 + 16 * 4 + 4 * blocks
        count += LAYERS * each
    assert count_frozen_bytes(network) == count
    train_one_step(network)
    logits(network)
    assert count_frozen_bytes(network) == count, "after training and evaluation"


@on_every_base
def test_frozen_parameters_are_counted_however_they_are_stored(tiny_model, quantization):
    expected = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    assert count_frozen_parameters(new_adapter(tiny_model, quantization)) == expected


def test_a_float_base_takes_four_bytes_a_parameter(tiny_model):
    network = new_adapter(tiny_model)
    assert count_frozen_bytes(network) == 4 * count_frozen_parameters(network)
