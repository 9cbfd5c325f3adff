"""The stage prepare: how a corpus is split, and how much of it is kept; on the real WikiText-2 where it is at hand."""

import hashlib
from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from local_preset import make_article, write_params
from training_runs import run_stage
from wikitext import ARTICLES, DIGESTS, WIKITEXT2, needs_wikitext2

from gpt2lora.dataset import articles, blocks
from gpt2lora.pipeline.cli import StageError
from stages import prepare


@pytest.fixture
def folder(tmp_path, tiny_corpus, monkeypatch) -> Path:
    """A working directory with params.yaml, whose preset `local` has the tiny corpus."""
    monkeypatch.chdir(tmp_path)
    return write_params(tmp_path, tiny_corpus)


# A corpus in one file


@given(st.integers(3, 60), st.floats(0.01, 0.98), st.floats(0.01, 0.98))
def test_a_partition_has_three_nonempty_parts_that_make_the_list(count, validation_share, test_share):
    parts = prepare.partition(list(range(count)), validation_share, test_share)
    assert list(parts) == ["train", "validation", "test"]
    assert all(parts.values())
    assert [item for part in parts.values() for item in part] == list(range(count))


def test_a_single_file_is_split_by_articles_in_the_given_shares(tmp_path):
    pieces = [make_article(number) for number in range(40)]
    (tmp_path / "corpus.txt").write_text("".join(pieces))
    splits = prepare.split_text(tmp_path / "corpus.txt", 0.1, 0.2, seed=0)
    parts = {split: articles.split_articles(text) for split, text in splits.items()}
    assert {split: len(part) for split, part in parts.items()} == {"train": 28, "validation": 4, "test": 8}
    # The blank line before a title belongs to the article before it. So the articles are compared without blank lines.
    titles = [piece.strip() for part in parts.values() for piece in part]
    assert sorted(titles) == sorted(piece.strip() for piece in pieces)
    assert all(part == sorted(part, key=lambda piece: int(piece.split()[2])) for part in parts.values())


def test_the_seed_determines_the_splits(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text("".join(map(make_article, range(40))))
    assert prepare.split_text(file, 0.1, 0.1, seed=1) == prepare.split_text(file, 0.1, 0.1, seed=1)
    assert prepare.split_text(file, 0.1, 0.1, seed=1) != prepare.split_text(file, 0.1, 0.1, seed=2)


def test_a_file_without_articles_is_split_by_lines_in_order(tmp_path):
    text = "".join(f"line {number}\r\n" for number in range(20))
    (tmp_path / "corpus.txt").write_bytes(text.encode())
    splits = prepare.split_text(tmp_path / "corpus.txt", 0.1, 0.1, seed=0)
    assert "".join(splits[split] for split in ("train", "validation", "test")) == text
    assert splits["test"] == "line 18\r\nline 19\r\n"


def test_a_text_too_short_to_split_is_refused(tmp_path):
    (tmp_path / "corpus.txt").write_text("one\ntwo\n")
    with pytest.raises(StageError, match="2 lines: expected at least three"):
        prepare.split_text(tmp_path / "corpus.txt", 0.1, 0.1, seed=0)


# A fraction of a corpus


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 10), (0.25, 5), (0.001, 1)])
def test_a_fraction_keeps_complete_articles_in_their_order(fraction, count):
    pieces = articles.split_articles("".join(map(make_article, range(20))))
    kept = prepare.take_fraction("".join(pieces), fraction, seed=0)
    kept_pieces = [piece for piece in pieces if piece in kept]
    assert len(kept_pieces) == count
    assert "".join(kept_pieces) == kept
    assert prepare.take_fraction("".join(pieces), fraction, seed=0) == kept


def test_a_fraction_of_one_keeps_every_byte():
    text = "\n\n = A = \n no article \n"
    assert prepare.take_fraction(text, 1.0, seed=0) == text


# A corpus in a folder


@pytest.mark.parametrize("name", ["valid", "validation", "dev"])
def test_the_validation_split_may_have_any_usual_name(folder, name):
    corpus = folder / "corpus"
    corpus.mkdir()
    for split in ("train", name, "test"):
        (corpus / f"{split}.txt").write_bytes(f"{split}\r\n \n".encode())
    tiny.set_param(folder, "presets.local.dataset", "corpus")
    run_stage(prepare.main, "--out", "raw")
    written = {file.name: file.read_bytes() for file in Path("raw").glob("*.txt")}
    assert written == {
        "train.txt": b"train\r\n \n",
        "validation.txt": f"{name}\r\n \n".encode(),
        "test.txt": b"test\r\n \n",
    }


@needs_wikitext2
def test_prepare_writes_wikitext2_byte_for_byte(folder):
    tiny.set_param(folder, "presets.local.dataset", WIKITEXT2)
    run_stage(prepare.main, "--out", "raw")
    written = {split: (folder / "raw" / f"{split}.txt").read_bytes() for split in blocks.SPLITS}
    assert {split: hashlib.sha256(data).hexdigest() for split, data in written.items()} == DIGESTS
    assert {split: len(articles.split_articles(data.decode())) for split, data in written.items()} == ARTICLES
