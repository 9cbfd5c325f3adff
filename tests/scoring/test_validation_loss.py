"""The scores of tuned models, and the validation loss: against one token at a time, and with padding."""

import copy

import brute_force
import numpy as np
import pytest
import torch
from small_models import load, new_adapter, write_llama
from tiny import train_params
from training_steps import END, LENGTHS, make_rows, step_gradients

from gpt2lora.dataset import blocks
from gpt2lora.scoring import log_likelihood, windows
from gpt2lora.training import dropout, loop

FP32 = torch.float32


def score_by_token(network, split: blocks.Blocks) -> tuple[float, int, int]:
    """Score each target from the tokens of its row before it, with one call of the model for each.

    Returns:
        The summed negative log-likelihood in nats, how many targets are the model's first choice, and how many there
        are.
    """
    texts = [ids[:length].tolist() for ids, length in zip(split.ids, split.lengths, strict=True)]
    nll, ranks = brute_force.score_tokens(network, texts, [range(1, len(text)) for text in texts])
    return nll, int((ranks == 0).sum()), len(ranks)


def score_rows(network, split: blocks.Blocks, batch_size: int = 4) -> tuple[float, int, int]:
    """Return the same from `score_windows`, whose mean loss must be the validation loss."""
    scores = log_likelihood.score_windows(network, windows.block_windows(split), batch_size, FP32, "")
    assert log_likelihood.validation_loss(network, split, batch_size, FP32, "") == pytest.approx(
        scores.nll.mean(), rel=1e-6
    )
    return float(scores.nll.sum()), int((scores.ranks == 0).sum()), len(scores.nll)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_rows_are_scored_as_one_token_at_a_time(tuned_model, batch_size):
    split = make_rows(LENGTHS)
    exact = copy.deepcopy(tuned_model).double().eval()
    nll, correct, count = score_by_token(exact, split)
    assert count == sum(LENGTHS) - len(LENGTHS)
    for network in (tuned_model, exact):
        assert score_rows(network, split, batch_size) == (pytest.approx(nll, rel=1e-5), correct, count)


def test_a_target_that_is_the_first_choice_has_rank_0(tiny_model):
    network = load(tiny_model)
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        choices = network(input_ids=ids).logits.argmax(-1)
    stream = ids.numpy().astype(np.uint16)
    stream[0, 10] = choices[0, 9]  # the tokens before it are unchanged; the choices after it may not be
    _, correct, count = score_rows(network, blocks.Blocks(stream[:, :11], np.array([11], np.int32)))
    assert correct == 1 + int((choices[0, :9] == ids[0, 1:10]).sum())
    assert count == 10


def test_the_chunk_size_changes_no_score_of_rows(tuned_model, monkeypatch):
    split = make_rows(LENGTHS)
    nll, correct, count = score_rows(tuned_model, split)
    monkeypatch.setitem(log_likelihood.CHUNK_TOKENS, "cpu", 7)
    assert score_rows(tuned_model, split) == (pytest.approx(nll, rel=1e-6), correct, count)


def test_the_validation_loss_is_the_loss_of_training(tuned_model):
    split = make_rows(LENGTHS)
    trained_nll, _ = step_gradients(tuned_model, split, np.arange(len(split)), 4)
    validation_nll = log_likelihood.validation_loss(tuned_model, split, 4, FP32, "") * split.targets
    assert trained_nll == pytest.approx(validation_nll, rel=1e-6)


@pytest.mark.parametrize(("batch_size", "multiple"), [(2, 1), (3, 1), (2, 2)])
def test_a_validation_batch_is_a_multiple_of_a_training_batch(tuned_model, monkeypatch, batch_size, multiple):
    monkeypatch.setitem(log_likelihood.VALIDATION_ROWS, "cpu", multiple)
    sizes = []
    tuned_model.get_base_model().transformer.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs.get("input_ids", *args))), with_kwargs=True
    )
    split = make_rows(LENGTHS)
    loop.fit(tuned_model, split, split, train_params(batch_size=batch_size), 0)
    assert max(sizes) == multiple * batch_size


def test_a_trained_llama_is_scored_as_one_token_at_a_time(tmp_path):
    write_llama(tmp_path, hidden_size=32, intermediate_size=64, initializer_range=0.02)
    network, split = new_adapter(tmp_path), make_rows(LENGTHS)
    start = log_likelihood.validation_loss(network, split, 4, FP32, "")
    history = loop.fit(network, split, split, train_params(epochs=5), seed=0)
    assert history.best["validation_loss"] < start
    nll, correct, count = score_by_token(network.double().eval(), split)
    assert score_rows(network, split) == (pytest.approx(nll, rel=1e-5), correct, count)


# The state of the model


def test_scoring_leaves_no_gradient_and_restores_the_mode(tuned_model):
    for training in (True, False):
        tuned_model.train(training)
        score_rows(tuned_model, make_rows(LENGTHS))
        assert tuned_model.training is training
        assert all(value.grad is None for value in tuned_model.parameters())


def test_scoring_computes_without_autograd(tuned_model):
    seen = []
    tuned_model.get_base_model().transformer.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    score_rows(tuned_model, make_rows(LENGTHS))
    assert seen
    assert not any(seen)


def test_scoring_uses_no_dropout(tiny_model):
    network = new_adapter(tiny_model, dropout=0.5)
    dropout.set_base_dropout(network, 0.5)
    network.train()
    scores = [score_rows(network, make_rows(LENGTHS)) for _ in range(2)]
    assert scores[0] == scores[1]


# Padding


def test_padding_is_never_scored_or_trained_on(tuned_model):
    split = make_rows(LENGTHS)
    padding = np.arange(split.ids.shape[1]) >= split.lengths[:, None]
    assert padding.any()
    nll, gradients = step_gradients(tuned_model, split, np.arange(len(split)), 4)
    scored_nll, correct, count = score_rows(tuned_model, split)
    for seed in range(3):
        noise = np.random.default_rng(seed).integers(0, 300, split.ids.shape).astype(np.uint16)
        other = blocks.Blocks(np.where(padding, noise, split.ids), split.lengths)
        other_nll, other_gradients = step_gradients(tuned_model, other, np.arange(len(split)), 4)
        assert other_nll == pytest.approx(nll, rel=1e-6)
        torch.testing.assert_close(other_gradients, gradients, rtol=1e-5, atol=1e-7)
        assert score_rows(tuned_model, other) == (pytest.approx(scored_nll, rel=1e-6), correct, count)


def test_the_last_packed_block_is_scored_up_to_its_end(tuned_model):
    stream = np.random.default_rng(0).integers(1, 300, 40).astype(np.uint16)
    packed = blocks.pack_blocks(stream, 16, END)
    assert packed.lengths.tolist() == [17, 17, 8]
    nll, correct, count = score_by_token(tuned_model.eval(), packed)
    assert count == 39
    assert score_rows(tuned_model, packed) == (pytest.approx(nll, rel=1e-5), correct, count)
