"""Batches and the fused head and loss, against the unfused loss: value, gradients and memory."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import load
from training_steps import END, LENGTHS, make_rows

from gpt2lora.training import loss
from gpt2lora.training.loss import IGNORE_INDEX, LinearCrossEntropy, make_batch, nll_sum

TOKENS, WIDTH, VOCABULARY = 43, 16, 131


def make_inputs(dtype=torch.float64):
    torch.manual_seed(0)
    states = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH).to(dtype).requires_grad_()
    bias = torch.randn(VOCABULARY).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,))
    targets[[0, 5, -1]] = IGNORE_INDEX
    return states, weight, bias, targets


def unfused_loss(states, weight, bias, targets, softcap=None):
    logits = states @ weight.T + bias
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


# The fused loss


@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("chunk", [1, 7, 43, 100])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_loss_and_gradients_equal_those_of_the_unfused_loss(monkeypatch, softcap, chunk, multiple):
    monkeypatch.setitem(loss.CHUNK_TOKENS, "cpu", chunk)
    monkeypatch.setitem(loss.VOCABULARY_MULTIPLE, "cpu", multiple)
    fused, unfused = make_inputs(), make_inputs()
    ours = LinearCrossEntropy.apply(*fused, torch.float64, loss.softmax_nll, softcap)
    theirs = unfused_loss(*unfused, softcap)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    (3 * ours).backward()
    (3 * theirs).backward()
    for one, other in zip(fused[:3], unfused[:3], strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_lower_precisions_give_nearly_the_same(dtype, tolerance):
    unfused, fused = make_inputs(), make_inputs(torch.float32)
    exact, ours = unfused_loss(*unfused), LinearCrossEntropy.apply(*fused, dtype)
    assert ours.dtype == torch.float32
    assert abs(float(ours) / float(exact) - 1) < tolerance
    exact.backward()
    ours.backward()
    for one, other in zip(fused[:3], unfused[:3], strict=True):
        assert one.grad.dtype == torch.float32
        assert (one.grad - other.grad).norm() < tolerance * other.grad.norm()


@pytest.mark.parametrize("trained", ["states", "weight", "bias", "neither"])
def test_only_what_is_trained_gets_a_gradient(trained):
    *parts, targets = make_inputs()
    names = ("states", "weight", "bias")
    for name, part in zip(names, parts, strict=True):
        part.requires_grad_(trained == name)
    nll = LinearCrossEntropy.apply(*parts, targets, torch.float64)
    assert nll.requires_grad == (trained != "neither")
    if nll.requires_grad:
        nll.backward()
    assert [name for name, part in zip(names, parts, strict=True) if part.grad is not None] == [
        name for name in names if name == trained
    ]


def test_ignored_targets_have_no_loss_and_no_gradient():
    states, weight, bias, _ = make_inputs()
    nll = LinearCrossEntropy.apply(states, weight, bias, torch.full((TOKENS,), IGNORE_INDEX), torch.float64)
    nll.backward()
    assert float(nll) == 0
    assert not any(part.grad.any() for part in (states, weight, bias))


@pytest.mark.parametrize("multiple", [1, 64])
def test_no_more_than_a_chunk_of_logits_is_held_at_once(monkeypatch, multiple):
    monkeypatch.setitem(loss.CHUNK_TOKENS, "cpu", 4)
    monkeypatch.setitem(loss.VOCABULARY_MULTIPLE, "cpu", multiple)
    sizes = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    states, weight, _, targets = make_inputs()
    weight.requires_grad_(False)
    with Recorder():
        LinearCrossEntropy.apply(states, weight, None, targets, torch.float64).backward()
    padded = VOCABULARY + -VOCABULARY % multiple
    assert max(sizes) == max(padded * WIDTH, 4 * padded) < TOKENS * VOCABULARY


def test_all_weights_get_the_gradients_of_the_unfused_loss(tiny_model):
    """Head and embedding are one tensor, whose gradient is the sum of both uses."""
    split = make_rows(LENGTHS)
    inputs, targets = make_batch(split, np.arange(4), torch.device("cpu"))
    results = []
    for fused in (True, False):
        network = load(tiny_model).double().eval()
        if fused:
            nll = nll_sum(network, inputs, targets, torch.float64)
        else:
            logits = network(input_ids=inputs).logits.flatten(0, 1)
            nll = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        nll.backward()
        results.append([nll.detach(), *(parameter.grad for parameter in network.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


# Batches


def test_an_end_of_text_is_a_target_and_padding_is_none():
    split = make_rows([5, 8])
    inputs, targets = make_batch(split, np.array([0, 1]), torch.device("cpu"))
    assert inputs.shape == targets.shape == (2, 7)
    assert targets[0].tolist() == [*split.ids[0, 1:5].tolist(), *[IGNORE_INDEX] * 3]
    assert targets[0, 3] == END
    assert targets[1].tolist() == split.ids[1, 1:8].tolist()
    assert targets[1, 6] == END
    assert inputs[1].tolist() == split.ids[1, :7].tolist()
