"""Parameters and inputs with which train cannot train: one line, and earlier outputs unchanged."""

import shutil

import pytest
import tiny
from bad_input import error_line

from gpt2lora.model import loading
from stages import train


def test_an_unknown_method_is_refused(stage_folder, inputs):
    tiny.set_param(stage_folder, "method", "typo")
    line = error_line(train.main, *inputs["train"])
    assert line == "params.yaml: method: expected one of lora, qlora, full, not 'typo'"


def test_a_method_that_a_user_added_is_refused(stage_folder, inputs):
    tiny.set_param(stage_folder, "methods", {"mine": {}})
    tiny.set_param(stage_folder, "method", "mine")
    line = error_line(train.main, *inputs["train"])
    assert line == "params.yaml: method: expected one of lora, qlora, full, not 'mine'"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.learning_rate", 0.0, "a number above 0"),
        ("train.learning_rate", -1e-3, "a number above 0"),
        ("lora.r", 0, "an integer above 0"),
        ("train.epochs", 0, "an integer above 0"),
        ("lora.dropout", 1.0, "a number of at least 0, below 1"),
        ("seed", -1, "an integer of at least 0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_train(stage_folder, inputs, key, value, expected):
    tiny.set_param(stage_folder, key, value)
    line = error_line(train.main, *inputs["train"])
    assert line.startswith(f"params.yaml: {key}: expected {expected}")
    assert line.endswith(f", not {value!r}")


def test_an_unknown_target_module_is_refused(stage_folder, inputs):
    tiny.set_param(stage_folder, "lora.target_modules", ["q_proj"])
    line = error_line(train.main, *inputs["train"])
    names = "attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj"
    assert line == f"params.yaml: lora.target_modules: expected all-linear or names among {names}, not 'q_proj'"


def test_layers_beyond_the_last_are_refused(stage_folder, inputs):
    tiny.set_param(stage_folder, "lora.layers", "1-5")
    line = error_line(train.main, *inputs["train"])
    assert line == "params.yaml: lora.layers: expected all, or numbers from 0 to 1, the layers of this model, not 2"


@pytest.mark.parametrize(
    ("method", "init", "expected"),
    [
        ("qlora", "pissa", "default, orthogonal or loftq with method qlora: pissa takes floats out of the base"),
        ("qlora", "olora", "default, orthogonal or loftq with method qlora: olora takes floats out of the base"),
        ("lora", "loftq", "another init with method lora: loftq corrects the error of a quantized base"),
    ],
)
def test_an_init_that_does_not_fit_the_method_is_refused(stage_folder, inputs, method, init, expected):
    tiny.set_param(stage_folder, "method", method)
    tiny.set_param(stage_folder, "lora.init", init)
    assert error_line(train.main, *inputs["train"]) == f"params.yaml: lora.init: expected {expected}, not {init!r}"


def test_a_rank_above_that_of_a_layer_is_refused(stage_folder, inputs):
    tiny.set_param(stage_folder, "lora.init", "pissa")
    tiny.set_param(stage_folder, "lora.r", 65)
    line = error_line(train.main, *inputs["train"])
    assert line == "params.yaml: lora.r: expected at most 64, the rank of the smallest layer, with this init, not 65"


def test_a_lora_plus_ratio_with_method_full_is_refused(stage_folder, inputs):
    tiny.set_param(stage_folder, "method", "full")
    tiny.set_param(stage_folder, "train.lora_plus_ratio", 16.0)
    line = error_line(train.main, *inputs["train"])
    assert line == "params.yaml: train.lora_plus_ratio: expected 1 with full, not 16.0"


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("qlora", "lora.target_modules", ["q_proj"]),
        ("qlora", "lora.layers", [7]),
        ("qlora", "lora.init", "pissa"),
        ("qlora", "lora.bits", 2),
        ("qlora", "methods.qlora.bits", 5),
    ],
)
def test_invalid_parameters_are_refused_before_loading(stage_folder, inputs, monkeypatch, method, key, value):
    monkeypatch.setattr(loading, "load_base", lambda *_: pytest.fail("the base was loaded"))
    tiny.set_param(stage_folder, "method", method)
    tiny.set_param(stage_folder, key, value)
    assert error_line(train.main, *inputs["train"]).startswith(f"params.yaml: {key}: ")


def test_damaged_token_arrays_are_reported(stage_folder, inputs, stage_outputs):
    shutil.copytree(stage_outputs["tokens"], stage_folder / "tokens")
    (stage_folder / "tokens" / "train.npy").write_bytes(b"no array")
    line = error_line(train.main, *inputs["train"], "--tokens", "tokens")
    assert line.startswith("tokens/train.npy is damaged")


@pytest.mark.parametrize("batch_size", [8, 10_000], ids=["several steps", "one step"])
def test_a_learning_rate_that_is_too_high_is_reported(stage_folder, inputs, batch_size):
    tiny.set_param(stage_folder, "train.learning_rate", 1e30)
    tiny.set_param(stage_folder, "train.batch_size", batch_size)
    line = error_line(train.main, *inputs["train"])
    assert "loss is nan" in line
    assert "lower train.learning_rate" in line
