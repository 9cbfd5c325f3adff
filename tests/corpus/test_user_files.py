"""Which files of a folder are splits: none is left out without a word, none is taken for a whole one."""

import json
from pathlib import Path

import datasets
import pytest
import tiny
from local_preset import write_params
from training_runs import run_stage

from gpt2lora.corpus import user_files
from gpt2lora.pipeline.cli import StageError
from stages import prepare


def write_files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text\n" * 20)
    return folder


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["train-00000-of-00003", "train-00002-of-00003"], ": number 1 is missing"),
        (["train-00000-of-00003", "train-00001-of-00003"], ": number 2 is missing"),
        (["train-00001-of-00003", "train-00002-of-00003"], ": number 0 is missing"),
        (["train-1-of-3", "train-3-of-3"], ": number 2 is missing"),
        (["train-00001-of-00002"], ": number 0 is missing"),
        (["train_0", "train_2"], ": number 1 is missing"),
        (["train_1", "train_3"], ": number 2 is missing"),
        (["train-0", "train_0", "train_1"], ""),
        (["train-0-of-2", "train-1-of-3"], ": number 2 is missing"),
        (["train", "test-0-of-2"], ": number 1 is missing"),
    ],
)
def test_shards_of_which_some_are_missing_are_refused(tmp_path, names, missing):
    write_files(tmp_path, *(f"{name}.csv" for name in names))
    with pytest.raises(StageError, match=f": expected each shard of one table once{missing}$"):
        user_files.find_files(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002", "train-00001-of-00002"],
        ["train_00001_of_00002", "train_00002_of_00002"],
        ["train-1-of-1"],
        ["train_0", "train_1", "train_10", *(f"train_{number}" for number in range(2, 10))],
        ["train_2020", "train_2022"],
    ],
)
def test_all_shards_of_a_table_are_read(tmp_path, names):
    write_files(tmp_path, *(f"{name}.csv" for name in names))
    files, unused = user_files.find_files(tmp_path)
    assert ([path.stem for path in files["train"]], unused) == (names, [])


def test_files_that_are_not_used_are_said(tmp_path, monkeypatch, tiny_corpus):
    monkeypatch.chdir(write_params(tmp_path, tiny_corpus))
    write_files(tmp_path / "corpus", "train.txt", "valid.txt", "README", "notes.pdf", "picture/test.txt")
    unused = ["eval.txt", "test.md", "testing.txt.gz", "train2.txt", "train_extra.csv", "data/test.txt"]
    write_files(tmp_path / "corpus", *unused)
    tiny.set_param(tmp_path, "presets.local.dataset", "corpus")
    output = run_stage(prepare.main, "--out", "raw")
    assert f"prepare: warning: not used: {', '.join(unused)}: expected splits named train, validation " in output
    assert json.loads(Path("raw/manifest.json").read_text())["unused"] == unused
    for name in unused:
        (Path("corpus") / name).unlink()
    assert "not used" not in run_stage(prepare.main, "--out", "raw")
    assert "unused" not in json.loads(Path("raw/manifest.json").read_text())


def test_splits_that_are_not_used_are_named(tmp_path):
    table = datasets.Dataset.from_dict({"text": ["text"]})
    splits = datasets.DatasetDict({name: table for name in ("train", "dev", "val", "eval", "test_matched")})
    splits.save_to_disk(tmp_path / "saved")
    changes, unused = user_files.write_splits(tmp_path / "saved", "text", None, tmp_path)
    assert (list(changes), unused) == (["train", "validation"], ["val", "eval", "test_matched"])
