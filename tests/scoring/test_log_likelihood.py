"""The likelihood and the rank of each token in windows, against brute force: one token at a time, in fp64."""

import functools
import subprocess
import sys

import brute_force
import numpy as np
import pytest
import torch
from head_models import HEADS, write_head_model
from tiny import ROOT
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2lora.dataset import blocks
from gpt2lora.scoring import log_likelihood, windows

CONTEXT, VOCABULARY = 12, 50
LENGTHS = (0, 1, 2, 3, 11, 12, 13, 14, 25, 37)
TEXTS = [np.random.default_rng(length).integers(VOCABULARY, size=length).astype(np.uint16) for length in LENGTHS]
WINDOWS = windows.sliding_windows(TEXTS, CONTEXT, stride=4)
FP32, FP64 = torch.float32, torch.float64


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    """A model in fp64, with attention and embeddings so large that every token of context matters."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).double().eval()


@pytest.fixture(scope="module")
def score_token(model):
    """`brute_force.score_token` with the model, which computes each score once in all tests."""

    @functools.cache
    def score(context: tuple[int, ...], target: int) -> tuple[float, int]:
        return brute_force.score_token(model, context, target)

    return lambda context, target: score(tuple(map(int, context)), int(target))


def copy_fp32(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    copy = GPT2LMHeadModel(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


# The scores


@pytest.mark.parametrize("stride", [*range(1, CONTEXT + 1), None])
def test_each_token_is_scored_as_it_is_by_itself(model, score_token, stride):
    if stride is None:
        all_windows = windows.rolling_windows(TEXTS, CONTEXT)
        contexts = [brute_force.rolling_contexts(length, CONTEXT) for length in LENGTHS]
    else:
        all_windows = windows.sliding_windows(TEXTS, CONTEXT, stride)
        contexts = [brute_force.sliding_contexts(length, CONTEXT, stride) for length in LENGTHS]
    expected = [
        score_token(text[index - context : index], text[index])
        for text, text_contexts in zip(TEXTS, contexts, strict=True)
        for index, context in enumerate(text_contexts, start=1)
    ]
    exact = log_likelihood.score_windows(model, all_windows, 5, FP64, "")
    assert exact.nll == pytest.approx([nll for nll, _ in expected], rel=1e-9)
    assert exact.ranks.tolist() == [rank for _, rank in expected]
    single = log_likelihood.score_windows(copy_fp32(model), all_windows, 5, FP32, "")
    assert single.nll.dtype == np.float64
    assert single.nll == pytest.approx(exact.nll, rel=1e-5)
    assert single.nll.sum() == pytest.approx(exact.nll.sum(), rel=1e-6)


def test_padded_rows_are_scored_up_to_their_length(model):
    texts = [text for text in TEXTS if 2 <= len(text) <= CONTEXT]
    expected = log_likelihood.score_windows(model, windows.sliding_windows(texts, CONTEXT, CONTEXT), 8, FP64, "")
    for pad in (0, VOCABULARY - 1):
        padded = windows.block_windows(blocks.pad_texts(texts, CONTEXT, pad))
        scores = log_likelihood.score_windows(model, padded, 8, FP64, "")
        assert scores.nll == pytest.approx(expected.nll, rel=1e-12)


def test_equal_logits_give_every_token_the_last_rank(model):
    network = copy_fp32(model)
    torch.nn.init.zeros_(network.lm_head.weight)
    scores = log_likelihood.score_windows(network, WINDOWS, 8, FP64, "")
    assert set(scores.ranks) == {VOCABULARY - 1}
    assert scores.nll == pytest.approx(np.log(VOCABULARY))


def test_a_model_of_few_positions_is_scored(model):
    network = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=4, n_embd=32, n_layer=1, n_head=2))
    scores = log_likelihood.score_windows(network, windows.sliding_windows(TEXTS, 4, 4), 8, FP32, "")
    assert len(scores.nll) == sum(max(0, length - 1) for length in LENGTHS)


# Batches and chunks


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_neither_batch_size_nor_chunk_size_changes_a_score(model, monkeypatch, batch_size):
    expected = log_likelihood.score_windows(model, WINDOWS, 7, FP64, "")
    monkeypatch.setitem(log_likelihood.CHUNK_TOKENS, "cpu", 5)
    scores = log_likelihood.score_windows(model, WINDOWS, batch_size, FP64, "")
    assert scores.nll == pytest.approx(expected.nll, rel=1e-12)
    assert scores.ranks.tolist() == expected.ranks.tolist()


def test_logits_are_computed_for_scored_tokens_alone_in_chunks(model, monkeypatch):
    monkeypatch.setitem(log_likelihood.CHUNK_TOKENS, "cpu", 5)
    sizes, compute_logits = [], log_likelihood.compute_logits

    def recording(weight, head, states):
        sizes.append(len(states))
        return compute_logits(weight, head, states)

    monkeypatch.setattr(log_likelihood, "compute_logits", recording)
    log_likelihood.score_windows(model, WINDOWS, 8, FP64, "")
    assert max(sizes) == 5
    assert sum(sizes) == sum(max(0, length - 1) for length in LENGTHS)


@pytest.mark.parametrize(("tokens", "expected"), [(1, [1] * 9), (3 * CONTEXT, [3, 3, 3]), (1000, [9])])
def test_the_default_batch_size_follows_from_batch_tokens(model, monkeypatch, tokens, expected):
    monkeypatch.setitem(log_likelihood.BATCH_TOKENS, "cpu", tokens)
    monkeypatch.setattr(log_likelihood, "check_head", lambda *_: None)
    sizes = []
    handle = model.transformer.register_forward_pre_hook(
        lambda module, _, options: sizes.append(len(options["input_ids"])), with_kwargs=True
    )
    all_windows = windows.sliding_windows(TEXTS[5:8] * 2 + TEXTS[5:6], CONTEXT, 12)
    log_likelihood.score_windows(model, all_windows, None, FP64, "")
    handle.remove()
    assert sizes == expected


# Precision


def test_bf16_layers_keep_fp32_logits(model, monkeypatch):
    seen, compute_logits = set(), log_likelihood.compute_logits

    def recording(weight, head, states):
        logits, vocab_dim = compute_logits(weight, head, states)
        seen.add((weight.dtype, logits.dtype))
        return logits, vocab_dim

    monkeypatch.setattr(log_likelihood, "compute_logits", recording)
    scores = log_likelihood.score_windows(copy_fp32(model), WINDOWS, 8, torch.bfloat16, "")
    assert seen == {(FP32, FP32)}
    expected = log_likelihood.score_windows(model, WINDOWS, 8, FP64, "")
    assert scores.nll.sum() == pytest.approx(expected.nll.sum(), rel=1e-2)
    assert scores.nll.sum() != pytest.approx(expected.nll.sum(), rel=1e-9)


def test_the_likelihood_of_a_bf16_model_is_computed_in_fp32(model):
    nll = log_likelihood.score_windows(copy_fp32(model).bfloat16(), WINDOWS, 8, torch.bfloat16, "").nll
    rounded = torch.from_numpy(nll).bfloat16().double().numpy()
    assert (rounded != nll).mean() > 0.9


def test_the_precision_of_torch_is_restored():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ValueError, match=r"^$"), log_likelihood._allow_tf32(True):
        assert torch.get_float32_matmul_precision() == "high" != before
        raise ValueError
    assert torch.get_float32_matmul_precision() == before


def test_the_mode_of_the_model_is_restored(model):
    network = copy_fp32(model).train()
    network.transformer.drop.p = 0.5
    first, second = (log_likelihood.score_windows(network.float(), WINDOWS, 8, FP32, "").nll for _ in range(2))
    assert network.training
    assert (first == second).all()


# Heads that do more than a product


def test_a_bias_on_the_logits_is_scored(model):
    network = copy_fp32(model).double()
    network.lm_head.bias = torch.nn.Parameter(torch.arange(VOCABULARY).double() / 10)
    assert_scores_are_the_models(network)


@pytest.mark.parametrize(("kind", "changes"), HEADS)
def test_scaled_and_capped_logits_are_scored(kind, changes):
    network = write_head_model(kind, changes)
    assert_scores_are_the_models(network.double())


def assert_scores_are_the_models(network):
    """Compare scores with the model's own logits, one token at a time."""
    texts = TEXTS[2:8]
    contexts = [brute_force.sliding_contexts(len(text), CONTEXT, CONTEXT) for text in texts]
    nll, ranks = brute_force.score_tokens(network, [text.tolist() for text in texts], contexts)
    scores = log_likelihood.score_windows(network, windows.sliding_windows(texts, CONTEXT, CONTEXT), 8, FP64, "")
    assert scores.nll.sum() == pytest.approx(nll, rel=1e-9)
    assert scores.ranks.tolist() == ranks.tolist()


# Exactness and memory with many tokens in the vocabulary


@pytest.mark.parametrize("vocabulary", [50_257, 262_144])
@pytest.mark.parametrize("vocab_dim", [0, -1])
def test_nll_is_that_of_fp64_for_large_vocabularies(vocabulary, vocab_dim):
    logits = 3 * torch.randn(8, vocabulary, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(8)[:, None] * 5
    exact = torch.nn.functional.cross_entropy(logits.double(), targets[:, 0], reduction="none")
    if vocab_dim == 0:
        logits, targets = logits.T.contiguous(), targets.T
    nll = log_likelihood.token_nll(logits, targets, vocab_dim)
    assert (nll.double() - exact).abs().max() < 2e-6  # fp32 resolves 1e-6 at 17 nats
    assert abs(nll.double().mean() - exact.mean()) < 1e-6


MEASURE_MEMORY = """
import numpy as np, torch
from transformers import GPT2Config, GPT2LMHeadModel
from gpt2lora.model.device import peak_memory
from gpt2lora.scoring import log_likelihood, windows

model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=1, n_positions=64)).eval()
ids = np.arange(24_577, dtype=np.uint16)

def peak(tokens):
    text = windows.sliding_windows([ids[: tokens + 1]], 64, 64)
    log_likelihood.score_windows(model, text, 32, torch.float32, "")
    return peak_memory(torch.device("cpu"))

first = peak(8192)  # malloc takes up to 100 MB more during the first batches
print((peak(24_576) - first) / 16_384)
"""


@pytest.mark.slow
def test_memory_hardly_grows_with_the_scored_tokens():
    """The measured growth was 167 kB a token where each chunk's small results lay between large logits."""
    done = subprocess.run([sys.executable, "-c", MEASURE_MEMORY], capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) < 10_000, "bytes a token"
