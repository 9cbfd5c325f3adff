"""Loading a base in floats or quantized, evaluating it between steps, and loading a tuned model."""

import numpy as np
import pytest
import torch
from bad_input import update_json
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from small_models import (
    IDS,
    NF4,
    fill_factors_b,
    load,
    logits,
    new_adapter,
    on_every_base,
    on_quantized_bases,
    train_one_step,
    write_mixtral,
)
from tiny import low_rank
from training_steps import LENGTHS, frozen_values, make_rows, step_gradients, trained_values
from transformers import (
    AutoModelForCausalLM,
    BigBirdConfig,
    BigBirdForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)
from transformers.models.big_bird import modeling_big_bird

from gpt2lora.model import loading, lora
from gpt2lora.pipeline.cli import StageError


def training_logits(network: torch.nn.Module) -> torch.Tensor:
    """Return the logits of IDS of a model without dropout, computed as in training."""
    network.train()
    with torch.no_grad():
        return network(input_ids=IDS, use_cache=False).logits


def test_the_faster_gelu_computes_the_same_logits(gpt2_folder):
    original = AutoModelForCausalLM.from_pretrained(gpt2_folder).to(IDS.device)
    assert original.config.activation_function == "gelu_new"
    ours = load(gpt2_folder)
    assert ours.config.activation_function == "gelu_pytorch_tanh"
    expected = logits(original)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_batches_are_not_searched_for_padding(gpt2_folder, tmp_path, caplog):
    """It would wait for the GPU in each batch, and warn of a mask that is not needed."""
    changed = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    changed.config.pad_token_id = int(IDS[0, 0])
    changed.save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "transformers"):
        assert torch.equal(logits(load(tmp_path)), logits(load(gpt2_folder)))
    assert not caplog.records


@pytest.mark.parametrize("size", [30, 36])  # 36 numbers of fp32 are a multiple of 16 bytes, of bf16 they are not
def test_experts_of_any_size_train_in_fp32_and_bf16(tmp_path, capsys, size):
    write_mixtral(tmp_path, intermediate_size=size)
    own = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").to(IDS.device)
    torch.testing.assert_close(logits(load(tmp_path)), logits(own))
    torch.testing.assert_close(logits(loading.load_fp32(tmp_path, tmp_path).to(IDS.device)), logits(own))
    assert f"one after another, which is slower: {size} is no multiple of 8" in capsys.readouterr().out
    for dtype in (torch.float32, torch.bfloat16):
        network = new_adapter(tmp_path)
        loading.cast_frozen(network, dtype)
        before = trained_values(network)
        train_one_step(network, dtype)
        assert not any(
            torch.equal(value, before[name]) for name, value in trained_values(network).items() if "_B." in name
        )


def test_weights_that_the_configuration_has_no_place_for_are_refused(gpt2_folder, tmp_path):
    """transformers leaves them out: half of a model would be trained."""
    whole = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    whole.save_pretrained(tmp_path)
    update_json(tmp_path / "config.json", n_layer=whole.config.n_layer - 1)
    name = rf"transformer.h.{whole.config.n_layer - 1}.attn.c_attn.weight first"
    with pytest.raises(StageError, match=rf"hold 1[12] weights that config.json has no place for, {name}: not a pair"):
        load(tmp_path)


def test_causal_masks_among_the_weights_are_left_out(gpt2_folder, tmp_path):
    """GPT-Neo, GPT-J and CodeGen once saved theirs."""
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    GPTNeoForCausalLM(GPTNeoConfig(vocab_size=300, max_position_embeddings=64, **sizes)).save_pretrained(tmp_path)
    expected = logits(load(tmp_path))
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    for layer in range(2):
        prefix = f"transformer.h.{layer}.attn.attention"
        weights[f"{prefix}.bias"] = torch.ones(64, 64, dtype=torch.bool).tril()[None, None]
        weights[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
    save_file(weights, file, {"format": "pt"})
    assert torch.equal(logits(load(tmp_path)), expected)
    weights["transformer.h.0.attn.attention.q_proj.bias"] = torch.zeros(16)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(StageError, match=r"hold 1 weights that .*, transformer\.h\.0\.attn\.attention\.q_proj\.bias"):
        load(tmp_path)


def test_what_a_configuration_asks_a_model_to_return_changes_nothing(gpt2_folder, tmp_path):
    network = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    network.save_pretrained(tmp_path)
    update_json(tmp_path / "config.json", return_dict=False, output_attentions=True, output_hidden_states=True)
    changed = load(tmp_path)
    assert torch.equal(logits(changed), logits(load(gpt2_folder)))
    changed.save_pretrained(tmp_path / "again")  # transformers refuses output_attentions with this attention


def test_sparse_blocks_of_attention_that_see_ahead_are_refused(tmp_path):
    """On a short text, BigBird switches them off for good: a probe of a few tokens would find it causal."""
    size = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BigBirdConfig(**size, intermediate_size=128, is_decoder=True, attention_type="block_sparse")
    BigBirdForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(StageError, match=r"set attention_type to original_full in config.json"):
        load(tmp_path)
    update_json(tmp_path / "config.json", attention_type="original_full")
    if hasattr(modeling_big_bird, "create_causal_mask"):
        assert logits(load(tmp_path)).isfinite().all()
    else:  # transformers 5.17: it looks ahead in any case
        with pytest.raises(StageError, match="looks ahead"):
            load(tmp_path)


@on_every_base
def test_no_weights_are_rescaled_outside_training_without_their_adapter(tmp_path, quantization):
    """RWKV would do it: its adapter would count twice as much in each validation as in the step before."""
    config = RwkvConfig(vocab_size=300, context_length=64, hidden_size=64, num_hidden_layers=3, rescale_every=1)
    torch.manual_seed(0)
    original = RwkvForCausalLM(config)
    original.save_pretrained(tmp_path)
    network = lora.attach_lora(load(tmp_path, quantization), low_rank())
    if quantization is None:  # before the adapter has an effect
        torch.testing.assert_close(logits(network), training_logits(original.to(IDS.device)), rtol=1e-5, atol=1e-5)
    fill_factors_b(network, 0.5)
    in_evaluation = logits(network)
    torch.testing.assert_close(training_logits(network), in_evaluation, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(network), in_evaluation)


def test_a_float_base_has_the_folder_s_weights_in_fp32(tiny_model):
    original, ours = AutoModelForCausalLM.from_pretrained(tiny_model), load(tiny_model, dtype=torch.bfloat16)
    expected = original.state_dict()
    assert set(ours.state_dict()) == set(expected)
    for name, value in ours.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value.cpu(), expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@on_quantized_bases
def test_evaluation_between_steps_leaves_a_quantized_base_alone(tiny_model, quantization, dtype):
    network = lora.attach_lora(load(tiny_model, quantization, dtype), low_rank())
    frozen = frozen_values(network)
    train_one_step(network, dtype)
    before = logits(network, dtype)
    assert torch.equal(logits(network, dtype), before)
    train_one_step(network, dtype)
    assert not torch.equal(logits(network, dtype), before)
    for name, value in network.named_parameters():
        assert name not in frozen or torch.equal(value, frozen[name]), name


def test_4_bit_layers_never_repack_their_weights(tiny_model):
    """On a CPU without AVX512_BF16 the test above passes either way."""
    layers = [module for module in load(tiny_model, NF4).modules() if isinstance(module, Linear4bit)]
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


@pytest.mark.parametrize("quantization", [None, NF4], ids=["float", "nf4"])
def test_a_base_cast_to_bf16_gives_nearly_the_same_gradient(tiny_model, quantization):
    split = make_rows(LENGTHS)
    network = new_adapter(tiny_model, quantization)
    fill_factors_b(network, 0.02)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        loading.cast_frozen(network, dtype)
        assert {value.dtype for value in frozen_values(network).values()} <= {dtype, torch.uint8}
        assert {value.dtype for value in trained_values(network).values()} == {torch.float32}
        nll, gradients = step_gradients(network, split, np.arange(len(split)), 4, dtype)
        results.append((nll, torch.cat([gradient.flatten() for gradient in gradients.values()])))
    (exact_nll, exact_gradient), (nll, gradient) = results
    assert nll == pytest.approx(exact_nll, rel=1e-2)
    assert nll != exact_nll
    assert torch.cosine_similarity(exact_gradient, gradient, 0) > 0.99


@on_every_base
def test_a_tuned_model_has_the_logits_it_was_saved_with(gpt2_folder, tmp_path, quantization):
    network = lora.attach_lora(load(gpt2_folder, quantization), low_rank())
    train_one_step(network)
    lora.save_adapter(network, low_rank(), {}, tmp_path)
    loading.write_method(tmp_path, "qlora" if quantization else "lora", quantization, gpt2_folder)
    loaded = loading.load_tuned(gpt2_folder, tmp_path, torch.float32)
    assert torch.equal(logits(loaded), logits(network))
    assert not torch.equal(logits(network), logits(load(gpt2_folder, quantization)))
