"""How the cost of training grows: tokens a second and peak memory against rank, batch, block and model size.

    python -m benchmarks.growth [--steps N] [--out FOLDER]

One setting changes at a time; the others stand as in `FIXED`. Each is measured by benchmarks/ours.py in a process of
its own, on random weights and tokens; what does not fit in memory is said not to fit. Writes OUT/growth.md.
"""

import statistics
from pathlib import Path

import click

from benchmarks import random_inputs, workspace
from benchmarks.train import run
from gpt2lora.pipeline.artifacts import atomic_output
from gpt2lora.pipeline.cli import StageError, command, echo

FIGURES = ("tokens_per_second", "peak_memory_bytes")
FIXED = {
    "cuda": {"size": "124M", "block size": 1024, "batch": 8, "rank": 16},
    "cpu": {"size": "tiny", "block size": 128, "batch": 8, "rank": 16},
}
CHANGED = {
    "cuda": {
        "size": ("124M", "355M", "774M"),
        "rank": (4, 16, 64),
        "batch": (2, 8, 32),
        "block size": (256, 512, 1024),
    },
    "cpu": {"rank": (4, 16, 64), "batch": (1, 2, 8, 32), "block size": (32, 64, 128), "size": ("tiny", "124M")},
}


@command
@click.option("--steps", type=click.IntRange(2), help="[default: 40 on a GPU, 20 on a CPU]")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Runs of each; medians count.")
@click.option("--out", type=Path, default="benchmarks/out", show_default=True, help="Folder of growth.md.")
def main(steps: int | None, repeats: int, out: Path) -> None:
    """Measure how the cost of training grows, with LoRA on all linear layers."""
    device = run("benchmarks.ceiling")["device"]
    steps = steps or {"cuda": 40, "cpu": 20}[device]
    fixed, lines = FIXED[device], ["| changed | to | tokens/s | peak memory, GB |", "|---|---|---|---|"]
    measured: dict[tuple, str] = {}  # each table has the setting that is nowhere changed
    for name, values in CHANGED[device].items():
        for value in values:
            setting = fixed | {name: value}
            key = tuple(setting.values())
            cells = measured[key] = measured.get(key) or measure(out.resolve() / "work", steps, setting, repeats)
            lines.append(f"| {name} | {value} | {cells} |")
            echo(lines[-1])
    unchanged = ", ".join(f"{name} {value}" for name, value in fixed.items())
    conditions = [f"- unchanged: {unchanged}", *(f"- {name}: {text}" for name, text in workspace.environment().items())]
    with atomic_output(out / "growth.md") as file:
        file.write_text("\n".join([*lines, "", *conditions]) + "\n", encoding="utf-8")


def measure(work: Path, steps: int, setting: dict, repeats: int) -> str:
    """Return the cells of a setting: the medians of FIGURES, or that it does not fit."""
    model = random_inputs.model(work, setting["size"])
    tokens = random_inputs.tokens(work, model, setting["block size"], steps * setting["batch"])
    options = {"model": model, "tokens": tokens, "rank": setting["rank"], "batch-size": setting["batch"]}
    options |= {"steps": steps, "warmup": max(1, steps // 4)}
    try:
        runs = [run("benchmarks.ours", options) for _ in range(repeats)]
    except StageError as error:
        if "out of memory" not in error.message:
            raise
        return "does not fit | "
    speed, memory = (statistics.median(run[key] for run in runs) for key in FIGURES)
    return f"{speed:,.0f} | {memory / 1e9:.2f}"


if __name__ == "__main__":
    main()
