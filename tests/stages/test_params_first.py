"""Each stage checks the whole of params.yaml before it does anything: a later stage's mistake costs no time."""

import importlib
import subprocess
import sys

import pytest
import tiny
from bad_input import error_line
from dvc_yaml import STAGES

from gpt2lora.pipeline import schemas
from gpt2lora.pipeline.cli import StageError

MISTAKES = {
    "method": ("lorra", "expected one of lora, qlora, full, not 'lorra'"),
    "seed": (-1, "expected an integer of at least 0, below 2**64, not -1"),
    "presets.gpt2.model": (["gpt2"], "expected a string or null, not ['gpt2']"),  # of a preset that is not chosen
    "methods.qlora.bits": (5, "expected 4 or 8, not 5"),  # of a method that is not chosen
    "prepare.fraction": (2.0, "expected a number above 0, at most 1, not 2.0"),
    "tokenize.layout": ("ragged", "expected one of packed, padded, not 'ragged'"),
    "lora.init": ("loftq", "expected another init with method lora: loftq corrects the error of a quantized base"),
    "train.epochs": ("three", "expected an integer, not 'three'"),
    "train.patience": (0, "expected an integer above 0, or null, not 0"),
    "train.seed": (-1, "expected an integer of at least 0, below 2**64, or null, not -1"),
    "evaluate.stride": (4096, "expected 1 to 32, the block size, or null, not 4096"),
}


@pytest.fixture
def no_work(monkeypatch):
    """Fail where a stage starts any work, or imports torch."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("gpt2lora.pipeline.artifacts.verify_digests", lambda *_: pytest.fail("a stage read its input"))


@pytest.mark.parametrize("key", MISTAKES)
def test_a_mistake_anywhere_is_found(stage_folder, key):
    value, expected = MISTAKES[key]
    tiny.set_param(stage_folder, key, value)
    with pytest.raises(StageError) as error:
        schemas.check_params()
    assert error.value.format_message().startswith(f"params.yaml: {key}: {expected}")


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_refuses_the_mistakes_of_all_others(stage_folder, no_work, stage):
    main = importlib.import_module(f"stages.{stage}").main
    for key in ("prepare.fraction", "evaluate.stride"):
        value, expected = MISTAKES[key]
        tiny.set_param(stage_folder, key, value)
        assert error_line(main).startswith(f"params.yaml: {key}: {expected}")
        tiny.set_param(stage_folder, key, {"prepare.fraction": 1.0, "evaluate.stride": None}[key])


@pytest.mark.parametrize(
    ("section", "key", "known"),
    [
        ("", "trian", "it has preset, method, seed, presets, methods, prepare, tokenize, lora, train, evaluate"),
        ("methods.", "mine", "methods has lora, qlora, full"),
    ],
)
def test_an_unknown_section_is_refused(stage_folder, section, key, known):
    file = stage_folder / "params.yaml"
    added = f"{key}: {{}}\n" if not section else f"  {key}: {{}}\n"
    text = file.read_text()
    file.write_text(text + added if not section else text.replace("methods:\n", "methods:\n" + added))
    line = error_line(importlib.import_module("stages.base").main)
    assert line == f"params.yaml: {section}{key}: unknown key; {known}"


def test_the_check_is_quick_and_needs_no_heavy_package():
    code = (
        "import sys, time; started = time.process_time(); from gpt2lora.pipeline import schemas; "
        "schemas.check_params(); print(time.process_time() - started); "
        "assert not {'torch', 'numpy', 'transformers', 'omegaconf'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 0.3


def test_a_user_s_own_preset_is_allowed(stage_folder):
    values = {"model": "m", "model_revision": None, "dataset": "d", "dataset_config": None}
    values |= {"dataset_revision": None, "text_column": None}
    text = (stage_folder / "params.yaml").read_text()
    lines = "".join(f"    {key}: {value or 'null'}\n" for key, value in values.items())
    (stage_folder / "params.yaml").write_text(text.replace("presets:\n", f"presets:\n  mine:\n{lines}"))
    schemas.check_params()
