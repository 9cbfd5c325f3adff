"""The results of a training run: metrics/train.json and metrics/train_timings.json."""

from dataclasses import asdict

import torch

from gpt2lora.model.lora import lora_layers, weights_without_adapter
from gpt2lora.model.quantization import count_frozen_bytes, count_frozen_parameters
from gpt2lora.pipeline.cli import echo
from gpt2lora.pipeline.schemas import LoraParams, QuantizationParams, TrainParams
from gpt2lora.training.state import History


def summarize_training(model: torch.nn.Module, history: History, planned_steps: int) -> dict:
    """Return what each run reproduces: sizes, steps, tokens, losses in nats/token, and the layers with an adapter."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = count_frozen_parameters(model)
    return {
        "trainable_parameters": trainable,
        "frozen_parameters": frozen,
        "trainable_percent": 100 * trainable / (trainable + frozen),
        "frozen_base_bytes": count_frozen_bytes(model),
        "steps": history.rows[-1]["step"],
        "planned_steps": planned_steps,  # more than steps if train.patience ended the run
        "tokens": history.tokens,
        "start_validation_loss": history.start_loss,
        "best_validation_loss": history.best["validation_loss"],
        "best_step": history.best["step"],
        "weights_without_adapter_percent": weights_without_adapter(model)[0],
        "adapted_modules": list(lora_layers(model)) if hasattr(model, "get_base_model") else [],
    }


def describe_method(method: str, quantization: QuantizationParams | None) -> dict:
    """Return the method, and in how many bits the frozen base was: params.yaml may say something else by now.

    The key is not `method`: `dvc exp show` would call both columns by their files.
    """
    return {"trained_by": method} | ({"base_bits": quantization.bits} if quantization else {})


def describe_settings(lora: LoraParams, options: TrainParams, seed: int, train_seed: int, record: dict) -> dict:
    """Return what the report says about a run.

    Args:
        record: from `summarize_training` and `describe_method`.
    """
    shown = ("trainable_parameters", "trainable_percent", "steps", "tokens")
    return {
        "lora": asdict(lora) if record["trained_by"] != "full" else None,
        "rows_per_step": options.batch_size * options.accumulation_steps,
        **{name: getattr(options, name) for name in ("learning_rate", "epochs")},
        **{name: record[name] for name in shown},
        "seed": seed,
        "train_seed": train_seed,
    }


def measure_speed(history: History, peak_memory: int) -> dict:
    """Return what differs from run to run. peak_memory: in bytes."""
    return {
        "train_seconds": history.seconds,
        "tokens_per_second": history.tokens / history.seconds,
        "peak_memory_bytes": peak_memory,
    }


def echo_result(record: dict, timings: dict) -> None:
    """Print the result in one line, and a warning if training did not lower the validation loss."""
    start, best = record["start_validation_loss"], record["best_validation_loss"]
    echo(
        f"train: validation loss {start:.4f} -> {best:.4f} nats/token (step {record['best_step']}), "
        f"{record['trainable_parameters']:,} trained parameters, {timings['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {timings['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    if best >= start:
        echo("train: warning: no better than before training; lower train.learning_rate or train for more epochs")


def echo_weights_without_adapter(model: torch.nn.Module) -> None:
    """Print which share of the weights no adapter reaches, if there are any."""
    percent, kinds = weights_without_adapter(model)
    if kinds:
        advice = "; lora.dropout 0 adapts experts, too" if any(".experts." in kind for kind in kinds) else ""
        echo(f"train: {percent:.1f} % of the weights lie in layers without an adapter: {', '.join(kinds)}{advice}")
