"""The scoring of windows, in one process or in each of a group: windows a second, and the mean loss.

python -m benchmarks.scoring --model FOLDER [--stride 512]

Random tokens, as many as the raw test split of WikiText-2 has. Prints a line of JSON.
"""

import contextlib
import json
import os
import time
from pathlib import Path

import click
import numpy as np

from gpt2lora.pipeline.cli import command
from gpt2lora.scoring.windows import Windows, sliding_windows

TOKENS = 287_644


@command
@click.option("--model", "folder", type=Path, required=True, help="Folder of the model.")
@click.option("--context", type=int, default=1024, show_default=True)
@click.option("--stride", type=int, default=512, show_default=True)
def main(folder: Path, context: int, stride: int) -> None:
    """Measure the scoring of windows."""
    from gpt2lora.distributed import group
    from gpt2lora.model import device
    from gpt2lora.model.loading import load_base
    from gpt2lora.scoring.log_likelihood import score_windows

    with group.joined() if "RANK" in os.environ else contextlib.nullcontext():
        target = device.pick_device()
        dtype = device.compute_dtype("auto", target)
        model = load_base(folder, None, dtype)
        count = TOKENS if target.type == "cuda" else 20 * context
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, count).astype(np.uint32)
        windows = sliding_windows([ids], context, min(stride, context))
        first = slice(0, 32 * group.size())
        few = Windows(windows.ids, windows.starts[first], windows.lengths[first], windows.skips[first])
        score_windows(model, few, None, dtype, "warm-up")
        group.barrier()
        started = time.perf_counter()
        loss = float(score_windows(model, windows, None, dtype, "score").nll.mean())
        seconds = time.perf_counter() - started
        speed, memory = len(windows) / seconds, device.peak_memory(target) / 1e9
        click.echo(json.dumps({"windows_per_second": speed, "seconds": seconds, "loss": loss, "memory_gb": memory}))


if __name__ == "__main__":
    main()
