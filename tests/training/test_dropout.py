"""The dropout of the base model: train.base_dropout decides it, wherever a model keeps its own."""

import json

import pytest
import torch
from small_models import new_adapter
from tiny import train_params
from training_steps import LENGTHS, make_rows
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from gpt2lora.training import dropout, loop

IDS = torch.arange(20)[None]
SIZE = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def is_random(network: torch.nn.Module) -> bool:
    """Tell whether two passes in training differ."""
    network.train()
    return not torch.equal(network(input_ids=IDS).logits, network(input_ids=IDS).logits)


def test_base_dropout_does_not_change_the_adapter_s_dropout(tiny_model):
    network = new_adapter(tiny_model, dropout=0.05)
    dropout.set_base_dropout(network, 0.3)
    shares = {name: module.p for name, module in network.named_modules() if isinstance(module, torch.nn.Dropout)}
    adapter = {share for name, share in shares.items() if "lora_dropout" in name}
    base = {share for name, share in shares.items() if "lora_dropout" not in name}
    assert (adapter, base) == ({0.05}, {0.3})


def test_base_dropout_covers_dropout_that_is_no_module():
    torch.manual_seed(0)
    sizes = SIZE | {"word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1}
    network = OPTForCausalLM(OPTConfig(**sizes, dropout=0.5, attention_dropout=0.5))
    assert is_random(network)
    dropout.set_base_dropout(network, 0.0)
    assert not is_random(network)


def test_base_dropout_of_0_replaces_that_of_the_model_s_config(tiny_model):
    network, train = new_adapter(tiny_model), make_rows(LENGTHS)
    assert network.get_base_model().config.resid_pdrop == 0.1
    loop.fit(network, train, train, train_params(), seed=0)
    assert not is_random(network)
    dropout.set_base_dropout(network, 0.1)
    assert is_random(network)


@pytest.mark.parametrize(
    "network",
    [
        LlamaForCausalLM(LlamaConfig(**SIZE, intermediate_size=32, attention_dropout=0)),  # an integer
        FalconForCausalLM(FalconConfig(**SIZE)),  # reads its configuration in each pass
        OPTForCausalLM(OPTConfig(**SIZE, word_embed_proj_dim=16, ffn_dim=32, dropout=0.0)),
    ],
    ids=["integer", "configuration", "attribute"],
)
def test_base_dropout_acts_on_models_whose_own_is_0(network):
    assert not is_random(network)
    dropout.set_base_dropout(network, 0.5)
    assert is_random(network)
    dropout.set_base_dropout(network, 0.0)
    assert not is_random(network)


def test_other_noise_in_training_is_turned_off():
    size = SIZE | {"num_hidden_layers": 8}
    opt = OPTForCausalLM(OPTConfig(**size, word_embed_proj_dim=16, ffn_dim=32, dropout=0.0, layerdrop=0.5))
    mixtral = MixtralForCausalLM(
        MixtralConfig(**SIZE, num_key_value_heads=2, intermediate_size=32, router_jitter_noise=0.5)
    )
    for network in (opt, mixtral):
        assert is_random(network)
        dropout.set_base_dropout(network, 0.0)
        assert not is_random(network)


def test_a_model_is_saved_with_its_own_configuration(tmp_path):
    network = FalconForCausalLM(FalconConfig(**SIZE, hidden_dropout=0.25, attention_dropout=0.125))
    dropout.set_base_dropout(network, 0.0)
    network.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["hidden_dropout"], saved["attention_dropout"]) == (0.25, 0.125)
