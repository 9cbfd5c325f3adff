"""sources: links to the user's own model and texts, with which DVC sees when they change."""

import json
from pathlib import Path

import pytest
import tiny
from bad_input import error_line
from training_runs import run_stage

from gpt2lora.sources import hub
from stages import sources

COMMIT = "1" * 40


def paths() -> dict[str, str | None]:
    return json.loads(Path("data/sources/paths.json").read_text())


def test_own_files_are_linked_by_their_full_path(stage_folder):
    run_stage(sources.main)
    for name, source in (("model", "model"), ("dataset", "corpus")):
        assert paths()[name] == str(stage_folder / source)
        assert Path(f"data/sources/{name}").readlink() == stage_folder / source


@pytest.mark.parametrize("preset", ["gpt2", "sample"])
def test_what_is_not_on_this_disk_has_a_constant_file(stage_folder, preset):
    run_stage(sources.main)
    tiny.set_param(stage_folder, "preset", preset)
    run_stage(sources.main)
    assert paths() == {"model": None, "dataset": None}
    for name in ("model", "dataset"):
        assert not Path(f"data/sources/{name}").is_symlink()
        assert Path(f"data/sources/{name}").read_text() == sources.ELSEWHERE
    assert (stage_folder / "model/config.json").exists()


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_an_id_without_a_revision_may_have_been_a_path(stage_folder, monkeypatch, kind):
    monkeypatch.setattr(hub, "_suggest_commit", lambda kind, name, revision: f"write {COMMIT}")
    tiny.set_param(stage_folder, f"presets.local.{kind}", "gpt2")
    assert error_line(sources.main) == (
        f"{kind} gpt2: expected a full commit hash as its revision, not null: write {COMMIT}; "
        f"if a path was meant: 'gpt2' is no file or folder, seen from {stage_folder}"
    )
    tiny.set_param(stage_folder, f"presets.local.{kind}_revision", COMMIT)
    run_stage(sources.main)


@pytest.mark.parametrize("name", ["mytext.txt", "texts/my.jsonl", "my.csv.gz", "model.safetensors"])
def test_a_file_that_does_not_exist_may_be_an_id(stage_folder, name):
    tiny.set_param(stage_folder, "presets.local.dataset", name)
    assert error_line(sources.main) == (
        f"params.yaml: presets.local.dataset: {name!r} does not exist, seen from {stage_folder}; "
        "as an id on the hub it needs its full commit hash in presets.local.dataset_revision"
    )


def test_a_relative_path_in_a_temporary_folder_of_dvc_is_explained(stage_folder, monkeypatch):
    folder = stage_folder / ".dvc/tmp/exps/tmp1"
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_bytes((stage_folder / "params.yaml").read_bytes())
    tiny.set_param(folder, "presets.local.model", "./model")
    monkeypatch.chdir(folder)
    line = error_line(sources.main)
    assert line.endswith(f"does not exist, seen from {folder}, a temporary folder of DVC's: write the full path")
