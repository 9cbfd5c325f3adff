"""Every method on one base and corpus: each at its own best learning rate, found by a sweep, then over three seeds.

    python -m benchmarks.methods --base FOLDER --corpus FOLDER --out FOLDER [--jobs N] [--only NAME ...]

in   --base, a model; --corpus, a text; params.yaml for everything that METHODS does not set
out  OUT/runs.jsonl: a record for each run; OUT/methods.md: the tables; OUT/methods.csv: the figures of all runs;
     OUT/methods.png: the picture

base, prepare and tokenize run once. The methods are measured one after another, several runs at a time. Started again,
the study makes only the runs that are missing or failed.
"""

import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from fnmatch import fnmatch
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import click

from benchmarks import workspace
from benchmarks.methods_figure import draw_methods
from benchmarks.methods_plan import METHODS, Records, Run, done, parse_key, plan
from benchmarks.methods_table import COLUMNS, all_runs, means, render
from gpt2lora.pipeline.artifacts import atomic_output
from gpt2lora.pipeline.cli import StageError, command, echo

METRICS = ("train", "train_timings", "eval")  # the files of metrics/ that a record holds
EXISTING = click.Path(exists=True, path_type=Path)


@command
@click.option("--base", type=EXISTING, required=True, help="Folder of the model that is tuned.")
@click.option("--corpus", type=EXISTING, required=True, help="Folder or file of the text it is tuned on.")
@click.option("--out", type=Path, required=True, help="Folder of runs.jsonl and methods.md.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at once on each GPU.")
@click.option("--only", multiple=True, help="Only methods of such a name, such as 'lora-r*'; may be repeated.")
@click.option("--seconds", type=float, default=float("inf"), help="Start no run later than this.")
@click.option("--set", "items", multiple=True, help="key=value of params.yaml, for all runs; may be repeated.")
def main(
    base: Path, corpus: Path, out: Path, jobs: int, only: tuple[str, ...], seconds: float, items: tuple[str, ...]
) -> None:
    """Train and evaluate METHODS, and write their tables."""
    deadline = time.monotonic() + seconds
    settings = workspace.settings(items)
    if unknown := [pattern for pattern in only if not any(fnmatch(name, pattern) for name in METHODS)]:
        raise StageError(f"--only {unknown[0]}: there are {', '.join(METHODS)}")
    names = [name for name in METHODS if not only or any(fnmatch(name, pattern) for pattern in only)]
    shared = prepare(base, corpus, out, settings)
    conditions = workspace.environment() | {"jobs": jobs}
    gpus: SimpleQueue[str] = SimpleQueue()  # a run takes one and puts it back
    free = workspace.cards() * jobs
    for gpu in free:
        gpus.put(gpu)
    records = read_records(out / "runs.jsonl")
    echo(f"methods: {len(done(plan(names, records), records))} runs on record, {len(free)} at once")
    work = functools.partial(make, out, shared, settings, conditions, gpus, len(free))
    for record in in_parallel(names, records, len(free), deadline, work):
        with (out / "runs.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        runs = plan(names, records)
        count = f"{len(done(runs, records))} of at least {len(runs)} runs"
        result = record["error"] or f"test perplexity {record['eval']['tuned']['perplexity']:.3f}"
        echo(f"methods: {count}, {record['key']}: {result}, {record['seconds']:.0f} s")
        write_tables(out, records)
    if not records:
        echo("methods: no run was made")
        return
    write_tables(out, records)
    if points := means(records):
        draw_methods(points, out / "methods.png")
        with atomic_output(out / "methods.csv") as file:
            all_runs(records).to_csv(file, index=False, float_format="%.8g")
    echo(f"methods: {out}/methods.md holds {sum(record['error'] is None for record in records.values())} runs")


def write_tables(out: Path, records: Records) -> None:
    """Write OUT/methods.md."""
    conditions = json.loads((out / "prepared/conditions.json").read_text())
    with atomic_output(out / "methods.md") as file:
        file.write_text(render(records, conditions), encoding="utf-8")


def prepare(base: Path, corpus: Path, out: Path, settings: dict[str, Any]) -> Path:
    """Return the folder in which base, prepare and tokenize have run.

    Raises:
        StageError: OUT holds runs of another base, corpus or params.yaml, or a stage failed.
    """
    shared = out.resolve() / "prepared"
    local = {"presets.local.model": str(base.resolve()), "presets.local.dataset": str(corpus.resolve())}
    files = {"base": base.resolve(), "corpus": corpus.resolve()}
    now = {name: f"{path.name}, SHA-256 {workspace.fingerprint(path)}..." for name, path in files.items()}
    now["params"] = settings | {"params.yaml": workspace.fingerprint(workspace.ROOT / "params.yaml")}
    if (shared / "conditions.json").is_file():
        before = json.loads((shared / "conditions.json").read_text())
        if other := " and ".join(name for name in now if before[name] != now[name]):
            raise StageError(f"{out}: its runs have another {other}: give another --out, or remove the folder")
        return shared
    workspace.empty(shared)
    workspace.write_params(shared, settings | {"preset": "local"} | local)
    for name in ("base", "prepare", "tokenize"):
        if error := workspace.run_stage(name, shared, shown=True):
            raise StageError(error)
    (shared / "conditions.json").write_text(json.dumps(now, indent=2) + "\n")
    return shared


def in_parallel(
    names: list[str], records: Records, jobs: int, deadline: float, work: Callable[[Run], dict]
) -> Iterator[dict]:
    """Make the runs of a plan, which a record may lengthen; yield each record as it ends, and add it to `records`."""
    started: set[Run] = set()
    running: set[Future] = set()
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            planned = plan(names, records) if time.monotonic() < deadline else []
            skipped = started.union(done(planned, records))
            chosen = [run for run in planned if run not in skipped][: jobs - len(running)]
            started |= set(chosen)
            running |= {pool.submit(work, run) for run in chosen}
            if not running:
                return
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for record in (future.result() for future in ended):
                records[record["key"]] = record
                yield record


def make(out: Path, shared: Path, settings: dict, conditions: dict, gpus: SimpleQueue, jobs: int, run: Run) -> dict:
    """Train and evaluate one run; return its record."""
    started = time.monotonic()
    folder = workspace.empty(out / "runs" / run.key)
    values = {"method": "lora"} | METHODS[run.method] | {"train.learning_rate": run.learning_rate, "seed": run.seed}
    values |= {"train.seed": None}  # it would stand for the seed of every run
    inputs = {name: shared / "data" / name for name in ("base", "raw", "tokens")}
    workspace.link_inputs(folder, settings | values, **inputs)
    gpu = gpus.get()
    threads = os.getenv("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    # Locks of GPUs lie in TMPDIR: with one of its own, a run shares its GPU with others.
    variables = {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": gpu, "TMPDIR": str(folder)}
    variables["TORCHINDUCTOR_CACHE_DIR"] = str(out.resolve() / "compiled")
    error = workspace.run_stage("train", folder, **variables) or workspace.run_stage("evaluate", folder, **variables)
    gpus.put(gpu)
    shutil.rmtree(folder / "data")  # with method full it holds all weights
    record = {"key": run.key, "error": error, "seconds": round(time.monotonic() - started, 1), **conditions}
    metrics = {} if error else {name: folder / "metrics" / f"{name}.json" for name in METRICS}
    return record | {name: json.loads(file.read_text()) for name, file in metrics.items()}


def read_records(file: Path) -> Records:
    """Return the newest record of each run.

    Raises:
        StageError: a line is not a record.
    """
    records = {}
    for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else [], start=1):
        try:
            record = json.loads(line)
            records[parse_key(record["key"]).key] = record
            if record["error"] is None:
                [figure(record) for figure, _ in COLUMNS.values()]
        except (ValueError, LookupError, TypeError) as error:
            raise StageError(f"{file}, line {number}: not the record of a run ({error}); remove the line") from error
    return records


if __name__ == "__main__":
    main()
