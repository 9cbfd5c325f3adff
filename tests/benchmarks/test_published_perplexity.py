"""make gate and the benchmark of the evaluation, on the tiny model."""

import importlib.util
import math
import random
import re
from pathlib import Path

import brute_force
import pytest
from click.testing import CliRunner
from tiny import POSITIONS, ROOT

from benchmarks import evaluation
from gpt2lora.dataset.tokenizer import load_tokenizer
from gpt2lora.evaluation import protocols
from gpt2lora.sources import hub

spec = importlib.util.spec_from_file_location("gate", ROOT / "tools/published_perplexity.py")
gate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gate)


@pytest.fixture(autouse=True)
def inside_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    """Two pages of words that are few tokens each: by words, too, an untrained model's perplexity stays readable."""
    pick = random.Random(0)
    pages = [" ".join(pick.choices(("the", "old", "a", "this", ","), k=length)) for length in (150, 30)]
    file = tmp_path_factory.mktemp("text") / "test.txt"
    file.write_text("".join(f" \n = Title {number} = \n \n {page} . \n" for number, page in enumerate(pages)))
    return file


@pytest.fixture(scope="module")
def expected_figures(tiny_model, text_file) -> list[float]:
    """The tiny model's three perplexities, each token scored by itself."""
    text = text_file.read_text()
    tokenizer = load_tokenizer(tiny_model)
    joined = "\n\n".join("" if line.isspace() else line for line in text.splitlines(keepends=True))
    stream = tokenizer.encode(joined).ids
    found = []
    for stride in (POSITIONS, POSITIONS // 2):
        nll, ranks = brute_force.scored(tiny_model, [stream], [brute_force.slid(len(stream), POSITIONS, stride)])
        found.append(math.exp(nll / len(ranks)))
    pages = protocols.split_pages(text)
    texts = [[0, *tokenizer.encode(protocols.detokenize(page)).ids] for page in pages]
    nll, _ = brute_force.scored(tiny_model, texts, [brute_force.rolled(len(text), POSITIONS) for text in texts])
    return [*found, math.exp(nll / sum(len(re.split(r"\s+", page)) for page in pages))]


def run(model: Path, text: Path, *published: float):
    arguments = ["--base", model, "--text", text, "--published", *published]
    return CliRunner().invoke(gate.main, list(map(str, arguments)), catch_exceptions=False)


def test_the_gate_passes_a_model_with_its_own_figures(tiny_model, text_file, expected_figures):
    result = run(tiny_model, text_file, *expected_figures)
    assert result.exit_code == 0, result.output
    rows = re.findall(r"^(.+?) {2,}([\d.]+) +([\d.]+) +([+-][\d.]+)$", result.output, re.MULTILINE)
    assert [row[0] for row in rows] == ["hf, stride 64", "hf, stride 32", "lm-eval, by words"]
    for row, expected in zip(rows, expected_figures, strict=True):
        assert float(row[2]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("place", "off", "name"),
    [(0, 0.11, "hf, stride 64"), (1, -0.11, "hf, stride 32"), (2, math.nan, "lm-eval, by words"), (0, 0.09, None)],
)
def test_the_gate_stops_a_figure_that_is_off_by_more_than_a_tenth(tiny_model, text_file, monkeypatch, place, off, name):
    measured = {"hf, stride 64": 30.0, "hf, stride 32": 25.0, "lm-eval, by words": 37.0}
    monkeypatch.setattr(gate, "measure", lambda *_: measured)
    published = [30.0, 25.0, 37.0]
    published[place] -= off
    result = run(tiny_model, text_file, *published)
    assert result.exit_code == (0 if name is None else 1)
    assert all(re.search(rf"^{figure} +\S", result.output, re.MULTILINE) for figure in measured)
    assert ("off by more than 0.1" in result.output) is (name is not None)
    if name:
        assert result.output.splitlines()[-1] == f"Error: gate: off by more than 0.1: {name}"


def test_the_gate_fails_the_tiny_model_by_gpt2_s_figures(tiny_model, text_file):
    result = run(tiny_model, text_file, *gate.PUBLISHED)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].endswith("hf, stride 64, hf, stride 32, lm-eval, by words")


def test_the_gate_scores_the_model_and_the_text_of_the_preset_gpt2(tiny_model, text_file, monkeypatch):
    text = text_file.read_text()
    asked = []
    monkeypatch.setattr(hub, "fetch_model", lambda *names: asked.append(names) or tiny_model)
    rows = {"test": protocols.hub_rows(text)}
    monkeypatch.setattr(hub, "fetch_dataset", lambda *names: asked.append(names) or rows)
    seen, measured = [], dict(zip("abc", gate.PUBLISHED, strict=True))
    monkeypatch.setattr(gate, "measure", lambda folder, content, size: seen.append((folder, content)) or measured)
    result = CliRunner().invoke(gate.main, [], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert [names[0] for names in asked] == ["openai-community/gpt2", "Salesforce/wikitext"]
    assert seen == [(tiny_model, text)]


def benchmark(model: Path, text: Path, *arguments) -> tuple[str, dict[str, list[float]]]:
    arguments = ["--model", model, "--text", text, *arguments]
    result = CliRunner().invoke(evaluation.main, list(map(str, arguments)), catch_exceptions=False)
    rows = re.findall(r"^(documentation|evaluate) +([\d.]+) +([\d.]+) +([\d.]+)$", result.output, re.MULTILINE)
    return result.output, {name: list(map(float, numbers)) for name, *numbers in rows}


def test_the_benchmark_runs_both_and_finds_the_same_perplexity(tiny_model, text_file, expected_figures):
    output, found = benchmark(tiny_model, text_file, "--stride", 32)
    assert found["evaluate"][2] == pytest.approx(expected_figures[1], rel=1e-4)
    assert found["documentation"][2] == pytest.approx(expected_figures[1], rel=5e-3)
    assert all(number > 0 for numbers in found.values() for number in numbers)
    ratio, difference = map(float, re.search(r"ratio ([\d.]+)x, perplexity ([+-][\d.]+) %", output).groups())
    assert ratio == pytest.approx(found["evaluate"][0] / found["documentation"][0], rel=0.02)
    assert difference == pytest.approx(100 * (found["evaluate"][2] / found["documentation"][2] - 1), abs=1e-3)


@pytest.mark.parametrize(("stride", "labels"), [(16, [64, 16, 16]), (64, [64, 64, 64])])
def test_the_benchmark_s_loop_labels_what_no_window_before_has(tiny_model, text_file, monkeypatch, stride, labels):
    from transformers import GPT2LMHeadModel

    found, forward = [], GPT2LMHeadModel.forward

    def counting(self, *arguments, **options):
        if "labels" in options:
            found.append(int((options["labels"] != -100).sum()))
        return forward(self, *arguments, **options)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", counting)
    output, _ = benchmark(tiny_model, text_file, "--stride", stride, "--windows", 3)
    assert f"3 windows of 64 at a stride of {stride}" in output
    assert found == labels[:2] + labels  # warm-up and measurement


def test_the_benchmark_refuses_a_stride_above_the_context(tiny_model, text_file):
    output, _ = benchmark(tiny_model, text_file, "--stride", 65)
    assert output.splitlines()[-1] == "Error: --stride: expected 1 to 64, the model's context, not 65"
