"""Errors of libraries end in one line, which says whether fp32 helps; too little memory is told elsewhere."""

import pytest
import tiny
import torch
from small_models import NF4, load, new_adapter
from training_steps import make_rows

from gpt2lora.model import errors, loading
from gpt2lora.model.computation_errors import computation_errors
from gpt2lora.pipeline.cli import StageError
from gpt2lora.training import loop, validation


def fail_in(network: torch.nn.Module, *types: torch.dtype) -> None:
    """Let the layers of a model refuse some types, as operators without a kernel do."""

    def hook(module, inputs, output):
        if output.dtype in types:
            raise RuntimeError(f'"rms_norm" not implemented for {output.dtype}\nand a second line')

    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(hook)


@pytest.mark.parametrize("quantization", [None, NF4], ids=["float", "nf4"])
def test_a_model_that_bf16_breaks_says_so(tiny_model, quantization):
    network, split = new_adapter(tiny_model, quantization), make_rows([17] * 4)
    loading.cast_frozen(network, torch.bfloat16)
    fail_in(network, torch.bfloat16)
    with pytest.raises(StageError) as caught:
        loop.fit(network, split, split, tiny.train_params(precision="bf16"), 0)
    assert caught.value.message == (
        'GPT2LMHeadModel cannot be computed in bfloat16 (RuntimeError: "rms_norm" not implemented for torch.bfloat16); '
        "in fp32 it can: -S train.precision=fp32"
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_fails_in_every_precision_gets_no_such_advice(tiny_model, precision):
    network, split = load(tiny_model), make_rows([17] * 4)
    fail_in(network, torch.bfloat16, torch.float32)
    with pytest.raises(StageError, match=r"^GPT2LMHeadModel cannot be computed in .*take another model"):
        loop.fit(network, split, split, tiny.train_params(precision=precision), 0)


def test_an_id_out_of_range_is_no_question_of_precision(tiny_model):
    line = r"cannot be computed in bfloat16 \(IndexError: .*\); take another model"
    with pytest.raises(StageError, match=line), computation_errors(load(tiny_model), torch.bfloat16, "train.precision"):
        raise IndexError("index out of range in self")


def test_a_model_that_fails_in_a_later_validation_says_so(tiny_model, monkeypatch):
    """As one does that changes its weights between training and evaluation."""
    network, split, losses = new_adapter(tiny_model), make_rows([17] * 4), {"first": 5.0}
    monkeypatch.setattr(validation, "validation_loss", lambda *arguments: losses.pop("first"))
    with pytest.raises(StageError, match=r"^GPT2LMHeadModel cannot be computed in float32 \(KeyError: 'first'\)"):
        loop.fit(network, split, split, tiny.train_params(), 0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_told_elsewhere(tiny_model, error):
    for context in (
        errors.library_errors("what", "advice"),
        computation_errors(load(tiny_model), torch.bfloat16, "train.precision"),
    ):
        with pytest.raises(type(error)) as caught, context:
            raise error
        assert caught.value is error


def test_an_adapter_that_peft_refuses_ends_in_one_line(tiny_model, monkeypatch):
    def refuse(*_):
        raise ValueError("Module 'x' is incompatible")

    monkeypatch.setattr("peft.get_peft_model", refuse)
    line = r"PEFT cannot attach an adapter \(ValueError: Module 'x' is incompatible\); set lora\.target_modules"
    with pytest.raises(StageError, match=line):
        loading.load_for_training(tiny_model, "lora", None, tiny.low_rank(), torch.float32)
