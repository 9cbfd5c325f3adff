"""The command compare: the experiments of `dvc exp show` as a table and a picture, and experiments without results."""

import json
import re
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner
from pictures import check_layout, color_share, record_axes
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


def save_experiment(
    project: Path, name: str, method: str, *metrics: float, params: dict | None = None, **counts: int
) -> None:
    """Save the workspace with these metrics as an experiment, and restore it."""
    for key, value in {"method": method, **(params or {})}.items():
        tiny.set_param(project, key, value)
    write_metrics(project, *metrics, **counts)
    tiny.run(project, "dvc", "exp", "save", "--quiet", "--force", "--name", name)
    tiny.run(project, "git", "checkout", "--quiet", ".")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A repository with experiments on its last commit, and one experiment on the commit before."""
    folder = tmp_path_factory.mktemp("compare") / "project"
    (folder / ".dvc").mkdir(parents=True)
    (folder / ".dvc/config").write_text("[core]\n    analytics = false\n")
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "params.yaml").write_text((tiny.ROOT / "params.yaml").read_text())
    (folder / ".gitignore").write_text("dvc_plots/\n")
    write_metrics(folder, 25.0, 400, 4)
    tiny.run(folder, "git", "init", "--quiet", "--initial-branch=main")
    tiny.commit(folder, "First")
    save_experiment(folder, "older", "lora", 24.0, 497_800_000, 9_000_000)
    (folder / "README").write_text("changed\n")
    tiny.commit(folder, "Second")
    save_experiment(folder, "low-rank", "lora", 22.5, 497_800_000, 9_500_000)
    save_experiment(folder, "quantized", "qlora", 22.75, 201_700_000, 9_500_000)
    save_experiment(folder, "all-weights", "full", 20.25, 0, 498_000_000)
    tiny.run(folder, "dvc", "exp", "run", "--quiet", "--queue", "--name", "waiting", "-S", "method=qlora")
    return folder


def run_compare(project: Path, *names: str, fails: bool = False) -> str:
    """Return what compare printed. Python and matplotlib are not started anew, but DVC is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.setenv("GIT_CEILING_DIRECTORIES", str(project.parent))
        result = CliRunner().invoke(compare.main, names, env=tiny.environment(), catch_exceptions=False)
    assert (result.exit_code != 0) == fails, result.output
    return result.output


def table_rows(output: str) -> list[list[str]]:
    """Return the rows of the table, each as its cells."""
    lines = [line for line in output.splitlines() if re.search(r"\d,\d{3}$", line)]
    return [re.split(r" {2,}", line) for line in lines]


ALL_WEIGHTS = ["all-weights", "full", "30.00", "20.25", "-32.5%", "0.00", "498.00", "2,359,296"]
LOW_RANK = ["low-rank", "lora", "30.00", "22.50", "-25.0%", "497.80", "9.50", "2,359,296"]
QUANTIZED = ["quantized", "qlora, 4 bits", "30.00", "22.75", "-24.2%", "201.70", "9.50", "2,359,296"]
OTHER_TOKENS = "not all were scored on the same tokens"
OLDER = ["older", "lora", "30.00", "24.00", "-20.0%", "497.80", "9.00", "2,359,296"]


def test_the_default_is_the_last_commits_experiments_best_first(project):
    output = tiny.run(project, "python", "-m", "gpt2lora", "compare", PYTHONPATH=str(tiny.ROOT))
    assert table_rows(output) == [ALL_WEIGHTS, LOW_RANK, QUANTIZED]
    assert "waiting is left out" in output
    assert "older" not in output
    assert OTHER_TOKENS not in output
    with Image.open(project / "dvc_plots/compare.png") as picture:
        assert picture.size == (800, 280)
        assert color_share(picture, plots.TUNED_COLOR) > 0
    assert tiny.run(project, "git", "status", "--short") == ""


def test_names_may_be_older_experiments_commits_and_branches(project):
    assert table_rows(run_compare(project, "quantized", "low-rank")) == [LOW_RANK, QUANTIZED]
    first = tiny.run(project, "git", "rev-parse", "HEAD").strip()
    tiny.run(project, "git", "branch", "--force", "side", first)
    names = ("main", "HEAD", "HEAD~1", "side", "workspace", first, first[:7])
    output = run_compare(project, "older", *names, "low-rank", "--out", "dvc_plots/one.png")
    assert OTHER_TOKENS not in output
    rows = table_rows(output)
    assert [rows[0], rows[1]] == [LOW_RANK, OLDER]
    assert {(shown, cells[2]) for shown, *cells in rows[2:]} == {(name, "25.00") for name in names}


def test_the_error_for_an_unknown_name_lists_the_known_names(project):
    lines = run_compare(project, "low-rank", "typo", fails=True).splitlines()
    assert lines[:-1] == ["compare: asking dvc exp show"]
    assert lines[-1].startswith("Error: compare: no experiment typo: expected one of")
    assert all(name in lines[-1] for name in ("low-rank", "older", "all-weights"))


def test_an_error_is_printed_if_no_experiment_has_metrics(project):
    assert run_compare(project, "waiting", fails=True).splitlines()[1:] == [
        "compare: waiting is left out: it failed, waits in the queue, or has no metrics",
        "Error: compare: no experiment with metrics: `dvc exp run` makes one, `dvc exp show` lists them",
    ]


def test_outside_a_repository_the_error_is_that_of_dvc(tmp_path):
    lines = run_compare(tmp_path, fails=True).splitlines()
    assert lines[-1].startswith("Error: dvc exp show: you are not inside of a DVC repository")
    assert not (tmp_path / "dvc_plots").exists()


def test_a_revision_with_unreadable_metrics_is_left_out(project):
    try:
        (project / "metrics/eval.json").write_text("{")
        output = run_compare(project, "workspace", "low-rank")
    finally:
        tiny.run(project, "git", "checkout", "--quiet", ".")
    assert table_rows(output) == [LOW_RANK]
    assert "workspace is left out" in output


def test_a_warning_tells_of_runs_scored_on_other_tokens(project):
    try:
        write_metrics(project, 21.0, 400, 4, predicted_tokens=1283)
        assert OTHER_TOKENS in run_compare(project, "low-rank", "workspace")
    finally:
        tiny.run(project, "git", "checkout", "--quiet", ".")


# The picture


def experiment(name: str, tuned: float, frozen: float, adapter: float, base: float = 29.94) -> compare.Experiment:
    """Return an experiment; the sizes of the frozen base and of the adapter are in MB."""
    return compare.Experiment(name, "lora", (1,), base, tuned, int(frozen * 1e6), int(adapter * 1e6), 1)


PICTURES = {
    "one": [experiment("only", 21, 497.8, 9.4)],
    "nothing frozen": [experiment("full", 20, 0, 498)],
    "no better than its base": [experiment("full", 29.94, 0, 498), experiment("same", 29.94, 497.8, 9)],
    "far apart": [
        experiment("full", 90.5, 0, 498, 63351),
        experiment("lora", 1356, 498, 9, 63351),
        experiment("q", 1361, 202, 9, 63351),
    ],
    "close": [experiment(f"rank-{n}", 21 + n / 1000, 497.8, n / 10) for n in range(1, 12)],
    "many": [experiment(f"number-{n}", 21 + n / 100, 500 - n % 4 * 70, 9.4) for n in range(40)],
    "crowded below": [*(experiment(f"number-{n}", 21, 497.8, 9.4) for n in range(12)), experiment("far", 25, 202, 9.4)],
    "crowded above": [*(experiment(f"number-{n}", 25, 497.8, 9.4) for n in range(12)), experiment("far", 21, 202, 9.4)],
    "long names": [experiment("x" * 60, 21, 497.8, 9.4), experiment("y" * 60, 21, 201, 9.4)],
    "other bases": [experiment("small", 21, 497.8, 9.4), experiment("large", 15, 3000, 30, 18)],
}


@pytest.mark.parametrize("name", PICTURES)
def test_all_texts_are_in_view_and_none_overlap(name, tmp_path, monkeypatch):
    experiments = sorted(PICTURES[name], key=lambda each: each.tuned)
    with record_axes(monkeypatch) as drawn:
        compare.draw_comparison(experiments, tmp_path / "compare.png")
    (axes,) = drawn
    check_layout(axes)
    # Each point lies inside the axes, at the height of its name: nothing has to cross anything.
    (points,) = axes.collections
    assert points.get_offsets().tolist() == [[each.tuned, row] for row, each in enumerate(experiments)]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        compare.shorten(each.name) for each in experiments
    ]
    centers = axes.transData.transform(points.get_offsets())
    assert all(axes.bbox.x0 < x < axes.bbox.x1 and axes.bbox.y0 < y < axes.bbox.y1 for x, y in centers)
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.width == 800


def test_the_picture_names_the_sizes_of_base_and_adapter(tmp_path, monkeypatch):
    with record_axes(monkeypatch) as drawn:
        compare.draw_comparison([experiment("a", 21, 500, 2), experiment("b", 22, 200, 8)], tmp_path / "compare.png")
    assert [text.get_text() for text in drawn[0].texts] == ["MB: base + adapter", "500.0 + 2.0", "200.0 + 8.0"]


# Parameters


def with_params(name: str, tuned: float, **params: object) -> compare.Experiment:
    """Return an experiment with these parameters; two underscores stand for a dot."""
    values = {"method": "lora", "seed": 0, "lora.r": 16, "train.seed": None}
    values |= {key.replace("__", "."): value for key, value in params.items()}
    return compare.Experiment(name, "lora", (1,), 30.0, tuned, 1, 1, 2_359_296, values)


def test_each_parameter_that_differs_has_a_column():
    experiments = [with_params("a", 20, lora__r=8, train__seed=1), with_params("b", 21, method="full")]
    lines = compare.format_table(experiments).splitlines()
    assert re.split(r" {2,}", lines[1])[:4] == ["experiment", "method", "r", "train.seed"]
    assert [re.split(r" {2,}", line)[:4] for line in lines[2:]] == [
        ["a", "lora", "8", "1"],
        ["b", "lora", "16", "null"],
    ]
    assert len({len(line) for line in lines}) == 1
    alike = compare.format_table([with_params("a", 20), with_params("b", 21)]).splitlines()
    assert re.split(r" {2,}", alike[1])[:3] == ["experiment", "method", "perplexity"]


def test_runs_that_differ_in_train_seed_alone_have_a_mean():
    seeds = [with_params(f"s{seed}", 20.0 + seed, train__seed=seed) for seed in range(3)]
    assert compare.describe_seeds(seeds) == [
        "21.00 ± 1.00 (mean, sample standard deviation) over train.seed: s0, s1, s2"
    ]
    assert compare.describe_seeds([seeds[0], with_params("r8", 20, lora__r=8, train__seed=1)]) == []
    assert compare.describe_seeds([with_params("a", 20), with_params("b", 20)]) == []  # one run, twice
    others = [with_params("t0", 30, lora__r=8, train__seed=0), with_params("t1", 32, lora__r=8, train__seed=1)]
    assert [line.split(": ")[1] for line in compare.describe_seeds([*seeds, *others])] == ["s0, s1, s2", "t0, t1"]


def test_the_method_is_that_of_the_runs_own_record(project):
    try:
        write_metrics(project, 21.0, 400, 4)
        file = project / "metrics/train.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"trained_by": "qlora", "base_bits": 8}))
        stages = {"train": {"cmd": "true", "params": {"params.yaml": {"lora": {"r": 2}, "train": {"seed": 5}}}}}
        (project / "dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": stages}))
        output = run_compare(project, "workspace", "low-rank")
    finally:
        (project / "dvc.lock").unlink()
        tiny.run(project, "git", "checkout", "--quiet", ".")
    rows = table_rows(output)
    assert [row[:4] for row in rows] == [["workspace", "qlora, 8 bits", "2", "5"], ["low-rank", "lora", "16", "null"]]


def test_all_commits_are_searched_if_asked(project):
    names = [row[0] for row in table_rows(run_compare(project, "--all-commits"))]
    assert names == ["all-weights", "low-rank", "quantized", "older"]
