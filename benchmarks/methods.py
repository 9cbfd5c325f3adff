"""Every method on one base and corpus: each at its own best learning rate, found by a sweep, then over three seeds.

    python -m benchmarks.methods --base FOLDER --corpus FOLDER --out FOLDER [--jobs N] [--only NAME ...]

in   --base, a model; --corpus, a text; params.yaml for everything that METHODS does not set
out  OUT/runs.jsonl: a record for each run; OUT/methods.md: the tables; OUT/methods.png: the figure

base, prepare and tokenize run once. The methods are measured one after another, several runs at a time. Started again,
the study makes only the runs that are missing or failed.
"""

import functools
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import click

from benchmarks import workspace
from benchmarks.methods_figure import draw_methods
from gpt2lora.pipeline.artifacts import atomic_output
from gpt2lora.pipeline.cli import StageError, command, echo

QLORA = {"method": "qlora", "methods.qlora.bits": 4, "methods.qlora.quant_type": "nf4"}
METHODS: dict[str, dict[str, Any]] = {  # what differs from params.yaml; method is lora where nothing else is said
    "lora": {},
    "full": {"method": "full"},
    "qlora-nf4": QLORA,
    "lora-dropout-0.05": {"lora.dropout": 0.05},
    **{f"lora-r{r}": {"lora.r": r, "lora.alpha": 2 * r} for r in (8, 64, 128, 32)},
    "qlora-8bit": QLORA | {"methods.qlora.bits": 8, "methods.qlora.double_quant": False},
    "lora-attention": {"lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},  # of Gemma and Llama
    "rslora": {"lora.use_rslora": True},
    "dora": {"lora.use_dora": True},
    "lora-plus": {"train.lora_plus_ratio": 16.0},
    **{f"lora-r{r}-alpha32": {"lora.r": r, "lora.alpha": 32} for r in (8, 64, 128)},
    "lora-batch-32": {"train.batch_size": 32},
    "full-batch-32": {"method": "full", "train.batch_size": 32},
    **{init: {"lora.init": init} for init in ("pissa", "olora", "orthogonal")},
    "qlora-fp4": QLORA | {"methods.qlora.quant_type": "fp4"},
    "qlora-loftq": QLORA | {"lora.init": "loftq"},
    "lora-bits-8": {"lora.bits": 8},
    "lora-bits-4": {"lora.bits": 4},
    "lora-3-epochs": {"train.epochs": 3},
    "full-3-epochs": {"method": "full", "train.epochs": 3},
}
RATES = tuple(float(f"{digit}e{power}") for power in range(-6, -1) for digit in (1, 2, 5))
# The five rates around this one are tried first. A wrong expectation costs runs, and changes no result.
EXPECTED = dict.fromkeys(METHODS, 5e-4)
EXPECTED |= dict.fromkeys(("rslora", "lora-plus", "pissa", "olora"), 2e-4)
EXPECTED |= dict.fromkeys(("lora", "lora-batch-32", "lora-r64-alpha32", "lora-r128-alpha32"), 1e-3)
EXPECTED |= dict.fromkeys((name for name in METHODS if name.startswith("qlora")), 1e-3)
EXPECTED |= dict.fromkeys((name for name in METHODS if name.startswith("full")), 5e-5)
SEEDS = (0, 1, 2)
METRICS = ("train", "train_timings", "eval")  # the files of metrics/ that a record holds
EXISTING = click.Path(exists=True, path_type=Path)
Records = dict[str, dict]  # the newest record of each run, by Run.key


@dataclass(frozen=True)
class Run:
    """One training: a method, its learning rate and its seed."""

    method: str
    learning_rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.method}-lr-{self.learning_rate:g}-seed-{self.seed}"


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
        with atomic_output(out / "methods.md") as file:
            file.write_text(render(records, json.loads((shared / "conditions.json").read_text())), encoding="utf-8")
    if points := means(records):
        draw_methods(points, out / "methods.png")
    echo(f"methods: {out}/methods.md holds {sum(record['error'] is None for record in records.values())} runs")


def plan(names: list[str], records: Records) -> list[Run]:
    """Return all runs that are known to be needed: for each method its sweep, then its seeds."""
    return list(dict.fromkeys(run for name in names for run in (*sweep(name, records), *finals(name, records))))


def sweep(method: str, records: Records) -> list[Run]:
    """Return the runs that find the learning rate of a method.

    They are five, around the expected rate. If the best of them is the lowest or the highest rate, one more follows on
    that side, until the best one lies inside.
    """
    middle = RATES.index(EXPECTED[method])
    low, high = middle - 2, middle + 2
    while True:
        runs = [Run(method, rate, SEEDS[0]) for rate in RATES[low : high + 1]]
        best = best_rate(runs, records) if all(run.key in records for run in runs) else None
        if best == RATES[low] and low > 0:
            low -= 1
        elif best == RATES[high] and high < len(RATES) - 1:
            high += 1
        else:
            return runs


def finals(method: str, records: Records) -> list[Run]:
    """Return the runs at the best learning rate, over all seeds; none before the sweep is done, or if it failed."""
    runs = sweep(method, records)
    rate = best_rate(runs, records) if all(run.key in records for run in runs) else None
    return [Run(method, rate, seed) for seed in SEEDS] if rate else []


def best_rate(runs: list[Run], records: Records) -> float | None:
    """Return the learning rate of the lowest validation loss; the test split has no say."""
    losses = {run.learning_rate: records[run.key]["train"]["best_validation_loss"] for run in done(runs, records)}
    return min(losses, key=losses.get, default=None)


def done(runs: list[Run], records: Records) -> list[Run]:
    """Return the runs that succeeded."""
    return [run for run in runs if run.key in records and records[run.key]["error"] is None]


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
            todo = [run for run in planned if run not in started and run not in done(planned, records)]
            chosen = todo[: jobs - len(running)]
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
    """Return the newest record of each run."""
    records = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.is_file() else [], start=1):
        try:
            record = json.loads(line)
            records[record["key"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise StageError(f"{file}, line {number}: not the record of a run ({error}); remove the line") from error
    return records


COLUMNS: dict[str, tuple[Callable[[dict], float], str]] = {  # of the final table
    "validation loss, nats/token": (lambda record: record["train"]["best_validation_loss"], ".4f"),
    "test perplexity": (lambda record: record["eval"]["tuned"]["perplexity"], ".3f"),
    "beside lora, %": (lambda record: record.get("beside_lora"), "+.2f"),
    "word perplexity": (lambda record: record["eval"]["tuned"]["word_perplexity"], ".2f"),
    "trained parameters": (lambda record: record["train"]["trainable_parameters"], ",.0f"),
    "adapter, MB": (lambda record: record["train"]["adapter_bytes"] / 1e6, ",.2f"),
    "frozen base, MB": (lambda record: record["train"]["frozen_base_bytes"] / 1e6, ",.1f"),
    "peak memory, GB": (lambda record: record["train_timings"]["peak_memory_bytes"] / 1e9, ".2f"),
    # Runs that share a GPU slow each other down.
    "tokens/s": (lambda r: r["train_timings"]["tokens_per_second"] if r["jobs"] == 1 else None, ",.0f"),
    "both stages, s": (lambda r: r["seconds"] if r["jobs"] == 1 else None, ".0f"),
}


def tuned(method: str, records: Records) -> list[Run]:
    """Return the runs on record at the best learning rate so far, by seed."""
    rate = best_rate(sweep(method, records), records)
    return done([Run(method, rate, seed) for seed in SEEDS], records) if rate else []


def spread(numbers: list[float | None], form: str) -> str:
    """Return the mean and, if the numbers differ, the sample standard deviation; nothing if all are missing."""
    numbers = [number for number in numbers if number is not None]
    if not numbers:
        return ""
    mean = format(statistics.mean(numbers), form)
    return f"{mean} ± {format(statistics.stdev(numbers), form.lstrip('+'))}" if len(set(numbers)) > 1 else mean


def means(records: Records) -> dict[str, tuple[float, float]]:
    """Return for each method that was measured its trained parameters and its mean test perplexity."""
    found = {name: tuned(name, records) for name in METHODS}
    return {
        name: tuple(
            statistics.mean(COLUMNS[key][0](records[run.key]) for run in runs)
            for key in ("trained parameters", "test perplexity")
        )
        for name, runs in found.items()
        if runs
    }


def render(records: Records, conditions: dict) -> str:
    """Return the tables in Markdown: the sweeps, the methods at their best rates, what failed, and the conditions."""
    sweeps = ["| method | test perplexity by learning rate | best |", "|---|---|---|"]
    table = [f"| method | learning rate | seeds | {' | '.join(COLUMNS)} |", "|---" * (3 + len(COLUMNS)) + "|"]
    lora = {run.seed: COLUMNS["test perplexity"][0](records[run.key]) for run in tuned("lora", records)}
    for name in METHODS:
        swept = done(sweep(name, records), records)
        if not swept:
            continue
        rate = best_rate(swept, records)
        edge = " (at the edge)" * (rate in (swept[0].learning_rate, swept[-1].learning_rate))
        cells = [f"{run.learning_rate:g}: {COLUMNS['test perplexity'][0](records[run.key]):.2f}" for run in swept]
        sweeps.append(f"| {name} | {', '.join(cells)} | {rate:g}{edge} |")
        runs = tuned(name, records)
        found = [dict(records[run.key]) for run in runs]
        for run, record in zip(runs, found, strict=True):
            if name != "lora" and run.seed in lora:  # paired: both runs have the same seed
                record["beside_lora"] = 100 * (record["eval"]["tuned"]["perplexity"] / lora[run.seed] - 1)
        cells = [spread([figure(record) for record in found], form) for figure, form in COLUMNS.values()]
        table.append(f"| {name} | {rate:g} | {', '.join(str(run.seed) for run in runs)} | {' | '.join(cells)} |")
    failed = [f"- {key}: `{record['error']}`" for key, record in records.items() if record["error"]]
    facts = {key: ", ".join({str(record[key]): None for record in records.values()}) for key in ("device", "commit")}
    facts |= {"base": conditions["base"], "corpus": conditions["corpus"]}
    parts = ["# Methods, measured", "\n".join(sweeps), "\n".join(table)]
    parts += ["## Failed\n\n" + "\n".join(failed)] * bool(failed)
    return "\n\n".join([*parts, "\n".join(f"- {name}: {text}" for name, text in facts.items())]) + "\n"


if __name__ == "__main__":
    main()
