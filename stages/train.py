"""train: a low-rank adapter for the frozen base (lora, qlora), or all of its weights (full).

in   data/tokens, data/base, params.yaml: method, methods.<method>, lora.*, train.*, seed
out  data/adapter: the adapter of lowest validation loss, or the whole model for method full
     metrics/train.json, metrics/loss.csv: what was trained and how the loss fell
     metrics/train_timings.json: seconds, tokens per second and memory, which no other run reproduces
     data/environment/train.json: what ran where, and how long
     data/.checkpoints: until it succeeds, where a run that was killed goes on from
"""

import csv
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpt2lora.pipeline import environment, params
from gpt2lora.pipeline.artifacts import read_ahead, whole
from gpt2lora.pipeline.cli import say, stage

if TYPE_CHECKING:
    import torch

    from gpt2lora.model.lora import Lora
    from gpt2lora.model.quantization import Quantization
    from gpt2lora.training.config import Train
    from gpt2lora.training.loop import History


# Steps between checkpoints. One of GPT-2 with an adapter of rank 16 has 38 MB; one of all its weights has 2 GB.
EVERY = {"lora": 100, "qlora": 100, "full": 1000}


@dataclass
class Plain:
    """methods.lora and methods.full have no keys."""


@stage
@click.option("--tokens", type=Path, default="data/tokens", show_default=True, help="Folder of the token arrays.")
@click.option("--base", type=Path, default="data/base", show_default=True, help="Folder of the base model.")
@click.option("--out", type=Path, default="data/adapter", show_default=True, help="Folder of the adapter.")
@click.option("--metrics", type=Path, default="metrics", show_default=True, help="Folder of train.json and loss.csv.")
@click.option(
    "--checkpoints", type=Path, default="data/.checkpoints", show_default=True, help="Folder of unfinished runs."
)
def main(tokens: Path, base: Path, out: Path, metrics: Path, checkpoints: Path) -> None:
    """Train an adapter on the corpus and keep the best by validation loss."""
    started = time.perf_counter()
    say("train: loading torch and transformers")
    read_ahead(base)
    import torch

    from gpt2lora.model import device

    beside = ThreadPoolExecutor(1)  # what fails in it fails again where it is needed, and says so there
    beside.submit(device.wake)
    from gpt2lora.dataset import blocks
    from gpt2lora.model import loading, lora
    from gpt2lora.training import checkpoint, execution, loop, oom

    method, quantization, low_rank, options = read_params()
    seed = params.seed()
    blocks.read_manifest(tokens, base)
    if method != "full":
        lora.targets(list(lora.linear_layers(loading.skeleton(base))), low_rank)

    place = device.pick_device()
    dtype = device.compute_dtype(options.precision, place)
    say(f"train: {method} on {device.describe(place)}, {str(dtype).removeprefix('torch.')}")
    if options.deterministic and place.type == "cuda":
        device.make_deterministic()
    torch.manual_seed(seed)
    network, taken = build(base, method, quantization, low_rank, dtype)
    split, held_out = blocks.load(tokens, "train"), blocks.load(tokens, "validation")
    sections = {"quantization": quantization, "lora": low_rank, "train": options}
    read = {name: section and asdict(section) for name, section in sections.items()} | {"method": method, "seed": seed}
    # CPUs differ in their kernels. On a GPU, without a compiler, steps are computed with other random numbers.
    kernels = [environment.cpu(), torch.backends.cpu.get_cpu_capability()]
    on = [device.describe(place), str(dtype), execution.lacks() if place.type == "cuda" else kernels]
    name = checkpoint.key(read, [tokens, base], code_files(), on)
    try:
        with checkpoint.signals() as caught:
            every = EVERY[method] if options.checkpoint_every is None else options.checkpoint_every
            kept = checkpoint.Checkpoints(checkpoints / name, every, caught)
            history = loop.fit(network, split, held_out, options, seed, kept)
    except torch.OutOfMemoryError:
        history = None  # the error holds what fit had in memory, until this clause is left
    if history is None:
        raise oom.too_large(network, split, options, dtype)

    record, timings = summary(network, history), speed(history, device.peak_memory(place))
    with (
        whole(metrics / "loss.csv") as table,
        whole(metrics / "train_timings.json") as times,
        whole(metrics / "train.json") as figures,
        whole(out) as folder,
    ):
        folder.mkdir()
        if method == "full":
            network.save_pretrained(folder)
        else:
            lora.save(network, low_rank, taken, folder)
        loading.save_method(folder, method, quantization, base)
        write_csv(table, history.rows)
        record["adapter_bytes"] = sum(file.stat().st_size for file in folder.iterdir())
        figures.write_text(json.dumps(record, indent=2) + "\n")
        times.write_text(json.dumps(timings, indent=2) + "\n")
    environment.write(out, "train", started, method=method, precision=str(dtype).removeprefix("torch."))
    kept.remove()
    report(history, record, timings)


def read_params() -> "tuple[str, Quantization | None, Lora, Train]":
    """Return the method, how its base is quantised, and what `lora` and `train` hold, all of which go together."""
    from gpt2lora.model import lora, lora_init
    from gpt2lora.model.quantization import Quantization
    from gpt2lora.training.config import Train

    method = params.chosen("method", "methods")
    params.require(method in EVERY, "method", method, f"one of {', '.join(EVERY)}")
    section = params.section(f"methods.{method}", Quantization if method == "qlora" else Plain)
    quantization = section if method == "qlora" else None
    low_rank, options = params.section("lora", lora.Lora), params.section("train", Train)
    if method == "full":
        params.require(options.lora_plus_ratio == 1, "train.lora_plus_ratio", options.lora_plus_ratio, "1 with full")
    else:
        lora_init.check(low_rank.init, quantized=quantization is not None)
    return method, quantization, low_rank, options


def build(
    base: Path, method: str, quantization: "Quantization | None", low_rank: "Lora", dtype: "torch.dtype"
) -> "tuple[torch.nn.Module, dict[str, torch.Tensor]]":
    """Return the model to train and what its adapter's first values took out of the base. The caller seeds."""
    from gpt2lora.model import loading, lora, lora_init

    network = loading.load_base(base, quantization, dtype)
    if method == "full":
        return network, {}
    network = lora.attach(network, low_rank)
    floats = lora.linear_layers(loading.load_base(base, None, dtype)) if low_rank.init == "loftq" else {}
    taken = lora_init.start(lora.adapted(network), low_rank.init, floats)
    if not low_rank.use_dora:  # which computes norms of whole weights: that wants fp32
        loading.hold_frozen(network, dtype)
    return network, taken


def code_files() -> set[Path]:
    """Return the files of code that are in use, of the stages and of the library."""
    modules = [module for name, module in sys.modules.items() if name.startswith(("stages.", "gpt2lora."))]
    return {Path(__file__), *(Path(module.__file__) for module in modules)}


def summary(network: "torch.nn.Module", history: "History") -> dict:
    from gpt2lora.model import lora, quantization

    trainable = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    frozen = quantization.frozen_parameters(network)
    return {
        "trainable_parameters": trainable,
        "frozen_parameters": frozen,
        "trainable_percent": 100 * trainable / (trainable + frozen),
        "frozen_base_bytes": quantization.frozen_bytes(network),
        "steps": history.rows[-1]["step"],
        "tokens": history.tokens,
        "start_validation_loss": history.start_loss,
        "best_validation_loss": history.best["validation_loss"],
        "best_step": history.best["step"],
        "adapted_modules": list(lora.adapted(network)) if hasattr(network, "get_base_model") else [],
    }


def speed(history: "History", peak_memory: int) -> dict:
    return {
        "train_seconds": history.seconds,
        "tokens_per_second": history.tokens / history.seconds,
        "peak_memory_bytes": peak_memory,
    }


def write_csv(file: Path, records: list[dict]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, records[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def report(history: "History", record: dict, timings: dict) -> None:
    best = record["best_validation_loss"]
    say(
        f"train: validation loss {history.start_loss:.4f} -> {best:.4f} nats/token (step {record['best_step']}), "
        f"{record['trainable_parameters']:,} trained parameters, {timings['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {timings['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    if best >= history.start_loss:
        say("train: warning: no better than before training; lower train.learning_rate or train for more epochs")


if __name__ == "__main__":
    main()
