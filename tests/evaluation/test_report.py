"""The report: metrics, pictures, samples and what ran; and environment.json, the records of all stages."""

import json
import re
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from training_runs import run_stage
from transformers import AutoModelForCausalLM

from gpt2lora.dataset import articles
from gpt2lora.dataset.tokenizer import load_tokenizer
from gpt2lora.evaluation import report, samples
from gpt2lora.evaluation.metrics import describe_metrics
from stages import base, evaluate, prepare, tokenize, train

STAGES = ("base", "prepare", "tokenize", "train", "evaluate")


class Page(HTMLParser):
    """The texts of the table cells of an HTML page, and the sources of its pictures. <br> is a newline."""

    def __init__(self, page: str):
        super().__init__()
        self.cells: list[str] = []
        self.pictures: list[str] = []
        self.in_cell = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "br":
            self.cells[-1] += "\n"
        if tag in ("td", "th"):
            self.cells.append("")
            self.in_cell = True
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.in_cell:
            self.cells[-1] += data


def render(markdown: str) -> Page:
    return Page(MarkdownIt("gfm-like", {"linkify": False}).render(markdown))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, tiny_model, tiny_corpus) -> Path:
    """A project in which every stage has run, on a base of 4 bits."""
    folder = tiny.make_project(tmp_path_factory.mktemp("report") / "project", tiny_model, tiny_corpus)
    tiny.set_param(folder, "method", "qlora")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in (base, prepare, tokenize, train, evaluate):
            run_stage(stage.main)
    return folder


@pytest.fixture(autouse=True)
def inside_the_project(evaluated, monkeypatch):
    monkeypatch.chdir(evaluated)


# The report


def test_the_report_shows_the_metrics_of_eval_json():
    scores = json.loads(Path("metrics/eval.json").read_text())
    text = Path("metrics/report.md").read_text()
    cells = render(text).cells
    for name, metric, decimals in (
        ("loss (nats/token)", "loss", 4),
        ("perplexity (of tokens)", "perplexity", 2),
        ("accuracy (share of tokens)", "accuracy", 4),
    ):
        index = cells.index(name)
        base, tuned, change, percent = (float(cell.replace(",", "")) for cell in cells[index + 1 : index + 5])
        rounding = 0.5001 * 10**-decimals
        assert base == pytest.approx(scores["base"][metric], abs=rounding)
        assert tuned == pytest.approx(scores["tuned"][metric], abs=rounding)
        assert change == pytest.approx(scores["tuned"][metric] - scores["base"][metric], abs=rounding)
        assert percent == pytest.approx(100 * (scores["tuned"][metric] / scores["base"][metric] - 1), abs=0.051)
    assert f"{scores['predicted_tokens']:,} predicted tokens" in text


def test_the_report_tells_what_ran(evaluated, tiny_model):
    text = Path("metrics/report.md").read_text()
    record = json.loads(Path("metrics/train.json").read_text())
    for line in (
        "| preset | local |",
        f"| base | {report.escape_markdown(str(tiny_model))} |",
        "| method | qlora, on a base of 4 bits (nf4, its scales quantized too) |",
        "| rank, alpha | 16, 32 |",
        "| target modules | all-linear |",
        f"| trained | {record['trainable_parameters']:,} parameters, {record['trainable_percent']:.2g} % of all |",
        "| learning rate | 0.001 at most |",
        f"| epochs | 1: {record['steps']} steps of 8 rows |",
        f"| tokens | {record['tokens']:,} trained on, over all epochs |",
        "| seeds | 0 of everything |",
        "| scored | native, in windows of 32 tokens, 32 apart |",
        f"| commit | {tiny.run(evaluated, 'git', 'rev-parse', 'HEAD')[:12]} and changes |",
    ):
        assert f"{line}\n" in text
    assert re.search(
        r"^\| versions \| Python [\d.]+, torch 2\S+, transformers 5\S+, peft \S+, bitsandbytes", text, re.M
    )
    cells = render(text).cells
    cells = cells[cells.index("stage") :]
    for stage in STAGES:
        assert re.fullmatch(r"\d+\.\d s", cells[cells.index(stage) + 1])
        assert cells[cells.index(stage) + 3] == ("float32" if stage in ("train", "evaluate") else "")


def test_the_report_begins_with_one_sentence_of_the_result():
    scores, record = (json.loads(Path(f"metrics/{name}.json").read_text()) for name in ("eval", "train"))
    before, after = (scores[side]["perplexity"] for side in ("base", "tuned"))
    text = Path("metrics/report.md").read_text()
    assert text.split("\n\n")[1] == (
        f"**QLoRA on a base of 4 bits lowers the test perplexity from {before:.2f} to {after:.2f} "
        f"({100 * (after / before - 1):+.1f} %) with {record['trainable_percent']:.2g} % of the weights.**"
    )
    assert "`base` is the float base before any training" in text
    assert "on the quantized base" in text


@pytest.mark.parametrize(
    ("method", "tuned", "expected"),
    [
        ("lora", 20.0, "**LoRA lowers the test perplexity from 25.00 to 20.00 (-20.0 %) with 1.2 % of the weights.**"),
        ("lora", 30.0, "**LoRA raises the test perplexity from 25.00 to 30.00 (+20.0 %) with 1.2 % of the weights.**"),
        ("lora", 25.0, "**LoRA does not change the test perplexity from"),
        ("full", 20.0, "**Training all weights lowers the test perplexity from 25.00 to 20.00 (-20.0 %).**"),
    ],
)
def test_the_sentence_says_whether_tuning_helped(method, tuned, expected):
    settings = {"lora": None if method == "full" else {"r": 16}, "trainable_percent": 1.2}
    metrics = {"base": {"perplexity": 25.0}, "tuned": {"perplexity": tuned}}
    records = {"train": {"settings": settings}, "evaluate": {"trained_by": method, "base_bits": None}}
    assert report.headline(metrics, records).startswith(expected)


@pytest.mark.parametrize(("perplexity", "shown"), [(99.0, True), (2.5e6, False)])
def test_word_perplexities_are_shown_where_they_tell_something(perplexity, shown):
    values = dict.fromkeys(report.METRIC_ROWS, 1.0) | {"word_perplexity": perplexity}
    table = report.metrics_table({"base": values, "tuned": values, "change": dict.fromkeys(values, 0.0)})
    assert ("perplexity (of words)" in table) == ("word perplexity" in describe_metrics(values)) == shown


def test_the_report_shows_exactly_the_existing_pictures():
    shown = render(Path("metrics/report.md").read_text()).pictures
    assert all(Path("metrics", name).is_file() for name in shown)
    assert {Path(name).name for name in shown} == {file.name for file in Path("metrics/plots").iterdir()}
    assert len(shown) == 7


def test_the_report_shows_how_both_models_continue_test_articles():
    cells = render(Path("metrics/report.md").read_text()).cells
    header = cells.index("prompt")
    rows = [cells[start : start + 3] for start in range(header + 3, header + 12, 3)]
    text = Path("data/raw/test.txt").read_text()
    tokenizer = load_tokenizer(Path("data/base"))
    prompts = samples.choose_prompts(text, tokenizer, 32, [])
    generated = samples.generate_samples(AutoModelForCausalLM.from_pretrained("data/base"), prompts, 0)
    pieces = articles.split_articles(text)
    for (prompt, base_text, tuned_text), piece, ids in zip(
        rows, (pieces[0], pieces[2], pieces[-1]), generated, strict=True
    ):
        assert prompt
        assert "".join(piece.split()).startswith("".join(prompt.split()))
        assert "".join(base_text.split()) == "".join(tokenizer.decode(ids).split())
        assert base_text != tuned_text


def test_evaluating_again_gives_the_same_samples_and_plots():
    before = render(Path("metrics/report.md").read_text()).cells
    run_stage(evaluate.main, "--out", "again/eval.json", "--positions", "again/positions.csv")
    after = render(Path("again/report.md").read_text())
    start, end = before.index("prompt"), before.index("stage")
    assert after.cells[after.cells.index("prompt") : after.cells.index("stage")] == before[start:end]
    assert len(after.pictures) == 7
    pictures = ("plots/loss_by_position.png", "plots/accuracy_by_position.png", "plots/passage.png")
    for name in ("eval.json", "positions.csv", *pictures):
        assert Path("again", name).read_bytes() == Path("metrics", name).read_bytes()


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")) | st.sampled_from("|\\`*_[]<>&~$#\n!-+=")))
@example("a | b \\| c `d` **e** _f_ [g](h) <b>i</b> &amp; ~~j~~ $k$\n\n# l\n| --- |\n")
@example("![x](y) <!-- z --> &#42; http://example.com\n    code\n- list\n1. one\n===\n---")
def test_escaped_text_is_shown_literally(text):
    cells = render(report.markdown_table(["a", "b"], [[report.escape_markdown(text), "end"]])).cells
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
def test_durations_have_two_units_at_most(seconds, expected):
    assert report.format_duration(seconds) == expected


def test_metrics_of_a_broken_model_are_short():
    values = dict.fromkeys(report.METRIC_ROWS, 1e304)
    text = report.metrics_table({"base": values, "tuned": values, "change": dict.fromkeys(report.METRIC_ROWS, 0.0)})
    assert max(map(len, text.splitlines())) < 80


# environment.json


def test_environment_json_has_a_record_of_every_stage(evaluated):
    records = json.loads(Path("metrics/environment.json").read_text())
    assert tuple(records) == STAGES
    for stage in STAGES[:-1]:
        assert records[stage] == json.loads(Path(f"data/environment/{stage}.json").read_text())
    commit = tiny.run(evaluated, "git", "rev-parse", "HEAD").strip()
    for stage, record in records.items():
        assert 0 < record["seconds"] < 300
        assert (record["commit"], record["uncommitted_changes"]) == (commit, True)
        assert record["versions"]["torch"] == version("torch")
        assert record["cpu"]
        assert record["cores"] >= 1
        assert record["gpu"] is None or torch.cuda.is_available()
        assert record.get("precision") == ("float32" if stage in ("train", "evaluate") else None)
    assert records["train"]["threads"] == torch.get_num_threads()
    assert records["train"]["method"] == "qlora"
    assert records["base"]["preset"] == "local"


def test_missing_records_are_shown_as_not_recorded(evaluated, tmp_path, monkeypatch):
    for name in ("params.yaml", "data/raw", "data/base", "data/tokens", "data/adapter", "metrics/loss.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(evaluated / name)
    monkeypatch.chdir(tmp_path)
    run_stage(evaluate.main)
    records = json.loads(Path("metrics/environment.json").read_text())
    assert {stage: record is None for stage, record in records.items()} == {
        stage: stage != "evaluate" for stage in STAGES
    }
    text = Path("metrics/report.md").read_text()
    assert "| preset | not known |\n" in text
    assert text.count("not recorded") == 4
    assert "| commit | not known |\n" in text  # no repository
    assert "of the weights" not in text
