"""`make table`: the whole of it against a hub on the loopback interface, and the arithmetic of its table."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from click.testing import CliRunner
from hub_fetch import COMMIT, CORPUS, MODEL, write_dataset
from hub_server import Hub

from benchmarks import gpt2_table, workspace


def record(method: str, seed: int, perplexity: float) -> dict:
    train = {"trainable_parameters": 1234, "adapter_bytes": 5_000_000, "frozen_base_bytes": 10**8}
    timings = {"train_seconds": 10.0 + seed}
    scores = {name: perplexity for name in gpt2_table.PROTOCOLS}
    base = dict.fromkeys(gpt2_table.PROTOCOLS, 50.0)
    facts = {"method": method, "seed": seed, "learning_rate": 5e-4}
    return facts | {"base": base, "tuned": scores, "train": train, "timings": timings}


def cells(table: str, method: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {method} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_a_row_has_means_and_deviations_over_the_seeds():
    table = gpt2_table.render([record("lora", 0, 20.0), record("qlora", 0, 21.0), record("lora", 1, 22.0)], {"a": "b"})
    assert cells(table, "base")[:3] == ["50.000"] * 3
    assert cells(table, "lora")[:4] == ["21.000 ± 1.414"] * 3 + ["2"]
    assert cells(table, "lora")[4:] == ["0.0005", "1,234", "5.00", "100.0", "10.5 ± 0.7"]
    assert cells(table, "qlora")[:4] == ["21.000"] * 3 + ["1"]
    assert "| full |" not in table
    assert table.endswith("- a: b\n")


def test_each_method_is_trained_with_each_seed_and_scored_by_each_protocol(tmp_path, monkeypatch):
    trained, scored = [], []

    def run_stage(stage: str, folder: Path, shown: bool = False) -> None:
        params = yaml.safe_load((folder / "params.yaml").read_text())
        run = (params["method"], params["train"]["seed"], params["train"]["learning_rate"])
        (folder / "metrics").mkdir(exist_ok=True)
        if stage == "train":
            trained.append(run)
            (folder / "metrics/train.json").write_text(json.dumps(record("lora", 0, 0.0)["train"]))
            (folder / "metrics/train_timings.json").write_text('{"train_seconds": 10.0}')
        elif stage == "evaluate":
            protocol = params["evaluate"]["protocol"]
            scored.append((*run, protocol))
            number = 10.0 * list(gpt2_table.PROTOCOLS).index(protocol) + run[1]
            tuned = {"perplexity": 100.0 + number, "word_perplexity": 200.0 + number}
            base = {"perplexity": 300.0, "word_perplexity": 400.0}
            (folder / "metrics/eval.json").write_text(json.dumps({"base": base, "tuned": tuned}))

    monkeypatch.setattr(workspace, "run_stage", run_stage)
    arguments = ["--seeds", "2", "--out", str(tmp_path), "--set", "train.learning_rate=5e-4", "--set", "train.epochs=3"]
    result = CliRunner().invoke(gpt2_table.main, arguments)
    assert result.exit_code == 0, result.output
    rates = {"lora": 5e-4, "qlora": 5e-4, "full": 2e-5}
    assert trained == [(method, seed, rate) for seed in (0, 1) for method, rate in rates.items()]
    assert scored == [(*run, protocol) for run in trained for protocol in ("native", "hf", "lm-eval")]
    table = (tmp_path / "table.md").read_text()
    assert cells(table, "base")[:3] == ["300.000", "300.000", "400.000"]
    for method, rate in rates.items():
        expected = ["100.500 ± 0.707", "110.500 ± 0.707", "220.500 ± 0.707", "2", f"{rate:g}"]
        assert cells(table, method)[:5] == expected
    assert "- train.epochs: 3\n" in table


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_table_of_a_tiny_model_of_a_hub(tmp_path, tiny_model, tiny_corpus):
    splits = {"train": "train", "validation": "valid", "test": "test"}
    rows = {
        split: ["" if line.isspace() else line for line in (tiny_corpus / f"{name}.txt").read_text().splitlines(True)]
        for split, name in splits.items()
    }
    repositories = {
        f"models/{MODEL}": {COMMIT: tiny_model},
        f"datasets/{CORPUS}": {COMMIT: write_dataset(tmp_path / "corpus", rows)},
    }
    preset = {"model": MODEL, "model_revision": COMMIT, "dataset": CORPUS, "dataset_revision": COMMIT}
    values = {f"presets.gpt2.{key}": value for key, value in (preset | {"dataset_config": "small"}).items()}
    values |= {"train.epochs": 1, "lora.r": 2, "train.precision": "fp32", "evaluate.precision": "fp32"}
    settings = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    with Hub(repositories) as hub:
        command = [sys.executable, "-m", "benchmarks.gpt2_table", "--seeds", "1", "--out", str(tmp_path / "out")]
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(tiny.ROOT)}
        output = tiny.run(tiny.ROOT, *command, *settings, **variables)
    table = (tmp_path / "out/table.md").read_text()
    assert table in output
    records = [json.loads(line) for line in (tmp_path / "out/runs.jsonl").read_text().splitlines()]
    assert [found["method"] for found in records] == ["lora", "qlora", "full"]
    base = {name: f"{value:.3f}" for name, value in records[0]["base"].items()}
    assert cells(table, "base")[:3] == list(base.values())
    for found in records:
        assert cells(table, found["method"])[:3] == [f"{found['tuned'][name]:,.3f}" for name in gpt2_table.PROTOCOLS]
        assert all(found["tuned"][name] < found["base"][name] for name in gpt2_table.PROTOCOLS)
