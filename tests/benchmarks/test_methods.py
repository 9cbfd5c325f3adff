"""The study of methods: which runs it makes, in what order, and the arithmetic of its tables."""

import json
import threading
from pathlib import Path

import pandas
import pytest
import yaml
from click.testing import CliRunner

from benchmarks import methods, methods_figure, methods_plan, methods_table, workspace
from benchmarks.methods_plan import SEEDS, Run


def invoke(command, *arguments, fails: bool = False) -> str:
    result = CliRunner().invoke(command, list(map(str, arguments)))
    assert (result.exit_code != 0) == fails, result.output
    return result.output


def record(run: Run, loss: float, perplexity: float = 20.0, error: str | None = None, jobs: int = 1) -> dict:
    train = {"frozen_base_bytes": 10**9, "trainable_parameters": 1234, "adapter_bytes": 5_000_000}
    metrics = {
        "train": train | {"best_validation_loss": loss},
        "train_timings": {"tokens_per_second": 1000.0, "peak_memory_bytes": 2 * 10**9},
        "eval": {"tuned": {"perplexity": perplexity, "word_perplexity": 2 * perplexity}},
    }
    facts = {"key": run.key, "error": error, "jobs": jobs, "seconds": 1.0, "device": "abacus", "commit": "abc"}
    return facts | ({} if error else metrics)


def test_the_best_rate_has_the_lowest_validation_loss():
    runs = methods_plan.sweep("lora", {})
    records = {
        runs[0].key: record(runs[0], 3.0, perplexity=18.0),
        runs[1].key: record(runs[1], 2.5, perplexity=25.0),
        runs[2].key: record(runs[2], 0.1, error="train: diverged"),
    }
    assert methods_plan.best_rate(runs, records) == runs[1].learning_rate
    assert methods_plan.best_rate(methods_plan.sweep("dora", {}), records) is None
    assert methods_plan.finals("lora", records) == []  # before the sweep is done
    records |= {run.key: record(run, 4.0) for run in runs[3:]}
    assert methods_plan.finals("lora", records) == [Run("lora", runs[1].learning_rate, seed) for seed in SEEDS]


def measure(method: str, losses: dict[float, float]) -> list[float]:
    """Return the learning rates that a sweep tries if it finds these losses; others are 9."""
    records = {}
    while todo := [run for run in methods_plan.sweep(method, records) if run.key not in records]:
        records |= {run.key: record(run, losses.get(run.learning_rate, 9.0)) for run in todo}
    return [run.learning_rate for run in methods_plan.sweep(method, records)]


def test_a_sweep_goes_on_until_the_best_rate_lies_inside():
    five = measure("dora", {5e-4: 1.0})
    assert five == [1e-4, 2e-4, 5e-4, 1e-3, 2e-3]
    assert measure("dora", {1e-4: 1.0, 2e-5: 0.5}) == [5e-5, *five]  # 2e-5 lies beyond a worse rate
    assert measure("dora", {1e-4: 1.0, 5e-5: 0.9, 2e-5: 0.5}) == [1e-5, 2e-5, 5e-5, *five]
    assert measure("dora", {2e-3: 1.0, 5e-3: 0.5}) == [*five, 5e-3, 1e-2]
    assert measure("dora", {rate: rate for rate in methods_plan.RATES})[0] == methods_plan.RATES[0]
    assert measure("full", {5e-5: 1.0}) == [1e-5, 2e-5, 5e-5, 1e-4, 2e-4]


def test_a_sweep_is_not_widened_before_it_is_done():
    first, *others = methods_plan.sweep("lora", {})
    assert methods_plan.sweep("lora", {first.key: record(first, 1.0)}) == [first, *others]


def test_a_rate_that_fails_ends_no_sweep():
    runs = methods_plan.sweep("lora", {})
    records = {run.key: record(run, 3.0 - run.learning_rate) for run in runs[:-1]}
    records[runs[-1].key] = record(runs[-1], 0.0, error="diverged")
    assert methods_plan.sweep("lora", records) == runs
    assert (
        methods_plan.sweep("lora", records)[-1].learning_rate == 5e-3
    )  # no wider, though the best is next to a failure


def test_a_line_has_mean_deviation_and_paired_differences():
    rate = 5e-4
    records = {run.key: record(run, 9.0) for name in ("lora", "dora") for run in methods_plan.sweep(name, {})}
    for seed, (lora, dora) in enumerate(((20.0, 21.0), (40.0, 42.4), (50.0, 52.0))):
        for name, perplexity in (("lora", lora), ("dora", dora)):
            run = Run(name, rate, seed)
            records[run.key] = record(run, 3.0 + seed, perplexity)
    text = methods_table.render(records, {"base": "a base", "corpus": "a corpus"})
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    cells = [cell.strip() for cell in lines["dora"].split("|")[1:-1]]
    assert cells[:5] == ["dora", "0.0005", "0, 1, 2", "4.0000 ± 1.0000", "38.467 ± 15.870"]
    assert cells[5:8] == ["+5.00 ± 1.00", "76.93 ± 31.74", "1,234"]
    assert cells[8:] == ["5.00", "1,000.0", "2.00", "1,000", "1"]
    assert lines["lora"].split("|")[6].strip() == ""
    header = next(line for line in text.splitlines() if line.startswith("| method | learning rate | seeds"))
    assert header.count("|") == lines["dora"].count("|")
    assert "- device: abacus" in text and "- base: a base" in text


def test_runs_that_share_a_gpu_have_no_speed():
    runs = methods_plan.sweep("lora", {})
    records = {run.key: record(run, 3.0, jobs=2) for run in runs}
    lines = methods_table.render(records, {"base": "", "corpus": ""}).splitlines()
    (line,) = [line for line in lines if line.startswith("| lora | 0.0002 | 0 | 3.0000 | 20.000 |")]
    assert line.endswith("| 2.00 |  |  |")
    records[runs[0].key]["jobs"] = 1
    assert "| 2.00 | 1,000 | 1 |" in methods_table.render(records, {"base": "", "corpus": ""})


def test_failed_runs_are_listed_and_enter_no_mean():
    runs = [Run("lora", 2e-4, seed) for seed in SEEDS]
    records = {runs[0].key: record(runs[0], 3.0), runs[1].key: record(runs[1], 0, error="train: Error: no memory")}
    text = methods_table.render(records, {"base": "", "corpus": ""})
    assert "| lora | 0.0002 | 0 | 3.0000 | 20.000 |" in text
    assert "- lora-lr-0.0002-seed-1: `train: Error: no memory`" in text


def test_a_best_rate_at_the_edge_of_a_sweep_is_marked():
    for best, marked in ((0, True), (1, False), (4, True)):
        runs = methods_plan.sweep("lora", {})
        records = {run.key: record(run, 2.0 if index == best else 3.0) for index, run in enumerate(runs)}
        text = methods_table.render(records, {"base": "", "corpus": ""})
        assert ("(at the edge)" in text) == marked


def test_the_figure_shows_methods_of_the_study_and_a_point_each(tmp_path):
    names = {name for family in methods_figure.FAMILIES.values() for name in family}
    assert names <= set(methods_plan.METHODS)
    sizes = set()
    for count in range(1, 4):
        points = {name: (1e6 * 2**number, 10 + number) for number, name in enumerate(sorted(names)[:count])}
        methods_figure.draw_methods(points, tmp_path / "figure.png")
        sizes.add((tmp_path / "figure.png").read_bytes())
    assert len(sizes) == 3


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A study whose stages only write metrics: the best learning rate is 5e-4, and DoRA fails.

    Returns:
        The runs and the epochs of each, the GPUs that were used, the options of the command.
    """
    ran, gpus, lock = [], set(), threading.Lock()

    def run_stage(name: str, folder: Path, shown: bool = False, **variables: str) -> str | None:
        params = yaml.safe_load((folder / "params.yaml").read_text())
        rate = params["train"]["learning_rate"]
        seed = params["seed"] if params["train"]["seed"] is None else params["train"]["seed"]
        if name == "train":
            with lock:
                ran.append((folder.name, params["train"]["epochs"]))
                gpus.add(variables["CUDA_VISIBLE_DEVICES"])
            if params["lora"]["use_dora"]:
                return "train: Error: no such thing"
        (folder / "metrics").mkdir(exist_ok=True)
        metrics = record(Run("", rate, seed), 3 + abs(rate - 5e-4) + seed, perplexity=1 / rate)
        for part in {"train": ("train", "train_timings"), "evaluate": ("eval",)}.get(name, ()):
            (folder / "metrics" / f"{part}.json").write_text(json.dumps(metrics[part]))
        return None

    monkeypatch.setattr(workspace, "run_stage", run_stage)
    monkeypatch.setattr(workspace, "cards", lambda: ["7"])
    for name in ("base", "corpus"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    inputs = ("--base", tmp_path / "base", "--corpus", tmp_path / "corpus")
    return ran, gpus, (*inputs, "--out", tmp_path / "out", "--jobs", 3)


def test_seeds_run_at_the_best_rate_and_no_run_is_made_twice(pretended, tmp_path):
    ran, gpus, options = pretended
    only = ("--only", "lora", "--only", "dora", "--set", "train.epochs=7", "--set", "train.seed=3")
    invoke(methods.main, *options, *only)
    sweep = [run.key for name in ("lora", "dora") for run in methods_plan.sweep(name, {})]
    # Seed 0 is a run of the sweep. All of DoRA's runs failed, so it has no best rate.
    assert sorted(name for name, _ in ran) == sorted([*sweep, "lora-lr-0.0005-seed-1", "lora-lr-0.0005-seed-2"])
    names = [name for name, _ in ran]
    assert names.index("lora-lr-0.0005-seed-2") < names.index(sweep[-1])  # a method is finished before the next
    assert {epochs for _, epochs in ran} == {7}
    assert gpus == {"7"}
    assert len((tmp_path / "out/runs.jsonl").read_text().splitlines()) == len(ran)
    assert (tmp_path / "out/methods.png").read_bytes().startswith(b"\x89PNG")
    table = pandas.read_csv(tmp_path / "out/methods.csv")
    assert table["method"].tolist() == ["lora"] * 7 and table["seed"].sum() == 3  # not those that failed
    assert table["learning rate"].is_monotonic_increasing
    assert table["test perplexity"].tolist() == pytest.approx((1 / table["learning rate"]).tolist())
    text = (tmp_path / "out/methods.md").read_text()
    assert "| lora | 0.0005 | 0, 1, 2 | 4.0000 ± 1.0000 |" in text
    assert "- dora-lr-0.0005-seed-0: `train: Error: no such thing`" in text
    assert not list((tmp_path / "out/runs").glob("*/data"))

    ran.clear()
    invoke(methods.main, *options, *only)
    assert sorted(name for name, _ in ran) == sorted(
        run.key for run in methods_plan.sweep("dora", {})
    )  # the failed ones


def test_a_study_starts_no_run_after_its_deadline(pretended, tmp_path):
    ran, _, options = pretended
    output = invoke(methods.main, *options, "--seconds", -1)
    assert ran == [] and not (tmp_path / "out/runs.jsonl").exists()
    assert "no run was made" in output


def test_the_tables_are_written_again_from_the_records(pretended, tmp_path):
    ran, _, options = pretended
    invoke(methods.main, *options, "--only", "lora")
    before = (tmp_path / "out/methods.md").read_bytes()
    (tmp_path / "out/methods.md").unlink()
    ran.clear()
    assert "holds 7 runs" in invoke(methods.main, *options, "--only", "lora")
    assert ran == [] and (tmp_path / "out/methods.md").read_bytes() == before


def test_a_study_refuses_to_mix_runs(pretended, tmp_path):
    *_, options = pretended
    invoke(methods.main, *options, "--only", "lora")
    before = (tmp_path / "out/methods.md").read_bytes()
    assert "have another params" in invoke(methods.main, *options, "--set", "train.epochs=9", fails=True)
    (tmp_path / "base/file").write_text("other weights")
    assert "have another base" in invoke(methods.main, *options, fails=True)
    assert "with a key of params.yaml" in invoke(methods.main, *options, "--set", "train.epoch=2", fails=True)
    assert "expected key=value" in invoke(methods.main, *options, "--set", "train.epochs", fails=True)
    assert (tmp_path / "out/methods.md").read_bytes() == before


DAMAGED = (
    b"{}",
    b"[]",
    b"null",
    b"",
    b"\xff\xfe",
    b'{"key": 5, "error": null}',
    b'{"key": "lora", "error": "failed"}',
    b'{"key": "lora-lr-0.001-seed-0"}',
    b'{"key": "lora-lr-0.001-seed-0", "error": null}',
)


def test_a_damaged_record_is_named_by_its_line(pretended, tmp_path):
    *_, options = pretended
    invoke(methods.main, *options, "--only", "lora")
    whole = (tmp_path / "out/runs.jsonl").read_bytes()
    for line in DAMAGED:
        (tmp_path / "out/runs.jsonl").write_bytes(whole + line + b"\n")
        assert "line 8: not the record of a run" in invoke(methods.main, *options, fails=True), line


def test_every_method_sets_only_known_parameters():
    for name, values in methods_plan.METHODS.items():
        for key, value in values.items():
            assert workspace.settings((f"{key}={json.dumps(value)}",)) == {key: value}, name


def test_a_stage_that_fails_says_why(tmp_path):
    line = workspace.run_stage("prepare", tmp_path)
    assert line.startswith("prepare: Error: params.yaml not found")


def test_settings_are_read_as_in_params_yaml():
    asked = ("train.learning_rate=5e-05", "lora.target_modules=[attn.c_attn]", "tokenize.block_size=null")
    values = {"train.learning_rate": 5e-5, "lora.target_modules": ["attn.c_attn"], "tokenize.block_size": None}
    assert workspace.settings(asked) == values


@pytest.mark.slow
def test_two_methods_are_tuned_and_evaluated(tmp_path, tiny_corpus, tiny_model, monkeypatch):
    monkeypatch.setattr(methods_plan, "sweep", lambda name, records: [Run(name, 2e-2, 0)])
    monkeypatch.setattr(methods_plan, "SEEDS", (0,))
    options = ("--base", tiny_model, "--corpus", tiny_corpus, "--out", tmp_path / "out", "--jobs", 2)
    settings = ("--set", "train.epochs=1", "--set", "train.validations=1")
    invoke(methods.main, *options, "--only", "lora", "--only", "qlora-nf4", *settings)
    lines = [json.loads(line) for line in (tmp_path / "out/runs.jsonl").read_text().splitlines()]
    assert {line["key"]: line["error"] for line in lines} == {
        "lora-lr-0.02-seed-0": None,
        "qlora-nf4-lr-0.02-seed-0": None,
    }
    for line in lines:
        assert line["eval"]["tuned"]["perplexity"] < line["eval"]["base"]["perplexity"]
