"""dvc repro: which stages a change reruns, and what a failed stage leaves behind."""

import os
import shutil
from pathlib import Path

import pytest
from dvc_yaml import computing_stages_run, declared_files, stages_run
from project_changes import METRICS, changed_files
from tiny import run, set_param

pytestmark = pytest.mark.timeout(300)


def repro(project: Path) -> list[str]:
    """Return the stages that `dvc repro` runs. It must not restore outputs of another test from DVC's run cache."""
    return stages_run(run(project, "dvc", "repro", "--no-run-cache"))


def test_a_first_run_adds_only_the_lock_file_and_metrics(finished):
    added = run(finished, "git", "show", "--format=", "--name-status", "HEAD").split("\n")
    assert set(filter(None, added)) == {f"A\t{name}" for name in {"dvc.lock", *METRICS}}


def test_nothing_reruns_when_nothing_changed(finished):
    before = os.times()
    assert repro(finished) == []
    after = os.times()
    # Of the CPU, not of the clock: other tests run beside this one.
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"dvc repro with nothing to do: {seconds:.2f} s of the CPU")
    assert seconds < 6
    assert changed_files(finished) == set()


def test_dvc_restores_a_changed_base(finished):
    file = finished / "data/base/model.safetensors"
    before = file.read_bytes()
    file.unlink()  # it may be a link to DVC's cache
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert "Stage 'base' is cached - skipping run" in run(finished, "dvc", "repro", "base")
    assert file.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"method": "full"}, "train evaluate"),
        ({"train.learning_rate": 0.02, "lora.r": 3}, "train evaluate"),
        ({"tokenize.block_size": 24}, "tokenize train evaluate"),
        ({"evaluate.batch_size": 5}, "evaluate"),
        ({"evaluate.protocol": "hf", "evaluate.stride": 16}, "evaluate"),
        ({"prepare.fraction": 0.5}, "prepare tokenize train evaluate"),
        # Of a method and presets that are not chosen:
        ({"methods.qlora.bits": 8, "methods.qlora.quant_type": "fp4", "methods.qlora.double_quant": False}, ""),
        ({"presets.gpt2.model": "other/model", "presets.gpt2.dataset": "other/data", "presets.sample.model": None}, ""),
    ],
    ids=lambda case: case if isinstance(case, str) else next(iter(case)),
)
def test_a_parameter_reruns_the_stages_that_read_it(finished, values, expected):
    for key, value in values.items():
        set_param(finished, key, value)
    assert repro(finished) == expected.split()
    assert changed_files(finished) <= {"params.yaml", "dvc.lock", *METRICS}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("params.yaml", ""),
        ("stages/train.py", "train"),  # evaluate need not run, since the adapter has the same bytes
    ],
)
def test_a_comment_reruns_the_stages_that_use_the_file(finished, name, expected):
    with (finished / name).open("a", encoding="utf-8") as file:
        file.write("# a comment\n")
    assert repro(finished) == expected.split()


@pytest.mark.slow
def test_own_files_that_change_rerun_the_stages_that_read_them(finished, tmp_path, tiny_model, tiny_corpus):
    corpus = shutil.copytree(tiny_corpus, tmp_path / "own corpus")
    (corpus / "test.txt").chmod(0o444)
    corpus.chmod(0o755)
    set_param(finished, "presets.local.dataset", str(corpus))
    run(finished, "dvc", "repro")
    with (corpus / "train.txt").open("a", encoding="utf-8") as file:
        file.write(" The river reached the coast . \n")
    assert repro(finished) == ["prepare", "tokenize", "train", "evaluate"]
    assert repro(finished) == []

    # Another preset replaces the links. DVC has neither removed what they pointed to nor changed its permissions.
    before = {path.name: (path.stat().st_mode, path.read_bytes()) for path in corpus.iterdir()}
    run(finished, "git", "checkout", "params.yaml")
    run(finished, "dvc", "repro", "--force", "--single-item", "sources")
    run(finished, "dvc", "repro", "prepare", "--force")
    assert "own corpus" not in (finished / "data/sources/paths.json").read_text()
    assert {path.name: (path.stat().st_mode, path.read_bytes()) for path in corpus.iterdir()} == before
    assert corpus.stat().st_mode & 0o777 == 0o755
    assert before["test.txt"][0] & 0o777 == 0o444


@pytest.mark.slow
def test_a_failed_stage_loses_no_output(finished):
    def read_outputs() -> dict[str, bytes]:
        files = [path for folder in ("data", "metrics") for path in (finished / folder).rglob("*") if path.is_file()]
        return {path.relative_to(finished).as_posix(): path.read_bytes() for path in files}

    before = read_outputs()
    assert {name.split("/")[1] for name in before} >= {"adapter", "base", "raw", "tokens", "eval.json", "train.json"}
    set_param(finished, "train.learning_rate", -1)
    output = run(finished, "dvc", "repro", fails=True)
    assert stages_run(output) in (["train"], ["sources"])  # the first that runs checks all of params.yaml
    assert "train.learning_rate" in output

    # DVC removes the outputs of a stage before it runs it. With the old value, the run cache restores them.
    removed = tuple(declared_files("train", "outs", "metrics", "plots"))
    after = read_outputs()
    assert all(after[name] == content for name, content in before.items() if not name.startswith(removed))
    run(finished, "git", "checkout", "params.yaml")
    assert computing_stages_run(run(finished, "dvc", "repro")) == []
    assert read_outputs() == before
    assert changed_files(finished) == set()
