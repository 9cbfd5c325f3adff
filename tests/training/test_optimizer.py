"""The learning rate schedule, and the learning rates of LoRA+."""

import itertools
import math

import pytest
from small_models import random_adapter, write_gpt2, write_llama
from tiny import train_params

from gpt2lora.model import lora
from gpt2lora.training import optimizer


def test_the_learning_rate_warms_up_to_its_peak_then_decays():
    options = train_params(learning_rate=2.0, warmup_fraction=0.1)
    rates = [optimizer.lr_at_step(step, 100, options) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert rates[55] == pytest.approx(1.0), "half of the decay"
    assert rates[99] == pytest.approx(1 + math.cos(math.pi * 89 / 90))
    assert all(before > after > 0 for before, after in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 1), (0.0, 3), (0.99, 3), (0.05, 1), (0.5, 2)])
def test_a_short_schedule_reaches_its_peak_and_is_never_zero(warmup, steps):
    rates = [optimizer.lr_at_step(step, steps, train_params(warmup_fraction=warmup)) for step in range(1, steps + 1)]
    assert all(0 < rate <= 1e-2 for rate in rates)
    assert max(rates) == 1e-2


@pytest.mark.parametrize("write_model", [write_gpt2, write_llama], ids=["gpt2", "llama"])
def test_lora_plus_multiplies_the_learning_rate_of_factors_b(tmp_path, write_model):
    network, _, _ = random_adapter(write_model(tmp_path), use_dora=True)
    others, factors_b = optimizer.make_optimizer(network, train_params(lora_plus_ratio=16.0)).param_groups
    assert (others["ratio"], factors_b["ratio"]) == (1.0, 16.0)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert {names[id(p)].split(".")[-3] for p in factors_b["params"]} == {"lora_B"}
    assert len(factors_b["params"]) == len(lora.lora_layers(network))
    trained = sum(parameter.requires_grad for parameter in network.parameters())
    assert len(others["params"]) + len(factors_b["params"]) == trained
