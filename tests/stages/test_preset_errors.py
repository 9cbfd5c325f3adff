"""Invalid presets: base and prepare report them in one line, and leave earlier outputs unchanged."""

import pytest
import tiny
from bad_input import error_line

from stages import base, prepare

MODEL_AND_DATASET = pytest.mark.parametrize(("stage", "key"), [(base.main, "model"), (prepare.main, "dataset")])


@pytest.mark.parametrize("stage", [base.main, prepare.main])
def test_an_unknown_preset_is_refused(stage_folder, stage):
    tiny.set_param(stage_folder, "preset", "typo")
    assert error_line(stage) == "params.yaml: preset: expected one of gpt2, sample, local, not 'typo'"


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere", "two words"])
@MODEL_AND_DATASET
def test_a_path_that_does_not_exist_is_refused(stage_folder, stage, key, path):
    tiny.set_param(stage_folder, f"presets.local.{key}", path)
    line = error_line(stage)
    assert line == f"params.yaml: presets.local.{key}: {path!r} does not exist, seen from {stage_folder}"


@MODEL_AND_DATASET
def test_an_empty_preset_is_refused(stage_folder, stage, key):
    tiny.set_param(stage_folder, f"presets.local.{key}", None)
    assert error_line(stage) == f"params.yaml: presets.local.{key}: expected a folder or an id on the hub, not null"


@MODEL_AND_DATASET
def test_a_revision_of_a_local_folder_is_refused(stage_folder, stage, key):
    tiny.set_param(stage_folder, f"presets.local.{key}_revision", "main")
    line = error_line(stage)
    assert line.startswith(f"params.yaml: presets.local.{key}_revision: expected null, ")
