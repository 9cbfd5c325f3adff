"""`make verify`, which compares measured with published perplexities, on the tiny model."""

import importlib.util
import math
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import ROOT

from gpt2lora.evaluation import protocols
from gpt2lora.sources import hub

spec = importlib.util.spec_from_file_location("published_perplexity", ROOT / "tools/published_perplexity.py")
published_perplexity = importlib.util.module_from_spec(spec)
spec.loader.exec_module(published_perplexity)


@pytest.fixture(autouse=True)
def inside_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def run_verify(model: Path, text: Path, *published: float):
    arguments = ["--base", model, "--text", text, "--published", *published]
    return CliRunner().invoke(published_perplexity.main, list(map(str, arguments)), catch_exceptions=False)


def test_a_model_with_the_published_perplexities_passes(tiny_model, text_file, expected_perplexities):
    result = run_verify(tiny_model, text_file, *expected_perplexities)
    assert result.exit_code == 0, result.output
    rows = re.findall(r"^(.+?) {2,}([\d.]+) +([\d.]+) +([+-][\d.]+)$", result.output, re.MULTILINE)
    assert [row[0] for row in rows] == ["hf, stride 64", "hf, stride 32", "lm-eval, by words"]
    for row, expected in zip(rows, expected_perplexities, strict=True):
        assert float(row[2]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("index", "difference", "name"),
    [(0, 0.11, "hf, stride 64"), (1, -0.11, "hf, stride 32"), (2, math.nan, "lm-eval, by words"), (0, 0.09, None)],
)
def test_a_difference_above_a_tenth_fails(tiny_model, text_file, monkeypatch, index, difference, name):
    measured = {"hf, stride 64": 30.0, "hf, stride 32": 25.0, "lm-eval, by words": 37.0}
    monkeypatch.setattr(published_perplexity, "measure", lambda *_: measured)
    published = [30.0, 25.0, 37.0]
    published[index] -= difference
    result = run_verify(tiny_model, text_file, *published)
    assert result.exit_code == (0 if name is None else 1)
    assert all(re.search(rf"^{row} +\S", result.output, re.MULTILINE) for row in measured)
    assert ("off by more than 0.1" in result.output) is (name is not None)
    if name:
        assert result.output.splitlines()[-1] == f"Error: verify: off by more than 0.1: {name}"


def test_the_tiny_model_fails_with_the_perplexities_of_gpt2(tiny_model, text_file):
    result = run_verify(tiny_model, text_file, *published_perplexity.PUBLISHED)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].endswith("hf, stride 64, hf, stride 32, lm-eval, by words")


def test_the_default_is_the_model_and_the_text_of_preset_gpt2(tiny_model, text_file, monkeypatch):
    text = text_file.read_text()
    fetched = []
    monkeypatch.setattr(hub, "fetch_model", lambda *names: fetched.append(names) or tiny_model)
    rows = {"test": protocols.hub_rows(text)}
    monkeypatch.setattr(hub, "fetch_dataset", lambda *names: fetched.append(names) or rows)
    scored, perplexities = [], dict(zip("abc", published_perplexity.PUBLISHED, strict=True))

    def fake_measure(folder, content, batch_size) -> dict[str, float]:
        scored.append((folder, content))
        return perplexities

    monkeypatch.setattr(published_perplexity, "measure", fake_measure)
    result = CliRunner().invoke(published_perplexity.main, [], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert [names[0] for names in fetched] == ["openai-community/gpt2", "Salesforce/wikitext"]
    assert scored == [(tiny_model, text)]
