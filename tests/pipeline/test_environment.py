"""The record of a stage's run: duration, commit, versions; and records that cannot be read."""

import time

import pytest

from gpt2lora.pipeline import environment
from gpt2lora.pipeline.cli import StageError


def test_the_error_for_a_damaged_record_names_the_stage_to_run(tmp_path):
    (tmp_path / "environment").mkdir()
    (tmp_path / "environment/train.json").write_text("{")
    with pytest.raises(StageError, match=r"environment/train.json is damaged .* `dvc repro --force train`"):
        environment.read_record(tmp_path / "adapter", "train")


def test_the_duration_counts_from_the_start():
    assert environment.describe_run(time.perf_counter() - 100)["seconds"] == pytest.approx(100, abs=1)


def test_without_git_the_commit_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    record = environment.describe_run(time.perf_counter())
    assert (record["commit"], record["uncommitted_changes"]) == (None, None)


def test_the_version_of_a_missing_package_is_none(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("numpy", "no-such-package"))
    versions = environment.describe_run(time.perf_counter())["versions"]
    assert versions["numpy"] and versions["no-such-package"] is None
