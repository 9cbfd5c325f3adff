"""The benchmark of the evaluation against the loop of transformers' documentation, on the tiny model."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import ROOT

from benchmarks import evaluation


@pytest.fixture(autouse=True)
def inside_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def run_benchmark(model: Path, text: Path, *arguments) -> tuple[str, dict[str, list[float]]]:
    """Return the output, and from it windows a second, memory and perplexity of both sides."""
    arguments = ["--model", model, "--text", text, *arguments]
    result = CliRunner().invoke(evaluation.main, list(map(str, arguments)), catch_exceptions=False)
    rows = re.findall(r"^(documentation|evaluate) +([\d.]+) +([\d.]+) +([\d.]+)$", result.output, re.MULTILINE)
    return result.output, {name: list(map(float, numbers)) for name, *numbers in rows}


def test_both_sides_find_the_same_perplexity(tiny_model, text_file, expected_perplexities):
    output, results = run_benchmark(tiny_model, text_file, "--stride", 32)
    assert results["evaluate"][2] == pytest.approx(expected_perplexities[1], rel=1e-4)
    assert results["documentation"][2] == pytest.approx(expected_perplexities[1], rel=5e-3)
    assert all(number > 0 for numbers in results.values() for number in numbers)
    ratio, difference = map(float, re.search(r"ratio ([\d.]+)x, perplexity ([+-][\d.]+) %", output).groups())
    assert ratio == pytest.approx(results["evaluate"][0] / results["documentation"][0], rel=0.02)
    assert difference == pytest.approx(100 * (results["evaluate"][2] / results["documentation"][2] - 1), abs=1e-3)


@pytest.mark.parametrize(("stride", "expected"), [(16, [64, 16, 16]), (64, [64, 64, 64])])
def test_a_window_of_the_loop_scores_only_new_tokens(tiny_model, text_file, monkeypatch, stride, expected):
    from transformers import GPT2LMHeadModel

    label_counts, forward = [], GPT2LMHeadModel.forward

    def counting_forward(self, *arguments, **options):
        if "labels" in options:
            label_counts.append(int((options["labels"] != -100).sum()))
        return forward(self, *arguments, **options)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", counting_forward)
    output, _ = run_benchmark(tiny_model, text_file, "--stride", stride, "--windows", 3)
    assert f"3 windows of 64 at a stride of {stride}" in output
    assert label_counts == expected[:2] + expected  # warm-up and measurement


def test_a_stride_above_the_context_is_refused(tiny_model, text_file):
    output, _ = run_benchmark(tiny_model, text_file, "--stride", 65)
    assert output.splitlines()[-1] == "Error: --stride: expected 1 to 64, the model's context, not 65"
