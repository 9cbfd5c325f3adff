"""Training that diverges: it stops with the step that is not finite, and warns of an exploding gradient."""

import math

import pytest
import tiny
import torch
from small_models import new_adapter
from tiny import train_params
from training_runs import checkpoint_files, run_stage
from training_steps import LENGTHS, make_rows

from gpt2lora.pipeline.cli import StageError
from gpt2lora.training import divergence, loop
from stages import train

# Losses


def test_a_loss_that_is_not_finite_stops_with_its_step(tiny_model, monkeypatch):
    network, train = new_adapter(tiny_model), make_rows(LENGTHS)
    lr_at_step = loop.lr_at_step

    def damage_and_lr(*arguments):
        with torch.no_grad():
            next(value for name, value in network.named_parameters() if "lora_A" in name).fill_(math.nan)
        return lr_at_step(*arguments)

    monkeypatch.setattr(loop, "lr_at_step", damage_and_lr)
    with pytest.raises(StageError, match=r"the loss is nan at step 1: lower train.learning_rate"):
        loop.fit(network, train, train, train_params(), seed=0)


def test_a_base_without_a_finite_loss_is_refused_before_the_first_step(tiny_model):
    network, train = new_adapter(tiny_model), make_rows(LENGTHS)
    with torch.no_grad():
        network.get_input_embeddings().weight[0].fill_(math.nan)
    with pytest.raises(StageError, match=r"the validation loss is nan before any step: the base's weights are damaged"):
        loop.fit(network, train, train, train_params(), seed=0)


@pytest.mark.parametrize("index", [1, 2, 3, 4, 11])
def test_the_first_step_whose_loss_is_not_finite_is_named(index):
    losses = [1.0] * 12
    losses[index] = math.inf
    losses[11] = math.nan
    with pytest.raises(StageError, match=rf"the loss is {'nan' if index == 11 else 'inf'} at step {9 + index}:"):
        divergence.check_finite(losses, 20)
    divergence.check_finite(losses[:index], 20)


@pytest.mark.parametrize("batch_size", [4, 100], ids=["several steps", "one step"])
def test_a_huge_learning_rate_stops_with_one_line(tiny_model, batch_size):
    train = make_rows(LENGTHS)
    with pytest.raises(StageError, match=r"the .*loss is nan .*at step [12]: lower train.learning_rate"):
        loop.fit(new_adapter(tiny_model), train, train, train_params(batch_size=batch_size, learning_rate=1e30), seed=0)


# Gradient norms


def test_a_gradient_that_is_not_finite_names_its_step():
    norms = [1.0, math.inf, 1.0]
    with pytest.raises(StageError, match=r"the norm of the gradient is inf at step 19: lower train.learning_rate"):
        divergence.check_gradient_norms(norms, math.inf, 20)


def test_an_exploding_gradient_prints_a_warning(capsys):
    lowest = divergence.check_gradient_norms([2.0, 3.0, 100.0], math.inf, 10)
    assert lowest == 3.0
    assert divergence.check_gradient_norms([290.0], lowest, 20) == 3.0
    assert capsys.readouterr().out == ""
    assert divergence.check_gradient_norms([310.0], lowest, 30) == 3.0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("train: warning: the gradient explodes: norm 310 near step 30, 3 before: lower train.learn")


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (500.0, "warning: the gradient explodes: norm 500 near step 14, 1 before"),
        (math.inf, "the norm of the gradient is inf at step 13"),
    ],
)
def test_training_checks_its_gradient_norms(training_folder, monkeypatch, norm, message):
    tiny.set_param(training_folder, "train.epochs", 2)
    tiny.set_param(training_folder, "train.validations", 1)
    norms = iter([1.0] * 12 + [norm] + [1.0] * 100)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(next(norms)))
    assert message in run_stage(train.main, code=int(math.isinf(norm)))


def test_norms_are_checked_after_the_next_step_is_launched(training_folder, monkeypatch):
    """The norms of steps 11 to 20 are checked when step 21 has been launched, so that the device is never idle."""
    for key, value in {"train.epochs": 4, "train.validations": 1, "train.checkpoint_every": 0}.items():
        tiny.set_param(training_folder, key, value)
    norms = []

    def next_norm(*_):
        norms.append(math.inf if len(norms) + 1 == 17 else 1.0)
        return torch.tensor(norms[-1])

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", next_norm)
    assert "the norm of the gradient is inf at step 17" in run_stage(train.main, code=1)
    assert len(norms) == 21


def test_a_diverged_step_is_never_in_a_checkpoint(training_folder, monkeypatch):
    tiny.set_param(training_folder, "train.checkpoint_every", 3)
    norms = iter([1.0] * 5 + [math.inf] + [1.0] * 100)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(next(norms)))
    assert "the norm of the gradient is inf at step 6" in run_stage(train.main, code=1)
    assert {file.name[:8] for file in checkpoint_files()} == {"00000003"}
