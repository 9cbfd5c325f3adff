"""Eager, captured and compiled steps: which is chosen when, and that all give the same gradients.

`TEST_ON_GPU=1 pytest tests/training` also runs what needs a GPU.
"""

import contextlib
import functools

import numpy as np
import pytest
import tiny
import torch
import torch._dynamo
from small_models import INT8, NF4, fill_factors_b, new_adapter
from torch._functorch._aot_autograd.autograd_cache import check_cacheable
from training_steps import make_rows, on_gpu
from transformers import BartConfig, BartForCausalLM, MistralConfig, MistralForCausalLM

from benchmarks import random_inputs, workspace
from gpt2lora.dataset import blocks
from gpt2lora.model import dora_forward
from gpt2lora.model.device import pick_device
from gpt2lora.pipeline.artifacts import digests
from gpt2lora.pipeline.cli import StageError
from gpt2lora.scoring import log_likelihood
from gpt2lora.training import accumulation, cuda_graph, dropout, execution, loop, loss
from gpt2lora.training.loss import IGNORE_INDEX

DEVICE = pick_device()
GPU = torch.device("cuda")
FULL_ROWS = [17] * 6
FP32 = torch.float32


def train_model(folder, quantization=None, **changes) -> torch.nn.Module:
    """Return a model in training mode, without dropout in its base, whose adapter has gradients everywhere."""
    network = new_adapter(folder, quantization, **changes)
    fill_factors_b(network, 0.02)
    dora_forward.fuse_dora(network, "default")
    dropout.set_base_dropout(network, 0.0)
    return network.train()


def take_step(
    network, backward: execution.Backward, split: blocks.Blocks, step: int = 1
) -> tuple[float, list[torch.Tensor]]:
    """Return the summed loss of one step over all rows, four at a time, and the gradients it leaves."""
    network.zero_grad()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    batches = accumulation.split_step(np.arange(len(split)), 4, seed=0, step=step)
    nll = float(accumulation.accumulate_gradients(backward, trained, split, batches, split.targets))
    return nll, [parameter.grad.clone() for parameter in trained if parameter.grad is not None]


# The choice


@pytest.mark.parametrize(
    ("changes", "device", "mode", "reason"),
    [
        ({}, torch.device("cpu"), "eager", "for GPUs"),
        ({"lengths": [17, 17, 5, 5]}, GPU, "eager", "differ in length"),
        ({"lengths": [*FULL_ROWS, 12]}, GPU, "captured", "saves time"),
        ({"quantization": INT8}, GPU, "captured", "saves time"),
        ({"quantization": NF4}, GPU, "captured", "saves time"),
        ({"use_dora": True, "compiled": "always"}, GPU, "compiled", "always"),
        ({"use_dora": True, "dropout": 0.1, "compiled": "always"}, GPU, "captured", "DoRA does not compile"),
        ({"tokens": 10**13}, GPU, "compiled", "saves time"),
        ({"tokens": 10**13, "compiled": "never"}, GPU, "captured", "never"),
        ({"compiled": "always"}, GPU, "compiled", "always"),
    ],
    ids=str,
)
def test_the_mode_depends_on_device_rows_method_and_tokens(tiny_model, monkeypatch, changes, device, mode, reason):
    monkeypatch.setattr(execution, "missing_compile_requirement", lambda: None)
    changes = dict(changes)
    split, tokens = make_rows(changes.pop("lengths", FULL_ROWS)), changes.pop("tokens", 1000)
    compiled = changes.pop("compiled", "auto")
    chosen = execution.choose_execution(train_model(tiny_model, **changes), split, tokens, compiled, device)
    assert chosen[0] == mode
    assert reason in chosen[1]


def test_all_micro_batches_of_a_run_count_for_the_mode(tiny_model, monkeypatch):
    """Whatever accumulation_steps is, a run of as many tokens is compiled or not; other processes do not change it."""
    asked = []
    choose = execution.choose_execution
    monkeypatch.setattr(execution, "choose_execution", lambda *given: asked.append(given[2]) or choose(*given))
    split = make_rows([17] * 8)
    for batch_size, accumulation_steps in ((4, 1), (2, 2), (1, 4)):
        options = tiny.train_params(batch_size=batch_size, accumulation_steps=accumulation_steps, epochs=3)
        loop.fit(train_model(tiny_model), split, split, options, 0)
    assert asked == [3 * 8 * 16] * 3


def test_nothing_is_compiled_without_a_compiler_or_triton(tiny_model, monkeypatch):
    monkeypatch.setattr(execution, "find_spec", lambda name: name)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    mode, reason = execution.choose_execution(train_model(tiny_model), make_rows(FULL_ROWS), 10**13, "auto", GPU)
    assert (mode, reason) == ("captured", "compilation needs a C compiler")
    with pytest.raises(StageError, match=r"train\.compile: expected auto or never, without a C compiler, not 'always'"):
        execution.choose_execution(train_model(tiny_model), make_rows(FULL_ROWS), 1, "always", GPU)
    monkeypatch.setattr(execution, "find_spec", lambda name: None)
    assert execution.missing_compile_requirement() == "Triton"


def test_the_mode_and_its_reason_are_printed(tiny_model, capsys):
    backward = execution.prepare_backward(train_model(tiny_model), make_rows(FULL_ROWS), 4, "auto", 10, FP32)
    if DEVICE.type == "cpu":
        assert capsys.readouterr().out == ""  # nothing that a user could choose
        assert backward.shape is None
    else:
        assert capsys.readouterr().out.startswith("train: captured steps: ")
        assert backward.shape == (4, 16)


# The same gradients


@pytest.mark.parametrize(
    "changes",
    [{}, {"r": 3}, {"bits": 8}, {"bits": 4}, {"use_dora": True}, {"quantization": NF4}, {"quantization": INT8}],
    ids=str,
)
def test_all_layers_share_one_compiled_graph_without_breaks(tiny_model, monkeypatch, changes):
    network, split = train_model(tiny_model, **changes), make_rows([17] * 4)
    expected_nll, expected_gradients = take_step(network, execution.eager_backward(network, FP32), split)
    compile_by_aot_eager = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compile_by_aot_eager)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    execution.compile_layers(network)
    nll, gradients = take_step(network, execution.eager_backward(network, FP32), split)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    assert nll == pytest.approx(expected_nll, rel=1e-6)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert log_likelihood.validation_loss(network, split, 1, FP32, "") == pytest.approx(nll / split.targets, rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 1  # validation has other shapes, and compiles nothing


@pytest.mark.parametrize("changes", [{}, {"bits": 8}, {"use_dora": True}], ids=str)
def test_torch_can_cache_compiled_layers_for_later_runs(tiny_model, monkeypatch, changes):
    network, split = train_model(tiny_model, **changes), make_rows([17] * 4)
    graphs = []

    def backend(graph, inputs):
        check_cacheable(graph)  # raises if it is not
        graphs.append(graph)
        return graph.forward

    def compute_once(model, compute, shape, device):
        ids = torch.zeros(shape, dtype=torch.int64, device=device)
        compute(ids, ids, torch.ones((), device=device))
        return compute, contextlib.nullcontext

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(execution, "choose_execution", lambda *_: ("compiled", "it is asked for"))
    monkeypatch.setattr(execution, "capture_cuda_graph", compute_once)
    torch._dynamo.reset()
    network.train()
    execution.prepare_backward(network, split, 4, "always", 1, FP32)
    execution.wait_for_compile_workers()
    assert len(graphs) == 2  # of a layer and of the softmax


def test_rows_of_padding_change_no_gradient(tiny_model):
    network, split = train_model(tiny_model), make_rows([17, 9, 17])
    backward = execution.eager_backward(network, FP32)
    expected_nll, expected_gradients = take_step(network, backward, split)
    backward.shape = (4, 16)
    inputs, targets = loss.make_batch(split, np.arange(3), DEVICE, backward.shape)
    assert inputs.shape == targets.shape == (4, 16)
    assert int((targets != IGNORE_INDEX).sum()) == split.targets
    nll, gradients = take_step(network, backward, split)
    assert nll == pytest.approx(expected_nll, rel=1e-6)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_gradients_that_each_batch_overwrites_are_summed():
    trained = [torch.nn.Parameter(torch.zeros(size)) for size in (2, 3)]
    written = [torch.zeros(size) for size in (2, 3)]
    for _ in range(2):  # steps
        for parameter in trained:
            parameter.grad = None
        for number, total in ((1.0, 1.0), (2.0, 3.0), (4.0, 7.0)):  # batches
            cuda_graph.add_gradients(trained, written, lambda number=number: [each.fill_(number) for each in written])
            for parameter in trained:
                assert torch.equal(parameter.grad, torch.full_like(parameter, total))
            if number == 1.0:  # a step of one batch makes no copy
                assert all(parameter.grad is each for parameter, each in zip(trained, written, strict=True))


@on_gpu
@pytest.mark.parametrize("compiled", ["never", "always"])
@pytest.mark.parametrize("changes", [{}, {"bits": 8}, {"bits": 4}, {"use_dora": True}, {"quantization": NF4}], ids=str)
def test_a_captured_step_gives_what_an_eager_one_gives(tiny_model, compiled, changes):
    network, split = train_model(tiny_model, **changes), make_rows([17] * 5)  # a full batch, and one that is padded
    expected_nll, expected_gradients = take_step(network, execution.eager_backward(network, FP32), split)
    validation_loss = log_likelihood.validation_loss(network, split, 1, FP32, "")
    random_state = torch.cuda.get_rng_state()
    backward = execution.prepare_backward(network, split, 4, compiled, 1, FP32)
    assert backward.shape == (4, 16)
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
    for _ in range(3):  # a validation between two steps uses their memory, and changes neither
        reserved = torch.cuda.memory_reserved()
        with backward.share_memory():
            assert log_likelihood.validation_loss(network, split, 1, FP32, "") == validation_loss
        assert torch.cuda.memory_reserved() == reserved
        nll, gradients = take_step(network, backward, split)
        assert nll == pytest.approx(expected_nll, rel=1e-5)
        for gradient, expected in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


@on_gpu
@pytest.mark.parametrize("compiled", ["never", "always"])
def test_each_step_draws_dropout_masks_of_its_own(tiny_model, compiled):
    network, split = train_model(tiny_model, dropout=0.5), make_rows([17] * 4)
    backward = execution.prepare_backward(network, split, 4, compiled, 1, FP32)
    losses = [take_step(network, backward, split, step)[0] for step in (1, 2, 3, 4, 5, 3)]
    assert len(set(losses)) == 5
    assert losses[5] == losses[2], "the random numbers are those of the step"


@on_gpu
@pytest.mark.parametrize(
    "values", [{"train.compile": "always"}, {"train.compile": "never"}, {"method": "full"}], ids=str
)
def test_deterministic_runs_give_the_same_bytes_on_a_gpu(tiny_model, tmp_path, values):
    settings = {"method": "lora", "train.batch_size": 8, "train.deterministic": True, "train.validations": 2} | values
    for folder in (tmp_path / "one", tmp_path / "two"):
        tokens = random_inputs.tokens(folder, tiny_model, 32, 64)
        workspace.link_inputs(folder, settings, base=tiny_model, tokens=tokens)
        assert workspace.run_stage("train", folder) is None
    one, two = (digests(tmp_path / name / "data" / "adapter") for name in ("one", "two"))
    assert one == two
    assert any(name.endswith(".safetensors") for name in one)


@on_gpu
@pytest.mark.parametrize("wait", ["item", "nonzero"])
def test_a_model_that_waits_for_the_gpu_trains_in_eager_steps(tiny_model, capsys, wait):
    network, split = train_model(tiny_model, dropout=0.5), make_rows([17] * 4)
    body = network.get_base_model().transformer
    # A busy GPU: when the attempts fail, their kernels still have to run.
    body.register_forward_pre_hook(lambda module, inputs: torch.cuda._sleep(10**8))  # cycles
    body.h[0].register_forward_hook(lambda module, inputs, output: wait_for(wait))
    random_state = torch.cuda.get_rng_state()
    backward = execution.prepare_backward(network, split, 4, "always", 1, FP32)
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
    assert "train: eager steps: captured ones fail: RuntimeError: " in capsys.readouterr().out
    assert backward.shape is None
    assert len({take_step(network, backward, split, step)[0] for step in (1, 2, 3)}) == 3  # dropout


def wait_for(how: str) -> None:
    flags = torch.ones(4, device=DEVICE)
    flags.sum().item() if how == "item" else flags.nonzero()


@on_gpu
def test_a_model_that_does_not_compile_is_captured(tiny_model, capsys, monkeypatch):
    network, split = train_model(tiny_model), make_rows([17] * 4)
    expected_nll, _ = take_step(network, execution.eager_backward(network, FP32), split)

    def fail(model: torch.nn.Module) -> None:
        execution_compile(model)
        raise ValueError("the compiler's line\nand others")

    execution_compile = execution.compile_layers
    monkeypatch.setattr(execution, "compile_layers", fail)
    backward = execution.prepare_backward(network, split, 4, "always", 1, FP32)
    printed = capsys.readouterr().out
    assert printed == "train: captured steps: compiled ones fail: ValueError: the compiler's line\n"
    assert not any(module._compiled_call_impl for module in network.modules())
    assert take_step(network, backward, split)[0] == pytest.approx(expected_nll, rel=1e-5)


@on_gpu
def test_a_model_whose_masks_depend_on_values_is_captured(tmp_path, capsys):
    """transformers looks whether a mask hides anything, which waits for the GPU, but not during a capture."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64}
    BartForCausalLM(BartConfig(vocab_size=300, max_position_embeddings=64, **sizes)).save_pretrained(tmp_path)
    network = train_model(tmp_path)
    split = make_rows([17] * 4)
    expected_nll, _ = take_step(network, execution.eager_backward(network, FP32), split)
    backward = execution.prepare_backward(network, split, 4, "never", 1, FP32)
    assert "train: captured steps" in capsys.readouterr().out
    assert take_step(network, backward, split)[0] == pytest.approx(expected_nll, rel=1e-5)


@on_gpu
def test_a_sliding_window_is_captured(tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=300, num_key_value_heads=1, sliding_window=8, **sizes)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    network = train_model(tmp_path)
    split = make_rows([17] * 4)
    expected_nll, expected_gradients = take_step(network, execution.eager_backward(network, FP32), split)
    backward = execution.prepare_backward(network, split, 4, "never", 1, FP32)
    assert "train: captured steps" in capsys.readouterr().out
    nll, gradients = take_step(network, backward, split)
    assert nll == pytest.approx(expected_nll, rel=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-5)
