"""Inputs that tokenize cannot use: one line, and earlier outputs unchanged."""

import shutil

import pytest
import tiny
from bad_input import error_line, update_json

from stages import tokenize


def test_a_block_longer_than_the_model_s_context_is_refused(stage_folder, inputs):
    tiny.set_param(stage_folder, "tokenize.block_size", 65)
    line = error_line(tokenize.main, *inputs["tokenize"])
    assert line == "params.yaml: tokenize.block_size: expected at most 64, the model's n_positions, not 65"


@pytest.mark.parametrize("settings", ["{", "[]", '{"eos_token": {}}', '{"eos_token": 1}'])
def test_a_missing_end_of_text_token_is_reported(stage_folder, stage_outputs, settings):
    model = shutil.copytree(stage_outputs["base"], stage_folder / "broken")
    (model / "manifest.json").unlink()
    (model / "tokenizer_config.json").write_text(settings)
    update_json(model / "config.json", eos_token_id=None)
    line = error_line(tokenize.main, "--raw", stage_outputs["raw"], "--base", model)
    assert "broken" in line and ("end-of-text" in line or "is damaged" in line)
