"""Training speed and memory against transformers' Trainer with PEFT, plain and with torch_compile=True.

    python -m benchmarks.training [--rows NAME ...] [--model FOLDER] [--steps N] [--repeats N] [--out FOLDER]

For each row, the Trainer (benchmarks/hf_trainer.py), the compiled Trainer and this project (benchmarks/ours.py) run in
turn, each in a process of its own, on the same model and token rows; medians over the repeats count, of memory the
highest. Rows of this project alone show how the cost grows. Writes OUT/training.md and OUT/training.json.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from benchmarks import random_inputs, workspace
from gpt2lora.pipeline.artifacts import atomic_output
from gpt2lora.pipeline.cli import StageError, command, echo

SIDES = {"Trainer": "hf_trainer", "Trainer, compiled": "hf_trainer", "ours": "ours"}


@dataclass(frozen=True)
class Row:
    """One comparison; `peers` false: only this project is measured."""

    name: str
    device: str
    size: str
    block_size: int
    batch_size: int
    method: str = "lora"
    target: str = "all-linear"
    bits: int = 4
    rank: int = 16
    precision: str | None = None  # of this project; None: params.yaml's
    peers: bool = True


GPU, TINY, CPU_124M = ("cuda", "124M", 1024), ("cpu", "tiny", 128), ("cpu", "124M", 256)
ROWS = (
    Row("lora-all-8", *GPU, 8),
    Row("lora-all-32", *GPU, 32),
    Row("lora-c_attn-8", *GPU, 8, target="c_attn"),
    Row("full-8", *GPU, 8, "full"),
    Row("full-32", *GPU, 32, "full"),
    Row("qlora-all-32", *GPU, 32, "qlora"),
    Row("qlora-8bit-all-32", *GPU, 32, "qlora", bits=8),
    *(Row(f"rank-{rank}", *GPU, 8, rank=rank, peers=False) for rank in (4, 64)),
    *(Row(f"batch-{batch}", *GPU, batch, peers=False) for batch in (2, 64)),
    *(Row(f"block-{block}", "cuda", "124M", block, 8, peers=False) for block in (256, 512)),
    *(Row(f"size-{size}", "cuda", size, 1024, 8, peers=False) for size in ("355M", "774M")),
    Row("tiny-lora", *TINY, 8),
    Row("tiny-lora-fp32", *TINY, 8, precision="fp32"),
    Row("tiny-full", *TINY, 8, "full"),
    Row("124M-lora", *CPU_124M, 1),
    *(Row(f"tiny-rank-{rank}", *TINY, 8, rank=rank, peers=False) for rank in (4, 64)),
    *(Row(f"tiny-batch-{batch}", *TINY, batch, peers=False) for batch in (2, 32)),
)
STEPS = {"cuda": (60, 15), "cpu tiny": (120, 20), "cpu 124M": (6, 2)}  # all, and those before the clock starts
STAGE = (
    "stage"  # the wall clock of the stage `train` against the script's: LoRA on all linear layers, batch 8, 3 epochs
)
STAGE_INPUTS = {"cuda": ("124M", 1024, 2336), "cpu": ("tiny", 128, 512)}  # 2,336 rows: WikiText-2's train split
STAGE_EPOCHS = 3
FOLDER = click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path)


@command
@click.option("--rows", "names", multiple=True, help="Only this row; may be repeated.  [default: all of the device]")
@click.option("--model", "base", type=FOLDER, help="Folder of the model.  [default: random weights of the row's size]")
@click.option("--tokens", type=FOLDER, help="Folder of token arrays.  [default: random ones of the row's block size]")
@click.option("--steps", type=click.IntRange(2), help="[default: 60 on a GPU; on a CPU 120, of 124M 6]")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Times that each side runs.")
@click.option("--out", type=Path, default="benchmarks/out", show_default=True, help="Folder of the results.")
def main(
    names: tuple[str, ...], base: Path | None, tokens: Path | None, steps: int | None, repeats: int, out: Path
) -> None:
    """Measure the project's training against the script that a user would write with transformers' Trainer."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = {row.name: row for row in ROWS if row.device == device}
    if unknown := set(names) - {STAGE, *rows}:
        raise StageError(f"--rows {min(unknown)}: on this device there are {', '.join([*rows, STAGE])}")
    conditions, work, results, clock = workspace.environment(), out.resolve() / "work", [], None
    for row in [rows[name] for name in names or rows if name != STAGE]:
        model = base or random_inputs.model(work, row.size)
        count, warmup = STEPS.get(f"{row.device} {row.size}", STEPS["cuda"])
        count = steps or count
        data = random_inputs.tokens(work, model, row.block_size, count * row.batch_size)
        options = {"model": model, "tokens": tokens or data, "steps": count}
        results.append(measure(row, options | {"warmup": min(warmup, count // 2)}, repeats))
        write_results(out, results, clock, conditions)
    if STAGE in names or not names:
        size, block_size, count = STAGE_INPUTS[device]
        model = base or random_inputs.model(work, size)
        data = tokens or random_inputs.tokens(work, model, block_size, count)
        clock = measure_stage(model, data, work / "stage", repeats)
        write_results(out, results, clock, conditions)
    echo("\n" + (out / "training.md").read_text(encoding="utf-8"))


def measure(row: Row, options: dict, repeats: int) -> dict:
    """Run all sides of a row in turn; return their figures.

    Raises:
        StageError: two sides did not do the same work.
    """
    options |= {"method": row.method, "target": row.target, "bits": row.bits, "rank": row.rank}
    options |= {"batch-size": row.batch_size}
    sides = SIDES if row.peers else {"ours": "ours"}
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    for repeat in range(1, repeats + 1):
        for side, module in sides.items():
            extra = {"precision": row.precision} if side == "ours" and row.precision else {}
            flags = ["--compile"] if side == "Trainer, compiled" else []
            runs[side].append(run(f"benchmarks.{module}", options | extra, *flags))
        speeds = "; ".join(f"{side} {runs[side][-1]['tokens_per_second']:,.0f} tokens/s" for side in sides)
        echo(f"{row.name} {repeat}/{repeats}: {speeds}")
    for key in ("steps", "tokens", "trained_parameters"):
        if len({record[key] for records in runs.values() for record in records}) > 1:
            raise StageError(f"{row.name}: {key} differ: { {side: records[0][key] for side, records in runs.items()} }")
    speed = {side: statistics.median(record["tokens_per_second"] for record in runs[side]) for side in runs}
    memory = {side: max(record["peak_memory_bytes"] for record in runs[side]) for side in runs}
    return {"row": asdict(row), "tokens_per_second": speed, "peak_memory_bytes": memory, "runs": runs}


def run(module: str, options: dict, *flags: str) -> dict:
    """Run a module in a process of its own; return the JSON on its last line."""
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", module, *arguments, *flags]
    done = subprocess.run(
        command, cwd=workspace.ROOT, env=workspace.environment_variables(), capture_output=True, encoding="utf-8"
    )
    if done.returncode:
        raise StageError(f"{' '.join(command)}\nfailed: {done.stderr[-2000:] or done.stdout[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_stage(model: Path, tokens: Path, folder: Path, repeats: int) -> dict[str, list[float]]:
    """Return the seconds from start to exit of the script and of the stage, in turn."""
    clocks: dict[str, list[float]] = {"Trainer": [], "ours": []}
    values = {
        "method": "lora",
        "train.epochs": STAGE_EPOCHS,
        "train.batch_size": 8,
        "lora.target_modules": "all-linear",
    }
    for repeat in range(1, repeats + 1):
        workspace.empty(folder)
        options = {"model": model, "tokens": tokens, "epochs": STAGE_EPOCHS, "batch-size": 8, "out": folder / "trained"}
        started = time.perf_counter()
        run("benchmarks.hf_trainer", options)
        clocks["Trainer"].append(time.perf_counter() - started)
        workspace.link_inputs(folder, values, base=model, tokens=tokens)
        started = time.perf_counter()
        if error := workspace.run_stage("train", folder):
            raise StageError(error)
        clocks["ours"].append(time.perf_counter() - started)
        echo(f"{STAGE} {repeat}/{repeats}: " + ", ".join(f"{side} {clocks[side][-1]:.1f} s" for side in clocks))
    shutil.rmtree(folder)
    return clocks


def write_results(out: Path, results: list[dict], clock: dict | None, conditions: dict[str, str]) -> None:
    """Write what was measured so far into OUT."""
    with atomic_output(out / "training.md") as file:
        file.write_text(render(results, clock, conditions), encoding="utf-8")
    with atomic_output(out / "training.json") as file:
        file.write_text(json.dumps({"conditions": conditions, "rows": results, "stage": clock}, indent=2) + "\n")


def render(results: list[dict], clock: dict | None, conditions: dict[str, str]) -> str:
    """Return the tables in Markdown."""
    header = [f"{side}, tokens/s" for side in SIDES] + ["ratio to Trainer", "ratio to compiled"]
    header += [f"{side}, GB" for side in SIDES]
    lines = [f"| row | {' | '.join(header)} |", "|---" * (len(header) + 1) + "|"]
    for result in results:
        speed = [result["tokens_per_second"].get(side) for side in SIDES]
        memory = [result["peak_memory_bytes"].get(side) for side in SIDES]
        ratios = [speed[2] / peer if peer else None for peer in speed[:2]]
        cells = [f"{value:,.0f}" if value else "" for value in speed]
        cells += [f"{value:.2f}" if value else "" for value in ratios]
        cells += [f"{value / 1e9:.2f}" if value else "" for value in memory]
        lines.append(f"| {result['row']['name']} | {' | '.join(cells)} |")
    if clock:
        trainer, ours = (statistics.median(clock[side]) for side in ("Trainer", "ours"))
        lines += ["", "| wall clock | Trainer, s | ours, s | ratio |", "|---|---|---|---|"]
        lines.append(f"| {STAGE} | {trainer:.1f} | {ours:.1f} | {ours / trainer:.2f} |")
    return "\n".join([*lines, "", *(f"- {name}: {text}" for name, text in conditions.items())]) + "\n"


if __name__ == "__main__":
    main()
