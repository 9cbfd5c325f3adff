"""Tables: every kind gives the same documents, and what cannot be read is one line."""

import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from local_preset import write_params

from gpt2lora.corpus import user_files
from gpt2lora.corpus.tables import read_tables
from gpt2lora.dataset import documents
from gpt2lora.pipeline.cli import StageError

# Words and numbers that readers of tables turn into something else, and characters that end lines somewhere.
TEXTS = ["NA", "null", "123", "True", "2024-01-01", '"a", b', "one\r\ntwo\n\n = x = \n", "\u2028 é 😀 \t|", None, " "]
EXPECTED = [text.replace("\r\n", "\n") for text in TEXTS[:-2]]


def write_csv(file: Path, delimiter: str = ",") -> None:
    with file.open("w", newline="") as out:
        table = csv.writer(out, delimiter=delimiter)
        table.writerow(["id", "text"])
        table.writerows([number, text] for number, text in enumerate(TEXTS))


ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
WRITERS = {
    "jsonl": lambda file: file.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    "json": lambda file: file.write_text(json.dumps(ROWS, indent=1)),
    "csv": write_csv,
    "tsv": lambda file: write_csv(file, "\t"),
    "parquet": lambda file: pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), file, row_group_size=3),
}


def read_all(source: Path, folder: Path, column: str = "text") -> dict[str, list[str]]:
    folder.mkdir()
    user_files.write_splits(source, column, None, folder)
    return {path.stem: documents.read_split(path) for path in folder.iterdir()}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_kind_of_table_gives_its_texts_as_documents(tmp_path, suffix, compressed):
    file = tmp_path / f"a [1].{suffix}"
    WRITERS[suffix](file)
    if compressed and suffix != "parquet":
        file, plain = tmp_path / f"a.{suffix.upper()}.gz", file
        file.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_all(file, tmp_path / "out") == {"train": EXPECTED}


def test_what_was_left_out_and_normalized_is_counted(tmp_path):
    WRITERS["csv"](tmp_path / "a.csv")
    changes, unused = user_files.write_splits(tmp_path / "a.csv", "text", None, tmp_path)
    assert (changes, unused) == ({"train": {"blank_documents": 2, "line_ends": 1}}, [])


def test_a_folder_of_tables_has_splits_by_name_and_shards(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "dev"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    (tmp_path / "notes.csv").write_text("ignored")
    assert read_all(tmp_path, tmp_path / "out") == {
        "train": ["train-00000-of-00002", "train-00001-of-00002"],
        "validation": ["dev"],
    }


@pytest.mark.parametrize("named", [True, False])
def test_a_folder_of_save_to_disk_is_read(tmp_path, named):
    table = datasets.Dataset.from_dict({"body": TEXTS})
    saved = datasets.DatasetDict(train=table, valid=table, other=table) if named else table
    saved.save_to_disk(tmp_path / "saved")
    expected = {"train": EXPECTED, "validation": EXPECTED} if named else {"train": EXPECTED}
    assert read_all(tmp_path / "saved", tmp_path / "out", "body") == expected


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("a.jsonl", b'{"content": "a", "id": 1}', "no column 'text', only content, id: set text_column"),
        ("a.csv", b"1,hello\n2,you\n", "no column 'text', only 1, hello: set text_column"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "not readable as JSON: line 2: Expecting ','"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 1}\n', "line 2: expected a string in column 'text', not int"),
        ("a.jsonl", b'{"text": ["a"]}', "line 1: expected a string in column 'text', not list"),
        ("a.json", b'{"data": [{"text": "a"}]}', "no column 'text', only data"),
        ("a.csv", b'text,id\na,1\nb,2,3\n', "not readable as CSV: line 3: expected 2 fields, as the header has, not 3"),
        ("a.csv", "text\nnaïve\n".encode("latin-1"), "not UTF-8 at byte 7: .*; convert the file to UTF-8"),
        ("a.jsonl", b"\n \n", "no column 'text', only : set text_column"),
        ("a.jsonl", b"", "is empty: expected rows with a column 'text'"),
        ("a.csv", b"text,id,text\na,1,b\n", "2 columns 'text': expected one of this name"),
        ("a.jsonl", gzip.compress(b'{"text": "a"}', mtime=0), "holds gzip data, not a text: decompress it"),
        ("a.parquet", b"no table", "not readable as PARQUET: "),
        ("a.parquet.gz", b"x", "Parquet is compressed inside: expected the file without .gz"),
        ("a.jsonl.gz", b"x", "damaged: Not a gzipped file"),
        ("a.csv", b"text\nHello, world\n", "not readable as CSV: line 2: expected 1 fields, as the header has, not 2"),
        ("a.csv", b"text,id\na,1,\nb,2,\n", "not readable as CSV: line 2: expected 2 fields, as the header has, not 3"),
        ("a.tsv", b'text\n"Hello\nyou\n"Hello\n', "not readable as TSV: line 4: .* expected after"),
        ("a.csv", b'text\n"Hello\nyou\n', "not readable as CSV: line 3: unexpected end of data"),
        ("a.jsonl", "text\n".encode("utf-16-le"), "holds NUL characters, as texts in UTF-16 do"),
        ("a.jsonl", b'{"text": "\\ud83d"}', "line 1: column 'text' is not Unicode: surrogates not allowed"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b", "text": "c"}\n', "line 2: the key 'text' stands there twice"),
        ("a.json", b'[{"text": "b", "text": null}]', "row 1: the key 'text' stands there twice"),
        ("a.jsonl", b'["a"]\n["b"]', "not readable as JSON: Extra data"),
        ("a.jsonl", b'"a"\n', "line 1: expected an object with a key 'text', not str"),
        ("a.json", b"[1]", "row 1: expected an object with a key 'text', not int"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_read_is_one_line(tmp_path, name, data, line):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(StageError, match=f"{name}: {line}"):
        list(read_tables([tmp_path / name], "text"))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_table_without_a_named_column_has_its_columns_named(tmp_path, tiny_corpus, monkeypatch, suffix):
    monkeypatch.chdir(write_params(tmp_path, tiny_corpus))
    WRITERS[suffix](tmp_path / f"a.{suffix}")
    line = f"presets.local.text_column: expected one of the columns of a.{suffix}: .*text.*, not null"
    with pytest.raises(StageError, match=line):
        list(read_tables([Path(f"a.{suffix}")], None))


def test_other_columns_and_what_a_text_looks_like_change_nothing(tmp_path):
    rows = [{"text": "2020-01-01", "meta": 1}, {"meta": "s", "text": None}, {"text": "1e5", "late": [{"x": 1}]}, {}]
    lines = "\ufeff\r\n" + "".join(json.dumps(row) + "\r\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines, newline="")
    assert list(read_tables([tmp_path / "a.jsonl"], "text")) == ["2020-01-01", None, "1e5", None]
    (tmp_path / "a.csv").write_text("\ufefftext,id\r2020-01-01,1\r\r1e5,\r", newline="")
    assert list(read_tables([tmp_path / "a.csv"], "text")) == ["2020-01-01", "1e5"]


def test_a_damaged_folder_of_save_to_disk_is_named(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(StageError, match="damaged: expected a folder written by save_to_disk"):
        read_all(tmp_path, tmp_path / "out")


def test_rows_of_the_hub_are_documents_unless_they_are_lines_of_wikitext(tmp_path):
    lines = ["", " = River = \n", "", " The river \n"]
    assert user_files.are_lines(lines)
    assert not user_files.are_lines(["one \n", "two \n"])
    assert not user_files.are_lines(["\n = A = \n\n text \n", "\n = B = \n\n text \n"])
    user_files.write_hub_rows({"train": lines, "test": lines}, tmp_path)
    assert documents.read_split(tmp_path / "test.txt") == " \n = River = \n \n The river \n"
    user_files.write_hub_rows({"train": ["a\r\nb", ""]}, tmp_path)
    assert documents.read_split(tmp_path / "train.jsonl") == ["a\r\nb"]


def test_repeated_keys_of_other_columns_change_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "id": 2, "text": "a", "more": {"text": 1, "text": 2}}')
    assert list(read_tables([tmp_path / "a.jsonl"], "text")) == ["a"]
