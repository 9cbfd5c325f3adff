"""Files that are missing or cannot be written: one line, and earlier outputs unchanged."""

import errno
import os
from pathlib import Path

import pytest
import tiny
from bad_input import error_line, read_files

from stages import base, evaluate, prepare, tokenize, train

STAGES = {
    "base": base.main,
    "prepare": prepare.main,
    "tokenize": tokenize.main,
    "train": train.main,
    "evaluate": evaluate.main,
}


@pytest.mark.parametrize(
    ("stage", "option", "source"),
    [
        ("tokenize", "--raw", "prepare"),
        ("tokenize", "--base", "base"),
        ("train", "--tokens", "tokenize"),
        ("train", "--base", "base"),
        ("evaluate", "--raw", "prepare"),
        ("evaluate", "--tokens", "tokenize"),
        ("evaluate", "--base", "base"),
        ("evaluate", "--adapter", "train"),
        ("evaluate", "--loss", "train"),
    ],
)
def test_a_missing_input_names_the_stage_that_makes_it(stage_folder, inputs, stage, option, source):
    line = error_line(STAGES[stage], *inputs[stage], option, "nowhere")
    assert line.startswith("nowhere")
    assert line.endswith(f"is missing: run `dvc repro {source}`, or python -m stages.{source}")


@pytest.fixture
def full_disk(tmp_path, request) -> Path:
    """A disk that holds outputs of an earlier run and has `request.param` KB left."""
    disk = tmp_path / "disk"
    with tiny.mounted(disk, "64k"):
        for name in ("folder", "metrics"):
            (disk / name).mkdir()
            for file in ("earlier", "train.json", "train_timings.json", "loss.csv"):
                (disk / name / file).write_text("earlier output")
        (disk / "eval.json").write_text("earlier output")
        with pytest.raises(OSError, match="No space left"):
            (disk / "filling").write_bytes(bytes(2**17))
        os.truncate(disk / "filling", (disk / "filling").stat().st_size - 1024 * request.param)
        yield disk


@pytest.mark.parametrize(
    ("name", "full_disk"),
    [*((name, kb) for name in ("base", "prepare", "tokenize", "train", "full") for kb in (0, 8)), ("evaluate", 0)],
    indirect=["full_disk"],
)
def test_a_full_disk_leaves_the_earlier_outputs(stage_folder, inputs, full_disk, name):
    stage = "train" if name == "full" else name
    tiny.set_param(stage_folder, "method", "full" if name == "full" else "lora")
    outputs = {"train": ["--out", full_disk / "folder", "--metrics", full_disk / "metrics"]}
    outputs["evaluate"] = ["--out", full_disk / "eval.json"]
    loss_file = str(full_disk / "metrics/loss.csv")  # written at each validation, also by a run that fails later
    before = {path: content for path, content in read_files(full_disk).items() if path != loss_file}
    line = error_line(STAGES[stage], *inputs.get(stage, ()), *outputs.get(stage, ["--out", full_disk / "folder"]))
    assert "No space left on device" in line
    assert str(full_disk) in line
    assert {path: content for path, content in read_files(full_disk).items() if path != loss_file} == before


def test_an_output_path_below_a_file_is_reported(stage_folder, inputs):
    (stage_folder / "data" / "file").write_text("a file")
    line = error_line(tokenize.main, *inputs["tokenize"], "--out", "data/file/tokens")
    assert "data/file" in line and line.endswith("no output is half written")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_an_output_that_cannot_be_written_is_reported(stage_folder, monkeypatch, number):
    def fail(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_text", fail)
    assert os.strerror(number) in error_line(prepare.main)
