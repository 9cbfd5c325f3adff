"""DVC experiments, in the workspace, in temporary folders and in a queue: which stages run, and what changes."""

import csv
import io
import json
import math
from pathlib import Path

import pytest
from dvc_yaml import computing_stages_run
from project_changes import METRICS, changed_files
from tiny import run

FIRST_STAGES, LAST_STAGES = ["base", "prepare", "tokenize"], ["train", "evaluate"]
LINKS = ["sources"]  # runs in each temporary folder, and takes no time

pytestmark = pytest.mark.timeout(300)


def experiments(project: Path) -> dict[str, dict[str, str]]:
    """Return the rows of `dvc exp show`, by experiment."""
    rows = csv.DictReader(io.StringIO(run(project, "dvc", "exp", "show", "--csv")))
    return {row["Experiment"] or row["rev"]: row for row in rows}


@pytest.mark.slow
def test_an_experiment_in_the_workspace(finished):
    output = run(finished, "dvc", "exp", "run", "--name", "quantized", "-S", "method=qlora")
    assert computing_stages_run(output) == ["train", "evaluate"]
    expected = {"params.yaml", "dvc.lock", *METRICS} - {"metrics/plots/learning_rate.png"}  # drawn with the same bytes
    assert changed_files(finished) == expected

    changes = json.loads(run(finished, "dvc", "metrics", "diff", "--json"))
    base_bytes = changes["metrics/train.json"]["frozen_base_bytes"]
    assert base_bytes["new"] < base_bytes["old"]
    assert changes["metrics/eval.json"]["tuned.loss"]["diff"] != 0
    assert changes["metrics/train.json"].pop("trained_by") == {"old": "lora", "new": "qlora"}
    assert changes["metrics/train.json"].pop("base_bits")["new"] == 4
    rows = [row for file in changes.values() for row in file.values()]
    assert all(math.isfinite(number) for row in rows for number in row.values())

    table = experiments(finished)
    assert table["quantized"]["method"] == "qlora"
    assert table["main"]["method"] == "lora"
    assert table["quantized"]["tuned.loss"] == table["workspace"]["tuned.loss"] != table["main"]["tuned.loss"]

    run(finished, "dvc", "plots", "show")
    page = (finished / "dvc_plots/index.html").read_text(encoding="utf-8")
    assert "Loss while training" in page
    assert "validation_loss" in page
    assert "metrics_plots_loss_by_position.png" in page  # the picture is shown without a network, too
    assert changed_files(finished) == expected


@pytest.mark.slow
def test_an_experiment_in_a_temporary_folder(finished):
    output = run(finished, "dvc", "exp", "run", "--temp", "--name", "apart", "-S", "train.learning_rate=5e-5")
    assert computing_stages_run(output) == ["train", "evaluate"]
    assert changed_files(finished) == set()
    assert float(experiments(finished)["apart"]["train.learning_rate"]) == 5e-5

    # The experiment carries its report. The records of stages that it did not run are those of the first run.
    before = json.loads((finished / "metrics/environment.json").read_text(encoding="utf-8"))
    run(finished, "dvc", "exp", "apply", "apart")
    after = json.loads((finished / "metrics/environment.json").read_text(encoding="utf-8"))
    same = {stage for stage in after if after[stage] == before[stage]}
    assert same == {"base", "prepare", "tokenize"}
    loss = json.loads((finished / "metrics/eval.json").read_text(encoding="utf-8"))["tuned"]["loss"]
    assert f"| {loss:.4f} |" in (finished / "metrics/report.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_queued_experiments(finished):
    run(finished, "dvc", "exp", "run", "--queue", "-S", "method=lora,qlora", "-S", "train.learning_rate=0.005")
    output = run(finished, "dvc", "exp", "run", "--run-all")
    assert computing_stages_run(output) == ["train", "evaluate"] * 2
    assert changed_files(finished) == set()
    table = experiments(finished).values()
    done = [row for row in table if row["State"] == "Success" and row["train.learning_rate"] == "0.005"]
    assert sorted(row["method"] for row in done) == ["lora", "qlora"]
    assert all(float(row["tuned.loss"]) < float(row["base.loss"]) for row in done)


@pytest.mark.slow
def test_temporary_experiments_reuse_the_first_stages(project):
    """No dvc.lock is in git. With one, DVC would run stages whose outputs its cache lacks, and ignore its run cache."""
    for method, expected in (("lora", [*LINKS, *FIRST_STAGES, *LAST_STAGES]), ("qlora", [*LINKS, *LAST_STAGES])):
        output = run(project, "dvc", "exp", "run", "--temp", "--name", method, "-S", f"method={method}")
        assert computing_stages_run(output) == [stage for stage in expected if stage not in LINKS]
    assert run(project, "git", "status", "--short") == ""


@pytest.mark.slow
def test_queued_experiments_reuse_the_first_stages(project):
    run(project, "dvc", "exp", "run", "--queue", "-S", "method=lora,qlora")
    output = run(project, "dvc", "exp", "run", "--run-all")
    assert computing_stages_run(output) == [*FIRST_STAGES, *LAST_STAGES, *LAST_STAGES]
    assert run(project, "git", "status", "--short") == ""


@pytest.mark.slow
def test_a_queue_over_the_seeds_of_training_shares_everything_else(project):
    """The seed of training decides neither the base nor the splits, so these are made once."""
    run(project, "dvc", "exp", "run", "--queue", "-S", "train.seed=1,2")
    output = run(project, "dvc", "exp", "run", "--run-all")
    assert computing_stages_run(output) == [*FIRST_STAGES, *LAST_STAGES, *LAST_STAGES]
    rows = [row for row in experiments(project).values() if row["State"] == "Success"]
    assert sorted(row["train.seed"] for row in rows) == ["1", "2"]
    assert len({row["base.loss"] for row in rows}) == 1
    assert len({row["tuned.loss"] for row in rows}) == 2


def test_an_unknown_method_stops_before_any_stage(finished):
    output = run(finished, "dvc", "exp", "run", "-S", "method=typo", fails=True)
    assert computing_stages_run(output) == []
    assert "methods.typo" in output
