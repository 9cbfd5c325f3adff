"""Causal attention without a mask, against its formula and against transformers, and the models that keep theirs."""

import pytest
import torch
import torch.nn.functional as F
from small_models import IDS, INT8, NF4, load, write_bloom, write_llama
from torch.nn.attention import SDPBackend, sdpa_kernel
from training_steps import on_gpu
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BloomConfig, LlamaForCausalLM, PreTrainedConfig

from gpt2lora.model import attention
from gpt2lora.pipeline.cli import StageError


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


@on_gpu
def test_a_window_needs_no_memory_for_all_scores():
    query = torch.randn(1, 4, 64, 32, dtype=torch.bfloat16, device="cuda")
    key, value = (torch.randn(1, 2, 64, 32, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    arguments = (torch.nn.Module(), query, key, value, None)
    expected, _ = attention.causal_attention(*arguments, sliding_window=8)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):  # it has no kernel for fewer heads of keys
        output, _ = attention.causal_attention(*arguments, sliding_window=8)
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)


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


def small(kind: str, **changes) -> PreTrainedConfig:
    """Return the configuration of a model of two layers whose weights are large enough for attention to matter."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50} | heads
    return CONFIG_MAPPING[kind](**sizes | {"initializer_range": 0.3, "pad_token_id": 0} | changes)


SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}


@pytest.mark.parametrize(
    "config",
    [
        small("mistral", sliding_window=4),
        small("gemma3_text", **SLIDING),
        small("gemma2", attn_logit_softcapping=2.0, query_pre_attn_scalar=4, **SLIDING),
        small("gpt_oss", **SLIDING, **EXPERTS),
        small("qwen2", use_sliding_window=True, max_window_layers=1, sliding_window=4),
    ],
    ids=lambda config: config.model_type,
)
def test_windows_soft_caps_and_sinks_equal_those_of_transformers(config):
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in network.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
    network.set_attn_implementation("eager")
    ids = torch.randint(1, 50, (2, 12))
    with torch.no_grad():
        expected = network(input_ids=ids).logits
        attention.use_causal_attention(network)
        assert network.config._attn_implementation == attention.ATTENTION_NAME
        torch.testing.assert_close(network(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
        cache = network(input_ids=ids[:, :-3], use_cache=True).past_key_values
        for place in range(9, 12):  # generation, a token at a time
            generated = network(input_ids=ids[:, place : place + 1], past_key_values=cache).logits
            torch.testing.assert_close(generated[:, 0], expected[:, place], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("argument", ["position_bias", "block_indices", "attention_mask"])
def test_attention_refuses_what_it_would_leave_out(argument):
    parts = [torch.zeros(1, 2, 5, 8) for _ in range(3)]
    with pytest.raises(NotImplementedError):
        attention.causal_attention(
            torch.nn.Module(), *parts, **{"attention_mask": None} | {argument: torch.zeros(1, 1, 5, 5)}
        )


def test_a_window_that_a_layer_does_not_pass_on_is_left_to_the_model():
    wide = SLIDING | {"sliding_window": 4096}  # wider than what is probed
    network = AutoModelForCausalLM.from_config(small("gemma3_text", **wide)).eval()
    attention.use_causal_attention(network)
    assert network.config._attn_implementation == attention.ATTENTION_NAME
    network.set_attn_implementation("sdpa")
    network.model.layers[0].self_attn.sliding_window = None
    attention.use_causal_attention(network)
    assert network.config._attn_implementation == "sdpa"


def test_bidirectional_attention_and_attention_with_biases_are_left_to_the_model():
    bert = small("bert", head_dim=None)
    bloom = BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=50, initializer_range=0.3)
    for config in (bert, bloom):
        network = AutoModelForCausalLM.from_config(config).eval()
        own = network.config._attn_implementation
        attention.use_causal_attention(network)
        assert network.config._attn_implementation == own != attention.ATTENTION_NAME


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


def test_bloom_looks_ahead_with_our_attention_not_with_its_own(tmp_path):
    network = load(write_bloom(tmp_path))
    assert network.config._attn_implementation != attention.ATTENTION_NAME
    attention.check_causal(network)
    network.config._attn_implementation = attention.ATTENTION_NAME  # for which Bloom makes no mask
    with pytest.raises(StageError, match=r"^Bloom\w+ looks ahead"):
        attention.check_causal(network)


@pytest.mark.parametrize("quantization", [None, INT8, NF4], ids=["float", "int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_reads_both_ways_is_refused(tmp_path, quantization, dtype):
    torch.manual_seed(0)
    config = small("bert", head_dim=None, hidden_size=64, intermediate_size=64, initializer_range=0.02)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(StageError, match=r"^BertLMHeadModel looks ahead"):
        load(tmp_path, quantization, dtype)
