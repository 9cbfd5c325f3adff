"""Evaluation protocols: the tokens that each scores, and the words and bytes that it counts."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny import END
from training_runs import run_stage
from wikitext import GPT2_TOKENIZER, WIKITEXT2_RAW, needs_raw, needs_tokenizer

from gpt2lora.dataset import articles, blocks
from gpt2lora.dataset.tokenizer import load_tokenizer
from gpt2lora.evaluation import protocols
from stages import tokenize

TEXT = " \n = One = \n \n Jane 's dog ran @-@ fast , far . \n \n = = Deep = = \n \n More . \n = Two = \n \n End . \n"
# Its two pages, detokenized.
PAGE_ONE = " = One =\n\nJane's dog ran-fast, far.\n\n== Deep ==\n\nMore. "
PAGE_TWO = " = Two =\n\nEnd.\n"


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def end(tokenizer) -> int:
    return tokenizer.token_to_id(END)


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


# hf


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n", [""]),
        (" \n = A = \n \n b \n", ["", " = A = \n", "", " b \n"]),
        ("a\n\nb", ["a\n", "", "b"]),
        ("a\n  ", ["a\n", ""]),
        ("a\u2028b\x0c\n", ["a\u2028b\x0c\n"]),
    ],
)
def test_hub_rows_are_the_lines_of_a_text_with_blank_ones_empty(text, expected):
    assert protocols.hub_rows(text) == expected


def test_hf_scores_the_rows_joined_by_two_newlines(tokenizer):
    task = protocols.hf_task(" \n = A = \n \n bé c \n", tokenizer, 64, 64)
    assert task.windows.ids.tolist() == encode(tokenizer, "\n\n = A = \n\n\n\n\n bé c \n")
    assert (task.words, task.bytes) == (5, len(" \n = A = \n \n bé c \n".encode()))


def test_hf_windows_start_a_stride_apart(tokenizer):
    task = protocols.hf_task(TEXT * 5, tokenizer, 16, 4)
    assert set(np.diff(task.windows.starts)) == {4}
    assert task.windows.counts.tolist()[:-1] == [16] + [4] * (len(task.windows) - 2)


@needs_raw
@needs_tokenizer
@pytest.mark.parametrize(("stride", "windows"), [(1024, 281), (512, 561)])
def test_hf_counts_on_the_real_test_split(tmp_path, stride, windows):
    task = protocols.hf_task(real_text(), real_tokenizer(tmp_path), 1024, stride)
    assert len(task.windows.ids) == 287_644
    assert task.windows.counts.sum() == 287_643
    assert (task.words, task.bytes, len(task.windows)) == (241_211, 1_290_590, windows)


def real_text() -> str:
    return (Path(WIKITEXT2_RAW) / "test.txt").read_bytes().decode()


def real_tokenizer(folder: Path):
    """Return GPT-2's tokenizer; its tokenizer.json is written into `folder`."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(GPT2_TOKENIZER).save_pretrained(folder)
    return load_tokenizer(folder)


# lm-eval


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [""]),
        ("no title", ["no title"]),
        (" \n = A = \n \n x \n", [" = A = \n \n x \n"]),
        ("x\n = A = \n y\n = B = ", ["x", " = A = \n y", " = B = "]),
        (" = A = \n = = deep = = \n = = = deeper = = = \n", [" = A = \n = = deep = = \n = = = deeper = = = \n"]),
        (" = A = \n = B = \n", [" = A = ", " = B = \n"]),
        # A formula on a line of its own counts as a title, even without blank lines around it.
        (" = A = \n x \n = n + 1 = \n y\n", [" = A = \n x ", " = n + 1 = \n y\n"]),
    ],
)
def test_pages_begin_at_lines_that_look_like_a_title(text, expected):
    assert protocols.split_pages(text) == expected


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("a guest @-@ starring role , in 1 @,@ 000 or 2 @.@ 5 .", "a guest-starring role, in 1,000 or 2.5 ."),
        ("one : two ; three . four ! five ? six", "one: two; three. four! five? six"),
        ("( in brackets ) [ square ] { curly }", "(in brackets) [square] {curly}"),
        ('" Teddy \'s Story " of', '"Teddy\'s Story" of'),
        ("the kings ' men", "the kings' men"),
        ("' quoted '", "'quoted'"),
        (" = = = Deep = = = \n \n text \n", " === Deep ===\n\ntext\n"),
        ("5 ° 3 N of", "5°3 1 of"),
        ("it 's", "it's"),
    ],
)
def test_pages_are_detokenized_by_the_rules_of_lm_eval(page, expected):
    assert protocols.detokenize(page) == expected


def test_lm_eval_scores_detokenized_text_and_counts_the_original(tokenizer, end):
    task = protocols.lm_eval_task(TEXT, tokenizer, end, 64)
    one, two = (encode(tokenizer, page) for page in (PAGE_ONE, PAGE_TWO))
    assert task.windows.ids.tolist() == [end, *one, end, *two]
    assert task.windows.targets.tolist() == [*one, *two]
    # The harness splits at white space, which gives an empty word before and after each page.
    assert task.words == (19 + 2) + (5 + 2)
    assert task.bytes == len(TEXT.encode()) - len(" \n") - len("\n")


@pytest.mark.parametrize(("text", "tokens", "words"), [("", 0, 1), ("x", 1, 1), (" \n", 1, 2), (" \n = x = \n", 5, 5)])
def test_lm_eval_predicts_the_first_token_from_end_of_text(tokenizer, end, text, tokens, words):
    task = protocols.lm_eval_task(text, tokenizer, end, 64)
    assert (task.windows.counts.sum(), task.words) == (tokens, words)
    assert (task.windows.ids[task.windows.starts] == end).all()


@needs_raw
def test_lm_eval_counts_agree_with_published_perplexities(tokenizer, end):
    text = real_text()
    assert len(protocols.split_pages(text)) == 62
    assert len(articles.split_articles(text)) == 60
    task = protocols.lm_eval_task(text, tokenizer, end, 64)
    # GPT-2's word perplexity 37.3698 and byte perplexity 1.9682 (github.com/workofart/ml-by-hand/releases) come from
    # the same sum, divided by the number of words and by the number of bytes.
    assert task.words * math.log(37.3698) == pytest.approx(task.bytes * math.log(1.9682), rel=5e-5)


# native


def tokenize_text(tmp_path, tiny_model, text: str, layout: str, block_size: int) -> blocks.Blocks:
    """Run the stage tokenize on a text; return its rows."""
    (tmp_path / "raw").mkdir()
    for split in blocks.SPLITS:
        (tmp_path / f"raw/{split}.txt").write_bytes(text.encode())
    shutil.copyfile(tiny.ROOT / "params.yaml", tmp_path / "params.yaml")
    for key, value in {"block_size": block_size, "layout": layout}.items():
        tiny.set_param(tmp_path, f"tokenize.{key}", value)
    run_stage(tokenize.main, "--raw", "raw", "--base", tiny_model, "--out", "tokens")
    return blocks.load_blocks(tmp_path / "tokens", "test", ())


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_native_scores_the_packed_stream_with_end_of_text(tmp_path, monkeypatch, tiny_model, tokenizer, end, stride):
    monkeypatch.chdir(tmp_path)
    text = TEXT.replace("More . \n", "More . \n \n")
    test = tokenize_text(tmp_path, tiny_model, text, "packed", 16)
    task = protocols.packed_task(test, text, stride, ())
    first, second = (encode(tokenizer, article) for article in articles.split_articles(text))
    assert task.windows.ids.tolist() == [*first, end, *second]
    assert task.windows.targets.tolist() == [*first, end, *second][1:]
    assert (task.words, task.bytes) == (24, len(text.encode()))


def test_native_counts_only_the_text_that_a_padded_row_holds(tmp_path, monkeypatch, tiny_model, tokenizer, end):
    monkeypatch.chdir(tmp_path)
    long, short = "zqx jwv éé kpf " * 5, "a b"
    test = tokenize_text(tmp_path, tiny_model, f"{short}\n\n{long}\n", "padded", 16)
    task = protocols.padded_task(test, f"{short}\n\n{long}\n", tokenizer, (), end)
    kept = tokenizer.decode(encode(tokenizer, long)[:17])
    assert long.startswith(kept.rstrip("\ufffd"))
    # The first token is predicted from the end-of-text token: its word and bytes count, so it has to be scored.
    assert task.windows.targets.tolist() == [*encode(tokenizer, short), end, *encode(tokenizer, long)[:17]]
    assert (task.windows.ids[task.windows.starts[:2]] == end).all()
    assert task.words == 2 + len(kept.split()) < 2 + len(long.split())
    assert task.bytes == len(short.encode()) + len(kept.encode())
