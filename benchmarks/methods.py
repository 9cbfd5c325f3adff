"""methods: every method, fine-tuned from one base on one corpus.

in   --base, a folder as for presets.local.model; --corpus, one as for presets.local.dataset; params.yaml
out  OUT/runs.jsonl: a record of each run, added when it ends; OUT/methods.md: tables of all of them

Started again with the same --out, it makes only the runs that no record says have succeeded.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import click

from benchmarks import grid, tables, workspace
from benchmarks.grid import Run
from gpt2lora.pipeline.artifacts import atomic_output
from gpt2lora.pipeline.cli import StageError, command, echo

RECORDS, TABLES, CONDITIONS = "runs.jsonl", "methods.md", "conditions.json"
FIGURES = ("train", "train_timings", "eval")  # the files of metrics/ that a record holds


@command
@click.option("--base", type=Path, required=True, help="Folder of the model that is tuned.")
@click.option("--corpus", type=Path, required=True, help="Folder or file of the text it is tuned on.")
@click.option("--out", type=Path, required=True, help="Folder of runs.jsonl and methods.md.")
@click.option(
    "--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at once on each GPU, or on the CPU."
)
@click.option("--only", multiple=True, help="Make only runs of such a name, such as 'lora-lr-*'; may be repeated.")
@click.option("--seconds", type=float, default=float("inf"), help="Start no run later than this.")
@click.option("--set", "items", multiple=True, help="key=value of params.yaml, for all runs; may be repeated.")
def main(
    base: Path, corpus: Path, out: Path, jobs: int, only: tuple[str, ...], seconds: float, items: tuple[str, ...]
) -> None:
    """Train and evaluate the grid of benchmarks/grid.py, and write its tables."""
    deadline = time.monotonic() + seconds
    settings = workspace.settings(items)
    if fixed := grid.KEYS & settings.keys():
        raise StageError(f"--set {', '.join(sorted(fixed))}: the grid has values of its own for it")
    shared = prepare(base, corpus, out, settings)
    around = workspace.environment() | {"jobs": jobs}
    free = workspace.cards() * jobs
    at_once = len(free)
    places: SimpleQueue[str] = SimpleQueue()  # a run takes one and puts it back
    for card in free:
        places.put(card)
    threads = os.getenv("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
    rate = json.loads((shared / CONDITIONS).read_text())["params"]["train"]["learning_rate"]
    records = read_records(out / RECORDS)
    for phase in (grid.sweeps, lambda: finals(records, rate)):
        wanted = {run.key: run for run in phase() if not only or any(fnmatch(run.name, name) for name in only)}
        todo = [run for run in wanted.values() if not tables.succeeded(run, records)]
        echo(f"methods: {len(wanted) - len(todo)} runs on record, {len(todo)} to make, {at_once} at once")
        made = in_parallel(
            todo, at_once, lambda run: measure(run, out, shared, settings, around, deadline, places, threads)
        )
        for place, record in enumerate(made, start=1):
            add_record(out / RECORDS, record)
            records[record["key"]] = record
            echo(f"methods: {place}/{len(todo)} {describe(record)}")
            write_tables(out, shared, grid.sweeps() + finals(records, rate), records)
    echo(f"methods: {out / TABLES} holds {sum(record['error'] is None for record in records.values())} runs")


def prepare(base: Path, corpus: Path, out: Path, settings: dict[str, Any]) -> Path:
    """Return the folder where the stages before train have run, once for all runs.

    Raises:
        Stop: OUT holds runs of another base, corpus or params.yaml, or a stage failed.
    """
    for option, path in (("--base", base), ("--corpus", corpus)):
        if not path.exists():
            raise StageError(f"{option} {path}: does not exist")
    shared = out.resolve() / "prepared"
    local = {"presets.local.model": str(base.resolve()), "presets.local.dataset": str(corpus.resolve())}
    params = workspace.write_params(out / "asked", settings)
    named = {"base": base.resolve(), "corpus": corpus.resolve()}
    now = {name: f"{path.name}, SHA-256 {workspace.fingerprint(path)}..." for name, path in named.items()}
    now["params"] = params
    shutil.rmtree(out / "asked")
    if (shared / CONDITIONS).is_file():
        before = json.loads((shared / CONDITIONS).read_text())
        if other := [name for name in now if before[name] != now[name]]:
            raise StageError(
                f"{out}: its runs have another {' and '.join(other)}: give another --out, or remove the folder"
            )
        return shared
    workspace.empty(shared)
    workspace.write_params(shared, settings | {"preset": "local"} | local)
    for name in ("base", "prepare", "tokenize"):
        if error := workspace.run_stage(name, shared, shown=True):
            raise StageError(error)
    (shared / CONDITIONS).write_text(json.dumps(now, indent=2) + "\n")
    return shared


def finals(records: tables.Records, default: float) -> list[Run]:
    """Return the runs that compare, LoRA and full at their best rates on record, `default` where none is."""
    found = {method: tables.best(grid.sweep(method), records) for method in ("lora", "full")}
    rates = {method: run.values["train.learning_rate"] if run else default for method, run in found.items()}
    return grid.finals(rates["lora"], rates["full"], default)


def in_parallel(runs: list[Run], jobs: int, work: Callable[[Run], dict | None]) -> Iterator[dict]:
    """Yield what `work` returns for each run, as it ends; leave out None."""
    pool = ThreadPoolExecutor(jobs)
    try:
        for end in as_completed([pool.submit(work, run) for run in runs]):
            if record := end.result():
                yield record
    finally:
        pool.shutdown(cancel_futures=True)


def measure(
    run: Run,
    out: Path,
    shared: Path,
    settings: dict[str, Any],
    around: dict[str, Any],
    deadline: float,
    places: "SimpleQueue[str]",
    threads: str,
) -> dict | None:
    """Train and evaluate one run in a folder of its own; return its record, or None when it is too late to start."""
    if time.monotonic() > deadline:
        return None
    started = time.monotonic()
    folder = workspace.empty(out / "runs" / f"{run.name}-seed-{run.seed}")
    made = {name: shared / "data" / name for name in ("base", "raw", "tokens")}
    workspace.lay_out(folder, settings | run.values | {"seed": run.seed}, **made)
    place = places.get()
    variables = {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": place}
    stages = (workspace.run_stage(name, folder, **variables) for name in ("train", "evaluate"))
    error = next(filter(None, stages), None)  # evaluate runs where train succeeded
    places.put(place)
    shutil.rmtree(folder / "data")  # half a gigabyte where all weights were trained
    record = {"key": run.key, "name": run.name, "seed": run.seed, "error": error, **around}
    record["seconds"] = round(time.monotonic() - started, 1)
    figures = {} if error else {name: folder / "metrics" / f"{name}.json" for name in FIGURES}
    return record | {name: json.loads(file.read_text()) for name, file in figures.items()}


def describe(record: dict) -> str:
    told = f"failed: {record['error']}"
    if record["error"] is None:
        loss, perplexity = record["train"]["best_validation_loss"], record["eval"]["tuned"]["perplexity"]
        told = f"validation loss {loss:.4f} nats/token, test perplexity {perplexity:.3f}"
    return f"{record['name']}, seed {record['seed']}: {told}, {record['seconds']:.0f} s"


def read_records(file: Path) -> tables.Records:
    """Return the newest record of each run."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    records = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records[record["key"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise StageError(f"{file}, line {number}: no record of a run ({error}); remove the line") from error
    return records


def add_record(file: Path, record: dict) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def write_tables(out: Path, shared: Path, runs: list[Run], records: tables.Records) -> None:
    from omegaconf import OmegaConf

    asked = json.loads((shared / CONDITIONS).read_text())
    params = {key: value for key, value in asked["params"].items() if isinstance(value, dict) and key != "presets"}
    manifest = json.loads((shared / "data" / "tokens" / "manifest.json").read_text())
    tokens = ", ".join(f"{split} {counts['tokens']:,}" for split, counts in manifest["splits"].items())
    done = [record for record in records.values() if record["error"] is None]

    def among(figure: Callable[[dict], Any]) -> str:
        return ", ".join(dict.fromkeys(str(figure(record)) for record in done))

    conditions = {
        "base": asked["base"],
        "base, untuned": f"test perplexity {among(lambda record: round(record['eval']['base']['perplexity'], 3))}",
        "corpus": f"{asked['corpus']}; tokens: {tokens}; context: {manifest['block_size']}",
        "steps of a run": among(lambda record: record["train"]["steps"]),
        "tokens trained on": among(lambda record: record["train"]["tokens"]),
        "runs at once on the device": among(lambda record: record["jobs"]),
        **{name: among(lambda record, name=name: record[name]) for name in ("device", "versions", "commit")},
        "figures": "validation loss: the lowest while training; test perplexity: of those weights; over several seeds: "
        "mean ± sample standard deviation. A seed sets the order of the rows, dropout and the adapter's first values.",
    }
    text = tables.markdown(runs, records, conditions, OmegaConf.to_yaml(OmegaConf.create(params)))
    with atomic_output(out / TABLES) as file:
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
