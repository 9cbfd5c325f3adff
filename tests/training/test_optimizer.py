"""The learning rate schedule, and the learning rates of LoRA+."""

import itertools
import math

import pytest
import torch
from small_models import load, random_adapter, write_gpt2, write_llama
from tiny import train_params
from transformers import get_cosine_schedule_with_warmup
from transformers.trainer_pt_utils import get_parameter_names

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
    matrices, vectors, factors_b = optimizer.make_optimizer(network, train_params(lora_plus_ratio=16.0)).param_groups
    assert (matrices["ratio"], vectors["ratio"], factors_b["ratio"]) == (1.0, 1.0, 16.0)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert {names[id(p)].split(".")[-3] for p in factors_b["params"]} == {"lora_B"}
    assert len(factors_b["params"]) == len(lora.lora_layers(network))
    trained = sum(parameter.requires_grad for parameter in network.parameters())
    assert len(matrices["params"]) + len(vectors["params"]) + len(factors_b["params"]) == trained


def test_weight_decay_moves_matrices_alone_as_in_the_trainer(tmp_path):
    network = load(write_gpt2(tmp_path))
    decayed = optimizer.make_optimizer(network, train_params(weight_decay=0.5, learning_rate=0.1))
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    decayed.step()
    expected = set(get_parameter_names(network, [torch.nn.LayerNorm], ["bias"]))
    for name, parameter in network.named_parameters():
        factor = 0.95 if name in expected else 1.0
        torch.testing.assert_close(parameter, factor * before[name], msg=name)


def test_the_schedule_is_one_step_ahead_of_that_of_transformers():
    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([parameter], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(theirs, num_warmup_steps=5, num_training_steps=50)
    options = train_params(learning_rate=1.0, warmup_fraction=0.1)
    assert theirs.param_groups[0]["lr"] == 0
    for step in range(1, 6):
        theirs.step()
        schedule.step()
        assert optimizer.lr_at_step(step, 50, options) == pytest.approx(theirs.param_groups[0]["lr"])
