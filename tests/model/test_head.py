"""The output head is computed exactly; another one is left to the model itself; models that look ahead are refused."""

import numpy as np
import pytest
import torch
from head_models import HEADS, write_head_model
from small_models import IDS, load, on_every_base, write_gpt2, write_llama
from transformers import BartForCausalLM, OPTForCausalLM

from gpt2lora.dataset.blocks import Blocks
from gpt2lora.model import head, loading
from gpt2lora.scoring.log_likelihood import score_tokens, token_nll, token_rank
from gpt2lora.scoring.windows import block_windows
from gpt2lora.training import execution
from gpt2lora.training.loss import nll_sum


@pytest.mark.parametrize(("kind", "changes"), HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_that_scale_shift_or_cap_are_known(kind, changes, dtype):
    network = write_head_model(kind, changes).to(dtype)
    head.check_head(network, width=8)
    assert not network.computes_own_logits


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
def test_a_head_that_the_config_does_not_tell_of_is_left_to_the_model(tmp_path, capsys, key):
    network = load(write_gpt2(tmp_path))
    head.check_head(network, width=8)
    assert head.body_and_head(network)[1].weight is network.lm_head.weight
    setattr(network.config, key, 20.0)  # GPT-2 does not read it
    head.check_head(network, width=8)
    assert head.body_and_head(network) == (network, None)
    assert capsys.readouterr().out.startswith("GPT2LMHeadModel computes more than a linear output head")


@pytest.mark.parametrize("rows", [1, 5])
def test_the_models_own_logits_give_the_same_loss_gradients_and_scores(tmp_path, monkeypatch, rows):
    network = load(write_gpt2(tmp_path)).requires_grad_(True)
    monkeypatch.setitem(execution.CHUNK_TOKENS, "cpu", rows * IDS.shape[1] // 2)
    windows = block_windows(Blocks(IDS.cpu().numpy().astype("uint16"), np.full(len(IDS), IDS.shape[1]), 1))
    results = []
    for network.computes_own_logits in (False, True):
        backward = execution.eager_backward(network, torch.float32)
        nll = backward(IDS[:, :-1], IDS[:, 1:], torch.tensor(1.0))
        gradients = [parameter.grad for parameter in network.parameters()]
        network.zero_grad()
        scores = score_tokens(network, windows, 2, torch.float32, "", (token_nll, token_rank))
        results.append((nll, gradients, [torch.from_numpy(each) for each in scores]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("model", [OPTForCausalLM, BartForCausalLM])
def test_the_head_of_a_model_that_calls_a_part_of_its_body_is_known(tmp_path, capsys, model):
    sizes = {"vocab_size": 300, "d_model": 32, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64}
    sizes |= {"num_attention_heads": 2, "decoder_attention_heads": 2, "decoder_layers": 2, "num_hidden_layers": 2}
    model(model.config_class(max_position_embeddings=64, **sizes)).save_pretrained(tmp_path)
    network = load(tmp_path)
    head.check_head(network, 16)
    assert capsys.readouterr().out == ""
    body, known = head.body_and_head(network)
    with torch.no_grad():
        states, expected = head.body_outputs(body, IDS), network(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(states @ known.weight.T, expected, rtol=1e-5, atol=1e-6)


def test_a_cap_shows_although_the_models_own_logits_are_small():
    network = write_head_model("gemma2", {"final_logit_softcapping": 30.0})
    with torch.no_grad():
        network.model.norm.weight.fill_(-1 + 1e-4)  # Gemma scales by 1 + weight
        assert network(input_ids=torch.arange(8)[None]).logits.abs().max() < 0.1
    head.check_head(network, width=8)
    assert not network.computes_own_logits
    network.config.final_logit_softcapping = None
    model_caps = network.lm_head.register_forward_hook(lambda module, inputs, logits: 30 * torch.tanh(logits / 30))
    head.check_head(network, width=8)
    assert network.computes_own_logits
    model_caps.remove()


@on_every_base
@pytest.mark.parametrize("write_model", [write_gpt2, write_llama], ids=["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantized_bases_pass_the_check(tmp_path, write_model, quantization, dtype):
    network = load(write_model(tmp_path), quantization, dtype)
    loading.cast_frozen(network, dtype)
    head.check_head(network, width=8)
    assert not network.computes_own_logits
