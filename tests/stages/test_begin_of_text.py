"""A model whose tokenizer begins a text with a token: every row and window begins with it, and it is never a target."""

import json
from pathlib import Path

import brute_force
import numpy as np
import pytest
import tiny
from training_runs import run_stage

from gpt2lora.dataset import blocks
from gpt2lora.dataset.articles import split_articles
from gpt2lora.dataset.tokenizer import load_tokenizer
from gpt2lora.evaluation import protocols, samples
from stages import base, evaluate, prepare, tokenize, train

BLOCK_SIZE, FIRST = 32, 0  # FIRST: the id of tiny.END, which is this tokenizer's first token of a text

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, tiny_corpus):
    """A project with such a model, in which all stages have run."""
    folder = tmp_path_factory.mktemp("begin")
    model = tiny.write_begin_of_text(folder / "model", tiny_model)
    project = tiny.make_project(folder / "project", model, tiny_corpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        for stage in (base, prepare, tokenize, train, evaluate):
            run_stage(stage.main)
    return project


@pytest.fixture
def project(finished, monkeypatch):
    monkeypatch.chdir(finished)
    return finished


def encode(text: str) -> list[int]:
    return load_tokenizer(Path("data/base")).encode(text, add_special_tokens=False).ids


def run_evaluate(**settings) -> dict:
    for key, value in settings.items():
        tiny.set_param(Path(), f"evaluate.{key}", value)
    run_stage(evaluate.main, "--out", "again/eval.json", "--positions", "again/positions.csv")
    return json.loads(Path("again/eval.json").read_text())


def test_every_row_begins_with_it_and_predicts_each_token_once(project):
    manifest = json.loads(Path("data/tokens/manifest.json").read_text())
    assert manifest["prefix"] == [FIRST]
    for split in blocks.SPLITS:
        rows = blocks.load_blocks(Path("data/tokens"), split, [FIRST])
        assert (rows.ids[:, 0] == FIRST).all()
        stream = np.concatenate([ids[1:length] for ids, length in zip(rows.ids, rows.lengths, strict=True)]).tolist()
        texts = split_articles(Path(f"data/raw/{split}.txt").read_text())
        assert stream == [id for text in texts for id in [*encode(text), FIRST]][:-1]
        assert rows.targets == len(stream) == manifest["splits"][split]["predicted_tokens"]


@pytest.mark.parametrize("stride", [BLOCK_SIZE, 8])
def test_native_predicts_every_token_after_it(project, stride):
    tiny.set_param(Path(), "evaluate.protocol", "native")
    metrics = run_evaluate(stride=stride)
    texts = split_articles(Path("data/raw/test.txt").read_text())
    stream = [id for text in texts for id in [*encode(text), FIRST]][:-1]
    pairs = []
    for start in range(0, len(stream), stride):  # windows of BLOCK_SIZE inputs, the first of which is the token
        fresh = range(0 if start == 0 else start + BLOCK_SIZE - stride, min(start + BLOCK_SIZE, len(stream)))
        pairs += [([FIRST, *stream[start:index]], stream[index]) for index in fresh]
    nll = sum(nll for nll, _ in brute_force.score_pairs(load_model(), pairs))
    assert metrics["predicted_tokens"] == len(stream)
    assert metrics["base"]["loss"] == pytest.approx(nll / len(stream), rel=1e-5)


def test_hf_puts_it_at_the_beginning_of_the_text_alone(project):
    text = Path("data/raw/test.txt").read_text()
    metrics = run_evaluate(protocol="hf", stride=None)
    ids = [FIRST, *encode("\n\n".join(protocols.hub_rows(text)))]
    contexts = brute_force.sliding_contexts(len(ids), BLOCK_SIZE, BLOCK_SIZE)
    nll, ranks = brute_force.score_tokens(load_model(), [ids], [contexts])
    assert metrics["predicted_tokens"] == len(ids) - 1 == len(ranks)
    assert metrics["base"]["loss"] == pytest.approx(nll / len(ranks), rel=1e-5)


def test_lm_eval_predicts_first_tokens_from_it(project):
    metrics = run_evaluate(protocol="lm-eval", stride=None)
    pages = protocols.split_pages(Path("data/raw/test.txt").read_text())
    texts = [[FIRST, *encode(protocols.detokenize(page))] for page in pages]
    contexts = [brute_force.rolling_contexts(len(text), BLOCK_SIZE) for text in texts]
    nll, ranks = brute_force.score_tokens(load_model(), texts, contexts)
    assert metrics["base"]["loss"] == pytest.approx(nll / len(ranks), rel=1e-5)


def test_samples_are_continued_after_it(project, monkeypatch):
    given = []
    monkeypatch.setattr(samples, "generate_samples", lambda model, prompts, end: given.append(prompts) or prompts.ids)
    run_evaluate(protocol="native", stride=None)
    assert [prompts.prefix for prompts in given] == [[FIRST], [FIRST]], "base and tuned"


def test_the_report_says_where_it_stands(project):
    report = Path("metrics/report.md").read_text().replace("\\", "")
    scored = f"native, in windows of {BLOCK_SIZE} tokens, {BLOCK_SIZE} apart, each after {tiny.END}"
    assert f"| scored | {scored} |\n" in report


def load_model():
    """Return the base model in fp64, loaded once."""
    from transformers import AutoModelForCausalLM

    if not loaded:
        loaded.append(AutoModelForCausalLM.from_pretrained("data/base").double().eval())
    return loaded[0]


loaded = []
