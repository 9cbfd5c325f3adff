"""What the benchmarks refuse, in one line and before any work."""

import pytest
from click.testing import CliRunner
from tiny import ROOT

from benchmarks import evaluation, methods, scaling


@pytest.fixture(autouse=True)
def inside_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("main", "options", "line"),
    [
        (scaling.main, "--gpus 0", "Invalid value for '--gpus'"),
        (scaling.main, "--size huge", "Invalid value for '--size'"),
        (scaling.main, "--size tiny", "--block-size: expected 1 to 128, the positions of tiny, not 1,024"),
        (scaling.main, "--rows before", "--rows before: expected --before FOLDER"),
        (evaluation.main, "--model . --text LICENSE --precision fp61", "Invalid value for '--precision'"),
        (methods.main, "--base . --corpus . --out x --only nosuch", "--only nosuch: there are lora, full, "),
    ],
)
def test_bad_options_are_refused(main, options, line):
    result = CliRunner().invoke(main, options.split())
    assert result.exit_code in (1, 2)
    assert line in result.output


@pytest.mark.parametrize(
    ("content", "line"), [(b"", "0 tokens: expected at least two"), (b"caf\xe9", "not UTF-8 at byte 3")]
)
def test_a_text_that_cannot_be_scored_is_refused(tiny_model, tmp_path, content, line):
    (tmp_path / "text.txt").write_bytes(content)
    options = ["--model", tiny_model, "--text", tmp_path / "text.txt", "--stride", 32]
    assert line in CliRunner().invoke(evaluation.main, list(map(str, options))).output
