"""The report and the records: what ran, shown as it was, and nothing lost where something is unknown."""

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from transformers import AutoModelForCausalLM

from gpt2lora.dataset import articles
from gpt2lora.dataset.tokenizer import load_tokenizer
from gpt2lora.evaluation import report, samples
from gpt2lora.pipeline import cli, environment
from stages import base, evaluate, prepare, tokenize, train

STAGES = ("base", "prepare", "tokenize", "train", "evaluate")


def run(command, *arguments, exit_code: int = 0) -> str:
    result = CliRunner().invoke(command, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.output


class Cells(HTMLParser):
    """The texts of a page's table cells, and the sources of its pictures; <br> is a newline."""

    def __init__(self, page: str):
        super().__init__()
        self.cells: list[str] = []
        self.pictures: list[str] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "br":
            self.cells[-1] += "\n"
        if tag in ("td", "th"):
            self.cells.append("")
            self.inside = True
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data


def rendered(markdown: str) -> Cells:
    return Cells(MarkdownIt("gfm-like", {"linkify": False}).render(markdown))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_model, tiny_corpus) -> Path:
    """A project that was run once, stage by stage, on a 4-bit base."""
    folder = tiny.make_project(tmp_path_factory.mktemp("report") / "project", tiny_model, tiny_corpus)
    tiny.set_param(folder, "method", "qlora")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in (base, prepare, tokenize, train, evaluate):
            run(stage.main)
    return folder


@pytest.fixture(autouse=True)
def inside(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


# The report


def test_the_report_shows_the_figures_of_eval_json(workplace):
    scores = json.loads(Path("metrics/eval.json").read_text())
    text = Path("metrics/report.md").read_text()
    cells = rendered(text).cells
    for name, figure, factor, decimals in (
        ("loss (nats/token)", "loss", 1, 4),
        ("perplexity", "perplexity", 1, 2),
        ("accuracy (%)", "accuracy", 100, 2),
    ):
        place = cells.index(name)
        base, tuned, change = (float(cell.replace(",", "")) for cell in cells[place + 1 : place + 4])
        half = 0.5001 * 10**-decimals
        assert base == pytest.approx(factor * scores["base"][figure], abs=half)
        assert tuned == pytest.approx(factor * scores["tuned"][figure], abs=half)
        assert change == pytest.approx(factor * (scores["tuned"][figure] - scores["base"][figure]), abs=half)
    assert f"{scores['predicted_tokens']:,} predicted tokens" in text


def test_the_report_says_what_ran(workplace, tiny_model):
    text = Path("metrics/report.md").read_text()
    for line in (
        "- preset: local",
        f"- base: {report.escape_markdown(str(tiny_model))}",
        "- method: qlora, on a base of 4 bits (nf4, its scales quantized too)",
        "- scored: native, in windows of 32 tokens, 32 apart",
        f"- commit: {tiny.run(workplace, 'git', 'rev-parse', 'HEAD')[:12]} and changes",
    ):
        assert f"{line}\n" in text
    assert re.search(r"^- versions: Python [\d.]+, torch 2\S+, transformers 5\S+, peft \S+, bitsandbytes", text, re.M)
    cells = rendered(text).cells
    cells = cells[cells.index("stage") :]
    for stage in STAGES:
        assert re.fullmatch(r"\d+\.\d s", cells[cells.index(stage) + 1])
        assert cells[cells.index(stage) + 3] == ("float32" if stage in ("train", "evaluate") else "")


def test_every_picture_of_the_report_is_there_and_every_picture_in_the_report():
    shown = rendered(Path("metrics/report.md").read_text()).pictures
    assert all(Path("metrics", name).is_file() for name in shown)
    assert {Path(name).name for name in shown} == {file.name for file in Path("metrics/plots").iterdir()}
    assert len(shown) == 6


def test_the_samples_are_what_base_and_tuned_model_put_behind_beginnings_of_the_test_split():
    cells = rendered(Path("metrics/report.md").read_text()).cells
    place = cells.index("prompt")
    table = [cells[start : start + 3] for start in range(place + 3, place + 12, 3)]
    text = Path("data/raw/test.txt").read_text()
    tokenizer = load_tokenizer(Path("data/base"))
    prompts = samples.choose_prompts(text, tokenizer, 32)
    written = samples.generate_samples(AutoModelForCausalLM.from_pretrained("data/base"), prompts, 0)
    pieces = articles.split_articles(text)
    for (prompt, base_text, tuned_text), piece, ids in zip(
        table, (pieces[0], pieces[2], pieces[-1]), written, strict=True
    ):
        assert prompt
        assert "".join(piece.split()).startswith("".join(prompt.split()))
        assert "".join(base_text.split()) == "".join(tokenizer.decode(ids).split())
        assert base_text != tuned_text


def test_samples_are_the_same_at_every_run(workplace):
    before = rendered(Path("metrics/report.md").read_text()).cells
    run(evaluate.main, "--out", "again/eval.json", "--positions", "again/positions.csv")
    after = rendered(Path("again/report.md").read_text())
    start, end = before.index("prompt"), before.index("stage")
    assert after.cells[after.cells.index("prompt") : after.cells.index("stage")] == before[start:end]
    assert len(after.pictures) == 6
    for name in ("eval.json", "positions.csv", "plots/loss_by_position.png", "plots/accuracy_by_position.png"):
        assert Path("again", name).read_bytes() == Path("metrics", name).read_bytes()


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")) | st.sampled_from("|\\`*_[]<>&~$#\n!-+=")))
@example("a | b \\| c `d` **e** _f_ [g](h) <b>i</b> &amp; ~~j~~ $k$\n\n# l\n| --- |\n")
@example("![x](y) <!-- z --> &#42; http://example.com\n    code\n- list\n1. one\n===\n---")
def test_any_text_is_shown_as_it_is(text):
    cells = rendered(report.markdown_table(["a", "b"], [[report.escape_markdown(text), "end"]])).cells
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert cells == ["a", "b", "\n".join(filter(None, lines)), "end"]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (60, "1 min 0 s"),
        (3599.4, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (8000, "2 h 13 min"),
    ],
)
def test_durations(seconds, expected):
    assert report.format_duration(seconds) == expected


def test_figures_of_a_broken_model_stay_short():
    values = dict.fromkeys(report.METRIC_ROWS, 1e304)
    text = report.metrics_table({"base": values, "tuned": values, "change": dict.fromkeys(report.METRIC_ROWS, 0.0)})
    assert max(map(len, text.splitlines())) < 80


# Prompts


@pytest.mark.parametrize("context", [1, 2, 7, 32, 64, 1024])
def test_prompt_and_continuation_fit_into_the_context(context):
    tokenizer = load_tokenizer(Path("data/base"))
    prompts = samples.choose_prompts(Path("data/raw/test.txt").read_text(), tokenizer, context)
    assert len(prompts.ids) == 3
    (length,) = set(map(len, prompts.ids))
    assert 1 <= length <= 32
    assert 1 <= prompts.new_tokens <= 48
    assert length + prompts.new_tokens <= max(context, 2)
    if context == 1024:
        assert (length, prompts.new_tokens) == (32, 48)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one", ["one"]),
        ("one \n \n one \n", ["one", "one"]),
        ("the first line\nthe second\n\nthe\nthe fourth line\n", ["the", "the", "the"]),
        ("the river " * 100_000, ["the river the river"]),
    ],
)
def test_prompts_of_a_text_without_articles_are_beginnings_of_its_paragraphs(text, expected):
    tokenizer = load_tokenizer(Path("data/base"))
    prompts = samples.choose_prompts(text, tokenizer, 64)
    assert len(set(map(len, prompts.ids))) == 1
    found = [tokenizer.decode(ids) for ids in prompts.ids]
    assert len(found) == len(expected)
    assert all(text.strip().startswith(beginning) for text, beginning in zip(found, expected, strict=True)), found


def test_a_continuation_ends_where_its_text_does():
    network = AutoModelForCausalLM.from_pretrained("data/base")
    end = network.config.eos_token_id
    with torch.no_grad():
        network.transformer.ln_f.bias.copy_(10_000 * network.lm_head.weight[end])
    assert samples.generate_samples(network, samples.Prompts([[5, 6], [7, 8]], 10), end) == [[], []]


# The records


def test_environment_json_has_a_record_of_every_stage(workplace):
    records = json.loads(Path("metrics/environment.json").read_text())
    assert tuple(records) == STAGES
    for stage in STAGES[:-1]:
        assert records[stage] == json.loads(Path(f"data/environment/{stage}.json").read_text())
    commit = tiny.run(workplace, "git", "rev-parse", "HEAD").strip()
    for stage, record in records.items():
        assert 0 < record["seconds"] < 300
        assert (record["commit"], record["uncommitted_changes"]) == (commit, True)
        assert record["versions"]["torch"] == torch.__version__
        assert record["cpu"]
        assert record["cores"] >= 1
        assert record["gpu"] is None or torch.cuda.is_available()
        assert record.get("precision") == ("float32" if stage in ("train", "evaluate") else None)
    assert records["train"]["threads"] == torch.get_num_threads()
    assert records["train"]["method"] == "qlora"
    assert records["base"]["preset"] == "local"


def test_without_earlier_records_evaluate_says_so(workplace, tmp_path, monkeypatch):
    for name in ("params.yaml", "data/raw", "data/base", "data/tokens", "data/adapter", "metrics/loss.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(workplace / name)
    monkeypatch.chdir(tmp_path)
    run(evaluate.main)
    records = json.loads(Path("metrics/environment.json").read_text())
    assert {stage: record is None for stage, record in records.items()} == {
        stage: stage != "evaluate" for stage in STAGES
    }
    text = Path("metrics/report.md").read_text()
    assert "- preset: not known\n" in text
    assert text.count("not recorded") == 4
    assert "- commit: not known\n" in text  # no repository


def test_a_damaged_record_is_one_line(tmp_path):
    (tmp_path / "environment").mkdir()
    (tmp_path / "environment/train.json").write_text("{")
    with pytest.raises(cli.StageError, match=r"environment/train.json is damaged .* `dvc repro --force train`"):
        environment.read_record(tmp_path / "adapter", "train")


def test_seconds_are_those_since_the_start():
    assert environment.describe_run(time.perf_counter() - 100)["seconds"] == pytest.approx(100, abs=1)


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    record = environment.describe_run(time.perf_counter())
    assert (record["commit"], record["uncommitted_changes"]) == (None, None)


def test_what_is_not_installed_is_null(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("numpy", "no-such-package"))
    versions = environment.describe_run(time.perf_counter())["versions"]
    assert versions["numpy"] and versions["no-such-package"] is None
