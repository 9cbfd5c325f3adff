"""Evaluation against the loop of transformers' documentation: windows a second, memory, and perplexity.

    python -m benchmarks.evaluation --model FOLDER --text FILE [--stride 512] [--windows N]

The loop (https://huggingface.co/docs/transformers/perplexity) reads one window at a time in fp32, and computes logits
for every position. Ours is the protocol hf of the stage `evaluate`. Both run in one process, each after a warm-up. The
perplexities differ a little: the loop weighs each window by one target less than it scores.
"""

import gc
import math
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from gpt2lora.corpus.text_files import decode
from gpt2lora.evaluation import protocols
from gpt2lora.pipeline import params
from gpt2lora.pipeline.artifacts import require_file
from gpt2lora.pipeline.cli import StageError, command, echo
from gpt2lora.scoring.windows import Windows, sliding_windows


@command
@click.option("--model", "folder", type=Path, required=True, help="Folder of the model and its tokenizer.")
@click.option("--text", type=Path, required=True, help="A text file, such as WikiText-2's raw test split.")
@click.option("--stride", type=click.IntRange(1), default=512, show_default=True, help="Tokens between windows.")
@click.option("--windows", "count", type=click.IntRange(1), help="Windows to measure.  [default: the whole text]")
@click.option("--precision", type=click.Choice(params.PRECISIONS), default="auto", help="Of ours. The loop is fp32.")
def main(folder: Path, text: Path, stride: int, count: int | None, precision: str) -> None:
    """Measure our evaluation against the loop of transformers' documentation."""
    echo("loading torch and transformers")
    from transformers import AutoConfig

    from gpt2lora.dataset.tokenizer import encode_texts, load_tokenizer
    from gpt2lora.model import device
    from gpt2lora.pipeline.context import choose_block_size

    require_file(folder / "tokenizer.json", "base")
    context = choose_block_size(None, AutoConfig.from_pretrained(folder, local_files_only=True).to_dict(), 0)
    if stride > context:
        raise StageError(f"--stride: expected 1 to {context}, the model's context, not {stride}")
    content = "\n\n".join(protocols.hub_rows("".join(decode(text))))
    (ids,) = encode_texts(load_tokenizer(folder), [content], np.uint32)
    if count:
        ids = ids[: context + (count - 1) * stride]
    if len(ids) < 2:
        raise StageError(f"--text {text}: {len(ids)} tokens: expected at least two")
    windows = sliding_windows([ids], context, stride)
    target = device.pick_device()
    dtype = device.compute_dtype(precision, target)
    name = device.device_name(target)
    precision = str(dtype).removeprefix("torch.")
    echo(f"{len(ids):,} tokens, {len(windows)} windows of {context} at a stride of {stride}; {name}, {precision}\n")
    ours = measure(target, *our_evaluation(folder, windows, dtype), len(windows))
    loop = measure(target, *documentation_loop(folder, ids, context, stride, target))
    echo(f"{'':14}{'windows/s':>12}{'peak memory, GB':>18}{'perplexity':>14}")
    for name, (speed, memory, perplexity) in (("documentation", loop), ("evaluate", ours)):
        echo(f"{name:14}{speed:12.2f}{memory:18.2f}{perplexity:14.4f}")
    echo(f"\nratio {ours[0] / loop[0]:.2f}x, perplexity {100 * (ours[2] / loop[2] - 1):+.4f} %")


def our_evaluation(folder: Path, windows: Windows, dtype) -> tuple[Callable, Callable]:
    """Return a warm-up, and the evaluation, which returns the mean loss in nats."""
    from gpt2lora.model.loading import load_base
    from gpt2lora.scoring.log_likelihood import score_windows

    model = load_base(folder, None, dtype)
    first = Windows(windows.ids, windows.starts[:32], windows.lengths[:32], windows.skips[:32])
    return (
        lambda: score_windows(model, first, None, dtype, "warm-up"),
        lambda: score_windows(model, windows, None, dtype, "evaluate").nll.mean(),
    )


def documentation_loop(folder: Path, ids: np.ndarray, context: int, stride: int, device) -> tuple:
    """Return a warm-up, the loop, which returns the mean loss in nats, and its number of windows."""
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(device).eval()
    stream = torch.from_numpy(ids.astype(np.int64))[None]
    total = 1 + max(0, -(-(len(ids) - context) // stride))

    def loop(count: int) -> float:
        nll, tokens, scored_up_to = 0.0, 0, 0
        for start in tqdm(range(0, count * stride, stride), "documentation", unit="window", leave=False):
            end = min(start + context, len(ids))
            inputs = stream[:, start:end].to(device)
            labels = inputs.clone()
            labels[:, : scored_up_to - start] = -100  # scored by earlier windows; the model shifts labels itself
            with torch.no_grad():
                mean = model(inputs, labels=labels).loss
            weight = int((labels != -100).sum()) - 1
            nll, tokens, scored_up_to = nll + mean * weight, tokens + weight, end
        return float(nll) / tokens

    return lambda: loop(min(2, total)), lambda: loop(total), total


def measure(device, warm_up: Callable, work: Callable, windows: int) -> tuple[float, float, float]:
    """Return windows a second, peak memory in GB (on a CPU of the whole process, on Linux), and perplexity."""
    import torch

    warm_up()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    started = time.perf_counter()
    loss = work()
    seconds = time.perf_counter() - started
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return windows / seconds, peak / 1e9, math.exp(loss)


if __name__ == "__main__":
    main()
