"""GPT-2 124M on WikiText-2: base, LoRA, QLoRA and full fine-tuning, by all three protocols (`make table`).

    python -m benchmarks.gpt2_table [--seeds N] [--set key=value ...] [--out FOLDER]

in   the preset gpt2, from the hub; params.yaml for everything that METHODS does not set
out  OUT/table.md: means and sample standard deviations over the seeds; OUT/runs.jsonl: a record for each training
"""

import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import click

from benchmarks import workspace
from gpt2lora.evaluation.report import format_duration, markdown_table
from gpt2lora.pipeline.artifacts import atomic_output
from gpt2lora.pipeline.cli import StageError, command, echo

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "qlora": {},
    "full": {"train.learning_rate": 2e-5},  # the best of docs/methods.md
}
PROTOCOLS = {"native": "perplexity", "hf": "perplexity", "lm-eval": "word_perplexity"}  # and the metric of each


@command
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Trainings of each method.")
@click.option("--set", "items", multiple=True, help="key=value of params.yaml, for all runs; may be repeated.")
@click.option("--out", type=Path, default="benchmarks/out/gpt2", show_default=True, help="Folder of the results.")
def main(seeds: int, items: tuple[str, ...], out: Path) -> None:
    """Train GPT-2 with each method, score it by each protocol, and write the table."""
    settings, started = {"preset": "gpt2"} | workspace.settings(items), time.monotonic()
    shared = workspace.empty(out / "prepared")
    workspace.write_params(shared, settings)
    for stage in ("sources", "base", "prepare", "tokenize"):
        run(stage, shared, shown=True)
    (out / "runs.jsonl").unlink(missing_ok=True)
    records, conditions = [], workspace.environment() | settings
    for seed in range(seeds):
        for method, values in METHODS.items():
            folder = workspace.empty(out / "run")
            inputs = {name: shared / "data" / name for name in ("base", "raw", "tokens")}
            changes = {"method": method, "train.seed": seed} | values
            workspace.link_inputs(folder, settings | changes, **inputs)
            facts = {"method": method, "seed": seed, "learning_rate": learning_rate(folder)}
            records.append(facts | train_and_score(folder, settings | changes))
            with (out / "runs.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(records[-1]) + "\n")
            scores = ", ".join(f"{name} {records[-1]['tuned'][name]:.3f}" for name in PROTOCOLS)
            echo(f"table: {method}, seed {seed}: {scores}, {format_duration(time.monotonic() - started)} so far")
            with atomic_output(out / "table.md") as file:
                file.write_text(render(records, conditions), encoding="utf-8")
    shutil.rmtree(out / "run")
    echo("\n" + (out / "table.md").read_text(encoding="utf-8"))


def learning_rate(folder: Path) -> float:
    """Return the learning rate of params.yaml in `folder`."""
    from omegaconf import OmegaConf

    return float(OmegaConf.load(folder / "params.yaml").train.learning_rate)


def run(stage: str, folder: Path, shown: bool = False) -> None:
    """Run a stage in `folder`.

    Raises:
        StageError: it failed; the stage's last line.
    """
    if error := workspace.run_stage(stage, folder, shown=shown):
        raise StageError(error)


def train_and_score(folder: Path, settings: dict[str, Any]) -> dict:
    """Train in `folder`, and score by each protocol; return the figures."""
    run("train", folder)
    record = {"base": {}, "tuned": {}, "train": json.loads((folder / "metrics/train.json").read_text())}
    record["timings"] = json.loads((folder / "metrics/train_timings.json").read_text())
    for protocol, metric in PROTOCOLS.items():
        workspace.write_params(folder, settings | {"evaluate.protocol": protocol})
        run("evaluate", folder)
        scores = json.loads((folder / "metrics/eval.json").read_text())
        for model in ("base", "tuned"):
            record[model][protocol] = scores[model][metric]
    return record


def render(records: list[dict], conditions: dict[str, str]) -> str:
    """Return the table in Markdown: the base, whose figures are the same in all records, and each method."""
    header = ["", *(f"{metric.replace('_', ' ')}, {name}" for name, metric in PROTOCOLS.items())]
    header += ["seeds", "learning rate", "trained parameters", "adapter, MB", "frozen base, MB", "training, s"]
    rows = [["base", *(f"{records[0]['base'][name]:.3f}" for name in PROTOCOLS), *[""] * 6]]
    for method in METHODS:
        if not (runs := [record for record in records if record["method"] == method]):
            continue
        train = runs[0]["train"]
        facts = [str(len(runs)), f"{runs[0]['learning_rate']:g}"]
        facts += [f"{train['trainable_parameters']:,}", f"{train['adapter_bytes'] / 1e6:,.2f}"]
        facts += [
            f"{train['frozen_base_bytes'] / 1e6:,.1f}",
            spread([each["timings"]["train_seconds"] for each in runs], 1),
        ]
        rows.append([method, *(spread([each["tuned"][name] for each in runs], 3) for name in PROTOCOLS), *facts])
    conditions = "\n".join(f"- {name}: {text}" for name, text in conditions.items())
    return f"{markdown_table(header, rows, numbers=True)}\n\n{conditions}\n"


def spread(values: list[float], digits: int) -> str:
    """Return the mean, and with several values the sample standard deviation."""
    mean = f"{statistics.mean(values):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
