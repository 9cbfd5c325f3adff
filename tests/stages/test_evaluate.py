"""The stages one after the other, in this process: what they leave behind, and that tuning helped."""

import csv
import json
import math
import re
import shutil
import sys
from pathlib import Path

import brute_force
import numpy as np
import pandas
import pytest
import tiny
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from gpt2lora.dataset import articles, blocks
from gpt2lora.dataset.tokenizer import load_tokenizer
from gpt2lora.evaluation import metrics, protocols
from gpt2lora.model import loading
from gpt2lora.pipeline.artifacts import digests
from gpt2lora.scoring import log_likelihood, windows
from gpt2lora.scoring.log_likelihood import TokenScores
from stages import base, evaluate, prepare, tokenize, train

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
BLOCK = 32  # tokens: tokenize.block_size of tiny's projects
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
            inputs = ["--adapter", f"{name}/adapter", "--loss", f"{name}/loss.csv"]
            run(evaluate.main, *inputs, "--out", f"{name}/eval.json")
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
    names = {"loss", "perplexity", "word_perplexity", "bits_per_byte", "accuracy", "top5_accuracy"}
    assert set(figures["base"]) == set(figures["tuned"]) == set(figures["change"]) == names
    split = read("data/tokens/manifest.json")["splits"]["test"]
    text = Path("data/raw/test.txt").read_text()
    assert {name: number for name, number in figures.items() if not isinstance(number, dict)} == {
        "predicted_tokens": split["predicted_tokens"],
        "words": len(text.split()),
        "bytes": len(text.encode()),
        "windows": split["rows"],
    }


def test_the_base_is_scored_alike_whatever_was_trained():
    figures = [read(f"{method}/eval.json")["base"] for method in METHODS]
    assert all(scores == figures[0] for scores in figures)


def check_figures(found: dict, nll: float, ranks: np.ndarray, words: int, size: int) -> None:
    assert {name: number for name, number in found.items() if name in ("predicted_tokens", "words", "bytes")} == {
        "predicted_tokens": len(ranks),
        "words": words,
        "bytes": size,
    }
    assert found["base"] == pytest.approx(
        {
            "loss": nll / len(ranks),
            "perplexity": math.exp(nll / len(ranks)),
            "word_perplexity": math.exp(nll / words),
            "bits_per_byte": nll / math.log(2) / size,
            "accuracy": (ranks == 0).mean(),
            "top5_accuracy": (ranks < 5).mean(),
        },
        rel=1e-5,
    )


def evaluated(workplace, **settings) -> dict:
    """Return the figures of the lora adapter with other parameters of `evaluate`."""
    for key, value in settings.items():
        tiny.set_param(workplace, f"evaluate.{key}", value)
    inputs = ["--adapter", "lora/adapter", "--loss", "lora/loss.csv"]
    run(evaluate.main, *inputs, "--out", "again/eval.json", "--positions", "again/positions.csv")
    return read("again/eval.json")


@pytest.fixture
def restored(workplace):
    """Puts params.yaml back after the test."""
    before = (workplace / "params.yaml").read_bytes()
    yield workplace
    (workplace / "params.yaml").write_bytes(before)


@pytest.mark.parametrize("stride", [None, 7])
def test_native_figures_are_those_of_each_token_by_itself(restored, stride):
    text = Path("data/raw/test.txt").read_text()
    tokenizer, end = load_tokenizer(Path("data/base")), read("data/base/config.json")["eos_token_id"]
    stream = [id for article in articles.split_articles(text) for id in (*tokenizer.encode(article).ids, end)][:-1]
    scored = brute_force.scored(Path("data/base"), [stream], [brute_force.slid(len(stream), BLOCK, stride or BLOCK)])
    check_figures(evaluated(restored, stride=stride), *scored, len(text.split()), len(text.encode()))


@pytest.mark.parametrize("stride", [None, 16, 1])
def test_hf_figures_are_those_of_each_token_by_itself(restored, stride):
    text = Path("data/raw/test.txt").read_text()
    joined = "\n\n".join("" if line.isspace() else line for line in text.splitlines(keepends=True))
    stream = load_tokenizer(Path("data/base")).encode(joined).ids
    scored = brute_force.scored(Path("data/base"), [stream], [brute_force.slid(len(stream), BLOCK, stride or BLOCK)])
    found = evaluated(restored, protocol="hf", stride=stride)
    check_figures(found, *scored, len(text.split()), len(text.encode()))
    assert found["windows"] == 1 + math.ceil((len(stream) - 1 - BLOCK) / (stride or BLOCK))


def test_lm_eval_figures_are_those_of_each_token_by_itself(restored):
    text = Path("data/raw/test.txt").read_text()
    pages = protocols.split_pages(text)
    tokenizer, end = load_tokenizer(Path("data/base")), read("data/base/config.json")["eos_token_id"]
    texts = [[end, *tokenizer.encode(protocols.detokenize(page)).ids] for page in pages]
    contexts = [brute_force.rolled(len(text), BLOCK) for text in texts]
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    found = evaluated(restored, protocol="lm-eval")
    scored = brute_force.scored(Path("data/base"), texts, contexts)
    check_figures(found, *scored, words, sum(len(page.encode()) for page in pages))


@pytest.mark.parametrize("settings", [{}, {"stride": 5}, {"protocol": "lm-eval"}], ids=str)
def test_the_figures_by_position_add_up_to_those_of_the_split(restored, settings):
    found = evaluated(restored, **settings)
    table = pandas.read_csv("again/positions.csv")
    names = ["base_loss", "tuned_loss", "base_accuracy", "tuned_accuracy"]
    assert list(table.columns) == ["position", "tokens", *names]
    assert table.position.tolist() == list(range(1, BLOCK + 1))
    assert table.tokens.sum() == found["predicted_tokens"]
    for name in names:
        model, figure = name.split("_")
        mean = (table[name] * table.tokens).sum() / table.tokens.sum()
        assert mean == pytest.approx(found[model][figure], rel=1e-12)


@pytest.mark.parametrize(
    ("block_size", "contexts", "expected"),
    [
        (1024, [1, 32, 33, 1024], [(1, 2), (33, 1), (993, 1)]),
        (50, [1, 2, 3, 4, 50], [(1, 2), (3, 2), (50, 1)]),
        (3, [1, 3, 3], [(1, 1), (3, 2)]),
    ],
)
def test_positions_stand_in_at_most_32_buckets_by_their_first(tmp_path, block_size, contexts, expected):
    count = len(contexts)
    skips = np.array(contexts) - 1
    laid = windows.Windows(np.zeros(2000, np.uint16), np.zeros(count, int), skips + 2, skips)
    scored = TokenScores(np.arange(count) + 1.0, np.zeros(count, int))
    metrics.write_positions(tmp_path / "positions.csv", laid, {"base": scored, "tuned": scored}, block_size)
    table = pandas.read_csv(tmp_path / "positions.csv")
    assert list(zip(table.position, table.tokens, strict=True)) == expected
    assert (table.tokens * table.base_loss).sum() == pytest.approx(count * (count + 1) / 2)


# Figures that are odd


def task_of(tokens: int, words: int) -> protocols.Task:
    return protocols.Task(windows.sliding_windows([np.zeros(tokens + 1, np.uint16)], BLOCK, BLOCK), words, 10)


@pytest.mark.parametrize(("loss", "warned"), [(math.log(1.49), True), (math.log(1.51), False)])
def test_a_perplexity_that_no_real_text_has_is_reported_as_a_leak(capsys, loss, warned):
    scores = metrics.compute_metrics(TokenScores(np.full(4, loss), np.zeros(4, int)), task_of(4, 4))
    metrics.warn_about_metrics("tuned", scores)
    printed = capsys.readouterr().out
    assert ("warning: the tuned model's perplexity" in printed and "labels probably leak" in printed) is warned


def test_a_perplexity_too_large_for_a_number_is_capped_and_said(capsys):
    scores = metrics.compute_metrics(TokenScores(np.full(8, 650.0), np.full(8, 7)), task_of(8, 2))
    assert scores["perplexity"] == math.exp(650)
    assert scores["word_perplexity"] == math.exp(700)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    metrics.warn_about_metrics("base", scores)
    assert capsys.readouterr().out.count("word_perplexity is capped at 1.0e+304") == 1


# Bad input


def refusal(*arguments) -> str:
    """Return the line of a run that has no torch: what is wrong must be said before it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "torch",
            "transformers",
            "gpt2lora.scoring.log_likelihood",
            "gpt2lora.model.loading",
            "gpt2lora.model.device",
        ):
            patch.setitem(sys.modules, name, None)
        result = CliRunner().invoke(
            evaluate.main, ["--adapter", "lora/adapter", "--loss", "lora/loss.csv", *map(str, arguments)]
        )
    assert result.exit_code == 1
    return result.output.splitlines()[-1]  # behind what is left of a progress bar


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"stride": 0}, "evaluate.stride: expected an integer above 0, or null, not 0"),
        ({"stride": 33}, "evaluate.stride: expected 1 to 32, the block size, or null, not 33"),
        ({"protocol": "hf", "stride": 33}, "evaluate.stride: expected 1 to 32, the block size, or null, not 33"),
        (
            {"protocol": "lm-eval", "stride": 16},
            "evaluate.stride: expected null, since lm-eval has a stride of its own, not 16",
        ),
        ({"protocol": "wikitext"}, "evaluate.protocol: expected one of native, hf, lm-eval, not 'wikitext'"),
        ({"batch_size": 0}, "evaluate.batch_size: expected an integer above 0, or null, not 0"),
        ({"precision": "fp16"}, "evaluate.precision: expected one of auto, bf16, fp32, not 'fp16'"),
    ],
)
def test_a_wrong_parameter_is_one_line_before_torch_is_loaded(restored, settings, line):
    for key, value in settings.items():
        tiny.set_param(restored, f"evaluate.{key}", value)
    assert refusal() == f"Error: params.yaml: {line}"


@pytest.mark.parametrize(("protocol", "text"), [("hf", ""), ("hf", "x"), ("hf", " \n"), ("lm-eval", "")])
def test_a_text_with_nothing_to_predict_is_one_line(restored, tmp_path, protocol, text):
    tiny.set_param(restored, "evaluate.protocol", protocol)
    (tmp_path / "test.txt").write_text(text)
    tokens = shutil.copytree("data/tokens", tmp_path / "tokens")
    manifest = json.loads((tokens / "manifest.json").read_text())
    (tokens / "manifest.json").write_text(json.dumps(manifest | {"raw": digests(tmp_path, "*.txt")}))
    line = f"Error: {tmp_path}/test.txt: nothing to score: expected a word at least, and a token to predict"
    assert refusal("--raw", tmp_path, "--tokens", tokens) == line


def test_a_manifest_that_is_damaged_is_one_line(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    assert refusal("--tokens", tmp_path).startswith(f"Error: {tmp_path}/manifest.json is damaged")


@pytest.mark.parametrize("method", METHODS)
def test_every_number_in_the_metrics_is_finite(method):
    def numbers(value) -> list:
        return [number for part in value.values() for number in numbers(part)] if isinstance(value, dict) else [value]

    with open(f"{method}/loss.csv", newline="") as file:
        table = list(csv.DictReader(file))
    record = read(f"{method}/train.json")
    assert all(isinstance(name, str) for name in record.pop("adapted_modules"))  # the one list, which DVC leaves out
    found = [number for part in ("eval", "train_timings") for number in numbers(read(f"{method}/{part}.json"))]
    found += numbers(record)
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


def test_the_quantized_bases_take_less_memory():
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
    ours = logits(loading.load_tuned(Path("data/base"), adapter, torch.float32))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    untuned = logits(loading.load_base(Path("data/base"), None, torch.float32))
    assert (ours - untuned).abs().max() > 0.1


def test_the_whole_model_is_an_ordinary_one_for_transformers():
    names = contents(Path("full/adapter"))
    assert {"config.json", "model.safetensors", "method.json"} <= set(names)
    assert not any(name.startswith("adapter_") for name in names)
    expected = logits(AutoModelForCausalLM.from_pretrained("full/adapter"))
    ours = loading.load_tuned(Path("data/base"), Path("full/adapter"), torch.float32)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)


def test_the_tuned_model_that_is_evaluated_is_the_best_that_was_trained():
    validation = blocks.load_blocks(Path("data/tokens"), "validation")
    for method in METHODS:
        network = loading.load_tuned(Path("data/base"), Path(method, "adapter"), torch.float32)
        found = log_likelihood.validation_loss(network, validation, 8, torch.float32, "")
        assert found == pytest.approx(read(f"{method}/train.json")["best_validation_loss"], rel=1e-5), method


def test_the_figures_do_not_depend_on_the_batch_size(restored):
    for name, scores in evaluated(restored, batch_size=3).items():
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
    del found["manifest.json"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(found)
    assert found == {name: data for name, data in contents(tiny_model).items() if name in found}


def test_no_stage_leaves_temporary_files(workplace):
    assert [path for path in workplace.rglob(".*.new")] + [path for path in workplace.rglob(".*.old")] == []
