"""The initial factors of an adapter, against what defines each init."""

import pytest
import tiny
import torch
from peft import PeftModel
from small_models import IDS, INT8, NF4, change_trained, float_weight, load, logits, random_adapter
from transformers import AutoModelForCausalLM

from gpt2lora.model import lora, lora_init


@pytest.mark.parametrize("init", ["default", "pissa", "olora", "orthogonal"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["", "dora"])
def test_an_adapter_changes_no_logit_at_first_with_any_init(model_folder, init, use_dora):
    expected = logits(load(model_folder))
    network = lora.attach_lora(load(model_folder), tiny.low_rank(init=init, use_dora=use_dora))
    lora_init.initialize_lora(lora.lora_layers(network), init, {})
    zero = [bool((module.lora_B["default"].weight == 0).all()) for module in lora.lora_layers(network).values()]
    assert all(zero) if init == "default" else not any(zero)
    torch.testing.assert_close(logits(network), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_pissa_takes_the_largest_singular_triplets(model_folder):
    network, _, _ = random_adapter(model_folder, init="pissa", r=4, alpha=8)
    original = lora.linear_layers(load(model_folder))
    for name, module in lora.lora_layers(network).items():
        update = 2 * module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()
        before, rest = float_weight(original[name]), float_weight(module.base_layer)
        torch.testing.assert_close(update + rest, before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            torch.linalg.svdvals(update)[:4], torch.linalg.svdvals(before)[:4], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(torch.linalg.svdvals(rest)[0], torch.linalg.svdvals(before)[4], rtol=1e-4, atol=1e-5)


def test_olora_s_factors_are_orthonormal_and_triangular(model_folder):
    network, _, _ = random_adapter(model_folder, init="olora", r=4)
    for module in lora.lora_layers(network).values():
        b = module.lora_B["default"].weight
        torch.testing.assert_close(b.T @ b, torch.eye(4, device=b.device), rtol=0, atol=1e-5)
        assert torch.equal(module.lora_A["default"].weight.tril(-1), torch.zeros_like(module.lora_A["default"].weight))


def test_orthogonal_factors_are_random_and_their_product_is_0(model_folder):
    network, _, _ = random_adapter(model_folder, init="orthogonal", r=4)
    for module in lora.lora_layers(network).values():
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        assert a.abs().mean() > 1e-2
        assert b.abs().mean() > 1e-2
        assert (b @ a).abs().max() < 1e-5 * a.abs().max() * b.abs().max() * 4


@pytest.mark.parametrize("quantization", [NF4, INT8], ids=["nf4", "int8"])
def test_loftq_corrects_the_error_as_well_as_its_rank_allows(model_folder, quantization):
    """What remains of the quantization error is its smallest singular values."""
    network, _, _ = random_adapter(model_folder, quantization, init="loftq", r=32, alpha=16)
    original = lora.linear_layers(load(model_folder))
    for name, module in lora.lora_layers(network).items():
        base = module.base_layer
        with torch.no_grad():
            stored = (base(torch.eye(base.in_features, device=IDS.device)) - (0 if base.bias is None else base.bias)).T
        error = float_weight(original[name]) - stored.double()
        rest = error - 0.5 * module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()
        torch.testing.assert_close(rest.norm(), torch.linalg.svdvals(error)[32:].norm(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_and_olora_are_saved_as_standard_adapters(model_folder, tmp_path, init, changes):
    network, lora_params, initial_factors = random_adapter(model_folder, init=init, **changes)
    start = logits(network)
    change_trained(network)
    expected = logits(network)
    assert (expected - start).abs().max() > 0.1 * start.abs().max()
    (tmp_path / "adapter").mkdir()
    lora.save_adapter(network, lora_params, initial_factors, tmp_path / "adapter")
    by_peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder).to(IDS.device), tmp_path / "adapter"
    )
    torch.testing.assert_close(logits(by_peft), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert by_peft.peft_config["default"].r == 8
