"""The files that the stages leave behind for every method: records, adapters and models."""

import csv
import math
from pathlib import Path

import pytest
import tiny
import torch
from evaluated_methods import METHODS, file_contents, read_json, set_method
from peft import PeftModel
from training_runs import run_stage
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from gpt2lora.dataset import blocks
from gpt2lora.model import loading
from gpt2lora.scoring import log_likelihood
from gpt2lora.training.model_card import CARD
from stages import train

IDS = torch.arange(2 * 30).reshape(2, 30) * 7 % 300

pytestmark = pytest.mark.usefixtures("methods_folder")


def compute_logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


# Records


@pytest.mark.parametrize("method", METHODS)
def test_every_number_in_the_metrics_is_finite(method):
    def numbers(value) -> list:
        return [number for part in value.values() for number in numbers(part)] if isinstance(value, dict) else [value]

    with open(f"{method}/loss.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    record = read_json(f"{method}/train.json")
    assert record.pop("trained_by") in ("lora", "qlora", "full")
    assert all(isinstance(name, str) for name in record.pop("adapted_modules"))  # the only list, which DVC leaves out
    values = [number for part in ("eval", "train_timings") for number in numbers(read_json(f"{method}/{part}.json"))]
    values += numbers(record)
    values += [float(cell) for row in rows[1:] for cell in row.values()]
    no_numbers = {name for name, cell in rows[0].items() if math.isnan(float(cell))}  # before training
    assert no_numbers == {"train_loss", "learning_rate", "gradient_norm"}
    assert len(values) > 20
    assert all(isinstance(number, int | float) and math.isfinite(number) for number in values)


@pytest.mark.parametrize("method", METHODS)
def test_the_training_record_agrees_with_the_files(method):
    record = read_json(f"{method}/train.json")
    with open(f"{method}/loss.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    best = min(rows, key=lambda row: float(row["validation_loss"]))
    assert record["best_validation_loss"] == float(best["validation_loss"]) < record["start_validation_loss"]
    assert record["best_step"] == int(best["step"])
    start = {"step": "0", "tokens": "0", "validation_loss": str(record["start_validation_loss"])}
    assert rows[0].items() >= start.items()
    assert record["trained_by"] == read_json(f"{method}/adapter/method.json")["method"]
    assert record.get("base_bits") == {"qlora": 4, "qlora8": 8}.get(method.split(",")[0])
    assert record["steps"] == int(rows[-1]["step"])
    assert record["tokens"] == read_json("data/tokens/manifest.json")["splits"]["train"]["predicted_tokens"]
    files = file_contents(Path(method, "adapter"))
    assert record["adapter_bytes"] == sum(len(content) for name, content in files.items() if name != CARD)
    base_parameters = sum(value.numel() for value in AutoModelForCausalLM.from_pretrained("data/base").parameters())
    is_full = method == "full"
    assert record["frozen_parameters"] == (0 if is_full else base_parameters)
    all_parameters = record["trainable_parameters"] + record["frozen_parameters"]
    assert record["trainable_percent"] == 100 * record["trainable_parameters"] / all_parameters
    assert (record["trainable_percent"] == 100) is is_full


def test_quantized_bases_take_less_memory():
    sizes = {method: read_json(f"{method}/train.json")["frozen_base_bytes"] for method in METHODS}
    assert sizes["full"] == 0 < sizes["qlora"] < sizes["qlora8"] < sizes["lora"] == sizes["lora, adapter of 8 bits"]


# Adapters and models


def load_dequantized_8bit() -> torch.nn.Module:
    """Load the base in 8 bits as transformers does, and turn its weights back to floats.

    bitsandbytes' own 8-bit layers would round the activations, too.
    """
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained("data/base", quantization_config=quantization, dtype=torch.float32)
    return base.dequantize()


@pytest.mark.parametrize("method", ["lora", "qlora8"])
def test_peft_alone_loads_the_adapter(method):
    adapter = Path(method, "adapter")
    config = read_json(adapter / "adapter_config.json")
    assert config["target_modules"] == sorted(config["target_modules"])
    assert len(config["target_modules"]) == 8
    is_8bit = method == "qlora8"
    base = load_dequantized_8bit() if is_8bit else AutoModelForCausalLM.from_pretrained("data/base")
    expected = compute_logits(PeftModel.from_pretrained(base, adapter))
    tuned = compute_logits(loading.load_tuned(Path("data/base"), adapter, torch.float32))
    torch.testing.assert_close(tuned, expected, rtol=1e-5, atol=1e-5)
    untuned = compute_logits(loading.load_base(Path("data/base"), None, torch.float32))
    assert (tuned - untuned).abs().max() > 0.1


def test_transformers_alone_loads_the_model_of_full():
    names = file_contents(Path("full/adapter"))
    assert {"config.json", "model.safetensors", "method.json"} <= set(names)
    assert not any(name.startswith("adapter_") for name in names)
    expected = compute_logits(AutoModelForCausalLM.from_pretrained("full/adapter"))
    tuned = loading.load_tuned(Path("data/base"), Path("full/adapter"), torch.float32)
    torch.testing.assert_close(compute_logits(tuned), expected, rtol=1e-5, atol=1e-5)


def test_the_tuned_model_has_the_best_validation_loss():
    validation = blocks.load_blocks(Path("data/tokens"), "validation", ())
    for method in METHODS:
        model = loading.load_tuned(Path("data/base"), Path(method, "adapter"), torch.float32)
        loss = log_likelihood.validation_loss(model, validation, 8, torch.float32, "")
        assert loss == pytest.approx(read_json(f"{method}/train.json")["best_validation_loss"], rel=1e-5), method


@pytest.mark.parametrize("method", ["lora", "qlora", "qlora, adapter of 4 bits", "full"])
def test_the_same_seed_gives_the_same_bytes_another_does_not(methods_folder, method):
    set_method(methods_folder, method)
    run_stage(train.main, "--out", "again/adapter", "--metrics", "again")
    assert file_contents(Path("again/adapter")) == file_contents(Path(method, "adapter"))
    assert Path("again/loss.csv").read_bytes() == Path(method, "loss.csv").read_bytes()
    tiny.set_param(methods_folder, "seed", 1)
    run_stage(train.main, "--out", "again/adapter", "--metrics", "again")
    assert file_contents(Path("again/adapter")) != file_contents(Path(method, "adapter"))


def test_the_base_is_a_copy_of_the_model_byte_for_byte(tiny_model):
    files = file_contents(Path("data/base"))
    del files["manifest.json"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert files == {name: content for name, content in file_contents(tiny_model).items() if name in files}


def test_no_stage_leaves_temporary_files(methods_folder):
    assert [path for path in methods_folder.rglob(".*.new")] + [path for path in methods_folder.rglob(".*.old")] == []
