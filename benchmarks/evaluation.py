"""Evaluation against the loop of transformers' documentation: windows a second, memory, and the same perplexity.

    python -m benchmarks.evaluation --model FOLDER --text FILE [--stride 512] [--windows N]

The loop is that of https://huggingface.co/docs/transformers/perplexity: one window at a time in fp32, logits for
every position, the loss the model's own. Ours is what the stage `evaluate` runs by the protocol hf. One process runs
both, one after the other, each with a model of its own that it loads itself, and each measured after a warm-up.
"""

import gc
import math
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from gpt2lora.evaluation import protocols
from gpt2lora.pipeline import params
from gpt2lora.pipeline.artifacts import require_file
from gpt2lora.pipeline.cli import StageError, command, echo
from gpt2lora.scoring import windows


@dataclass
class Run:
    windows_per_second: float
    peak_memory: float  # GB; on a CPU that of the process, libraries included
    perplexity: float


@command
@click.option("--model", "folder", type=Path, required=True, help="Folder of the model and its tokenizer.")
@click.option("--text", type=Path, required=True, help="File of text: the raw test split of WikiText-2, say.")
@click.option("--stride", type=click.IntRange(1), default=512, show_default=True, help="Tokens between windows.")
@click.option("--windows", "count", type=click.IntRange(1), help="Windows to measure.  [default: the whole text]")
@click.option("--batch-size", type=click.IntRange(1), help="Windows that we read at once.  [default: evaluate's]")
@click.option(
    "--precision",
    type=click.Choice(params.PRECISIONS),
    default="auto",
    show_default=True,
    help="Of ours; auto as in params.yaml. The loop is fp32.",
)
def main(folder: Path, text: Path, stride: int, count: int | None, batch_size: int | None, precision: str) -> None:
    """Measure our evaluation against the loop of transformers' documentation."""
    echo("loading torch and transformers")
    from transformers import AutoConfig

    from gpt2lora.dataset.tokenizer import encode_texts, load_tokenizer
    from gpt2lora.model import device
    from stages.tokenize import choose_block_size

    require_file(folder / "tokenizer.json", "base")
    context = choose_block_size(None, AutoConfig.from_pretrained(folder, local_files_only=True).to_dict())
    if stride > context:
        raise StageError(f"--stride: expected 1 to {context}, the model's context, not {stride}")
    content = "\n\n".join(protocols.hub_rows(text.read_bytes().decode("utf-8")))
    (ids,) = encode_texts(load_tokenizer(folder), [content], np.uint32)
    if count:
        ids = ids[: context + (count - 1) * stride]
    laid = windows.sliding_windows([ids], context, stride)

    place = device.pick_device()
    dtype = device.compute_dtype(precision, place)
    echo(
        f"{len(ids):,} tokens, {len(laid)} windows of {context} at a stride of {stride}; {device.device_name(place)}\n"
    )
    ours = run_ours(folder, laid, batch_size, dtype, place)
    loop = run_loop(folder, ids, context, stride, place)
    echo(f"{'':14}{'windows/s':>12}{'peak memory, GB':>18}{'perplexity':>14}")
    for name, run in (("documentation", loop), ("evaluate", ours)):
        echo(f"{name:14}{run.windows_per_second:12.2f}{run.peak_memory:18.2f}{run.perplexity:14.4f}")
    echo(
        f"\nratio {ours.windows_per_second / loop.windows_per_second:.2f}x, "
        f"perplexity {100 * (ours.perplexity / loop.perplexity - 1):+.4f} %"
    )


def run_ours(folder: Path, laid: windows.Windows, batch_size: int | None, dtype, place) -> Run:
    from gpt2lora.model.loading import load_base
    from gpt2lora.scoring.log_likelihood import score_windows

    model = load_base(folder, None, dtype)
    some = batch_size or 32
    first = windows.Windows(laid.ids, laid.starts[:some], laid.lengths[:some], laid.skips[:some])
    score_windows(model, first, batch_size, dtype, "warm-up")
    with Measured(place) as measured:
        found = score_windows(model, laid, batch_size, dtype, "evaluate")
    return Run(len(laid) / measured.seconds, measured.peak, math.exp(found.nll.mean()))


def run_loop(folder: Path, ids: np.ndarray, context: int, stride: int, place) -> Run:
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(place).eval()
    stream = torch.from_numpy(ids.astype(np.int64))[None]
    total = 1 + max(0, -(-(len(ids) - context) // stride))

    def loop(count: int) -> tuple[float, int]:
        nll, tokens, scored_up_to = 0.0, 0, 0
        for start in tqdm(range(0, count * stride, stride), "documentation", unit="window", leave=False):
            end = min(start + context, len(ids))
            inputs = stream[:, start:end].to(place)
            labels = inputs.clone()
            labels[:, : scored_up_to - start] = -100  # what the windows before have scored; the model shifts by itself
            with torch.no_grad():
                mean = model(inputs, labels=labels).loss
            weight = int((labels != -100).sum()) - 1
            nll, tokens, scored_up_to = nll + mean * weight, tokens + weight, end
        return float(nll), tokens

    loop(min(2, total))
    with Measured(place) as measured:
        nll, tokens = loop(total)
    return Run(total / measured.seconds, measured.peak, math.exp(nll / tokens))


class Measured:
    """The seconds and the peak memory, in GB, of a block: of CUDA's allocator, or of the whole process on a CPU."""

    def __init__(self, place):
        self.place = place

    def __enter__(self) -> "Measured":
        import torch

        gc.collect()
        if self.place.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far (Linux)
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        import torch

        if self.place.type == "cuda":
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.started
        if self.place.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated() / 1e9
        else:
            lines = Path("/proc/self/status").read_text().splitlines()
            self.peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e9


if __name__ == "__main__":
    main()
