"""train: a low-rank adapter for the frozen base (lora, qlora), or all weights (full).

in   data/tokens, data/base, params.yaml: method, methods.<method>, lora.*, train.*, seed
out  data/adapter: the adapter with the lowest validation loss, or the whole model with method full
     metrics/loss.csv: losses, learning rate and gradient norm, written at each validation; the first row is before
         training, and has a validation loss alone
     metrics/train.json: what was trained, and its lowest validation loss
     metrics/train_timings.json: seconds, tokens per second and memory, which differ from run to run
     data/environment/train.json: hardware, versions and duration
     data/.checkpoints: until the run succeeds, the checkpoints from which a killed run resumes
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click

from gpt2lora.distributed import launch
from gpt2lora.pipeline import environment, params
from gpt2lora.pipeline.adapter_files import describe_start
from gpt2lora.pipeline.artifacts import atomic_output, prefetch_digests
from gpt2lora.pipeline.cli import command, echo
from gpt2lora.pipeline.schemas import METHODS, LoraParams, QuantizationParams, TrainParams, check_params
from gpt2lora.training.gpus import check_processes, choose_gpus

# In steps. A checkpoint of GPT-2 with an adapter of rank 16 takes 38 MB, one of all its weights 2 GB.
DEFAULT_CHECKPOINT_INTERVAL = {"lora": 100, "qlora": 100, "full": 1000}


@command
@click.option("--tokens", type=Path, default="data/tokens", show_default=True, help="Folder of the token arrays.")
@click.option("--base", type=Path, default="data/base", show_default=True, help="Folder of the base model.")
@click.option("--out", type=Path, default="data/adapter", show_default=True, help="Folder of the adapter.")
@click.option("--metrics", type=Path, default="metrics", show_default=True, help="Folder of train.json and loss.csv.")
@click.option("--checkpoints", type=Path, default="data/.checkpoints", show_default=True, help="Folder of checkpoints.")
def main(tokens: Path, base: Path, out: Path, metrics: Path, checkpoints: Path) -> None:
    """Train an adapter on the corpus and keep the one with the lowest validation loss."""
    work = partial(train, tokens, base, out, metrics, checkpoints)
    launch.run("train", check_params, lambda free: choose_gpus(read_params()[-1].accumulation_steps, free), work)


def train(tokens: Path, base: Path, out: Path, metrics: Path, checkpoints: Path) -> None:
    """Train in this process, alone or as one of a group."""
    started = time.perf_counter()
    method, quantization, lora_params, options = read_params()
    seed = params.seed() if options.seed is None else options.seed
    echo("train: loading torch and transformers")
    prefetch_digests(base)
    import torch

    from gpt2lora.model import device

    # The GPU's driver starts beside the imports. If that fails, the first computation fails too, with a clear error.
    ThreadPoolExecutor(1).submit(device.warm_up)
    from gpt2lora.dataset.blocks import load_blocks, read_token_manifest
    from gpt2lora.distributed import facts, group
    from gpt2lora.model import layers, loading, lora
    from gpt2lora.training import checkpoint, model_card, oom, summary
    from gpt2lora.training.loop import count_steps, fit

    check_processes(options.accumulation_steps, group.size())
    prefix = read_token_manifest(tokens, base)["prefix"]
    if method != "full":
        layers.check_target_layers(base, lora_params)

    target = device.pick_device()
    dtype = device.compute_dtype(options.precision, target)
    precision = str(dtype).removeprefix("torch.")
    name, processes = device.device_name(target), group.size()
    echo(f"train: {method} on {f'{processes} x ' * (processes > 1)}{name}, {precision}")
    if options.deterministic and target.type == "cuda":
        device.make_deterministic()
    torch.manual_seed(seed)
    start = describe_start(lora_params)  # before it is read: what changes it later must not go into the records
    model, initial_factors = loading.load_for_training(base, method, quantization, lora_params, dtype)
    if start:
        echo("train: starts from the adapter {folder}, SHA-256 {sha256}".format(**start["start_from"]))
    summary.echo_weights_without_adapter(model)
    train, validation = load_blocks(tokens, "train", prefix), load_blocks(tokens, "validation", prefix)

    sections = {"quantization": quantization, "lora": lora_params, "train": options}
    values = {name: section and asdict(section) for name, section in sections.items()}
    code = facts.code_files(Path(__file__))
    decisive = facts.run_facts(values | {"method": method, "seed": seed} | start, [tokens, base], code)
    group.check_same(decisive | {"precision (train.precision)": precision}, facts.describe_device(target, name))
    key = checkpoint.run_key(decisive, checkpoint.hardware_facts(target, dtype))
    interval = options.checkpoint_every
    interval = DEFAULT_CHECKPOINT_INTERVAL[method] if interval is None else interval
    history = None
    try:
        with checkpoint.catch_signals() as caught:
            run = checkpoint.Checkpoints(checkpoints / key, interval, caught)
            history = fit(model, train, validation, options, seed, run, metrics / "loss.csv")
    except torch.OutOfMemoryError:
        pass  # handled below: until this clause ends, the error holds the memory of `fit`
    if history is None:
        raise oom.oom_error(model, train, options, dtype)
    if not group.leave():
        return

    record = summary.describe_method(method, quantization)
    record |= summary.summarize_training(model, history, count_steps(len(train), options)) | start
    timings = summary.measure_speed(history, device.peak_memory(target))
    with (
        atomic_output(metrics / "train_timings.json") as timings_file,
        atomic_output(metrics / "train.json") as record_file,
        atomic_output(out) as folder,
    ):
        folder.mkdir()
        if method == "full":
            model.save_pretrained(folder)
        else:
            lora.save_adapter(model, lora_params, initial_factors, folder)
            model_card.name_base(folder, base)
        loading.write_method(folder, method, quantization, base)
        record["adapter_bytes"] = sum(file.stat().st_size for file in folder.iterdir())
        model_card.write_card(folder, base, tokens, method, quantization, lora_params, options, record)
        record_file.write_text(json.dumps(record, indent=2) + "\n")
        timings_file.write_text(json.dumps(timings, indent=2) + "\n")
        history.write_csv(metrics / "loss.csv")
    settings = summary.describe_settings(lora_params, options, params.seed(), seed, record)
    environment.write_record(
        out, "train", started, method=method, precision=precision, processes=processes, settings=settings
    )
    run.remove()
    summary.echo_result(record, timings)


def read_params() -> tuple[str, QuantizationParams | None, LoraParams, TrainParams]:
    """Return the method, its quantization of the base, and the sections `lora` and `train`."""
    method = params.choice("method", "methods")
    section = params.section(f"methods.{method}", METHODS[method])
    return (
        method,
        section if method == "qlora" else None,
        params.section("lora", LoraParams),
        params.section("train", TrainParams),
    )


if __name__ == "__main__":
    main()
