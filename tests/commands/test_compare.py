"""compare: what `dvc exp show` knows of experiments, as a table and a picture; what happens where it knows little."""

import json
import re
from pathlib import Path

import pytest
import tiny
from pictures import check_layout, share, watched
from PIL import Image

from gpt2lora.commands import compare
from gpt2lora.evaluation import plots

COUNTS = {"predicted_tokens": 1282, "words": 430, "bytes": 2231, "windows": 41}
PIPELINE = """
stages:
  train:
    cmd: python -c "raise SystemExit('this never runs')"
    params: [method]
    metrics:
      - metrics/train.json:
          cache: false
metrics:
  - metrics/eval.json
"""


def write_metrics(project: Path, tuned: float, frozen: int, adapter: int, base: float = 30.0, **counts: int) -> None:
    scores = {"base": {"perplexity": base}, "tuned": {"perplexity": tuned}} | COUNTS | counts
    training = {"frozen_base_bytes": frozen, "adapter_bytes": adapter, "trainable_parameters": 2_359_296}
    (project / "metrics").mkdir(exist_ok=True)
    (project / "metrics/eval.json").write_text(json.dumps(scores))
    (project / "metrics/train.json").write_text(json.dumps(training))


def save(project: Path, name: str, method: str, *figures: float, **counts: int) -> None:
    """Save the workspace as an experiment, with figures of its own."""
    tiny.set_param(project, "method", method)
    write_metrics(project, *figures, **counts)
    tiny.run(project, "dvc", "exp", "save", "--quiet", "--force", "--name", name)
    tiny.run(project, "git", "checkout", "--quiet", ".")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A repository with experiments on its last commit and one on the commit before."""
    folder = tmp_path_factory.mktemp("compare") / "project"
    (folder / ".dvc").mkdir(parents=True)
    (folder / ".dvc/config").write_text("[core]\n    analytics = false\n")
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "params.yaml").write_text((tiny.ROOT / "params.yaml").read_text())
    (folder / ".gitignore").write_text("dvc_plots/\n")
    write_metrics(folder, 25.0, 400, 4)
    tiny.run(folder, "git", "init", "--quiet", "--initial-branch=main")
    tiny.commit(folder, "First")
    save(folder, "older", "lora", 24.0, 497_800_000, 9_000_000)
    (folder / "README").write_text("changed\n")
    tiny.commit(folder, "Second")
    save(folder, "low-rank", "lora", 22.5, 497_800_000, 9_500_000)
    save(folder, "quantized", "qlora", 22.75, 201_700_000, 9_500_000)
    save(folder, "all-weights", "full", 20.25, 0, 498_000_000)
    tiny.run(folder, "dvc", "exp", "run", "--quiet", "--queue", "--name", "waiting", "-S", "method=qlora")
    return folder


def run(project: Path, *names: str, fails: bool = False) -> str:
    return tiny.run(project, "python", "-m", "gpt2lora", "compare", *names, fails=fails, PYTHONPATH=str(tiny.ROOT))


def rows(output: str) -> list[list[str]]:
    """Return the table's rows, split where columns are."""
    lines = [line for line in output.splitlines() if re.search(r"\d,\d{3}$", line)]
    return [re.split(r" {2,}", line) for line in lines]


ALL_WEIGHTS = ["all-weights", "full", "30.00", "20.25", "-32.5%", "0.00", "498.00", "2,359,296"]
LOW_RANK = ["low-rank", "lora", "30.00", "22.50", "-25.0%", "497.80", "9.50", "2,359,296"]
QUANTISED = ["quantized", "qlora, 4 bits", "30.00", "22.75", "-24.2%", "201.70", "9.50", "2,359,296"]
OLDER = ["older", "lora", "30.00", "24.00", "-20.0%", "497.80", "9.00", "2,359,296"]


def test_without_names_all_experiments_of_the_last_commit_best_first(project):
    output = run(project)
    assert rows(output) == [ALL_WEIGHTS, LOW_RANK, QUANTISED]
    assert "waiting is left out" in output
    assert "older" not in output
    with Image.open(project / "dvc_plots/compare.png") as picture:
        assert picture.size == (800, 450)
        assert share(picture, plots.TUNED_COLOR) > 0
    assert tiny.run(project, "git", "status", "--short") == ""


def test_names_choose_also_among_older_commits_branches_and_the_workspace(project):
    assert rows(run(project, "quantized", "low-rank")) == [LOW_RANK, QUANTISED]
    assert rows(run(project, "older", "low-rank")) == [LOW_RANK, OLDER]
    first = tiny.run(project, "git", "rev-parse", "HEAD").strip()
    for name in ("main", "workspace", first, first[:7]):
        ((found, *figures),) = rows(run(project, name, "--out", "dvc_plots/one.png"))
        assert (found, figures[2]) == (name, "25.00")


def test_an_unknown_name_is_one_line_with_the_known_ones(project):
    lines = run(project, "low-rank", "typo", fails=True).splitlines()
    assert lines[:-1] == ["compare: asking dvc exp show"]
    assert lines[-1].startswith("Error: compare: no experiment typo: expected one of")
    assert all(name in lines[-1] for name in ("low-rank", "older", "all-weights"))


def test_no_experiment_with_figures_is_one_line(project):
    assert run(project, "waiting", fails=True).splitlines()[1:] == [
        "compare: waiting is left out: it failed, waits in the queue, or has no metrics",
        "Error: compare: no experiment with metrics: `dvc exp run` makes one, `dvc exp show` lists them",
    ]


def test_outside_of_a_repository_dvc_s_own_words(tmp_path):
    lines = run(tmp_path, fails=True).splitlines()
    assert lines[-1].startswith("Error: dvc exp show: you are not inside of a DVC repository")
    assert not (tmp_path / "dvc_plots").exists()


def test_a_commit_whose_metrics_cannot_be_read_is_left_out(project):
    try:
        (project / "metrics/eval.json").write_text("{")
        output = run(project, "workspace", "low-rank")
    finally:
        tiny.run(project, "git", "checkout", "--quiet", ".")
    assert rows(output) == [LOW_RANK]
    assert "workspace is left out" in output


def test_runs_that_were_scored_on_other_tokens_are_warned_of(project):
    warning = "not all were scored on the same tokens"
    assert warning not in run(project, "low-rank", "main")
    try:
        write_metrics(project, 21.0, 400, 4, predicted_tokens=1283)
        assert warning in run(project, "low-rank", "workspace")
    finally:
        tiny.run(project, "git", "checkout", "--quiet", ".")


# The picture


def a_run(name: str, tuned: float, megabytes: float, adapter: float, base: float = 29.94) -> compare.Experiment:
    return compare.Experiment(name, "lora", (1,), base, tuned, int(megabytes * 1e6), int(adapter * 1e6), 1)


PICTURES = {
    "one": [a_run("only", 21, 497.8, 9.4)],
    "nothing frozen": [a_run("full", 20, 0, 498)],
    "no better than its base": [a_run("full", 29.94, 0, 498), a_run("same", 29.94, 497.8, 9)],
    "far apart": [
        a_run("full", 90.5, 0, 498, 63351),
        a_run("lora", 1356, 498, 9, 63351),
        a_run("q", 1361, 202, 9, 63351),
    ],
    "close": [a_run(f"rank-{n}", 21 + n / 1000, 497.8, n / 10) for n in range(1, 12)],
    "many": [a_run(f"number-{n}", 21 + n / 100, 500 - n % 4 * 70, 9.4) for n in range(40)],
    "crowded below": [*(a_run(f"number-{n}", 21, 497.8, 9.4) for n in range(12)), a_run("far", 25, 202, 9.4)],
    "crowded above": [*(a_run(f"number-{n}", 25, 497.8, 9.4) for n in range(12)), a_run("far", 21, 202, 9.4)],
    "long names": [a_run("x" * 60, 21, 497.8, 9.4), a_run("y" * 60, 21, 201, 9.4)],
    "other bases": [a_run("small", 21, 497.8, 9.4), a_run("large", 15, 3000, 30, 18)],
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_name_is_in_view_and_covers_no_other(name, tmp_path, monkeypatch):
    runs = sorted(PICTURES[name], key=lambda run: run.tuned)
    seen: list = []
    with watched(monkeypatch, seen):
        compare.draw_comparison(runs, tmp_path / "compare.png")
    (axes,) = seen
    check_layout(axes)
    assert [text.xy for text in axes.texts] == [(run.frozen / 1e6, run.tuned) for run in runs]
    # No circle covers the numbers of an axis.
    circles = axes.collections[0]
    radii = [size**0.5 / 2 * plots.DPI / 72 for size in circles.get_sizes()]
    lefts = axes.transData.transform(circles.get_offsets())[:, 0] - radii
    assert lefts.min() >= axes.bbox.x0
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.width == 800


def test_a_point_stands_at_memory_and_perplexity_its_area_is_the_adapter_s_share(tmp_path, monkeypatch):
    seen: list = []
    with watched(monkeypatch, seen):
        compare.draw_comparison([a_run("a", 21, 500, 2), a_run("b", 22, 200, 8)], tmp_path / "compare.png")
    circles, centres = seen[0].collections
    assert circles.get_offsets().tolist() == centres.get_offsets().tolist() == [[500, 21], [200, 22]]
    small, large = circles.get_sizes()
    assert large == 4 * small
    assert seen[0].get_xlabel() == "frozen base in memory (MB)"
