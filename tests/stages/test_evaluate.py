"""The metrics of evaluate, for every method: they equal a brute-force computation, and training improves them."""

import math
import re
from pathlib import Path

import brute_force
import numpy as np
import pandas
import pytest
import tiny
from evaluated_methods import METHODS, evaluate_inputs, read_json
from training_runs import run_stage

from gpt2lora.dataset import articles
from gpt2lora.dataset.tokenizer import load_tokenizer
from gpt2lora.evaluation import protocols
from stages import evaluate

BLOCK_SIZE = 32  # tokenize.block_size of tiny's projects

pytestmark = pytest.mark.usefixtures("methods_folder", "no_pictures")


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_on_the_test_split(method):
    metrics = read_json(f"{method}/eval.json")
    assert metrics["tuned"]["loss"] < metrics["base"]["loss"] - 0.05
    assert metrics["tuned"]["top5_accuracy"] > metrics["base"]["top5_accuracy"] + 0.05


@pytest.mark.parametrize("method", METHODS)
def test_perplexity_is_exp_of_loss_and_change_a_difference(method):
    metrics = read_json(f"{method}/eval.json")
    for scores in (metrics["base"], metrics["tuned"]):
        assert scores["perplexity"] == math.exp(scores["loss"])
        assert 0 <= scores["accuracy"] <= 1
    for name, change in metrics["change"].items():
        assert change == metrics["tuned"][name] - metrics["base"][name]
    names = {"loss", "perplexity", "word_perplexity", "bits_per_byte", "accuracy", "top5_accuracy"}
    assert set(metrics["base"]) == set(metrics["tuned"]) == set(metrics["change"]) == names
    split = read_json("data/tokens/manifest.json")["splits"]["test"]
    text = Path("data/raw/test.txt").read_text()
    assert {name: value for name, value in metrics.items() if not isinstance(value, dict)} == {
        "predicted_tokens": split["predicted_tokens"],
        "words": len(text.split()),
        "bytes": len(text.encode()),
        "windows": split["rows"],
    }


def test_the_base_has_the_same_scores_for_every_method():
    scores = [read_json(f"{method}/eval.json")["base"] for method in METHODS]
    assert all(each == scores[0] for each in scores)


# Protocols


def evaluate_with(folder: Path, **settings) -> dict:
    """Return the metrics of the lora adapter with changed parameters of `evaluate`."""
    for key, value in settings.items():
        tiny.set_param(folder, f"evaluate.{key}", value)
    outputs = ["--out", "again/eval.json", "--positions", "again/positions.csv"]
    run_stage(evaluate.main, *evaluate_inputs("lora"), *outputs)
    return read_json("again/eval.json")


def check_metrics(metrics: dict, nll: float, ranks: np.ndarray, words: int, size: int) -> None:
    """Compare the counts and the base model's scores with the summed NLL in nats and the ranks of all tokens."""
    assert {name: value for name, value in metrics.items() if name in ("predicted_tokens", "words", "bytes")} == {
        "predicted_tokens": len(ranks),
        "words": words,
        "bytes": size,
    }
    assert metrics["base"] == pytest.approx(
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


@pytest.mark.parametrize("stride", [None, 7])
def test_native_metrics_equal_brute_force(methods_folder, stride):
    text = Path("data/raw/test.txt").read_text()
    tokenizer, end = load_tokenizer(Path("data/base")), read_json("data/base/config.json")["eos_token_id"]
    stream = [id for article in articles.split_articles(text) for id in (*tokenizer.encode(article).ids, end)][:-1]
    contexts = brute_force.sliding_contexts(len(stream), BLOCK_SIZE, stride or BLOCK_SIZE)
    scores = brute_force.score_folder(Path("data/base"), [stream], [contexts])
    check_metrics(evaluate_with(methods_folder, stride=stride), *scores, len(text.split()), len(text.encode()))


@pytest.mark.parametrize("stride", [None, 16, 1])
def test_hf_metrics_equal_brute_force(methods_folder, stride):
    text = Path("data/raw/test.txt").read_text()
    joined = "\n\n".join("" if line.isspace() else line for line in text.splitlines(keepends=True))
    stream = load_tokenizer(Path("data/base")).encode(joined).ids
    contexts = brute_force.sliding_contexts(len(stream), BLOCK_SIZE, stride or BLOCK_SIZE)
    scores = brute_force.score_folder(Path("data/base"), [stream], [contexts])
    metrics = evaluate_with(methods_folder, protocol="hf", stride=stride)
    check_metrics(metrics, *scores, len(text.split()), len(text.encode()))
    assert metrics["windows"] == 1 + math.ceil((len(stream) - 1 - BLOCK_SIZE) / (stride or BLOCK_SIZE))


def test_lm_eval_metrics_equal_brute_force(methods_folder):
    text = Path("data/raw/test.txt").read_text()
    pages = protocols.split_pages(text)
    tokenizer, end = load_tokenizer(Path("data/base")), read_json("data/base/config.json")["eos_token_id"]
    texts = [[end, *tokenizer.encode(protocols.detokenize(page)).ids] for page in pages]
    contexts = [brute_force.rolling_contexts(len(ids), BLOCK_SIZE) for ids in texts]
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    metrics = evaluate_with(methods_folder, protocol="lm-eval")
    scores = brute_force.score_folder(Path("data/base"), texts, contexts)
    check_metrics(metrics, *scores, words, sum(len(page.encode()) for page in pages))


@pytest.mark.parametrize("settings", [{}, {"stride": 5}, {"protocol": "lm-eval"}], ids=str)
def test_metrics_by_position_average_to_those_of_the_split(methods_folder, settings):
    metrics = evaluate_with(methods_folder, **settings)
    table = pandas.read_csv("again/positions.csv")
    names = ["base_loss", "tuned_loss", "base_accuracy", "tuned_accuracy"]
    assert list(table.columns) == ["position", "tokens", *names]
    assert table.position.tolist() == list(range(1, BLOCK_SIZE + 1))
    assert table.tokens.sum() == metrics["predicted_tokens"]
    for name in names:
        model, metric = name.split("_")
        mean = (table[name] * table.tokens).sum() / table.tokens.sum()
        assert mean == pytest.approx(metrics[model][metric], rel=1e-12)


def test_metrics_do_not_depend_on_the_batch_size(methods_folder):
    for name, scores in evaluate_with(methods_folder, batch_size=3).items():
        assert scores == pytest.approx(read_json("lora/eval.json")[name], rel=1e-5, abs=1e-6)
