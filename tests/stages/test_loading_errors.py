"""A base whose configuration does not fit its weights: the stages that load it report it in one line."""

import shutil
from pathlib import Path

import click
import pytest
import torch
from bad_input import update_json
from click.testing import CliRunner

from gpt2lora.model import layers, loading
from gpt2lora.pipeline import cli


def make_loading_command(folder: Path) -> click.Command:
    """Return a command that only loads a base, as train and evaluate do."""

    def main():
        """Load the base."""
        layers.load_on_meta(folder)
        loading.load_base(folder, None, torch.float32)

    return cli.command(main)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"n_embd": 32},
            "transformer.h.0.attn.c_attn.bias is (192,) in *.safetensors, (96,) by config.json: not a pair",
        ),
        ({"n_layer": 4}, "lack 24 of the model's weights, transformer.h.2.attn.c_attn.bias first"),
        ({"n_head": 3}, "divisible"),
        ({"activation_function": "none such"}, "none such"),
        ({"model_type": "t5"}, "transformers itself cannot load this model"),
    ],
    ids=str,
)
def test_a_configuration_of_other_weights_is_refused(stage_folder, stage_outputs, changes, message):
    broken = shutil.copytree(stage_outputs["base"], stage_folder / "broken")
    update_json(broken / "config.json", **changes)
    result = CliRunner().invoke(make_loading_command(broken))
    assert result.exit_code == 1, result.output
    (line,) = result.output.splitlines()
    assert line.startswith("Error: ") and str(broken) in line and message in line


def test_missing_weights_are_refused(stage_folder, stage_outputs):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(stage_outputs["base"], stage_folder / "broken")
    weights = load_file(broken / "model.safetensors")
    weights.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        cli.StageError, match=r"lack 1 of the model's weights, transformer\.h\.1\.mlp\.c_fc\.weight first"
    ):
        loading.load_base(broken, None, torch.float32)
