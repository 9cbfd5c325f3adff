"""How training and evaluation scale with the number of GPUs, and that they give the same bytes on any number.

    python -m benchmarks.scaling [--rows NAME ...] [--gpus 1 --gpus 2 --gpus 4] [--before FOLDER] [--out FOLDER]

Speed: each row at the same rows a GPU, benchmarks/ours.py and benchmarks/scoring.py under torch's launcher.
bytes: the stage `train` with train.deterministic, and without, on each number of GPUs.
queue: 8 trainings, as many at once as there are GPUs, against the time of one alone.
before: one GPU against the tree in --before, such as an unpacked `git archive` of an earlier commit.
Writes OUT/scaling.json and OUT/scaling.md. On a CPU the processes share its cores, which tries the script out.
"""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import click

from benchmarks import random_inputs, workspace
from gpt2lora.pipeline.artifacts import atomic_output
from gpt2lora.pipeline.cli import StageError, command, echo

TRAINING = {
    "lora-all-8": {"method": "lora", "batch-size": 8},
    "lora-all-32": {"method": "lora", "batch-size": 32},
    "full-32": {"method": "full", "batch-size": 32},
    "qlora-all-32": {"method": "qlora", "batch-size": 32},
}
OTHERS = ("evaluate", "bytes", "queue", "before")
COMPILED = {"train.compile": "always", "train.deterministic": True}
METHODS = {  # for the comparison of bytes: what differs from params.yaml
    "lora": COMPILED,
    "lora, captured": COMPILED | {"train.compile": "never"},
    "qlora": COMPILED | {"method": "qlora"},
    "full": COMPILED | {"method": "full", "train.learning_rate": 1e-3},
    "lora, not deterministic": COMPILED | {"train.deterministic": False},
}
QUEUED = 8


@command
@click.option("--rows", "names", multiple=True, help="Only this row; may be repeated.  [default: all]")
@click.option("--gpus", "counts", type=click.IntRange(1), multiple=True, default=(1, 2, 4), show_default=True)
@click.option("--size", type=click.Choice(list(random_inputs.SIZES)), default="124M", show_default=True)
@click.option("--block-size", type=click.IntRange(1), default=1024, show_default=True)
@click.option("--steps", type=click.IntRange(2), default=60, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=1, show_default=True)
@click.option("--before", type=click.Path(exists=True, path_type=Path), help="Folder of an earlier tree.")
@click.option("--out", type=Path, default="benchmarks/out", show_default=True, help="Folder of the results.")
def main(names, counts, size: str, block_size: int, steps: int, repeats: int, before: Path | None, out: Path) -> None:
    """Measure speed on several GPUs, and compare the bytes."""
    if unknown := set(names) - {*TRAINING, *OTHERS}:
        raise StageError(f"--rows {min(unknown)}: there are {', '.join([*TRAINING, *OTHERS])}")
    if "before" in names and not before:
        raise StageError("--rows before: expected --before FOLDER, an earlier tree to compare with")
    if block_size > (positions := random_inputs.SIZES[size][3]):
        raise StageError(f"--block-size: expected 1 to {positions:,}, the positions of {size}, not {block_size:,}")
    counts = tuple(sorted(set(counts)))
    work = out.resolve() / "work"
    model = random_inputs.model(work, size)
    results: dict[str, dict] = {}
    for name in names or (*TRAINING, *OTHERS):
        try:
            if name in TRAINING:
                rows = steps * TRAINING[name]["batch-size"] * max(counts)
                data = random_inputs.tokens(work, model, block_size, rows)
                options = {"model": model, "tokens": data, "steps": steps, "warmup": min(15, steps // 2)}
                results[name] = on_each_number(counts, partial(measure_training, TRAINING[name] | options, repeats))
            elif name == "evaluate":
                options = {"model": model, "context": block_size}
                results[name] = on_each_number(counts, partial(run_group, "benchmarks.scoring", options))
            elif name == "bytes":
                results[name] = compare_bytes(model, block_size, counts, work)
            elif name == "queue":
                results[name] = measure_queue(model, block_size, max(counts), work)
            elif before:
                results[name] = compare_trees(before.resolve(), model, block_size, steps, repeats, work)
        except StageError as error:  # the other rows are measured all the same
            results[name] = {"error": error.format_message()}
        echo(f"{name}: {json.dumps(results.get(name))}")
        write_results(out, results)
    results["conditions"] = workspace.environment()  # last, since it uses a GPU
    write_results(out, results)
    echo("\n" + (out / "scaling.md").read_text(encoding="utf-8"))
    if failed := failed_rows(results):
        raise StageError(f"failed: {', '.join(failed)}; {out}/scaling.json has the errors")


def on_each_number(counts: tuple[int, ...], measure: Callable[[int], dict]) -> dict:
    """Return what `measure` finds for each number of processes, and under "error" how the first one failed."""
    found = {}
    for count in counts:
        try:
            found[count] = measure(count)
        except StageError as error:  # those before it keep their figures
            return found | {"error": f"{count} processes: {error.format_message()}"}
    return found


def failed_rows(results: dict[str, dict]) -> list[str]:
    """Return the rows with an error, of the row itself or of one of its methods."""
    parts = {name: [found, *found.values()] for name, found in results.items()}
    return [name for name, found in parts.items() if any(isinstance(part, dict) and "error" in part for part in found)]


def measure_training(options: dict, repeats: int, count: int) -> dict:
    """Return the median of tokens/s of so many processes, and the memory in GB of one of them."""
    runs = [run_group("benchmarks.ours", options | {"accumulation-steps": count}, count) for _ in range(repeats)]
    return {
        "tokens_per_second": statistics.median(run["tokens_per_second"] for run in runs),
        "memory_gb": max(run["peak_memory_bytes"] for run in runs) / 1e9,
        "train_loss": runs[0]["train_loss"],
    }


def run_group(module: str, options: dict, count: int, root: Path = workspace.ROOT) -> dict:
    """Run a module in so many processes; return the JSON on the last line that is one."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    line = [sys.executable, *launcher, "-m", module, *arguments]
    environment = workspace.environment_variables() | {"PYTHONPATH": str(root)}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    done = subprocess.run(line, cwd=root, env=environment, capture_output=True, encoding="utf-8")
    records = [text for text in done.stdout.splitlines() if text.startswith("{")]
    if done.returncode or not records:
        raise StageError(f"{' '.join(line)} failed: {done.stderr[-1500:] or done.stdout[-1500:]}")
    return json.loads(records[-1])


def run_train(folder: Path, gpus: list[str] | None) -> float:
    """Run the stage `train` in a folder, on any or some of the GPUs; return its seconds."""
    variables = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    started = time.monotonic()
    if error := workspace.run_stage("train", folder, **variables):
        raise StageError(f"{folder.name}: {error}")
    return time.monotonic() - started


def compare_bytes(model: Path, block_size: int, counts: tuple[int, ...], work: Path) -> dict:
    """Return for each method whether all numbers of GPUs gave the same bytes, and the validation losses."""
    tokens, found = random_inputs.tokens(work, model, block_size, 100), {}
    common = {"train.epochs": 2, "train.batch_size": 4, "train.accumulation_steps": 4, "train.validations": 2}
    for name, values in METHODS.items():
        try:
            found[name] = train_on_each(common | values, counts, model, tokens, work)
        except StageError as error:
            found[name] = {"error": error.format_message()}
        echo(f"bytes: {name}: {found[name]}")
    return found


def train_on_each(settings: dict, counts: tuple[int, ...], model: Path, tokens: Path, work: Path) -> dict:
    """Train on each number of GPUs; return whether the bytes are equal, the validation losses and the seconds."""
    gpus, prints, losses = workspace.cards(), [], []

    def train(count: int) -> float:
        workspace.link_inputs(workspace.empty(work / f"bytes-{count}"), settings, base=model, tokens=tokens)
        # One GPU is the last one, so that it and two others can work at the same time.
        return run_train(work / f"bytes-{count}", gpus[-1:] if count == 1 else gpus[:count])

    *fewer, most = sorted(counts)
    with ThreadPoolExecutor(len(counts) if sum(fewer) <= len(gpus) else 1) as pool:
        seconds = list(pool.map(train, fewer))
    seconds.append(train(most))
    for count in counts:
        outputs = [
            work / f"bytes-{count}" / name for name in ("data/adapter", "metrics/train.json", "metrics/loss.csv")
        ]
        prints.append([workspace.fingerprint(path) for path in outputs])
        losses.append(json.loads(outputs[1].read_text())["best_validation_loss"])
    log = (work / f"bytes-{max(counts)}" / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in log if "GPUs:" in line or "steps:" in line]
    equal = all(each == prints[0] for each in prints)
    return {"equal": equal, "losses": losses, "seconds": seconds, "said": said}


def measure_queue(model: Path, block_size: int, jobs: int, work: Path) -> dict:
    """Return the seconds of 8 trainings of one GPU each, `jobs` at once, and of one alone."""
    tokens = random_inputs.tokens(work, model, block_size, 1000)

    def train(number: int) -> float:
        folder = workspace.empty(work / f"queued-{number}")
        values = {"train.epochs": 8, "train.validations": 2, "seed": number, "train.compile": "never"}
        workspace.link_inputs(folder, values, base=model, tokens=tokens)
        return run_train(folder, None)

    most, ended = Counter(), threading.Event()
    watcher = threading.Thread(target=count_processes, args=(most, ended))
    watcher.start()
    started = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        seconds = list(pool.map(train, range(QUEUED)))
    wall = time.monotonic() - started
    ended.set()
    watcher.join()
    alone = train(0)
    share = wall / (QUEUED * alone)
    return {"alone": alone, "each": seconds, "wall": wall, "share": share, "most_processes_on_a_gpu": dict(most)}


def count_processes(most: Counter, ended: threading.Event) -> None:
    """Record the most processes that nvidia-smi showed at once on each GPU."""
    while not ended.wait(1):
        try:
            query = ["nvidia-smi", "--query-compute-apps=gpu_uuid", "--format=csv,noheader"]
            shown = Counter(subprocess.run(query, capture_output=True, text=True).stdout.split())
        except OSError:
            return
        for gpu, number in shown.items():
            most[gpu] = max(most[gpu], number)


def compare_trees(before: Path, model: Path, block_size: int, steps: int, repeats: int, work: Path) -> dict:
    """Return speed and memory on one GPU with batch 8, of the earlier tree and of this one, in turn."""
    tokens = random_inputs.tokens(work, model, block_size, steps * 8)
    options = {"model": model, "tokens": tokens, "steps": steps, "warmup": min(15, steps // 2), "batch-size": 8}
    runs: dict[str, list[dict]] = {"before": [], "now": []}
    for _ in range(max(2, repeats)):
        for name, root in (("before", before), ("now", workspace.ROOT)):
            runs[name].append(run_group("benchmarks.ours", options, 1, root))
    return {
        name: {
            "tokens_per_second": [run["tokens_per_second"] for run in records],
            "memory_gb": max(run["peak_memory_bytes"] for run in records) / 1e9,
        }
        for name, records in runs.items()
    }


def write_results(out: Path, results: dict) -> None:
    """Write what was measured so far into OUT."""
    lines = ["| row | processes | tokens/s or windows/s | times one | GB |", "|---|---|---|---|---|"]
    for name, found in results.items():
        runs = {count: run for count, run in found.items() if isinstance(count, int)}
        speeds = {count: run.get("tokens_per_second") or run["windows_per_second"] for count, run in runs.items()}
        for count, speed in speeds.items():
            one = speeds[min(speeds)] / min(speeds)
            lines.append(f"| {name} | {count} | {speed:,.0f} | {speed / one:.2f} | {runs[count]['memory_gb']:.2f} |")
    lines += ["", *(f"- {name} failed: see scaling.json" for name in failed_rows(results))]
    with atomic_output(out / "scaling.md") as file:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with atomic_output(out / "scaling.json") as file:
        file.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
