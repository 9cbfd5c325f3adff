"""Windows and what is scored in them, against brute force: one token at a time, by itself, in fp64."""

import functools

import brute_force
import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from gpt2lora.dataset import blocks
from gpt2lora.pipeline.cli import StageError
from gpt2lora.scoring import log_likelihood, windows

CONTEXT, VOCABULARY = 12, 50
LENGTHS = (0, 1, 2, 3, 11, 12, 13, 14, 25, 37)
STRIDES = range(1, CONTEXT + 1)
TEXTS = [np.random.default_rng(length).integers(VOCABULARY, size=length).astype(np.uint16) for length in LENGTHS]


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    """In fp64, with attention and embeddings large enough that every token of context matters."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).double().eval()


@pytest.fixture(scope="module")
def one_token(model):
    """The negative log-likelihood and the rank of one token after those before it, computed by itself."""

    @functools.cache
    def one(context: tuple[int, ...], target: int) -> tuple[float, int]:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([context])).logits[0, -1].log_softmax(-1)
        return -float(scores[target]), int((scores > scores[target]).sum())

    return lambda context, target: one(tuple(map(int, context)), int(target))


@pytest.mark.parametrize("stride", STRIDES)
def test_every_token_but_a_text_s_first_is_scored_once_from_the_context_there_is(stride):
    laid = windows.sliding_windows(TEXTS, CONTEXT, stride)
    assert laid.contexts.tolist() == [
        context for length in LENGTHS for context in brute_force.slid(length, CONTEXT, stride)
    ]
    assert laid.targets.tolist() == [id for text in TEXTS for id in text[1:]]
    assert laid.lengths.max() <= CONTEXT + 1
    assert laid.counts.min() >= 1


def test_rolling_windows_score_every_token_once_and_fill_the_last():
    laid = windows.rolling_windows(TEXTS, CONTEXT)
    assert laid.contexts.tolist() == [context for length in LENGTHS for context in brute_force.rolled(length, CONTEXT)]
    assert laid.targets.tolist() == [id for text in TEXTS for id in text[1:]]
    assert brute_force.rolled(2 * CONTEXT + 4, CONTEXT)[-4:] == [12, 10, 11, 12]


@pytest.mark.parametrize("texts", [[], [TEXTS[0]], [TEXTS[1]], TEXTS[:2]], ids=["none", "empty", "one token", "both"])
def test_texts_with_nothing_to_predict_have_no_window(texts):
    for laid in (windows.sliding_windows(texts, CONTEXT, 3), windows.rolling_windows(texts, CONTEXT)):
        assert (len(laid), laid.counts.sum(), len(laid.targets), len(laid.contexts)) == (0, 0, 0, 0)


@pytest.mark.parametrize("length", LENGTHS[2:])
def test_a_stride_of_the_context_gives_the_rows_that_are_trained(length):
    stream = TEXTS[LENGTHS.index(length)]
    packed = blocks.pack_blocks(stream, CONTEXT, pad=0)
    assert windows.unpack_stream(packed).tolist() == stream.tolist()
    slid, trained = windows.sliding_windows([stream], CONTEXT, CONTEXT), windows.block_windows(packed)
    assert slid.lengths.tolist() == trained.lengths.tolist()
    assert slid.targets.tolist() == trained.targets.tolist()
    assert not slid.skips.any()


def laid_by(stride: int | None) -> windows.Windows:
    return (
        windows.rolling_windows(TEXTS, CONTEXT) if stride is None else windows.sliding_windows(TEXTS, CONTEXT, stride)
    )


@pytest.mark.parametrize("stride", [*STRIDES, None])
def test_the_likelihood_of_every_token_is_that_of_the_token_by_itself(model, one_token, stride):
    laid = laid_by(stride)
    lengths = [
        brute_force.rolled(n, CONTEXT) if stride is None else brute_force.slid(n, CONTEXT, stride) for n in LENGTHS
    ]
    expected = [
        one_token(text[place - context : place], text[place])
        for text, contexts in zip(TEXTS, lengths, strict=True)
        for place, context in enumerate(contexts, start=1)
    ]
    exact = log_likelihood.score_windows(model, laid, 5, torch.float64, "")
    assert exact.nll == pytest.approx([nll for nll, _ in expected], rel=1e-9)
    assert exact.ranks.tolist() == [rank for _, rank in expected]
    single = log_likelihood.score_windows(copy(model).float(), laid, 5, torch.float32, "")
    assert single.nll.dtype == np.float64
    assert single.nll == pytest.approx(exact.nll, rel=1e-5)
    assert single.nll.sum() == pytest.approx(exact.nll.sum(), rel=1e-6)


def copy(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    other = GPT2LMHeadModel(model.config)
    other.load_state_dict(model.state_dict())
    return other.eval()


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_neither_the_batch_nor_the_chunk_changes_a_figure(model, monkeypatch, batch_size):
    laid = windows.sliding_windows(TEXTS, CONTEXT, 4)
    expected = log_likelihood.score_windows(model, laid, 7, torch.float64, "")
    monkeypatch.setitem(log_likelihood.CHUNK_TOKENS, "cpu", 5)
    found = log_likelihood.score_windows(model, laid, batch_size, torch.float64, "")
    assert found.nll == pytest.approx(expected.nll, rel=1e-12)
    assert found.ranks.tolist() == expected.ranks.tolist()


def test_padded_rows_are_scored_up_to_their_length_whatever_the_padding(model):
    texts = [text for text in TEXTS if 2 <= len(text) <= CONTEXT]
    expected = log_likelihood.score_windows(
        model, windows.sliding_windows(texts, CONTEXT, CONTEXT), 8, torch.float64, ""
    )
    for pad in (0, VOCABULARY - 1):
        laid = windows.block_windows(blocks.pad_texts(texts, CONTEXT, pad))
        found = log_likelihood.score_windows(model, laid, 8, torch.float64, "")
        assert found.nll == pytest.approx(expected.nll, rel=1e-12)


def test_logits_are_computed_where_they_are_scored_and_a_chunk_at_a_time(model, monkeypatch):
    monkeypatch.setitem(log_likelihood.CHUNK_TOKENS, "cpu", 5)
    sizes, logits_of = [], log_likelihood.compute_logits

    def counting(weight, vocabulary, states):
        sizes.append(len(states))
        return logits_of(weight, vocabulary, states)

    monkeypatch.setattr(log_likelihood, "compute_logits", counting)
    log_likelihood.score_windows(model, windows.sliding_windows(TEXTS, CONTEXT, 4), 8, torch.float64, "")
    assert max(sizes) == 5
    assert sum(sizes) == sum(max(0, length - 1) for length in LENGTHS)


@pytest.mark.parametrize(("tokens", "batches"), [(1, [1] * 9), (3 * CONTEXT, [3, 3, 3]), (1000, [9])])
def test_without_a_batch_size_as_many_windows_are_read_as_hold_the_device_s_tokens(model, monkeypatch, tokens, batches):
    monkeypatch.setitem(log_likelihood.BATCH_TOKENS, "cpu", tokens)
    monkeypatch.setattr(log_likelihood, "check_head", lambda *_: None)
    laid, found = windows.sliding_windows(TEXTS[5:8] * 2 + TEXTS[5:6], CONTEXT, 12), []
    handle = model.transformer.register_forward_pre_hook(
        lambda module, _, options: found.append(len(options["input_ids"])), with_kwargs=True
    )
    log_likelihood.score_windows(model, laid, None, torch.float64, "")
    handle.remove()
    assert found == batches


def test_bf16_layers_keep_fp32_logits(model, monkeypatch):
    other, seen, logits_of = copy(model).float(), set(), log_likelihood.compute_logits

    def recording(weight, vocabulary, states):
        logits, across = logits_of(weight, vocabulary, states)
        seen.add((weight.dtype, logits.dtype))
        return logits, across

    monkeypatch.setattr(log_likelihood, "compute_logits", recording)
    laid = windows.sliding_windows(TEXTS, CONTEXT, 4)
    found = log_likelihood.score_windows(other, laid, 8, torch.bfloat16, "")
    assert seen == {(torch.float32, torch.float32)}
    expected = log_likelihood.score_windows(model, laid, 8, torch.float64, "")
    assert found.nll.sum() == pytest.approx(expected.nll.sum(), rel=1e-2)
    assert found.nll.sum() != pytest.approx(expected.nll.sum(), rel=1e-9)


def test_a_model_of_bf16_weights_has_its_likelihood_computed_in_fp32(model):
    found = log_likelihood.score_windows(
        copy(model).bfloat16(), windows.sliding_windows(TEXTS, CONTEXT, 4), 8, torch.bfloat16, ""
    ).nll
    rounded = torch.from_numpy(found).bfloat16().double().numpy()
    assert (rounded != found).mean() > 0.9


def test_torch_comes_back_in_its_precision():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ValueError, match=r"^$"), log_likelihood._allow_tf32(True):
        assert torch.get_float32_matmul_precision() == "high" != before
        raise ValueError
    assert torch.get_float32_matmul_precision() == before


def test_the_model_comes_back_in_its_mode(model):
    other = copy(model).train()
    other.transformer.drop.p = 0.5
    laid = windows.sliding_windows(TEXTS, CONTEXT, 4)
    found = [log_likelihood.score_windows(other.float(), laid, 8, torch.float32, "").nll for _ in range(2)]
    assert other.training
    assert (found[0] == found[1]).all()


def test_a_model_that_tells_tokens_not_apart_ranks_all_of_them_last(model):
    other = copy(model)
    torch.nn.init.zeros_(other.lm_head.weight)
    found = log_likelihood.score_windows(other, windows.sliding_windows(TEXTS, CONTEXT, 4), 8, torch.float64, "")
    assert set(found.ranks) == {VOCABULARY - 1}
    assert found.nll == pytest.approx(np.log(VOCABULARY))


def test_a_model_with_a_bias_on_its_logits_is_refused(model):
    other = copy(model)
    other.lm_head.bias = torch.nn.Parameter(torch.arange(VOCABULARY).float())
    with pytest.raises(StageError, match="does more to its logits"):
        log_likelihood.score_windows(other, windows.sliding_windows(TEXTS, CONTEXT, 4), 8, torch.float32, "")


def test_a_model_of_few_positions_is_scored(model):
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=4, n_embd=32, n_layer=1, n_head=2)
    found = log_likelihood.score_windows(
        GPT2LMHeadModel(config), windows.sliding_windows(TEXTS, 4, 4), 8, torch.float32, ""
    )
    assert len(found.nll) == sum(max(0, length - 1) for length in LENGTHS)


@pytest.mark.parametrize(("cap", "refused"), [(None, False), (1e-3, True)])
def test_a_model_that_caps_its_logits_is_refused(cap, refused):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = Gemma2Config(vocab_size=VOCABULARY, num_hidden_layers=1, head_dim=16, final_logit_softcapping=cap, **sizes)
    network, laid = Gemma2ForCausalLM(config).eval(), windows.sliding_windows(TEXTS, CONTEXT, 4)
    if not refused:
        assert len(log_likelihood.score_windows(network, laid, 8, torch.float32, "").nll) == laid.counts.sum()
        return
    with pytest.raises(StageError, match="does more to its logits"):
        log_likelihood.score_windows(network, laid, 8, torch.float32, "")
