"""The training loop: the gradient of a step, the order of the rows, the history, and what training changes."""

import numpy as np
import pytest
import torch
from small_models import NF4, load, new_adapter
from tiny import train_params
from training_steps import (
    LENGTHS,
    all_equal,
    frozen_values,
    make_rows,
    on_gpu,
    step_gradients,
    trained_values,
)

from gpt2lora.model.device import pick_device
from gpt2lora.scoring import log_likelihood
from gpt2lora.training import loop, optimizer
from gpt2lora.training.loss import make_batch
from gpt2lora.training.state import History, TrainState

ROWS = np.array([0, 3, 1, 9, 4, 7, 5, 2])  # of one step


# Steps


def test_accumulated_batches_give_the_gradient_of_a_large_batch(tuned_model):
    split = make_rows(LENGTHS)
    nll, gradients = step_gradients(tuned_model, split, ROWS, 8)
    small_nll, small_gradients = step_gradients(tuned_model, split, ROWS, 2)
    assert small_nll == pytest.approx(nll, rel=1e-6)
    assert all(value.abs().max() > 0 for value in gradients.values())
    torch.testing.assert_close(small_gradients, gradients, rtol=1e-4, atol=1e-7)


def test_the_gradient_is_that_of_the_mean_over_a_step_s_tokens(tuned_model):
    split = make_rows(LENGTHS)
    nll, gradients = step_gradients(tuned_model, split, ROWS, 3)
    tuned_model.zero_grad()
    inputs, targets = make_batch(split, ROWS, tuned_model.device)
    loss = torch.nn.functional.cross_entropy(
        tuned_model(input_ids=inputs).logits.transpose(1, 2), targets, ignore_index=-100
    )
    loss.backward()
    assert nll / split.count_targets(ROWS) == pytest.approx(loss.item(), rel=1e-6)
    expected = {name: value.grad for name, value in tuned_model.named_parameters() if value.requires_grad}
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-7)


def test_accumulation_gives_the_same_steps_and_losses(tiny_model):
    train, validation = make_rows(LENGTHS), make_rows(LENGTHS[:4], seed=1)
    histories = [
        loop.fit(new_adapter(tiny_model), train, validation, train_params(epochs=2, validations=4, **size), seed=0)
        for size in ({"batch_size": 4}, {"batch_size": 2, "accumulation_steps": 2})
    ]
    for one, other in zip(*(history.rows for history in histories), strict=True):
        assert one == {key: pytest.approx(value, rel=1e-3) for key, value in other.items()}
    assert histories[0].rows[-1]["step"] == 6, "two epochs of 11 rows, four a step"
    assert histories[0].tokens == histories[1].tokens == 2 * train.targets


def test_each_epoch_trains_on_every_row_once_in_a_new_order():
    steps = list(loop.shuffled_batches(11, 4, 3, seed=0))
    assert [len(rows) for rows in steps] == [4, 4, 3] * 3
    epochs = [np.concatenate(steps[first : first + 3]).tolist() for first in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert [rows.tolist() for rows in loop.shuffled_batches(11, 4, 3, seed=0)] == [rows.tolist() for rows in steps]
    assert [rows.tolist() for rows in loop.shuffled_batches(11, 4, 3, seed=1)] != [rows.tolist() for rows in steps]


def test_a_step_uses_the_learning_rate_of_the_schedule(tiny_model, monkeypatch):
    network, train = new_adapter(tiny_model), make_rows(LENGTHS)
    before = trained_values(network)
    monkeypatch.setattr(loop, "lr_at_step", lambda *_: 0.0)
    loop.fit(network, train, train, train_params(), seed=0)
    assert all_equal(trained_values(network), before)


def test_a_step_starts_without_gradients(tiny_model, monkeypatch):
    network, train = new_adapter(tiny_model), make_rows(LENGTHS)
    monkeypatch.setattr(loop, "lr_at_step", lambda *_: 0.0)
    history = loop.fit(
        network, train, train, train_params(epochs=3, batch_size=100, clip_norm=1e6, validations=3), seed=0
    )
    first, *others = [row["gradient_norm"] for row in history.rows]
    assert others == pytest.approx([first] * 2, rel=1e-3)


# The history


def test_the_history_has_learning_rates_and_gradient_norms(tiny_model):
    train = make_rows(LENGTHS)
    options = train_params(validations=3, clip_norm=1e-6)
    history = loop.fit(new_adapter(tiny_model), train, train, options, seed=0)
    assert [row["step"] for row in history.rows] == [1, 2, 3]
    assert [row["learning_rate"] for row in history.rows] == [
        optimizer.lr_at_step(step, 3, options) for step in (1, 2, 3)
    ]
    assert all(row["gradient_norm"] > options.clip_norm for row in history.rows), "before clipping"


def test_a_row_has_the_mean_gradient_norm_of_its_steps(tiny_model, monkeypatch):
    norms = iter([1.0, 2.0, 6.0, 5.0, 1.0, 3.0, 4.0, 4.0])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(next(norms), device=pick_device()))
    train = make_rows([17] * 8)
    history = loop.fit(new_adapter(tiny_model), train, train, train_params(batch_size=1, validations=2), seed=0)
    assert [row["gradient_norm"] for row in history.rows] == [3.5, 3.0]
    assert history.rows[-1]["tokens"] == history.tokens == train.targets


def test_the_train_loss_is_that_of_the_steps_since_the_last_row(tiny_model, monkeypatch):
    network, train = new_adapter(tiny_model), make_rows(LENGTHS)
    monkeypatch.setattr(loop, "lr_at_step", lambda *_: 0.0)
    history = loop.fit(network, train, train, train_params(validations=3), seed=0)
    for row, rows in zip(history.rows, loop.shuffled_batches(len(train), 4, 1, seed=0), strict=True):
        expected = step_gradients(network, train, rows, 4)[0] / train.count_targets(rows)
        assert row["train_loss"] == pytest.approx(expected, rel=1e-5)


@on_gpu
def test_losses_are_read_without_waiting_for_later_work():
    large = torch.randn(8192, 8192, device="cuda")
    state = TrainState(0, History([], 0.0, {}, 0, 0.0), [], [], [])
    for step in (1, 2):
        state.add_step(torch.full((), float(step), device="cuda"), (large @ large)[0, 0], 1)
    fetched = loop.fetch_losses_async(state)
    for _ in range(100):
        large = large @ large
    losses, norms, _ = fetched()
    assert not torch.cuda.current_stream().query()  # the later work has not ended
    assert (losses, norms) == ([1.0, 2.0], [float(norm) for norm in state.norms])


# Runs


def test_the_model_ends_with_its_lowest_validation_loss(tiny_model):
    network = load(tiny_model)
    train, validation = make_rows([17] * 8, high=20), make_rows([17] * 8, seed=1, low=10, high=40)
    history = loop.fit(network, train, validation, train_params(epochs=15, validations=15), seed=0)
    losses = [row["validation_loss"] for row in history.rows]
    assert history.best == min(history.rows, key=lambda row: row["validation_loss"])
    assert losses[-1] > 1.05 * min(losses), "training went on past the best"
    assert log_likelihood.validation_loss(network, validation, 4, torch.float32, "") == pytest.approx(
        min(losses), rel=1e-6
    )


def test_patience_ends_a_run_and_changes_no_step_before(tiny_model):
    train, validation = make_rows([17] * 8, high=20), make_rows([17] * 8, seed=1, low=10, high=40)
    histories = [
        loop.fit(load(tiny_model), train, validation, train_params(epochs=8, validations=8, patience=patience), seed=0)
        for patience in (None, 100, 2)
    ]
    losses = [row["validation_loss"] for row in histories[0].rows]
    best = losses.index(min(losses))
    assert best < 5, "the loss rises for longer than two validations"
    assert len(histories[1].rows) == 8
    assert len(histories[2].rows) == best + 3
    tolerance = {"cpu": 0, "cuda": 1e-5}[pick_device().type]  # on a GPU, gradients are summed in any order
    for history in histories[1:]:
        for row, expected in zip(history.rows, histories[0].rows, strict=False):
            assert row == pytest.approx(expected, rel=tolerance, abs=0)


@pytest.mark.parametrize("quantization", [None, NF4], ids=["float", "nf4"])
def test_training_changes_the_adapter_and_no_other_bit(tiny_model, quantization):
    network, train = new_adapter(tiny_model, quantization), make_rows(LENGTHS)
    adapter, base = trained_values(network), frozen_values(network)
    history = loop.fit(network, train, train, train_params(weight_decay=0.1), seed=0)
    assert history.best["validation_loss"] < history.start_loss
    assert all_equal(frozen_values(network), base)
    after = trained_values(network)
    assert all(not torch.equal(after[name], adapter[name]) for name in adapter)


@pytest.mark.parametrize("quantization", [None, NF4], ids=["float", "nf4"])
def test_the_same_seed_gives_the_same_adapter_bit_for_bit(tiny_model, quantization):
    train, validation = make_rows(LENGTHS), make_rows(LENGTHS[:4], seed=1)
    runs = []
    for seed in (1, 1, 2):
        network = new_adapter(tiny_model, quantization, seed, dropout=0.1)
        history = loop.fit(network, train, validation, train_params(epochs=2, base_dropout=0.1), seed)
        runs.append((trained_values(network), history.rows))
    assert all_equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert not all_equal(runs[0][0], runs[2][0])


def test_all_weights_are_trained_without_an_adapter(tiny_model):
    network, train = load(tiny_model), make_rows(LENGTHS)
    before = trained_values(network)
    history = loop.fit(network, train, train, train_params(epochs=3), seed=0)
    assert history.best["validation_loss"] < history.start_loss
    after = trained_values(network)
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_bf16_trains_an_fp32_adapter(tiny_model):
    network, train = new_adapter(tiny_model), make_rows(LENGTHS)
    history = loop.fit(network, train, train, train_params(epochs=4, precision="bf16"), seed=0)
    assert history.best["validation_loss"] < history.start_loss
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    exact = loop.fit(new_adapter(tiny_model), train, train, train_params(epochs=4), seed=0)
    assert history.best["validation_loss"] == pytest.approx(exact.best["validation_loss"], rel=0.02)
    assert history.best["validation_loss"] != exact.best["validation_loss"]
