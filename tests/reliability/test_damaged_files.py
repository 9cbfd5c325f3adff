"""Files in data/ that changed after a stage wrote them: the stage that reads them names them, and writes nothing."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
from bad_input import error_line, input_options
from click.testing import CliRunner

from gpt2lora.commands import dequantize, export, generate
from stages import evaluate, tokenize, train

STAGES = {"tokenize": tokenize.main, "train": train.main, "evaluate": evaluate.main}


def flip_bit(file: Path) -> None:
    """Change one bit of the last byte, which belongs to a value, not to a header."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def empty(file: Path) -> None:
    file.write_bytes(b"")


EVERY_DAMAGE = pytest.mark.parametrize("damage", [truncate, flip_bit, empty])


@EVERY_DAMAGE
@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("tokenize", "base/model.safetensors"),
        ("train", "tokens/train.npy"),
        ("train", "tokens/validation.lengths.npy"),
        ("evaluate", "tokens/test.npy"),
        ("train", "base/model.safetensors"),
        ("evaluate", "base/model.safetensors"),
        ("evaluate", "adapter/adapter_model.safetensors"),
        ("evaluate", "adapter/adapter_config.json"),
        ("evaluate", "raw/test.txt"),
        ("tokenize", "raw/train.txt"),
        ("tokenize", "base/config.json"),
        ("train", "base/config.json"),
    ],
)
def test_a_stage_names_the_damaged_file_that_it_reads(data, stage, name, damage):
    damage(data / name)
    line = error_line(STAGES[stage], *input_options(stage))
    assert line.startswith(f"data/{name} is damaged")
    assert "dvc repro --force" in line


# Manifests and records


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_a_damaged_manifest_is_named(data, content):
    for stage, source, folder in (
        ("tokenize", "base", "base"),
        ("tokenize", "prepare", "raw"),
        ("train", "tokenize", "tokens"),
    ):
        file = data / folder / "manifest.json"
        before = file.read_text()
        file.write_text(content)
        line = error_line(STAGES[stage], *input_options(stage))
        assert line.startswith(f"{file} is damaged")
        assert line.endswith(f"run `dvc repro --force {source}`")
        file.write_text(before)


@pytest.mark.parametrize("key", ["files", "base", "raw", "block_size"])
def test_a_key_missing_in_the_token_manifest_is_named(data, key):
    file = data / "tokens" / "manifest.json"
    file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != key}))
    for stage in ("train", "evaluate"):
        assert error_line(STAGES[stage], *input_options(stage)) == (
            f"data/tokens/manifest.json is damaged ('{key}'): run `dvc repro --force tokenize`"
        )


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_a_damaged_method_file_is_named(data, content):
    (data / "adapter" / "method.json").write_text(content)
    for command, arguments in ((evaluate.main, input_options("evaluate")), (export.main, ["--out", "exported"])):
        line = error_line(command, *arguments)
        assert line.startswith("data/adapter/method.json is damaged")
        assert line.endswith("run `dvc repro --force train`")


def test_digests_do_not_disturb_transformers_and_peft(data):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(data / "base"), data / "adapter")
    assert any("lora_" in name for name in model.state_dict())
    result = CliRunner().invoke(evaluate.main, input_options("evaluate"), catch_exceptions=False)
    assert result.exit_code == 0, result.output


# Files that do not belong together


def test_a_text_that_is_no_longer_utf8_is_named(data):
    (data / "raw" / "manifest.json").unlink()  # as in a folder that `prepare` did not write
    with (data / "raw" / "train.txt").open("ab") as file:
        file.write(b"\xff")
    line = error_line(tokenize.main, *input_options("tokenize"))
    assert line.startswith("data/raw/train.txt is not UTF-8")
    assert line.endswith("run `dvc repro --force prepare`")


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_tokenizer_changed_after_tokenize_is_named(data, stage):
    file = data / "base" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"].pop()
    file.write_text(json.dumps(content))
    line = error_line(STAGES[stage], *input_options(stage))
    assert line.startswith(
        "data/base/tokenizer.json is damaged, or not the one that data/tokens/manifest.json recorded"
    )


def test_an_adapter_of_another_base_is_refused(data, tmp_path, tiny_corpus):
    """The other base has the same shape."""
    other = tiny.write_model(tmp_path / "other", tiny_corpus, seed=1)
    line = error_line(export.main, "--out", "exported", "--base", other, "--adapter", "data/adapter")
    assert line.startswith(
        f"{other}/model.safetensors is damaged, or not the one that data/adapter/method.json recorded"
    )


# Commands


@EVERY_DAMAGE
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_generate_and_export_name_a_damaged_file(data, name, damage):
    damage(data / "base" / name)
    for line in (error_line(generate.main, "the river", "--base"), error_line(export.main, "--out", "exported")):
        assert line.startswith(f"data/base/{name} is damaged")
    assert not Path("exported").exists()


def test_dequantize_names_a_damaged_adapter(data):
    shutil.rmtree(data / "adapter")
    tiny.write_adapter(data / "adapter", data / "base", bits=8)
    truncate(data / "adapter" / "adapter_quantized.safetensors")
    line = error_line(dequantize.main, "--out", "plain")
    assert line.startswith("data/adapter/adapter_quantized.safetensors is damaged")
