"""The three ways to a batch's gradient: which is taken when, and that all give the same.

`TEST_ON_GPU=1 pytest tests/training/test_execution.py` runs what needs a GPU as well.
"""

import contextlib
import functools
import re

import numpy as np
import pytest
import tiny
import torch
import torch._dynamo
import torch.nn.functional as F
from click.testing import CliRunner
from torch._functorch._aot_autograd.autograd_cache import check_cacheable
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
)

from benchmarks import random_inputs, workspace
from gpt2lora.dataset import blocks
from gpt2lora.model import attention, head, loading, lora
from gpt2lora.model.quantization import QuantizationParams
from gpt2lora.pipeline.artifacts import digests
from gpt2lora.pipeline.cli import StageError
from gpt2lora.scoring import log_likelihood
from gpt2lora.training import execution, loop, loss
from gpt2lora.training.loss import IGNORE_INDEX
from gpt2lora.training.state import History, TrainState
from stages import train

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = torch.device("cuda")
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU and TEST_ON_GPU=1")
NF4 = QuantizationParams(bits=4, quant_type="nf4", double_quant=True)
INT8 = QuantizationParams(bits=8, quant_type="nf4", double_quant=False)
FULL_ROWS = [17] * 6
FP32 = torch.float32


def make_rows(lengths: list[int]) -> blocks.Blocks:
    ids = np.random.default_rng(0).integers(1, 300, (len(lengths), max(lengths))).astype(np.uint16)
    return blocks.Blocks(ids, np.array(lengths, np.int32))


def adapted(folder, quantization=None, dropout=0.0, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    network = lora.attach_lora(
        loading.load_base(folder, quantization, FP32), tiny.low_rank(r=4, alpha=8, dropout=dropout, **changes)
    )
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.02, generator=torch.Generator(DEVICE).manual_seed(0))
    loop.set_base_dropout(network, 0.0)
    return network.train()


def results(network, add: execution.Backward, split: blocks.Blocks, batch_size=4) -> tuple[float, list[torch.Tensor]]:
    """Return the loss of one step over all rows, and the gradients it leaves."""
    network.zero_grad()
    nll = float(loop.accumulate_gradients(add, split, np.arange(len(split)), batch_size))
    return nll, [parameter.grad.clone() for parameter in network.parameters() if parameter.requires_grad]


# The choice


@pytest.mark.parametrize(
    ("changes", "device", "way", "reason"),
    [
        ({}, torch.device("cpu"), "eager", "for GPUs"),
        ({"lengths": [17, 17, 5, 5]}, GPU, "eager", "differ in length"),
        ({"lengths": [*FULL_ROWS, 12]}, GPU, "captured", "saves time"),
        ({"quantization": INT8}, GPU, "eager", "outliers"),
        ({"quantization": NF4}, GPU, "captured", "saves time"),
        ({"use_dora": True, "compiled": "always"}, GPU, "captured", "DoRA"),
        ({"tokens": 10**13}, GPU, "compiled", "saves time"),
        ({"tokens": 10**13, "compiled": "never"}, GPU, "captured", "never"),
        ({"compiled": "always"}, GPU, "compiled", "always"),
    ],
    ids=str,
)
def test_the_way_follows_from_device_rows_method_and_length_of_the_run(
    tiny_model, monkeypatch, changes, device, way, reason
):
    monkeypatch.setattr(execution, "missing_compile_requirement", lambda: None)
    changes = dict(changes)
    split, tokens = make_rows(changes.pop("lengths", FULL_ROWS)), changes.pop("tokens", 1000)
    compiled = changes.pop("compiled", "auto")
    found = execution.choose_execution(adapted(tiny_model, **changes), split, tokens, compiled, device)
    assert found[0] == way
    assert reason in found[1]


def test_without_a_compiler_nothing_is_compiled(tiny_model, monkeypatch):
    monkeypatch.setattr(execution, "find_spec", lambda name: name)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    way, reason = execution.choose_execution(adapted(tiny_model), make_rows(FULL_ROWS), 10**13, "auto", GPU)
    assert (way, reason) == ("captured", "compilation needs a C compiler")
    with pytest.raises(StageError, match=r"train\.compile: expected auto or never, without a C compiler, not 'always'"):
        execution.choose_execution(adapted(tiny_model), make_rows(FULL_ROWS), 1, "always", GPU)
    monkeypatch.setattr(execution, "find_spec", lambda name: None)
    assert execution.missing_compile_requirement() == "Triton"


def test_the_line_says_which_way_and_why(tiny_model, capsys):
    add = execution.prepare_backward(adapted(tiny_model), make_rows(FULL_ROWS), 4, "auto", 10, FP32)
    if DEVICE.type == "cpu":
        assert capsys.readouterr().out == "train: eager steps: CUDA graphs are for GPUs\n"
        assert add.shape is None
    else:
        assert capsys.readouterr().out.startswith("train: captured steps: ")
        assert add.shape == (4, 16)


# The same gradient


@pytest.mark.parametrize("changes", [{}, {"bits": 8}, {"bits": 4}, {"quantization": NF4}], ids=str)
def test_layers_are_traced_whole_and_once_for_all(tiny_model, monkeypatch, changes):
    network, split = adapted(tiny_model, **changes), make_rows([17] * 4)
    expected = results(network, execution.eager_backward(network, FP32), split)
    eager = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    execution.compile_layers(network)
    nll, found = results(network, execution.eager_backward(network, FP32), split)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    assert nll == pytest.approx(expected[0], rel=1e-6)
    for one, other in zip(expected[1], found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    assert log_likelihood.validation_loss(network, split, 1, FP32, "") == pytest.approx(nll / split.targets, rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 1  # scoring has other shapes, and compiles nothing


@pytest.mark.parametrize("changes", [{}, {"bits": 8}], ids=str)
def test_torch_may_keep_compiled_layers_for_a_later_run(tiny_model, monkeypatch, changes):
    network, split = adapted(tiny_model, **changes), make_rows([17] * 4)
    seen = []

    def backend(graph, inputs):
        check_cacheable(graph)  # raises where it would not
        seen.append(graph)
        return graph.forward

    def run(model, add, shape, device):
        ids = torch.zeros(shape, dtype=torch.int64, device=device)
        add(ids, ids, torch.ones((), device=device))
        return add, contextlib.nullcontext

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(execution, "choose_execution", lambda *_: ("compiled", "it is asked for"))
    monkeypatch.setattr(execution, "capture_cuda_graph", run)
    torch._dynamo.reset()
    network.train()
    execution.prepare_backward(network, split, 4, "always", 1, FP32)
    execution.wait_for_compile_workers()
    assert len(seen) == 2  # a layer and the softmax


def test_rows_that_fill_a_batch_up_change_nothing(tiny_model):
    network, split = adapted(tiny_model), make_rows([17, 9, 17])
    add = execution.eager_backward(network, FP32)
    expected = results(network, add, split)
    add.shape = (4, 16)
    inputs, targets = loss.make_batch(split, np.arange(3), DEVICE, add.shape)
    assert inputs.shape == targets.shape == (4, 16)
    assert int((targets != IGNORE_INDEX).sum()) == split.targets
    nll, found = results(network, add, split)
    assert nll == pytest.approx(expected[0], rel=1e-6)
    for one, other in zip(expected[1], found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_what_is_written_over_and_over_adds_up():
    trained = [torch.nn.Parameter(torch.zeros(size)) for size in (2, 3)]
    written = [torch.zeros(size) for size in (2, 3)]
    for _ in range(2):  # steps
        for parameter in trained:
            parameter.grad = None
        for number, total in ((1.0, 1.0), (2.0, 3.0), (4.0, 7.0)):  # batches
            execution.add_gradients(trained, written, lambda number=number: [each.fill_(number) for each in written])
            for parameter in trained:
                assert torch.equal(parameter.grad, torch.full_like(parameter, total))
            if number == 1.0:  # a step of one batch takes no copy
                assert all(parameter.grad is each for parameter, each in zip(trained, written, strict=True))


@on_gpu
@pytest.mark.parametrize("compiled", ["never", "always"])
@pytest.mark.parametrize("changes", [{}, {"bits": 8}, {"bits": 4}, {"use_dora": True}, {"quantization": NF4}], ids=str)
def test_a_recorded_step_gives_what_an_eager_one_gives(tiny_model, compiled, changes):
    network, split = adapted(tiny_model, **changes), make_rows([17] * 5)  # a whole batch, and one that is filled up
    expected = results(network, execution.eager_backward(network, FP32), split)
    scored = log_likelihood.validation_loss(network, split, 1, FP32, "")
    random = torch.cuda.get_rng_state()
    add = execution.prepare_backward(network, split, 4, compiled, 1, FP32)
    assert add.shape == (4, 16)
    assert torch.equal(torch.cuda.get_rng_state(), random)
    for _ in range(3):  # what is scored between two batches takes the memory of a batch, and neither notices
        held = torch.cuda.memory_reserved()
        with add.share_memory():
            assert log_likelihood.validation_loss(network, split, 1, FP32, "") == scored
        assert torch.cuda.memory_reserved() == held
        nll, found = results(network, add, split)
        assert nll == pytest.approx(expected[0], rel=1e-5)
        for one, other in zip(expected[1], found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)


@on_gpu
@pytest.mark.parametrize("compiled", ["never", "always"])
def test_each_replay_draws_its_own_dropout(tiny_model, compiled):
    network, split = adapted(tiny_model, dropout=0.5), make_rows([17] * 4)
    add = execution.prepare_backward(network, split, 4, compiled, 1, FP32)
    losses = {results(network, add, split)[0] for _ in range(5)}
    assert len(losses) == 5
    state = torch.cuda.get_rng_state()
    again = []
    for _ in range(2):
        torch.cuda.set_rng_state(state)
        again.append(results(network, add, split)[0])
    assert again[0] == again[1]


@on_gpu
@pytest.mark.parametrize(
    "values", [{"train.compile": "always"}, {"train.compile": "never"}, {"method": "full"}], ids=str
)
def test_a_deterministic_run_gives_the_same_bytes_on_a_gpu(tiny_model, tmp_path, values):
    settings = {"method": "lora", "train.batch_size": 8, "train.deterministic": True, "train.validations": 2} | values
    for folder in (tmp_path / "one", tmp_path / "two"):
        tokens = random_inputs.tokens(folder, tiny_model, 32, 64)
        workspace.lay_out(folder, settings, base=tiny_model, tokens=tokens)
        assert workspace.run_stage("train", folder) is None
    one, two = (digests(tmp_path / name / "data" / "adapter") for name in ("one", "two"))
    assert one == two
    assert any(name.endswith(".safetensors") for name in one)


@on_gpu
def test_too_little_memory_names_a_batch_that_fits(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - 10**9, dtype=torch.uint8, device=DEVICE)
    settings = {"method": "lora", "train.epochs": 1, "train.validations": 1}
    tokens = random_inputs.tokens(tmp_path, tiny_model, 64, 8192)
    workspace.lay_out(tmp_path, settings | {"train.batch_size": 8192}, base=tiny_model, tokens=tokens)
    refused = CliRunner().invoke(train.main)
    assert refused.exit_code == 1, refused.output
    found = re.search(r"-S train\.batch_size=(\d+) -S train\.accumulation_steps=(\d+)$", refused.output.strip())
    assert found, refused.output
    batch_size, steps = map(int, found.groups())
    assert batch_size * steps == 8192
    assert batch_size >= 64
    workspace.write_params(tmp_path, settings | {"train.batch_size": batch_size, "train.accumulation_steps": steps})
    assert CliRunner().invoke(train.main).exit_code == 0
    assert taken.numel() > 0


@on_gpu
def test_a_look_sees_the_steps_before_it_and_not_what_was_begun_since():
    large = torch.randn(8192, 8192, device=DEVICE)
    state = TrainState(0, History([], 0.0, {}, 0, 0.0), [], [], [])
    for step in (1, 2):
        state.add_step(torch.full((), float(step), device=DEVICE), (large @ large)[0, 0], 1)
    fetched = loop.fetch_losses_async(state)
    for _ in range(100):
        large = large @ large
    losses, norms, _ = fetched()
    assert not torch.cuda.current_stream().query()  # still at work
    assert (losses, norms) == ([1.0, 2.0], [float(norm) for norm in state.norms])


# Attention


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_is_that_of_the_formula(heads, dtype):
    torch.manual_seed(0)
    query = torch.randn(2, 4, 5, 8, dtype=torch.float64).to(dtype)
    key, value = (torch.randn(2, heads, 5, 8, dtype=torch.float64).to(dtype) for _ in range(2))
    found, weights = attention.causal_attention(torch.nn.Module(), query, key, value, None, scaling=0.3)
    wide = [part.double().repeat_interleave(4 // heads, 1) for part in (key, value)]
    scores = 0.3 * query.double() @ wide[0].transpose(2, 3)
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    expected = (F.softmax(scores, -1) @ wide[1]).transpose(1, 2)
    assert weights is None
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), expected, **({} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02})
    )


def test_attention_on_a_cpu_computes_in_fp32_under_autocast_too(monkeypatch):
    seen, compute = [], F.scaled_dot_product_attention

    def recording(query, *others, **options):
        seen.append((query.dtype, torch.is_autocast_enabled("cpu")))
        return compute(query, *others, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    parts = [torch.randn(1, 2, 5, 8, dtype=torch.bfloat16) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attention.causal_attention(torch.nn.Module(), *parts, None)
    assert seen == [(FP32, False)]
    assert found.dtype == torch.bfloat16


def test_a_token_generated_after_others_reads_them_all(tiny_model):
    network = loading.load_base(tiny_model, None, FP32).eval()
    assert network.config._attn_implementation == attention.ATTENTION_NAME
    ids = torch.randint(1, 300, (1, 12), device=DEVICE)
    with torch.no_grad():
        expected = network(input_ids=ids).logits[:, -1]
        cached = network(input_ids=ids[:, :-1], use_cache=True).past_key_values
        found = network(input_ids=ids[:, -1:], past_key_values=cached).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "fits"),
    [(GPT2Config(), True), (LlamaConfig(), True), (MistralConfig(sliding_window=4), False), (BloomConfig(), False)],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_attention_is_replaced_where_all_layers_attend_so_and_leave_it_to_others(config, fits):
    with torch.device("meta"):
        assert attention.supports_causal_attention(AutoModelForCausalLM.from_config(config)) is fits


def test_a_model_that_attends_in_its_own_way_does_not_look_ahead(tmp_path):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
    BloomForCausalLM(config).save_pretrained(tmp_path)
    network, split = loading.load_base(tmp_path, None, FP32), make_rows([9] * 2)
    assert network.config._attn_implementation != attention.ATTENTION_NAME
    head.check_head(network, split.width)
    network.config._attn_implementation = attention.ATTENTION_NAME  # which Bloom takes for a reason to make no mask
    with pytest.raises(StageError, match=r"^Bloom\w+ looks ahead"):
        head.check_head(network, split.width)


def test_a_model_with_a_sliding_window_keeps_its_mask(tmp_path):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, num_key_value_heads=2, max_position_embeddings=64, **size)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    ids, logits = torch.randint(1, 300, (1, 12)), []
    ours = loading.load_base(tmp_path, None, FP32)
    assert ours.config._attn_implementation == attention.ATTENTION_NAME
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).to(DEVICE)
    with torch.no_grad():
        logits = [network.eval()(input_ids=ids.to(DEVICE)).logits for network in (ours, theirs)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
