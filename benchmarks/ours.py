"""The project's training, with the options and the line of JSON of benchmarks/hf_trainer.py.

    python -m benchmarks.ours --model FOLDER --tokens FOLDER --method lora --target all-linear --steps 60

Trains as the stage `train` does, with the values of params.yaml where no option says otherwise, and writes nothing.
"""

import functools
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import click

from gpt2lora.pipeline import params
from gpt2lora.pipeline.cli import StageError, command


@command
@click.option("--model", "base", type=Path, required=True, help="Folder of the base model.")
@click.option("--tokens", type=Path, required=True, help="Folder of the token arrays.")
@click.option("--method", type=click.Choice(["lora", "qlora", "full"]), default="lora", show_default=True)
@click.option("--bits", type=click.Choice(["4", "8"]), default="4", show_default=True, help="Of the base, with qlora.")
@click.option("--target", default="all-linear", show_default=True, help="all-linear or the name of a layer.")
@click.option("--rank", type=int, help="Rank of the update; alpha is twice that.  [default: params.yaml's]")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Rows of block_size tokens.")
@click.option("--accumulation-steps", type=int, default=1, show_default=True, help="Batches in an optimizer step.")
@click.option("--steps", type=click.IntRange(2), required=True, help="Train on so many batches.")
@click.option("--warmup", type=click.IntRange(1), default=1, show_default=True, help="Steps before the clock starts.")
@click.option("--learning-rate", type=float, help="[default: params.yaml's]")
@click.option("--dropout", type=float, help="Of the base and of LoRA.  [default: params.yaml's]")
@click.option("--precision", type=click.Choice(params.PRECISIONS), help="[default: params.yaml's]")
def main(base: Path, tokens: Path, method: str, bits: str, target: str, rank: int | None, **options) -> None:
    """Measure the project's training, in each process of a group if a launcher made one."""
    work = functools.partial(measure, base, tokens, method, bits, target, rank, **options)
    if "RANK" not in os.environ:
        work()
        return
    from gpt2lora.distributed import group

    with group.joined():
        work()


def measure(base: Path, tokens: Path, method: str, bits: str, target: str, rank: int | None, **options) -> None:
    """Train, and print what was measured."""
    import numpy as np
    import torch

    from gpt2lora.dataset.blocks import Blocks, load_blocks
    from gpt2lora.model import device, loading
    from gpt2lora.pipeline.schemas import LoraParams, QuantizationParams, TrainParams
    from gpt2lora.training import loop

    steps, warmup, batch_size, dropout = (options.pop(key) for key in ("steps", "warmup", "batch_size", "dropout"))
    train = params.section("train", TrainParams)
    given = {key: value for key, value in options.items() if value is not None}  # learning_rate, ...
    train = replace(train, epochs=1, batch_size=batch_size, validations=1, **given)
    rows = batch_size * train.accumulation_steps  # of a step
    if train.compile == "auto":  # three epochs of WikiText-2 with GPT-2 124M are compiled; these steps alone are not
        train = replace(train, compile="always")
    lora = params.section("lora", LoraParams)
    lora = replace(lora, target_modules="all-linear" if target == "all-linear" else [target])
    if rank is not None:
        lora = replace(lora, r=rank, alpha=2 * rank)
    if dropout is not None:
        train, lora = replace(train, base_dropout=dropout), replace(lora, dropout=dropout)
    quantization = QuantizationParams(int(bits), "nf4", bits == "4") if method == "qlora" else None

    split = load_blocks(tokens, "train", ())
    full = np.flatnonzero(split.lengths >= split.ids.shape[1] - 1)[: steps * rows]  # as hf_trainer.py selects them
    if len(full) < steps * rows:
        raise StageError(f"--tokens {tokens}: {len(full)} full rows, expected {steps} steps of {rows}")
    blocks = Blocks(split.ids[full], split.lengths[full])

    target_device = device.pick_device()
    torch.manual_seed(0)
    dtype = device.compute_dtype(train.precision, target_device)
    model, _ = loading.load_for_training(base, method, quantization, lora, dtype)
    times = record_step_times(loop, target_device, {warmup, steps})
    history = loop.fit(model, blocks, load_blocks(tokens, "validation", ()), train, 0)
    block_size = blocks.ids.shape[1] - 1
    record = {
        "tokens_per_second": block_size * rows * (steps - warmup) / (times[-1] - times[warmup - 1]),
        "peak_memory_bytes": device.peak_memory(target_device),
        "steps": len(times),
        "tokens": len(blocks) * block_size,
        "trained_parameters": sum(value.numel() for value in model.parameters() if value.requires_grad),
        "train_loss": history.rows[-1]["train_loss"],
    }
    click.echo(json.dumps(record))


def record_step_times(loop, device, synchronized: set[int]) -> list[float]:
    """Return a list that gets the time of each step, when `fit` updates its progress bar.

    On a GPU only the times of the `synchronized` steps mean something: the bar is updated when a step is launched.
    """
    import torch

    times: list[float] = []

    def progress_bar(*arguments, **options):
        bar = original(*arguments, **options)
        update = bar.update

        def record_and_update(n: int = 1) -> None:
            if device.type == "cuda" and len(times) + n in synchronized:
                torch.cuda.synchronize()
            times.extend([time.perf_counter()] * int(n))
            update(n)

        bar.update = record_and_update
        return bar

    original, loop.progress_bar = loop.progress_bar, progress_bar
    return times


if __name__ == "__main__":
    main()
