"""The training loop and the scores it goes by: what is summed, over which tokens, and what training may change."""

import copy
import itertools
import math

import numpy as np
import pytest
import tiny
import torch
from tiny import train_params
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from gpt2lora.dataset import blocks
from gpt2lora.model import attention, device, loading, lora
from gpt2lora.model.quantization import QuantizationParams
from gpt2lora.pipeline.cli import StageError
from gpt2lora.scoring import log_likelihood, windows
from gpt2lora.training import divergence, execution, loop, optimizer
from gpt2lora.training.loss import IGNORE_INDEX, make_batch, nll_sum

FP32 = torch.float32
END = 0  # of the tiny tokenizer, and the padding
LENGTHS = [17, 3, 9, 2, 12, 17, 5, 6, 8, 2, 11]
NF4 = QuantizationParams(bits=4, quant_type="nf4", double_quant=True)


def make_rows(lengths: list[int], seed: int = 0, block_size: int = 16, low: int = 1, high: int = 300) -> blocks.Blocks:
    """Rows of random ids, of any lengths, each ending in a real end-of-text, as the padded layout makes them."""
    random = np.random.default_rng(seed)
    texts = [np.append(random.integers(low, high, length - 1), END).astype(np.uint16) for length in lengths]
    return blocks.pad_texts(texts, block_size, END)


def adapted(folder, quantization=None, seed=0, dropout=0.0) -> torch.nn.Module:
    base = loading.load_base(folder, quantization, FP32)
    torch.manual_seed(seed)
    return lora.attach_lora(base, tiny.low_rank(dropout=dropout))


def trained(network) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters() if value.requires_grad}


def frozen(network) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters() if not value.requires_grad}


def gradients(network, split, places, batch_size) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the summed loss of one step, and the gradient it leaves."""
    network.eval()
    network.zero_grad()
    nll = loop.accumulate_gradients(execution.eager_backward(network, FP32), split, places, batch_size)
    return float(nll), {name: value.grad.clone() for name, value in network.named_parameters() if value.requires_grad}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def lively(tiny_model):
    """The tiny model with an adapter that already changes what it computes."""
    network = adapted(tiny_model)
    for name, value in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.5)
    return network


# Scores


def token_by_token(network, split: blocks.Blocks) -> tuple[float, int, int]:
    """Score each target from its own context alone, one call of the model a token."""
    nll, correct, count = 0.0, 0, 0
    for ids, length in zip(split.ids, split.lengths, strict=True):
        ids = torch.from_numpy(ids[:length].astype(np.int64))
        for place in range(1, length):
            with torch.no_grad():
                logits = network(input_ids=ids[None, :place], use_cache=False).logits[0, -1]
            nll -= float(torch.log_softmax(logits, -1)[ids[place]])
            correct += int(logits.argmax() == ids[place])
            count += 1
    return nll, correct, count


def score(network, split: blocks.Blocks, batch_size: int = 4) -> tuple[float, int, int]:
    """Return what `token_by_token` does, of many tokens at once, as `evaluate` scores; `train` has the same loss."""
    found = log_likelihood.score_windows(network, windows.block_windows(split), batch_size, FP32, "")
    assert log_likelihood.validation_loss(network, split, batch_size, FP32, "") == pytest.approx(
        found.nll.mean(), rel=1e-6
    )
    return float(found.nll.sum()), int((found.ranks == 0).sum()), len(found.nll)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_score_is_the_sum_over_every_target_of_its_own_loss(lively, batch_size):
    split = make_rows(LENGTHS)
    exact = copy.deepcopy(lively).double().eval()
    nll, correct, count = token_by_token(exact, split)
    assert count == sum(LENGTHS) - len(LENGTHS)
    for network in (lively, exact):
        assert score(network, split, batch_size) == (pytest.approx(nll, rel=1e-5), correct, count)


def test_a_score_counts_first_choices_that_are_right(tiny_model):
    network = loading.load_base(tiny_model, None, FP32)
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        choices = network(input_ids=ids).logits.argmax(-1)
    stream = ids.numpy().astype(np.uint16)
    stream[0, 10] = choices[0, 9]  # its context is unchanged: one target is right, those after it may not be
    right = stream[:, :11]
    _, correct, tokens = score(network, blocks.Blocks(right, np.array([11], np.int32)))
    assert correct == 1 + int((choices[0, :9] == ids[0, 1:10]).sum())
    assert tokens == 10


def test_a_score_is_the_same_however_many_logits_are_held_at_once(lively, monkeypatch):
    split = make_rows(LENGTHS)
    nll, correct, tokens = score(lively, split)
    monkeypatch.setitem(log_likelihood.CHUNK_TOKENS, "cpu", 7)
    assert score(lively, split) == (pytest.approx(nll, rel=1e-6), correct, tokens)


def test_the_loss_that_is_trained_is_the_loss_that_is_reported(lively):
    split = make_rows(LENGTHS)
    trained_nll, _ = gradients(lively, split, np.arange(len(split)), 4)
    reported = log_likelihood.validation_loss(lively, split, 4, FP32, "") * split.targets
    assert trained_nll == pytest.approx(reported, rel=1e-6)


@pytest.mark.parametrize(("batch_size", "more"), [(2, 1), (3, 1), (2, 2)])
def test_a_validation_reads_so_many_times_the_rows_of_training_at_once(lively, monkeypatch, batch_size, more):
    monkeypatch.setitem(log_likelihood.VALIDATION_ROWS, "cpu", more)
    seen = []
    lively.get_base_model().transformer.register_forward_pre_hook(
        lambda module, given, named: seen.append(len(named.get("input_ids", *given))), with_kwargs=True
    )
    split = make_rows(LENGTHS)
    loop.fit(lively, split, split, train_params(batch_size=batch_size), 0)
    assert max(seen) == more * batch_size


def test_a_model_that_looks_ahead_is_not_trained(tmp_path):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
    BloomForCausalLM(config).save_pretrained(tmp_path)
    network, split = adapted(tmp_path), make_rows([9] * 2)
    network.get_base_model().config._attn_implementation = attention.ATTENTION_NAME  # which makes no mask for Bloom
    with pytest.raises(StageError, match=r"^Bloom\w+ looks ahead"):
        loop.fit(network, split, split, train_params(), 0)


def test_scoring_leaves_no_gradient_and_the_mode_as_it_was(lively):
    for training in (True, False):
        lively.train(training)
        score(lively, make_rows(LENGTHS))
        assert lively.training is training
        assert all(value.grad is None for value in lively.parameters())


def test_scoring_keeps_nothing_for_gradients(lively):
    seen = []
    lively.get_base_model().transformer.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    score(lively, make_rows(LENGTHS))
    assert seen
    assert not any(seen)


def test_scoring_uses_no_dropout(tiny_model):
    network = adapted(tiny_model, dropout=0.5)
    loop.set_base_dropout(network, 0.5)
    network.train()
    scores = [score(network, make_rows(LENGTHS)) for _ in range(2)]
    assert scores[0] == scores[1]


def test_a_llama_is_scored_token_by_token_too(tmp_path):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=64, **size)).save_pretrained(tmp_path)
    network, split = adapted(tmp_path), make_rows(LENGTHS)
    start = log_likelihood.validation_loss(network, split, 4, FP32, "")
    history = loop.fit(network, split, split, train_params(epochs=5), seed=0)
    assert history.best["validation_loss"] < start
    nll, correct, count = token_by_token(network.double().eval(), split)
    assert score(network, split) == (pytest.approx(nll, rel=1e-5), correct, count)


# Padding


def test_what_stands_in_the_padding_changes_neither_loss_nor_gradient_nor_score(lively):
    split = make_rows(LENGTHS)
    padding = np.arange(split.ids.shape[1]) >= split.lengths[:, None]
    assert padding.any()
    nll, gradient = gradients(lively, split, np.arange(len(split)), 4)
    scored_nll, correct, count = score(lively, split)
    for seed in range(3):
        noise = np.random.default_rng(seed).integers(0, 300, split.ids.shape).astype(np.uint16)
        other = blocks.Blocks(np.where(padding, noise, split.ids), split.lengths)
        other_nll, other_gradient = gradients(lively, other, np.arange(len(split)), 4)
        assert other_nll == pytest.approx(nll, rel=1e-6)
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-5, atol=1e-7)
        assert score(lively, other) == (pytest.approx(scored_nll, rel=1e-6), correct, count)


def test_a_real_end_of_text_is_a_target_and_padding_with_the_same_id_is_none():
    split = make_rows([5, 8])
    inputs, targets = make_batch(split, np.array([0, 1]), torch.device("cpu"))
    assert inputs.shape == targets.shape == (2, 7)
    assert targets[0].tolist() == [*split.ids[0, 1:5].tolist(), *[IGNORE_INDEX] * 3]
    assert targets[0, 3] == END
    assert targets[1].tolist() == split.ids[1, 1:8].tolist()
    assert targets[1, 6] == END
    assert inputs[1].tolist() == split.ids[1, :7].tolist()


def test_the_last_packed_row_is_scored_to_its_end_and_no_further(lively):
    stream = np.random.default_rng(0).integers(1, 300, 40).astype(np.uint16)
    packed = blocks.pack_blocks(stream, 16, END)
    assert packed.lengths.tolist() == [17, 17, 8]
    nll, correct, count = token_by_token(lively.eval(), packed)
    assert count == 39
    assert score(lively, packed) == (pytest.approx(nll, rel=1e-5), correct, count)


# Steps


def test_small_batches_accumulated_give_the_gradient_of_the_large_batch(lively):
    split, places = make_rows(LENGTHS), np.array([0, 3, 1, 9, 4, 7, 5, 2])
    nll, gradient = gradients(lively, split, places, 8)
    small_nll, small_gradient = gradients(lively, split, places, 2)
    assert small_nll == pytest.approx(nll, rel=1e-6)
    assert all(value.abs().max() > 0 for value in gradient.values())
    torch.testing.assert_close(small_gradient, gradient, rtol=1e-4, atol=1e-7)


def test_the_gradient_is_that_of_the_mean_over_the_step_s_tokens(lively):
    split, places = make_rows(LENGTHS), np.array([0, 3, 1, 9, 4, 7, 5, 2])
    nll, gradient = gradients(lively, split, places, 3)
    lively.zero_grad()
    inputs, targets = make_batch(split, places, torch.device("cpu"))
    loss = torch.nn.functional.cross_entropy(
        lively(input_ids=inputs).logits.transpose(1, 2), targets, ignore_index=-100
    )
    loss.backward()
    assert nll / split.count_targets(places) == pytest.approx(loss.item(), rel=1e-6)
    expected = {name: value.grad for name, value in lively.named_parameters() if value.requires_grad}
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_accumulation_gives_as_many_steps_and_the_same_losses_as_the_large_batch(tiny_model):
    train, validation = make_rows(LENGTHS), make_rows(LENGTHS[:4], seed=1)
    histories = [
        loop.fit(adapted(tiny_model), train, validation, train_params(epochs=2, validations=4, **size), seed=0)
        for size in ({"batch_size": 4}, {"batch_size": 2, "accumulation_steps": 2})
    ]
    for one, other in zip(*(history.rows for history in histories), strict=True):
        assert one == {key: pytest.approx(value, rel=1e-3) for key, value in other.items()}
    assert histories[0].rows[-1]["step"] == 6, "two epochs of 11 rows by fours"
    assert histories[0].tokens == histories[1].tokens == 2 * train.targets


def test_each_row_is_trained_on_once_an_epoch_in_an_order_of_its_own():
    parts = list(loop.shuffled_batches(11, 4, 3, seed=0))
    assert [len(part) for part in parts] == [4, 4, 3] * 3
    epochs = [np.concatenate(parts[first : first + 3]).tolist() for first in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert [part.tolist() for part in loop.shuffled_batches(11, 4, 3, seed=0)] == [part.tolist() for part in parts]
    assert [part.tolist() for part in loop.shuffled_batches(11, 4, 3, seed=1)] != [part.tolist() for part in parts]


def test_the_learning_rate_warms_up_to_its_peak_and_decays_to_nothing():
    chosen = train_params(learning_rate=2.0, warmup_fraction=0.1)
    rates = [optimizer.lr_at_step(step, 100, chosen) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert rates[55] == pytest.approx(1.0), "half way down"
    assert rates[99] == pytest.approx(1 + math.cos(math.pi * 89 / 90))
    assert all(before > after > 0 for before, after in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 1), (0.0, 3), (0.99, 3), (0.05, 1), (0.5, 2)])
def test_the_learning_rate_of_few_steps_is_never_zero_nor_above_its_peak(warmup, steps):
    rates = [optimizer.lr_at_step(step, steps, train_params(warmup_fraction=warmup)) for step in range(1, steps + 1)]
    assert all(0 < rate <= 1e-2 for rate in rates)
    assert max(rates) == 1e-2


def test_the_history_tells_the_rate_and_the_norm_of_each_step(tiny_model):
    train = make_rows(LENGTHS)
    chosen = train_params(validations=3, clip_norm=1e-6)
    history = loop.fit(adapted(tiny_model), train, train, chosen, seed=0)
    assert [row["step"] for row in history.rows] == [1, 2, 3]
    assert [row["learning_rate"] for row in history.rows] == [
        optimizer.lr_at_step(step, 3, chosen) for step in (1, 2, 3)
    ]
    assert all(row["gradient_norm"] > chosen.clip_norm for row in history.rows), "before clipping"
    assert history.rows[-1]["tokens"] == history.tokens == train.targets


def test_a_step_goes_by_the_rate_of_the_schedule(tiny_model, monkeypatch):
    network, train = adapted(tiny_model), make_rows(LENGTHS)
    before = trained(network)
    monkeypatch.setattr(loop, "lr_at_step", lambda *_: 0.0)
    loop.fit(network, train, train, train_params(), seed=0)
    assert same(trained(network), before)


def test_the_train_loss_of_a_row_is_that_of_its_own_steps(tiny_model, monkeypatch):
    network, train = adapted(tiny_model), make_rows(LENGTHS)
    monkeypatch.setattr(loop, "lr_at_step", lambda *_: 0.0)
    history = loop.fit(network, train, train, train_params(validations=3), seed=0)
    for row, places in zip(history.rows, loop.shuffled_batches(len(train), 4, 1, seed=0), strict=True):
        expected = gradients(network, train, places, 4)[0] / train.count_targets(places)
        assert row["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_step_starts_from_no_gradient(tiny_model, monkeypatch):
    network, train = adapted(tiny_model), make_rows(LENGTHS)
    monkeypatch.setattr(loop, "lr_at_step", lambda *_: 0.0)
    history = loop.fit(
        network, train, train, train_params(epochs=3, batch_size=100, clip_norm=1e6, validations=3), seed=0
    )
    first, *others = [row["gradient_norm"] for row in history.rows]
    assert others == pytest.approx([first] * 2, rel=1e-3)


def test_base_dropout_leaves_the_adapters_alone(tiny_model):
    network = adapted(tiny_model, dropout=0.05)
    loop.set_base_dropout(network, 0.3)
    shares = {name: module.p for name, module in network.named_modules() if isinstance(module, torch.nn.Dropout)}
    adapters = {share for name, share in shares.items() if "lora_dropout" in name}
    others = {share for name, share in shares.items() if "lora_dropout" not in name}
    assert (adapters, others) == ({0.05}, {0.3})


def test_base_dropout_reaches_what_modules_hand_to_functions():
    torch.manual_seed(0)
    size = {"vocab_size": 50, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1}
    network = OPTForCausalLM(OPTConfig(**size, num_attention_heads=2, dropout=0.5, attention_dropout=0.5)).train()
    ids = torch.arange(20)[None]
    assert not torch.equal(network(input_ids=ids).logits, network(input_ids=ids).logits)
    loop.set_base_dropout(network, 0.0)
    assert torch.equal(network(input_ids=ids).logits, network(input_ids=ids).logits)


def test_base_dropout_is_off_unless_asked_for(tiny_model):
    network, train = adapted(tiny_model), make_rows(LENGTHS)
    assert network.get_base_model().config.resid_pdrop == 0.1
    loop.fit(network, train, train, train_params(), seed=0)
    network.train()
    ids = torch.arange(20)[None]
    assert torch.equal(network(input_ids=ids).logits, network(input_ids=ids).logits)
    loop.set_base_dropout(network, 0.1)
    assert not torch.equal(network(input_ids=ids).logits, network(input_ids=ids).logits)


# Runs


def test_a_loss_that_is_not_finite_stops_with_the_step(tiny_model):
    network, train = adapted(tiny_model), make_rows(LENGTHS)
    with torch.no_grad():
        next(value for name, value in network.named_parameters() if "lora_A" in name).fill_(math.nan)
    with pytest.raises(StageError, match=r"the loss is nan at step 1: lower train.learning_rate"):
        loop.fit(network, train, train, train_params(), seed=0)


@pytest.mark.parametrize("place", [1, 2, 3, 4, 11])
def test_the_step_named_is_the_first_whose_loss_is_not_finite(place):
    losses = [1.0] * 12
    losses[place] = math.inf
    losses[11] = math.nan
    with pytest.raises(StageError, match=rf"the loss is {'nan' if place == 11 else 'inf'} at step {9 + place}:"):
        divergence.check_finite(losses, 20)
    divergence.check_finite(losses[:place], 20)


@pytest.mark.parametrize("batch_size", [4, 100], ids=["several steps", "one step"])
def test_an_absurd_learning_rate_stops_with_one_line(tiny_model, batch_size):
    train = make_rows(LENGTHS)
    with pytest.raises(StageError, match=r"the .*loss is nan .*at step [12]: lower train.learning_rate"):
        loop.fit(adapted(tiny_model), train, train, train_params(batch_size=batch_size, learning_rate=1e30), seed=0)


def test_the_model_is_left_with_the_values_of_the_lowest_validation_loss(tiny_model):
    network = loading.load_base(tiny_model, None, FP32)
    train, validation = make_rows([17] * 8, high=20), make_rows([17] * 8, seed=1, low=10, high=40)
    history = loop.fit(network, train, validation, train_params(epochs=15, validations=15), seed=0)
    losses = [row["validation_loss"] for row in history.rows]
    assert history.best == min(history.rows, key=lambda row: row["validation_loss"])
    assert losses[-1] > 1.05 * min(losses), "training went on past the best"
    assert log_likelihood.validation_loss(network, validation, 4, FP32, "") == pytest.approx(min(losses), rel=1e-6)


@pytest.mark.parametrize("quantization", [None, NF4], ids=["float", "nf4"])
def test_training_changes_the_adapter_and_no_other_bit(tiny_model, quantization):
    network, train = adapted(tiny_model, quantization), make_rows(LENGTHS)
    adapter, base = trained(network), frozen(network)
    history = loop.fit(network, train, train, train_params(weight_decay=0.1), seed=0)
    assert history.best["validation_loss"] < history.start_loss
    assert same(frozen(network), base)
    after = trained(network)
    assert all(not torch.equal(after[name], adapter[name]) for name in adapter)


@pytest.mark.parametrize("quantization", [None, NF4], ids=["float", "nf4"])
def test_the_same_seed_trains_the_same_adapter_bit_for_bit(tiny_model, quantization):
    train, validation = make_rows(LENGTHS), make_rows(LENGTHS[:4], seed=1)
    runs = []
    for seed in (1, 1, 2):
        network = adapted(tiny_model, quantization, seed, dropout=0.1)
        history = loop.fit(network, train, validation, train_params(epochs=2, base_dropout=0.1), seed)
        runs.append((trained(network), history.rows))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert not same(runs[0][0], runs[2][0])


def test_every_weight_is_trained_without_an_adapter(tiny_model):
    network, train = loading.load_base(tiny_model, None, FP32), make_rows(LENGTHS)
    before = trained(network)
    history = loop.fit(network, train, train, train_params(epochs=3), seed=0)
    assert history.best["validation_loss"] < history.start_loss
    after = trained(network)
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_bf16_trains_an_fp32_adapter(tiny_model):
    network, train = adapted(tiny_model), make_rows(LENGTHS)
    history = loop.fit(network, train, train, train_params(epochs=4, precision="bf16"), seed=0)
    assert history.best["validation_loss"] < history.start_loss
    assert {value.dtype for value in network.parameters()} == {FP32}
    exact = loop.fit(adapted(tiny_model), train, train, train_params(epochs=4), seed=0)
    assert history.best["validation_loss"] == pytest.approx(exact.best["validation_loss"], rel=0.02)
    assert history.best["validation_loss"] != exact.best["validation_loss"]


def test_auto_is_bf16_where_the_device_computes_in_it(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for native, expected in ((True, torch.bfloat16), (False, FP32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        assert device.compute_dtype("auto", cpu) == expected
        assert device.compute_dtype("auto", gpu) == torch.bfloat16
        assert device.compute_dtype("fp32", cpu) == device.compute_dtype("fp32", gpu) == FP32
        assert device.compute_dtype("bf16", cpu) == torch.bfloat16


@pytest.mark.parametrize("quantization", [None, NF4], ids=["float", "nf4"])
def test_a_base_held_in_bf16_gives_nearly_the_same_gradient(tiny_model, quantization):
    split = make_rows(LENGTHS)
    network = adapted(tiny_model, quantization)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    network.eval()
    results = []
    for dtype in (FP32, torch.bfloat16):
        loading.cast_frozen(network, dtype)
        assert {value.dtype for value in frozen(network).values()} <= {dtype, torch.uint8}
        assert {value.dtype for value in trained(network).values()} == {FP32}
        nll = loop.accumulate_gradients(execution.eager_backward(network, dtype), split, np.arange(len(split)), 4)
        results.append((float(nll), torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad])))
        network.zero_grad()
    (exact, expected), (near, found) = results
    assert near == pytest.approx(exact, rel=1e-2)
    assert near != exact
    assert torch.cosine_similarity(expected, found, 0) > 0.99


def test_the_gradient_of_every_weight_is_that_of_the_plain_loss(tiny_model):
    """Head and embedding are one tensor, whose gradient is the sum of both uses."""
    split = make_rows(LENGTHS)
    inputs, targets = make_batch(split, np.arange(4), torch.device("cpu"))
    results = []
    for fused in (True, False):
        network = loading.load_base(tiny_model, None, FP32).double().eval()
        if fused:
            nll = nll_sum(network, inputs, targets, torch.float64)
        else:
            logits = network(input_ids=inputs).logits.flatten(0, 1)
            nll = torch.nn.functional.cross_entropy(
                logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
            )
        nll.backward()
        results.append([nll.detach(), *(parameter.grad for parameter in network.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
