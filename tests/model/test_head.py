"""The output head is computed exactly, and models whose head is another one, or that look ahead, are refused."""

import pytest
import torch
from head_models import HEADS, write_head_model
from small_models import load, on_every_base, write_bloom, write_gpt2, write_llama

from gpt2lora.model import attention, head, loading
from gpt2lora.pipeline.cli import StageError
from gpt2lora.training.loss import nll_sum


@pytest.mark.parametrize(("kind", "changes"), HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_that_scale_shift_or_cap_are_known(kind, changes, dtype):
    head.check_head(write_head_model(kind, changes).to(dtype), width=8)


@pytest.mark.parametrize(("kind", "changes"), HEADS)
def test_loss_and_gradients_are_those_of_the_model_itself(kind, changes):
    ids = torch.arange(24).view(2, 12) * 7 % 50
    network = write_head_model(kind, changes).double()
    expected = network(input_ids=ids, labels=ids, num_items_in_batch=1).loss
    expected.backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    network.zero_grad()
    nll = nll_sum(network, ids[:, :-1], ids[:, 1:], torch.float64)
    nll.backward()
    torch.testing.assert_close(nll, expected.double(), rtol=1e-6, atol=0)
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("key", ["final_logit_softcapping", "logits_scaling", "logit_scale"])
def test_a_head_that_the_config_does_not_tell_of_is_refused(tmp_path, key):
    network = load(write_gpt2(tmp_path))
    head.check_head(network, width=8)
    setattr(network.config, key, 20.0)  # GPT-2 does not read it
    with pytest.raises(StageError, match=r"^GPT2LMHeadModel does more to its logits"):
        head.check_head(network, width=8)


def test_a_cap_shows_although_the_models_own_logits_are_small():
    network = write_head_model("gemma2", {"final_logit_softcapping": 30.0})
    with torch.no_grad():
        network.model.norm.weight.fill_(-1 + 1e-4)  # Gemma scales by 1 + weight
        assert network(input_ids=torch.arange(8)[None]).logits.abs().max() < 0.1
    head.check_head(network, width=8)
    network.config.final_logit_softcapping = None
    model_caps = network.lm_head.register_forward_hook(lambda module, inputs, logits: 30 * torch.tanh(logits / 30))
    with pytest.raises(StageError, match="does more to its logits"):
        head.check_head(network, width=8)
    model_caps.remove()


@on_every_base
@pytest.mark.parametrize("write_model", [write_gpt2, write_llama], ids=["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantized_bases_pass_the_check(tmp_path, write_model, quantization, dtype):
    network = load(write_model(tmp_path), quantization, dtype)
    loading.cast_frozen(network, dtype)
    head.check_head(network, width=8)


def test_bloom_looks_ahead_with_our_attention_not_with_its_own(tmp_path):
    network = load(write_bloom(tmp_path))
    assert network.config._attn_implementation != attention.ATTENTION_NAME
    head.check_head(network, width=8)
    network.config._attn_implementation = attention.ATTENTION_NAME  # for which Bloom makes no mask
    with pytest.raises(StageError, match=r"^Bloom\w+ looks ahead"):
        head.check_head(network, width=8)
