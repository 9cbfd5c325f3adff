"""Causal attention without a mask, against its formula and against transformers, and the models it replaces."""

import pytest
import torch
import torch.nn.functional as F
from small_models import IDS, load, write_llama
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
)

from gpt2lora.model import attention


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_computes_its_formula(heads, dtype):
    torch.manual_seed(0)
    query = torch.randn(2, 4, 5, 8, dtype=torch.float64).to(dtype)
    key, value = (torch.randn(2, heads, 5, 8, dtype=torch.float64).to(dtype) for _ in range(2))
    output, weights = attention.causal_attention(torch.nn.Module(), query, key, value, None, scaling=0.3)
    keys, values = (part.double().repeat_interleave(4 // heads, 1) for part in (key, value))
    scores = 0.3 * query.double() @ keys.transpose(2, 3)
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    expected = (F.softmax(scores, -1) @ values).transpose(1, 2)
    assert weights is None
    assert output.dtype == dtype
    torch.testing.assert_close(
        output.double(), expected, **({} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02})
    )


def test_attention_on_a_cpu_computes_in_fp32_under_autocast_too(monkeypatch):
    seen, compute = [], F.scaled_dot_product_attention

    def recording(query, *others, **options):
        seen.append((query.dtype, torch.is_autocast_enabled("cpu")))
        return compute(query, *others, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    parts = [torch.randn(1, 2, 5, 8, dtype=torch.bfloat16) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = attention.causal_attention(torch.nn.Module(), *parts, None)
    assert seen == [(torch.float32, False)]
    assert output.dtype == torch.bfloat16


def test_a_generated_token_attends_to_all_before_it(tiny_model):
    network = load(tiny_model).eval()
    assert network.config._attn_implementation == attention.ATTENTION_NAME
    ids = torch.randint(1, 300, (1, 12), device=IDS.device)
    with torch.no_grad():
        expected = network(input_ids=ids).logits[:, -1]
        cache = network(input_ids=ids[:, :-1], use_cache=True).past_key_values
        generated = network(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(generated, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "supported"),
    [(GPT2Config(), True), (LlamaConfig(), True), (MistralConfig(sliding_window=4), False), (BloomConfig(), False)],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_only_full_causal_attention_is_replaced(config, supported):
    with torch.device("meta"):
        assert attention.supports_causal_attention(AutoModelForCausalLM.from_config(config)) is supported


def test_grouped_query_attention_equals_that_of_transformers(tmp_path):
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    write_llama(tmp_path, initializer_range=0.02, **size)
    ids = torch.randint(1, 300, (1, 12), device=IDS.device)
    ours = load(tmp_path)
    assert ours.config._attn_implementation == attention.ATTENTION_NAME
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).to(IDS.device)
    with torch.no_grad():
        logits = [network.eval()(input_ids=ids).logits for network in (ours, theirs)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
