"""Every type of causal language model that transformers knows, small and with random weights, through all stages.

Each stage gives the model's own loss and lowers it, or ends in one line. `make test-all` tries a third of the types,
`make test-models` all.
"""

import json
import os
from pathlib import Path

import every_model
import pytest
import tiny
import torch
from click.testing import CliRunner
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from gpt2lora.dataset.articles import split_articles
from gpt2lora.dataset.blocks import load_blocks
from gpt2lora.training.loss import IGNORE_INDEX, make_batch
from stages import base, evaluate, prepare, tokenize, train

BUILT = [kind for kind in every_model.ALL_TYPES if kind not in every_model.NOT_BUILT]
TYPES = BUILT if os.environ.get("EVERY_MODEL") else BUILT[::3]
METHODS = {"lora": {}, "qlora": {}, "qlora of 8 bits": {"methods.qlora.bits": 8}, "full": {}}
TOLERANCE = {"lora": 1e-3, "full": 1e-3, "qlora": 0.1, "qlora of 8 bits": 0.01}  # of the loss, as a share

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def texts(tmp_path_factory, tiny_corpus) -> Path:
    """A project with a few articles, in which `prepare` has run."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "corpus").mkdir()
    for split, count in {"train": 4, "valid": 1, "test": 1}.items():
        few = split_articles((tiny_corpus / f"{split}.txt").read_text())[:count]
        (folder / "corpus" / f"{split}.txt").write_text("".join(few))
    project = tiny.make_project(folder / "project", Path("model"), folder / "corpus")
    for key, value in {"train.epochs": 2, "lora.dropout": 0.0, "train.learning_rate": 3e-3}.items():
        tiny.set_param(project, key, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        assert error_of(prepare.main) is None
    return project


def error_of(stage) -> str | None:
    """Run a stage; return its error line, or None if it succeeded."""
    result = CliRunner().invoke(stage, [])
    if result.exit_code == 0:
        return None
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    line = result.stderr.splitlines()[-1]
    assert result.exit_code == 1
    assert line.startswith("Error: ")
    assert len(line) > 40
    return line


def own_loss(model: Path) -> float:
    """Return the loss of the validation split by transformers' own eager computation in fp32."""
    network = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager", dtype=torch.float32).eval()
    split, total = load_blocks(Path("data/tokens"), "validation", ()), 0.0
    for row in range(len(split)):  # by itself: no row is padded
        inputs, targets = make_batch(split, [row], torch.device("cpu"))
        with torch.no_grad():
            logits = network(input_ids=inputs, use_cache=False).logits.double()
        total += float(cross_entropy(logits[0], targets[0], ignore_index=IGNORE_INDEX, reduction="sum"))
    return total / split.targets


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", TYPES)
def test_a_model_trains_from_its_own_loss_or_is_refused_in_one_line(kind, texts, tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(texts)
    tiny.set_param(texts, "presets.local.model", str(every_model.write_small_model(kind, tmp_path / kind, tiny_model)))
    if error_of(base.main) or error_of(tokenize.main):
        return
    expected = own_loss(tmp_path / kind)
    for method, values in METHODS.items():
        for key, value in {"method": method.split()[0], "methods.qlora.bits": 4, **values}.items():
            tiny.set_param(texts, key, value)
        if error_of(train.main):
            continue
        record = json.loads(Path("metrics/train.json").read_text())
        assert record["start_validation_loss"] == pytest.approx(expected, rel=TOLERANCE[method]), method
        assert record["best_validation_loss"] < record["start_validation_loss"], method
        assert error_of(evaluate.main) is None
        metrics = json.loads(Path("metrics/eval.json").read_text())
        assert metrics["tuned"]["loss"] < metrics["base"]["loss"], method


def test_the_types_without_a_small_model_are_types_of_transformers():
    assert set(every_model.ALL_TYPES) > every_model.NOT_BUILT
