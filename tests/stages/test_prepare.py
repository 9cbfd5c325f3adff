"""The stage prepare: how a corpus is split, and how much of it is kept; on the real WikiText-2 where it is at hand."""

import hashlib
import json
from pathlib import Path

import pytest
import tiny
from local_preset import make_article, write_params
from training_runs import run_stage
from wikitext import ARTICLES, DIGESTS, WIKITEXT2, needs_wikitext2

from gpt2lora.dataset import articles, blocks
from stages import prepare


@pytest.fixture
def folder(tmp_path, tiny_corpus, monkeypatch) -> Path:
    """A working directory with params.yaml, whose preset `local` has the tiny corpus."""
    monkeypatch.chdir(tmp_path)
    return write_params(tmp_path, tiny_corpus)


# A corpus in one file


def run_prepare(folder: Path, **settings) -> dict[str, str]:
    """Run prepare with some values of params.yaml; return the text of each split."""
    for key, value in settings.items():
        tiny.set_param(folder, key.replace("__", "."), value)
    run_stage(prepare.main, "--out", "raw")
    return {split: (folder / f"raw/{split}.txt").read_bytes().decode() for split in blocks.SPLITS}


def split_file(folder: Path, text: str, **settings) -> dict[str, str]:
    """Run prepare on a single file."""
    (folder / "corpus.txt").write_bytes(text.encode())
    return run_prepare(folder, presets__local__dataset="corpus.txt", **settings)


def test_a_single_file_is_split_by_articles_in_the_given_shares(folder):
    pieces = [make_article(number) for number in range(40)]
    written = split_file(folder, "".join(pieces), prepare__test_share=0.2)
    parts = {split: articles.split_articles(text) for split, text in written.items()}
    assert {split: len(part) for split, part in parts.items()} == {"train": 28, "validation": 4, "test": 8}
    # The blank line before a title belongs to the article before it. So the articles are compared without blank lines.
    titles = [piece.strip() for part in parts.values() for piece in part]
    assert sorted(titles) == sorted(piece.strip() for piece in pieces)
    assert all(part == sorted(part, key=lambda piece: int(piece.split()[2])) for part in parts.values())


def test_the_seed_determines_the_splits(folder):
    text = "".join(map(make_article, range(40)))
    assert split_file(folder, text, seed=1) == split_file(folder, text, seed=1)
    assert split_file(folder, text, seed=1) != split_file(folder, text, seed=2)


def test_a_file_without_articles_is_split_by_lines_in_order(folder):
    text = "".join(f"line {number}\n" for number in range(20))
    written = split_file(folder, text)
    assert "".join(written.values()) == text
    assert written["test"] == "line 18\nline 19\n"


def test_line_ends_of_windows_give_the_same_splits(folder):
    text = "".join(map(make_article, range(20)))
    expected = split_file(folder, text)
    assert split_file(folder, text.replace("\n", "\r\n")) == expected
    changes = json.loads(Path("raw/manifest.json").read_text())["changes"]
    assert changes == {"train": {"line_ends": text.count("\n")}}
    assert split_file(folder, "\ufeff" + text.replace("\n", "\r")) == expected


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 10), (0.25, 5), (0.001, 1)])
def test_a_fraction_keeps_complete_articles_in_their_order(folder, fraction, count):
    (folder / "corpus").mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"corpus/{split}.txt").write_text("".join(map(make_article, range(20))))
    pieces = articles.split_articles("".join(map(make_article, range(20))))
    for text in run_prepare(folder, presets__local__dataset="corpus", prepare__fraction=fraction).values():
        kept = [piece for piece in pieces if piece in text]
        assert len(kept) == count
        assert "".join(kept) == text
    facts = json.loads(Path("raw/manifest.json").read_text())["fraction"]["test"]
    assert facts == {"unit": "articles", "kept": count, "of": 20}


def test_a_fraction_of_a_plain_text_keeps_paragraphs(folder):
    (folder / "corpus").mkdir()
    paragraphs = [f"Paragraph {number}\ngoes on.\n\n" for number in range(20)]
    for split in ("train", "valid", "test"):
        (folder / f"corpus/{split}.txt").write_text("".join(paragraphs))
    for text in run_prepare(folder, presets__local__dataset="corpus", prepare__fraction=0.1).values():
        assert "".join(each for each in paragraphs if each in text) == text
        assert text.count("Paragraph") == 2


# A corpus in a folder


@pytest.mark.parametrize("name", ["valid", "validation", "dev"])
def test_the_validation_split_may_have_any_usual_name(folder, name):
    corpus = folder / "corpus"
    corpus.mkdir()
    for split in ("train", name, "test"):
        (corpus / f"{split}.txt").write_bytes(f"{split}\n \n".encode())
    tiny.set_param(folder, "presets.local.dataset", "corpus")
    run_stage(prepare.main, "--out", "raw")
    written = {file.name: file.read_bytes() for file in Path("raw").glob("*.txt")}
    assert written == {
        "train.txt": b"train\n \n",
        "validation.txt": f"{name}\n \n".encode(),
        "test.txt": b"test\n \n",
    }


@needs_wikitext2
def test_prepare_writes_wikitext2_byte_for_byte(folder):
    tiny.set_param(folder, "presets.local.dataset", WIKITEXT2)
    run_stage(prepare.main, "--out", "raw")
    written = {split: (folder / "raw" / f"{split}.txt").read_bytes() for split in blocks.SPLITS}
    assert {split: hashlib.sha256(data).hexdigest() for split, data in written.items()} == DIGESTS
    assert {split: len(articles.split_articles(data.decode())) for split, data in written.items()} == ARTICLES
