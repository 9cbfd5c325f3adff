"""The fused head and cross entropy against the plain ones: value, both gradients, memory."""

import pytest
import torch
import torch.nn.functional as F

from gpt2lora.training import loss
from gpt2lora.training.loss import IGNORE_INDEX, LinearCrossEntropy

TOKENS, WIDTH, VOCABULARY = 43, 16, 131


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    states = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,))
    targets[[0, 5, -1]] = IGNORE_INDEX
    return states, weight, targets


def plain(states, weight, targets):
    return F.cross_entropy(states @ weight.T, targets, ignore_index=IGNORE_INDEX, reduction="sum")


@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("chunk", [1, 7, 43, 100])
def test_value_and_gradients_are_those_of_the_plain_form(monkeypatch, chunk, multiple):
    monkeypatch.setitem(loss.CHUNK_TOKENS, "cpu", chunk)
    monkeypatch.setitem(loss.VOCABULARY_MULTIPLE, "cpu", multiple)
    found, expected = inputs(), inputs()
    ours, theirs = LinearCrossEntropy.apply(*found, torch.float64), plain(*expected)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    (3 * ours).backward()
    (3 * theirs).backward()
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_lower_precisions_are_near(dtype, tolerance):
    expected, found = inputs(), inputs(torch.float32)
    exact, ours = plain(*expected), LinearCrossEntropy.apply(*found, dtype)
    assert ours.dtype == torch.float32
    assert abs(float(ours) / float(exact) - 1) < tolerance
    exact.backward()
    ours.backward()
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert one.grad.dtype == torch.float32
        assert (one.grad - other.grad).norm() < tolerance * other.grad.norm()


@pytest.mark.parametrize("trained", ["states", "weight", "neither"])
def test_only_what_is_trained_has_a_gradient(trained):
    states, weight, targets = inputs()
    states.requires_grad_(trained == "states")
    weight.requires_grad_(trained == "weight")
    nll = LinearCrossEntropy.apply(states, weight, targets, torch.float64)
    assert nll.requires_grad == (trained != "neither")
    if nll.requires_grad:
        nll.backward()
    assert (states.grad is None, weight.grad is None) == (trained != "states", trained != "weight")


def test_all_ignored_is_nothing():
    states, weight, _ = inputs()
    nll = LinearCrossEntropy.apply(states, weight, torch.full((TOKENS,), IGNORE_INDEX), torch.float64)
    nll.backward()
    assert float(nll) == 0
    assert not states.grad.any()


@pytest.mark.parametrize("multiple", [1, 64])
def test_no_more_than_a_chunk_of_logits_is_ever_held(monkeypatch, multiple):
    monkeypatch.setitem(loss.CHUNK_TOKENS, "cpu", 4)
    monkeypatch.setitem(loss.VOCABULARY_MULTIPLE, "cpu", multiple)
    sizes = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    states, weight, targets = inputs()
    weight.requires_grad_(False)
    with Recorder():
        LinearCrossEntropy.apply(states, weight, targets, torch.float64).backward()
    padded = VOCABULARY + -VOCABULARY % multiple
    assert max(sizes) == max(padded * WIDTH, 4 * padded) < TOKENS * VOCABULARY
