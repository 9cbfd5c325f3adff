"""Files in data/ that changed since a stage wrote them: the stage that reads them names them, and writes nothing."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
from bad_input import options, refusal
from click.testing import CliRunner

from gpt2lora.commands import dequantize, export, generate
from stages import evaluate, tokenize, train

STAGES = {"tokenize": tokenize.main, "train": train.main, "evaluate": evaluate.main}


def flip(file: Path) -> None:
    """Change one bit of the last byte, which holds a value and no header."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty])
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
def test_a_damaged_file_is_named_by_the_stage_that_reads_it(data, stage, name, damage):
    damage(data / name)
    line = refusal(STAGES[stage], *options(stage))
    assert line.startswith(f"data/{name} is damaged")
    assert "dvc repro --force" in line


def test_dvc_puts_back_a_base_that_changed(project):
    file = project / "data/base/model.safetensors"
    tiny.run(project, "dvc", "repro", "base")
    before = file.read_bytes()
    file.unlink()  # DVC may have linked it to its cache
    file.write_bytes(before)
    flip(file)
    assert "Stage 'base' is cached - skipping run" in tiny.run(project, "dvc", "repro", "base")
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_a_manifest_that_is_damaged(data, content):
    for stage, maker, folder in (
        ("tokenize", "base", "base"),
        ("tokenize", "prepare", "raw"),
        ("train", "tokenize", "tokens"),
    ):
        file = data / folder / "manifest.json"
        before = file.read_text()
        file.write_text(content)
        line = refusal(STAGES[stage], *options(stage))
        assert line.startswith(f"{file} is damaged")
        assert line.endswith(f"run `dvc repro --force {maker}`")
        file.write_text(before)


@pytest.mark.parametrize("key", ["files", "base", "raw", "block_size"])
def test_a_manifest_of_tokens_that_lacks_a_part(data, key):
    file = data / "tokens" / "manifest.json"
    file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != key}))
    for stage in ("train", "evaluate"):
        assert refusal(STAGES[stage], *options(stage)) == (
            f"data/tokens/manifest.json is damaged ('{key}'): run `dvc repro --force tokenize`"
        )


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_a_record_of_the_method_that_is_damaged(data, content):
    (data / "adapter" / "method.json").write_text(content)
    for stage, arguments in ((evaluate.main, options("evaluate")), (export.main, ["--out", "exported"])):
        line = refusal(stage, *arguments)
        assert line.startswith("data/adapter/method.json is damaged")
        assert line.endswith("run `dvc repro --force train`")


def test_a_text_that_is_no_longer_utf_8(data):
    (data / "raw" / "manifest.json").unlink()  # a folder that `prepare` did not write
    with (data / "raw" / "train.txt").open("ab") as file:
        file.write(b"\xff")
    line = refusal(tokenize.main, *options("tokenize"))
    assert line.startswith("data/raw/train.txt is not UTF-8")
    assert line.endswith("run `dvc repro --force prepare`")


@pytest.mark.parametrize("damage", [cut, flip, empty])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_generate_and_export_name_a_damaged_file(data, name, damage):
    damage(data / "base" / name)
    for line in (refusal(generate.main, "the river", "--base"), refusal(export.main, "--out", "exported")):
        assert line.startswith(f"data/base/{name} is damaged")
    assert not Path("exported").exists()


def test_expand_names_a_damaged_adapter(data):
    shutil.rmtree(data / "adapter")
    tiny.write_adapter(data / "adapter", data / "base", bits=8)
    cut(data / "adapter" / "adapter_quantized.safetensors")
    line = refusal(dequantize.main, "--out", "plain")
    assert line.startswith("data/adapter/adapter_quantized.safetensors is damaged")


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_tokenizer_that_changed_since_tokenize_is_named(data, stage):
    file = data / "base" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"].pop()
    file.write_text(json.dumps(content))
    line = refusal(STAGES[stage], *options(stage))
    assert line.startswith(
        "data/base/tokenizer.json is damaged, or not the one that data/tokens/manifest.json recorded"
    )


def test_an_adapter_of_another_base_of_the_same_shape_is_refused(data, tmp_path, tiny_corpus):
    other = tiny.write_model(tmp_path / "other", tiny_corpus, seed=1)
    line = refusal(export.main, "--out", "exported", "--base", other, "--adapter", "data/adapter")
    assert line.startswith(
        f"{other}/model.safetensors is damaged, or not the one that data/adapter/method.json recorded"
    )


def test_what_is_recorded_leaves_the_folders_to_transformers_and_peft(data):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(data / "base"), data / "adapter")
    assert any("lora_" in name for name in network.state_dict())
    result = CliRunner().invoke(evaluate.main, options("evaluate"), catch_exceptions=False)
    assert result.exit_code == 0, result.output
