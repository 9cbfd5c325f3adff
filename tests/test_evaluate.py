"""The stages one after the other, in this process: what they leave behind, and that tuning helped."""

import csv
import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from stages import base, evaluate, model, prepare, rows, scoring, tokenize, train

METHODS = {
    "lora": {},
    "qlora": {"method": "qlora"},
    "qlora8": {"method": "qlora", "methods.qlora.bits": 8, "methods.qlora.double_quant": False},
    "lora, adapter of 8 bits": {"lora.bits": 8},
    "qlora, adapter of 4 bits": {"method": "qlora", "lora.bits": 4},
    "full": {"method": "full"},
}
ORDINARY = {"method": "lora", "methods.qlora.bits": 4, "methods.qlora.double_quant": True, "lora.bits": 16}
LEARNING_RATES = {"full": 3e-3}
IDS = torch.arange(2 * 30).reshape(2, 30) * 7 % 300


def run(command, *arguments) -> str:
    result = CliRunner().invoke(command, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def read(file: str) -> dict:
    return json.loads(Path(file).read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def logits(network) -> torch.Tensor:
    network.eval()
    with torch.no_grad():
        return network(input_ids=IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_model, tiny_corpus):
    """A project where every method was trained and evaluated, each into a folder of its own."""
    folder = tiny.make_project(tmp_path_factory.mktemp("evaluate") / "project", tiny_model, tiny_corpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(base.main)
        run(prepare.main)
        run(tokenize.main)
        for name, changes in METHODS.items():
            rate = {"train.learning_rate": LEARNING_RATES.get(name, 3e-2)}
            for key, value in (ORDINARY | rate | changes).items():
                tiny.set_param(folder, key, value)
            run(train.main, "--out", f"{name}/adapter", "--metrics", name)
            run(evaluate.main, "--adapter", f"{name}/adapter", "--out", f"{name}/eval.json")
    return folder


@pytest.fixture(autouse=True)
def inside(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


@pytest.mark.parametrize("method", METHODS)
def test_tuning_lowers_the_loss_on_the_test_split(method):
    figures = read(f"{method}/eval.json")
    assert figures["tuned"]["loss"] < figures["base"]["loss"] - 0.05
    assert figures["tuned"]["accuracy"] > figures["base"]["accuracy"]


@pytest.mark.parametrize("method", METHODS)
def test_perplexity_is_the_exponential_of_the_loss_and_the_change_a_difference(method):
    figures = read(f"{method}/eval.json")
    for scores in (figures["base"], figures["tuned"]):
        assert scores["perplexity"] == math.exp(scores["loss"])
        assert 0 <= scores["accuracy"] <= 1
    for name, change in figures["change"].items():
        assert change == figures["tuned"][name] - figures["base"][name]
    assert set(figures["change"]) == {"loss", "perplexity", "accuracy"}
    assert figures["predicted_tokens"] == read("data/tokens/manifest.json")["splits"]["test"]["predicted_tokens"]


def test_the_base_is_scored_alike_whatever_was_trained():
    figures = [read(f"{method}/eval.json")["base"] for method in METHODS]
    assert all(scores == figures[0] for scores in figures)


def test_the_base_s_figures_are_those_of_the_model_as_published():
    network = AutoModelForCausalLM.from_pretrained("data/base").double().eval()
    nll, correct = 0.0, 0
    test = rows.load(Path("data/tokens"), "test")
    for ids, length in zip(test.ids, test.lengths, strict=True):
        row = torch.from_numpy(ids[:length].astype("int64"))
        with torch.no_grad():
            scores = network(input_ids=row[None, :-1]).logits[0].log_softmax(-1)
        nll -= float(scores.gather(1, row[1:, None]).sum())
        correct += int((scores.argmax(-1) == row[1:]).sum())
    figures = read("lora/eval.json")["base"]
    assert figures["loss"] == pytest.approx(nll / test.targets, rel=1e-5)
    assert figures["accuracy"] == pytest.approx(correct / test.targets)


@pytest.mark.parametrize("method", METHODS)
def test_every_number_in_the_metrics_is_finite(method):
    def numbers(value) -> list:
        return [number for part in value.values() for number in numbers(part)] if isinstance(value, dict) else [value]

    with open(f"{method}/loss.csv", newline="") as file:
        table = list(csv.DictReader(file))
    record = read(f"{method}/train.json")
    assert all(isinstance(name, str) for name in record.pop("adapted_modules"))  # the one list, which DVC leaves out
    found = numbers(read(f"{method}/eval.json")) + numbers(record)
    found += [float(cell) for row in table for cell in row.values()]
    assert len(found) > 20
    assert all(isinstance(number, int | float) and math.isfinite(number) for number in found)


@pytest.mark.parametrize("method", METHODS)
def test_the_training_record_agrees_with_the_files(method):
    record = read(f"{method}/train.json")
    with open(f"{method}/loss.csv", newline="") as file:
        table = list(csv.DictReader(file))
    best = min(table, key=lambda row: float(row["validation_loss"]))
    assert record["best_validation_loss"] == float(best["validation_loss"]) < record["start_validation_loss"]
    assert record["best_step"] == int(best["step"])
    assert record["steps"] == int(table[-1]["step"])
    assert record["tokens"] == read("data/tokens/manifest.json")["splits"]["train"]["predicted_tokens"]
    assert record["adapter_bytes"] == sum(map(len, contents(Path(method, "adapter")).values()))
    count = sum(value.numel() for value in AutoModelForCausalLM.from_pretrained("data/base").parameters())
    whole = method == "full"
    assert record["frozen_parameters"] == (0 if whole else count)
    everything = record["trainable_parameters"] + record["frozen_parameters"]
    assert record["trainable_percent"] == 100 * record["trainable_parameters"] / everything
    assert (record["trainable_percent"] == 100) is whole


def test_the_quantised_bases_take_less_memory():
    sizes = {method: read(f"{method}/train.json")["frozen_base_bytes"] for method in METHODS}
    assert sizes["full"] == 0 < sizes["qlora"] < sizes["qlora8"] < sizes["lora"] == sizes["lora, adapter of 8 bits"]


@pytest.mark.parametrize(
    ("method", "quantization"), [("lora", None), ("qlora8", BitsAndBytesConfig(load_in_8bit=True))]
)
def test_peft_loads_the_adapter_without_our_code(method, quantization):
    adapter = Path(method, "adapter")
    config = read(adapter / "adapter_config.json")
    assert config["target_modules"] == sorted(config["target_modules"])
    assert len(config["target_modules"]) == 8
    outside = AutoModelForCausalLM.from_pretrained("data/base", quantization_config=quantization, dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(outside, adapter))
    ours = logits(model.load_tuned(Path("data/base"), adapter, torch.float32))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    untuned = logits(model.load_base(Path("data/base"), None, torch.float32))
    assert (ours - untuned).abs().max() > 0.1


def test_the_whole_model_is_an_ordinary_one_for_transformers():
    names = contents(Path("full/adapter"))
    assert {"config.json", "model.safetensors", "method.json"} <= set(names)
    assert not any(name.startswith("adapter_") for name in names)
    expected = logits(AutoModelForCausalLM.from_pretrained("full/adapter"))
    ours = model.load_tuned(Path("data/base"), Path("full/adapter"), torch.float32)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)


def test_the_tuned_model_that_is_evaluated_is_the_best_that_was_trained():
    validation = rows.load(Path("data/tokens"), "validation")
    for method in METHODS:
        network = model.load_tuned(Path("data/base"), Path(method, "adapter"), torch.float32)
        found = scoring.score(network, validation, 8, torch.float32, "").loss
        assert found == pytest.approx(read(f"{method}/train.json")["best_validation_loss"], rel=1e-5), method


def test_the_figures_do_not_depend_on_the_batch_size(workplace):
    tiny.set_param(workplace, "evaluate.batch_size", 3)
    run(evaluate.main, "--adapter", "lora/adapter", "--out", "again/eval.json")
    for name, scores in read("again/eval.json").items():
        assert scores == pytest.approx(read("lora/eval.json")[name], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("method", ["lora", "qlora", "qlora, adapter of 4 bits", "full"])
def test_training_twice_gives_the_same_bytes(workplace, method):
    rate = {"train.learning_rate": LEARNING_RATES.get(method, 3e-2)}
    for key, value in (ORDINARY | rate | METHODS[method]).items():
        tiny.set_param(workplace, key, value)
    run(train.main, "--out", "again/adapter", "--metrics", "again")
    assert contents(Path("again/adapter")) == contents(Path(method, "adapter"))
    assert Path("again/loss.csv").read_bytes() == Path(method, "loss.csv").read_bytes()
    tiny.set_param(workplace, "seed", 1)
    run(train.main, "--out", "again/adapter", "--metrics", "again")
    tiny.set_param(workplace, "seed", 0)
    assert contents(Path("again/adapter")) != contents(Path(method, "adapter"))


def test_the_base_is_the_model_s_own_files_byte_for_byte(tiny_model):
    found = contents(Path("data/base"))
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(found)
    assert found == {name: data for name, data in contents(tiny_model).items() if name in found}


def test_no_stage_leaves_temporary_files(workplace):
    assert [path for path in workplace.rglob(".*.new")] + [path for path in workplace.rglob(".*.old")] == []
