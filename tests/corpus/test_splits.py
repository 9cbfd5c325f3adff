"""Splits that are cut from train, and shares of a split: whole units, in order, none lost."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2lora.corpus import splits
from gpt2lora.dataset import documents

SHARES = {"validation": 0.1, "test": 0.2}


@given(st.integers(3, 60), st.floats(0.01, 0.98), st.floats(0.01, 0.98), st.none() | st.integers(0, 5))
def test_every_unit_has_a_split_and_no_split_is_empty(count, validation_share, test_share, seed):
    owners = splits.assign(count, {"validation": validation_share, "test": test_share}, seed)
    assert len(owners) == count
    assert set(owners) == {0, 1, 2}
    assert seed is not None or list(owners) == sorted(owners)


def test_one_missing_split_leaves_two():
    assert list(splits.assign(2, {"test": 0.9}, None)) == [0, 1]
    assert list(splits.assign(10, {"validation": 0.2}, None)) == [0] * 8 + [1] * 2


def test_numbers_are_drawn_alike_in_both_ways(monkeypatch):
    monkeypatch.setattr(splits, "PYTHON_SAMPLE", 10)
    for count, size in ((10, 4), (1000, 400), (1000, 1000)):
        drawn = [int(number) for number in splits.draw(count, size, 3)]
        assert drawn == [int(number) for number in splits.draw(count, size, 3)] != sorted(drawn)
        assert len(set(drawn)) == size and set(drawn) <= set(range(count))


def write_rows(folder: Path, count: int) -> list[str]:
    texts = [f"number {number}\u2028\n\n = x = \n" for number in range(count)]
    documents.write_documents(texts, folder / "train.jsonl")
    return texts


def test_documents_are_cut_from_train_whole(tmp_path):
    texts = write_rows(tmp_path, 20)
    found = splits.cut_splits(tmp_path, SHARES, 0, "corpus")
    parts = {split: documents.read_split(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    assert found == {"unit": "documents"} | {split: len(part) for split, part in parts.items()}
    assert found == {"unit": "documents", "train": 14, "validation": 2, "test": 4}
    assert sorted(text for part in parts.values() for text in part) == sorted(texts)
    assert all(part == sorted(part, key=texts.index) for part in parts.values())


def test_a_fraction_of_documents(tmp_path):
    texts = write_rows(tmp_path, 20)
    assert splits.keep_fraction(tmp_path / "train.jsonl", 0.25, 0) == {"unit": "documents", "kept": 5, "of": 20}
    kept = documents.read_split(tmp_path / "train.jsonl")
    assert kept == [text for text in texts if text in kept]


@pytest.mark.parametrize(
    ("text", "unit", "count"),
    [
        ("\n = A = \n\n a\n\n = B = \n\n b\n", "articles", 2),
        ("\n\none\nline\n \n\ntwo\n", "paragraphs", 2),
        ("one\ntwo\nthree", "lines", 3),
        ("one", "lines", 1),
    ],
)
def test_a_text_is_divided_into_articles_paragraphs_or_lines(tmp_path, text, unit, count):
    (tmp_path / "a.txt").write_text(text)
    found, mark, number = splits.find_units(tmp_path / "a.txt", 2, ("documents",), ("articles", "paragraphs", "lines"))
    assert (found, number) == (unit, count)
    assert "".join(piece for _, piece in mark(tmp_path / "a.txt")) == text


def test_a_line_of_documents_is_json_with_any_character(tmp_path):
    texts = ["a\nb", "\u2028\x85\x0c\r\n", '"quoted" \\ é 😀', "\0"]
    documents.write_documents(texts, tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes().count(b"\n") == len(texts)
    assert documents.read_split(tmp_path / "a.jsonl") == texts
    assert json.loads((tmp_path / "a.jsonl").read_bytes().split(b"\n")[0]) == {"text": "a\nb"}
