"""Bad input of evaluate: one line, before torch is imported wherever that is possible."""

import json
import shutil
import sys

import pytest
import tiny
import torch
from bad_input import error_line
from click.testing import CliRunner
from evaluated_methods import evaluate_inputs

from gpt2lora.model.loading import write_method
from gpt2lora.pipeline.artifacts import digests
from stages import evaluate

HEAVY_MODULES = (
    "torch",
    "transformers",
    "gpt2lora.scoring.log_likelihood",
    "gpt2lora.model.loading",
    "gpt2lora.model.device",
)


def error_line_without_torch(*arguments) -> str:
    """Run evaluate, which must fail before it imports torch; return the last line that it printed."""
    with pytest.MonkeyPatch.context() as patch:
        for name in HEAVY_MODULES:
            patch.setitem(sys.modules, name, None)
        result = CliRunner().invoke(evaluate.main, [*evaluate_inputs("lora"), *map(str, arguments)])
    assert result.exit_code == 1
    return result.output.splitlines()[-1]  # a progress bar may come before


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"stride": 0}, "evaluate.stride: expected an integer above 0, or null, not 0"),
        ({"stride": 33}, "evaluate.stride: expected 1 to 32, the block size, or null, not 33"),
        ({"protocol": "hf", "stride": 33}, "evaluate.stride: expected 1 to 32, the block size, or null, not 33"),
        (
            {"protocol": "lm-eval", "stride": 16},
            "evaluate.stride: expected null, since lm-eval has a stride of its own, not 16",
        ),
        ({"protocol": "wikitext"}, "evaluate.protocol: expected one of native, hf, lm-eval, not 'wikitext'"),
        ({"batch_size": 0}, "evaluate.batch_size: expected an integer above 0, or null, not 0"),
        ({"precision": "fp16"}, "evaluate.precision: expected one of auto, bf16, fp32, not 'fp16'"),
    ],
)
def test_invalid_parameters_are_refused_before_torch_is_loaded(methods_folder, settings, line):
    for key, value in settings.items():
        tiny.set_param(methods_folder, f"evaluate.{key}", value)
    assert error_line_without_torch() == f"Error: params.yaml: {line}"


@pytest.mark.parametrize(("protocol", "text"), [("hf", ""), ("hf", "x"), ("hf", " \n"), ("lm-eval", "")])
def test_a_text_without_a_token_to_predict_is_refused(methods_folder, tmp_path, protocol, text):
    tiny.set_param(methods_folder, "evaluate.protocol", protocol)
    (tmp_path / "test.txt").write_text(text)
    tokens = shutil.copytree("data/tokens", tmp_path / "tokens")
    manifest = json.loads((tokens / "manifest.json").read_text())
    (tokens / "manifest.json").write_text(json.dumps(manifest | {"raw": digests(tmp_path, "*.txt")}))
    line = f"Error: {tmp_path}/test.txt: nothing to score: expected a word at least, and a token to predict"
    assert error_line_without_torch("--raw", tmp_path, "--tokens", tokens) == line


def test_a_damaged_manifest_is_reported(methods_folder, tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    line = error_line_without_torch("--tokens", tmp_path)
    assert line.startswith(f"Error: {tmp_path}/manifest.json is damaged")


def test_an_adapter_of_nan_is_reported(stage_folder, inputs, stage_outputs):
    from safetensors.torch import load_file, save_file

    shutil.copytree(stage_outputs["adapter"], stage_folder / "broken")
    file = stage_folder / "broken" / "adapter_model.safetensors"
    save_file({name: torch.full_like(value, torch.nan) for name, value in load_file(file).items()}, file)
    write_method(stage_folder / "broken", "lora", None, stage_outputs["base"])
    line = error_line(evaluate.main, *inputs["evaluate"], "--adapter", "broken")
    assert line == "evaluate: the loss is nan: the model is broken; train again with a lower learning rate"
