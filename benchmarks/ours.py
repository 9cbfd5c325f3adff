"""The project, measured as the peer script measures itself: the same options, the same line of JSON.

    python -m benchmarks.ours --model FOLDER --tokens FOLDER --method lora --target all-linear --steps 60

Loads, adapts and trains as the stage `train` does, with params.yaml's values where no option says otherwise, and writes
nothing.
"""

import time

STARTED = time.perf_counter()

import json  # noqa: E402  the clock starts before anything is imported
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

import click  # noqa: E402

from gpt2lora.pipeline import params  # noqa: E402
from gpt2lora.pipeline.cli import StageError, command  # noqa: E402


@command
@click.option("--model", "base", type=Path, required=True, help="Folder of the base model.")
@click.option("--tokens", type=Path, required=True, help="Folder of the token arrays.")
@click.option("--method", type=click.Choice(["lora", "qlora", "full"]), default="lora", show_default=True)
@click.option("--target", default="all-linear", show_default=True, help="all-linear or the name of a layer.")
@click.option("--rank", type=int, help="Rank of the update; alpha is twice that.  [default: params.yaml's]")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Rows of block_size tokens.")
@click.option("--steps", type=click.IntRange(2), required=True, help="Train on so many batches, each once.")
@click.option("--warmup", type=click.IntRange(1), default=1, show_default=True, help="Steps before the clock starts.")
@click.option("--learning-rate", type=float, help="[default: params.yaml's]")
@click.option("--dropout", type=float, help="Of the base and of LoRA.  [default: params.yaml's]")
@click.option("--precision", type=click.Choice(params.PRECISIONS), help="[default: params.yaml's]")
def main(
    base: Path,
    tokens: Path,
    method: str,
    target: str,
    rank: int | None,
    batch_size: int,
    steps: int,
    warmup: int,
    learning_rate: float | None,
    dropout: float | None,
    precision: str | None,
) -> None:
    """Measure the project's training."""
    import numpy as np
    import torch

    from gpt2lora.dataset import blocks
    from gpt2lora.model import device, lora
    from gpt2lora.model.quantization import QuantizationParams
    from gpt2lora.training import config, loop
    from stages.train import build_model

    options = params.section("train", config.TrainParams)
    options = replace(options, epochs=1, batch_size=batch_size, accumulation_steps=1, validations=1)
    if options.compile == "auto":
        # So do three epochs of WikiText-2 with GPT-2 124M; these few steps alone would not.
        options = replace(options, compile="always")
    low_rank = params.section("lora", lora.LoraParams)
    names = "all-linear" if target == "all-linear" else [target]
    low_rank = replace(low_rank, target_modules=names)
    if rank is not None:
        low_rank = replace(low_rank, r=rank, alpha=2 * rank)
    if learning_rate is not None:
        options = replace(options, learning_rate=learning_rate)
    if dropout is not None:
        options, low_rank = replace(options, base_dropout=dropout), replace(low_rank, dropout=dropout)
    if precision is not None:
        options = replace(options, precision=precision)

    split = blocks.load_blocks(tokens, "train")
    full = np.flatnonzero(split.lengths >= split.ids.shape[1] - 1)[: steps * batch_size]  # as the peer chooses them
    if len(full) < steps * batch_size:
        raise StageError(f"--tokens {tokens}: {len(full)} full rows, expected {steps} steps of {batch_size}")
    train = blocks.Blocks(split.ids[full], split.lengths[full])

    place = device.pick_device()
    dtype = device.compute_dtype(options.precision, place)
    torch.manual_seed(0)
    quantization = params.section("methods.qlora", QuantizationParams) if method == "qlora" else None
    network, _ = build_model(base, method, quantization, low_rank, dtype)
    validation = blocks.load_blocks(tokens, "validation")
    times = watch(loop, place, {1, warmup, steps})
    history = loop.fit(network, train, validation, options, 0)
    if len(times) != steps:
        raise RuntimeError(f"the bar of loop.fit moved {len(times)} times in {steps} steps")

    measured = train.ids.shape[1] - 1
    record = {
        "tokens_per_second": measured * batch_size * (steps - warmup) / (times[-1] - times[warmup - 1]),
        "peak_memory_bytes": device.peak_memory(place),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated() if place.type == "cuda" else None,
        "first_step_seconds": times[0] - STARTED,
        "wall_seconds": time.perf_counter() - STARTED,
        "steps": steps,
        "tokens": len(train) * measured,
        "trained_parameters": sum(value.numel() for value in network.parameters() if value.requires_grad),
        "train_loss": history.rows[-1]["train_loss"],
    }
    click.echo(json.dumps(record))


def watch(loop, place, waits: set[int]) -> list[float]:
    """Return a list that takes the time of each step's end, as `fit` moves its bar.

    Args:
        waits: steps, counted from 1, at whose end the device is waited for: the times of all others mean nothing on a
            GPU, where a step is only begun when the bar moves.
    """
    import torch

    times: list[float] = []

    class Bar(loop.tqdm):
        def update(self, n=1):
            if self.desc == "train":
                if place.type == "cuda" and len(times) + n in waits:
                    torch.cuda.synchronize()
                times.extend([time.perf_counter()] * int(n))
            return super().update(n)

    loop.tqdm = Bar
    return times


if __name__ == "__main__":
    main()
