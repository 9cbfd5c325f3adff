"""The speed benchmark: all sides do the same work, and the arithmetic of its tables."""

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from benchmarks import ours, training
from gpt2lora.dataset import blocks
from gpt2lora.pipeline.cli import StageError

ROW = training.Row("some", "cpu", "tiny", 16, 4, target="c_attn")
DONE = {"steps": 3, "tokens": 192, "trained_parameters": 100, "train_loss": 5.0}


@pytest.fixture(scope="module")
def few_tokens(tmp_path_factory):
    """Five rows that end one token before their width: the Trainer and the project predict the same targets of each."""
    folder, random = tmp_path_factory.mktemp("tokens"), np.random.default_rng(0)
    for split in ("train", "validation"):
        ids = random.integers(1, 300, (5, 17)).astype(np.uint16)
        ids[:, -1] = 0
        blocks.save_blocks(blocks.Blocks(ids, np.full(5, 16, np.int32)), folder, split)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "target", "bits"),
    [("lora", "c_attn", 4), ("qlora", "all-linear", 4), ("qlora", "all-linear", 8), ("full", "all-linear", 4)],
)
def test_the_trainer_and_the_project_do_the_same_work(method, target, bits, tiny_model, few_tokens):
    options = {
        "model": tiny_model,
        "tokens": few_tokens,
        "method": method,
        "target": target,
        "bits": bits,
        "dropout": 0,
    }
    # At this learning rate nothing is learned, so the order of the rows does not change the summed loss.
    options |= {"batch-size": 2, "steps": 2, "warmup": 1, "learning-rate": 1e-12}
    peer, project = (training.run(f"benchmarks.{module}", options) for module in ("hf_trainer", "ours"))
    assert peer.keys() == project.keys()
    for name in ("steps", "tokens", "trained_parameters"):
        assert peer[name] == project[name], name
    assert peer["tokens"] == 2 * 2 * 16
    for record in (peer, project):
        assert record["tokens_per_second"] > 0
        assert 1e8 < record["peak_memory_bytes"] < 1e10
    # The Trainer divides the summed loss by all 16 tokens of a row, of which it predicts 15. Ours is bf16 on some CPUs.
    assert peer["train_loss"] == pytest.approx(project["train_loss"] * 15 / 16, abs=2e-3)


def test_too_few_tokens_are_refused(tiny_model, few_tokens, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    options = ["--model", tiny_model, "--tokens", few_tokens, "--batch-size", 2, "--steps", 3]
    result = CliRunner().invoke(ours.main, list(map(str, options)))
    assert result.exit_code == 1
    assert "5 full rows, expected 3 steps of 2" in result.output


@pytest.fixture
def pretended(monkeypatch):
    """Runs that return the next of these figures; the commands that were asked for."""
    asked = []

    def pretend(*records: dict) -> list:
        figures = iter(records)

        def run(module: str, options: dict, *flags: str) -> dict:
            asked.append((module, flags))
            return DONE | next(figures)

        monkeypatch.setattr(training, "run", run)
        return asked

    return pretend


def figures(speed: float, memory: float = 1e9, **changes) -> dict:
    return {"tokens_per_second": speed, "peak_memory_bytes": memory} | changes


def test_a_row_has_median_speeds_and_the_highest_memory(pretended):
    asked = pretended(
        *(figures(80), figures(200), figures(250, 3e8)),
        *(figures(100), figures(100), figures(200, 3e8)),
        *(figures(500, 2e9), figures(400), figures(900, 4e8)),
    )
    result = training.measure(ROW, {}, 3)
    assert asked[:3] == [
        ("benchmarks.hf_trainer", ()),
        ("benchmarks.hf_trainer", ("--compile",)),
        ("benchmarks.ours", ()),
    ]
    assert result["tokens_per_second"] == {"Trainer": 100, "Trainer, compiled": 200, "ours": 250}
    assert result["peak_memory_bytes"] == {"Trainer": 2e9, "Trainer, compiled": 1e9, "ours": 4e8}
    line = training.render([result], None, {}).splitlines()[2]
    assert line == "| some | 100 | 200 | 250 | 2.50 | 1.25 | 2.00 | 1.00 | 0.40 |"


def test_rows_without_peers_measure_the_project_alone(pretended):
    asked = pretended(figures(250, 3e8))
    row = next(row for row in training.ROWS if not row.peers)
    result = training.measure(row, {}, 1)
    assert [module for module, _ in asked] == ["benchmarks.ours"]
    assert training.render([result], None, {}).splitlines()[2] == f"| {row.name} |  |  | 250 |  |  |  |  | 0.30 |"


@pytest.mark.parametrize("changes", [{"tokens": 191}, {"trained_parameters": 99}, {"steps": 2}])
def test_sides_that_did_other_work_are_not_compared(pretended, changes):
    pretended(figures(100), figures(100), figures(200, **changes))
    with pytest.raises(StageError, match=f"{next(iter(changes))} differ"):
        training.measure(ROW, {}, 1)


def test_the_report_has_the_wall_clock_and_the_conditions():
    clock = {"Trainer": [100.0, 90.0, 110.0], "ours": [30.0, 50.0, 40.0]}
    text = training.render([], clock, {"device": "abacus"})
    assert "| stage | 100.0 | 40.0 | 0.40 |" in text
    assert "- device: abacus" in text


def test_each_row_exists_once_and_its_size_is_known():
    names = [row.name for row in training.ROWS]
    assert len(names) == len(set(names))
    assert {row.size for row in training.ROWS} <= training.random_inputs.SIZES.keys()
