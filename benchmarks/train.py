"""Training against transformers' Trainer with PEFT: tokens a second, memory, and the train stage's wall clock.

    python -m benchmarks.train [--rows NAME ...] [--model FOLDER] [--steps N] [--repeats N] [--out FOLDER]

Peer (benchmarks/peer_trainer.py) and project (benchmarks/ours.py) run in turn, each time in a process of its own, on
the same model and the same token rows; the figures are medians over the repeats, of memory the highest. The same
process tree measures the device's matrix product, the ceiling of both. Writes OUT/train.md and OUT/train.json.
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


@dataclass(frozen=True)
class Row:
    """One comparison. speed, memory: the goals, the project's tokens/s and its memory over the peer's."""

    name: str
    device: str
    size: str
    block_size: int
    method: str
    target: str
    batch_size: int
    speed: float
    memory: float | None
    precision: str | None = None  # of ours; None: params.yaml's


GPU, CPU_TINY, CPU_124M = ("cuda", "124M", 1024), ("cpu", "tiny", 128), ("cpu", "124M", 256)
ROWS = (
    Row("lora-all-8", *GPU, "lora", "all-linear", 8, 4.0, 1 / 3),
    Row("lora-c_attn-8", *GPU, "lora", "c_attn", 8, 4.0, 1 / 4),
    Row("lora-c_attn-32", *GPU, "lora", "c_attn", 32, 3.6, 1 / 4),
    Row("lora-all-32", *GPU, "lora", "all-linear", 32, 3.4, 1 / 3),
    Row("full-8", *GPU, "full", "all-linear", 8, 3.0, 1 / 3),
    Row("full-32", *GPU, "full", "all-linear", 32, 3.0, 1 / 3),
    Row("qlora-all-32", *GPU, "qlora", "all-linear", 32, 2.8, 1 / 3),
    Row("qlora-c_attn-8", *GPU, "qlora", "c_attn", 8, 2.8, 1 / 3),
    Row("tiny-lora", *CPU_TINY, "lora", "all-linear", 8, 1.8, 1 / 2),
    Row("tiny-lora-fp32", *CPU_TINY, "lora", "all-linear", 8, 1.0, None, "fp32"),
    Row("tiny-full", *CPU_TINY, "full", "all-linear", 8, 1.8, 1 / 2),
    Row("tiny-full-fp32", *CPU_TINY, "full", "all-linear", 8, 1.0, None, "fp32"),
    Row("124M-lora", *CPU_124M, "lora", "all-linear", 1, 1.8, 1 / 2),
    Row("124M-lora-fp32", *CPU_124M, "lora", "all-linear", 1, 1.0, None, "fp32"),
)
STEPS = {"cuda": (60, 10), "cpu tiny": (120, 20), "cpu": (6, 2)}  # all, and those before the clock
# The stage's wall clock: LoRA on all linear layers, batch 8. 2,336 rows of 1,024 tokens are WikiText-2's train split.
STAGE, STAGE_GOAL, STAGE_EPOCHS = "stage", 0.4, 3
STAGE_SIZES = {"cuda": (*GPU[1:], 2336), "cpu": (*CPU_TINY[1:], 512)}
HEAD = (
    "| row | Trainer, tokens/s | ours, tokens/s | ratio | goal | of the ceiling "
    "| Trainer, GB | ours, GB | ratio | goal | |\n" + "|---" * 11 + "|"
)


@command
@click.option("--rows", "names", multiple=True, help="Only this row; may be repeated.  [default: all of the device]")
@click.option("--model", "base", type=Path, help="Folder of the model.  [default: random weights of --size]")
@click.option("--size", type=click.Choice(list(random_inputs.SIZES)), help="[default: the row's]")
@click.option("--tokens", type=Path, help="Folder of token arrays.  [default: random ones of the row's block size]")
@click.option("--steps", type=click.IntRange(2), help="[default: 60 on a GPU; on a CPU 120, of 124M 6]")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Times that each side runs.")
@click.option("--out", type=Path, default="benchmarks/out", show_default=True, help="Folder of train.md, train.json.")
def main(
    names: tuple[str, ...],
    base: Path | None,
    size: str | None,
    tokens: Path | None,
    steps: int | None,
    repeats: int,
    out: Path,
) -> None:
    """Measure the project's training against the script that a user would write with transformers' Trainer."""
    for option, path in (("--model", base), ("--tokens", tokens)):
        if path and not path.is_dir():
            raise StageError(f"{option} {path}: no such folder")
    ceiling = run("benchmarks.ceiling")
    rows = {row.name: row for row in ROWS if row.device == ceiling["device"]}
    if strange := set(names) - {STAGE, *rows}:
        raise StageError(f"--rows {min(strange)}: on this device there are {', '.join([*rows, STAGE])}")
    around = workspace.environment() | {"ceiling": f"{ceiling['tflops']:.2f} TFLOP/s, {ceiling['precision']}"}
    echo("\n".join(f"{name}: {text}" for name, text in around.items()))

    work, results, clock = out.resolve() / "work", [], None
    for row in [rows[name] for name in names or rows if name != STAGE]:
        model = base.resolve() if base else random_inputs.model(work, size or row.size)
        count, warmup = STEPS.get(f"{row.device} {row.size}", STEPS[row.device])
        count = steps or count
        data = tokens.resolve() if tokens else random_inputs.tokens(work, model, row.block_size, count * row.batch_size)
        options = {"model": model, "tokens": data, "method": row.method, "target": row.target}
        options |= {"batch-size": row.batch_size, "steps": count, "warmup": min(warmup, count // 2)}
        results.append(compare(row, *alternate(row, options, repeats)))
        results[-1]["of_ceiling"] = share(row, results[-1], model, data, ceiling["tflops"])
        text = write(out, results, clock, around)
    if STAGE in names or not names:
        stage_size, block_size, count = STAGE_SIZES[ceiling["device"]]
        model = base.resolve() if base else random_inputs.model(work, size or stage_size)
        data = tokens.resolve() if tokens else random_inputs.tokens(work, model, block_size, count)
        clock = wall_clocks(model, data, work / "stage", repeats)
        text = write(out, results, clock, around)
    echo(f"\n{text}")


def write(out: Path, results: list[dict], clock: dict | None, around: dict[str, str]) -> str:
    """Write what is measured so far into OUT; return the text of its tables."""
    text = report(results, clock, around)
    with atomic_output(out / "train.md") as file:
        file.write_text(text, encoding="utf-8")
    with atomic_output(out / "train.json") as file:
        file.write_text(json.dumps({"around": around, "rows": results, "stage": clock}, indent=2) + "\n")
    return text


def alternate(row: Row, options: dict, repeats: int) -> tuple[list[dict], list[dict]]:
    """Run the peer and the project in turn; return what each printed."""
    peers, ours = [], []
    for repeat in range(1, repeats + 1):
        peers.append(run("benchmarks.peer_trainer", options))
        ours.append(run("benchmarks.ours", options | ({"precision": row.precision} if row.precision else {})))
        speeds = [f"{side[-1]['tokens_per_second']:,.0f}" for side in (peers, ours)]
        echo(f"{row.name} {repeat}/{repeats}: Trainer {speeds[0]}, ours {speeds[1]} tokens/s")
    return peers, ours


def run(module: str, options: dict | None = None) -> dict:
    """Run a module in a process of its own; return the JSON on its last line."""
    arguments = [text for name, value in (options or {}).items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command, cwd=workspace.ROOT, env=workspace.surroundings(), capture_output=True, encoding="utf-8"
    )
    if done.returncode:
        raise StageError(f"{' '.join(command)}\nfailed: {done.stderr[-2000:] or done.stdout[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(row: Row, peers: list[dict], ours: list[dict]) -> dict:
    """Return the figures of a row: medians, of memory the highest, ratios, and whether the goals are met.

    Raises:
        Stop: the two did not do the same work.
    """
    for name in ("steps", "tokens", "trained_parameters"):
        if len({record[name] for record in peers + ours}) > 1:
            raise StageError(f"{row.name}: {name} differ: Trainer {peers[0][name]:,}, ours {ours[0][name]:,}")
    sides = [
        {
            "tokens_per_second": statistics.median(record["tokens_per_second"] for record in side),
            "peak_memory_bytes": max(record["peak_memory_bytes"] for record in side),
            "first_step_seconds": statistics.median(record["first_step_seconds"] for record in side),
            "train_loss": side[0]["train_loss"],
        }
        for side in (peers, ours)
    ]
    speed = sides[1]["tokens_per_second"] / sides[0]["tokens_per_second"]
    memory = sides[1]["peak_memory_bytes"] / sides[0]["peak_memory_bytes"]
    return {
        "row": asdict(row),
        "trained_parameters": ours[0]["trained_parameters"],
        "trainer": sides[0],
        "ours": sides[1],
        "speed": speed,
        "memory": memory,
        "met": speed >= row.speed and (row.memory is None or memory <= row.memory),
        "runs": {"trainer": peers, "ours": ours},
    }


def share(row: Row, result: dict, model: Path, data: Path, tflops: float) -> float:
    """Return the share of the ceiling that the project's matrix products reach.

    A matrix of n values takes 2n operations a token forward, 2n for the gradient of its input, and where it is trained
    2n for its own; causal attention over T positions of width d takes 2Td forward and twice that backward.
    """
    import numpy as np

    config = json.loads((model / "config.json").read_text())
    block_size = np.load(data / "train.npy", mmap_mode="r").shape[1] - 1
    layers, width = config["n_layer"], config["n_embd"]
    frozen = 12 * layers * width**2 + config["vocab_size"] * width
    products = 6 * frozen if row.method == "full" else 4 * frozen + 6 * result["trained_parameters"]
    return result["ours"]["tokens_per_second"] * (products + 6 * layers * block_size * width) / (tflops * 1e12)


def wall_clocks(model: Path, tokens: Path, folder: Path, repeats: int) -> dict:
    """Return the seconds from start to exit of the peer script and of the train stage, each in turn."""
    peers, ours = [], []
    values = {
        "method": "lora",
        "train.epochs": STAGE_EPOCHS,
        "train.batch_size": 8,
        "lora.target_modules": "all-linear",
    }
    for repeat in range(1, repeats + 1):
        workspace.empty(folder)
        options = {"model": model, "tokens": tokens, "epochs": STAGE_EPOCHS, "batch-size": 8, "out": folder / "peer"}
        started = time.perf_counter()
        run("benchmarks.peer_trainer", options)
        peers.append(time.perf_counter() - started)

        workspace.lay_out(folder, values, base=model, tokens=tokens)
        started = time.perf_counter()
        if error := workspace.run_stage("train", folder):
            raise StageError(error)
        ours.append(time.perf_counter() - started)
        echo(f"{STAGE} {repeat}/{repeats}: Trainer {peers[-1]:.1f} s, ours {ours[-1]:.1f} s")
    shutil.rmtree(folder)
    ratio = statistics.median(ours) / statistics.median(peers)
    return {"trainer": peers, "ours": ours, "ratio": ratio, "goal": STAGE_GOAL, "met": ratio <= STAGE_GOAL}


def markdown_line(result: dict) -> str:
    row, trainer, ours = result["row"], result["trainer"], result["ours"]
    cells = [
        row["name"],
        f"{trainer['tokens_per_second']:,.0f}",
        f"{ours['tokens_per_second']:,.0f}",
        f"{result['speed']:.2f}",
        f"≥ {row['speed']:.1f}",
        f"{100 * result['of_ceiling']:.0f} %",
        f"{trainer['peak_memory_bytes'] / 1e9:.2f}",
        f"{ours['peak_memory_bytes'] / 1e9:.2f}",
        f"{result['memory']:.2f}",
        "" if row["memory"] is None else f"≤ {row['memory']:.2f}",
        "met" if result["met"] else "not met",
    ]
    return f"| {' | '.join(cells)} |"


def report(results: list[dict], clock: dict | None, around: dict[str, str]) -> str:
    """Return the tables in Markdown."""
    parts = []
    if results:
        parts.append("\n".join([HEAD, *map(markdown_line, results)]))
    if clock:
        trainer, ours = (statistics.median(clock[side]) for side in ("trainer", "ours"))
        head = "| wall clock | Trainer, s | ours, s | ratio | goal | |\n" + "|---" * 6 + "|"
        cells = [STAGE, f"{trainer:.1f}", f"{ours:.1f}", f"{clock['ratio']:.2f}", f"≤ {clock['goal']:.1f}"]
        parts.append(f"{head}\n| {' | '.join(cells)} | {'met' if clock['met'] else 'not met'} |")
    parts.append("\n".join(f"- {name}: {text}" for name, text in around.items()))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
