"""Tables with a column of texts, read row by row: JSON, CSV, TSV, Parquet, folders of save_to_disk.

Only the column is read, and only as text: what other columns hold, and what a text looks like, changes nothing.
"""

import csv
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2lora.corpus.text_files import COMPRESSED, read_lines
from gpt2lora.pipeline import params
from gpt2lora.pipeline.cli import StageError
from gpt2lora.sources.hub import ENVIRONMENT

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
SAVED = ("dataset_dict.json", "state.json")  # files of folders that save_to_disk wrote: of splits, of one dataset
BATCH_ROWS = 1000
REPEATED = object()  # in the place of the values of a key that a JSON object has twice


def table_suffix(path: Path) -> str | None:
    """Return the suffix of a table, such as ".csv" for x.csv.gz; None for a file that is no table."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def read_tables(files: list[Path], column: str) -> Iterator[str | None]:
    """Yield the column of each row of some tables of one kind."""
    readers = {".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet}
    for path in files:
        if path.suffix.lower() in COMPRESSED and table_suffix(path) == ".parquet":
            raise StageError(f"{path}: Parquet is compressed inside: expected the file without {path.suffix}")
        if path.stat().st_size == 0:
            raise StageError(f"{path}: is empty: expected rows with a column {column!r}")
        yield from readers.get(table_suffix(path), read_json_rows)(path, column)


def read_csv(path: Path, column: str) -> Iterator[str]:
    """Yield the column of each row of a CSV or TSV file, as the text that it is: NA, null and 1 are texts.

    Readers that guess, such as pandas, take a row with more fields than the header for one with an index.
    """
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(read_lines(path), delimiter="\t" if table_suffix(path) == ".tsv" else ",", strict=True)
    try:
        header = next(rows, [])
        check_column(column, header, path)
        index = header.index(column)
        for row in rows:
            if row and len(row) != len(header):
                raise csv.Error(f"expected {len(header)} fields, as the header has, not {len(row)}")
            if row:
                yield row[index]
    except csv.Error as error:
        kind = table_suffix(path)[1:].upper()
        raise StageError(f"{path}: not readable as {kind}: line {rows.line_num:,}: {error}") from error


def read_json_rows(path: Path, column: str) -> Iterator[str | None]:
    """Yield the column of each row of a JSON file: an object a line, or an array of objects."""
    names: dict[str, None] = {}  # of the columns so far
    for place, row in parse_rows(path):
        if not isinstance(row, dict):
            raise StageError(f"{path}: {place}: expected an object with a key {column!r}, not {type(row).__name__}")
        if column not in names:
            names |= dict.fromkeys(row)
        if row.get(column) is REPEATED:
            raise StageError(f"{path}: {place}: the key {column!r} stands there twice: expected it once")
        yield check_text(row.get(column), f"{path}: {place}", column)
    check_column(column, list(names), path)


def parse_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yield where each row of a JSON file stands, and its value."""
    lines = ((number, line) for number, line in enumerate(read_lines(path), start=1) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        try:
            array = json.loads(first[1] + "".join(line for _, line in lines), object_pairs_hook=mark_repeated)
        except ValueError as error:
            raise StageError(f"{path}: not readable as JSON: {error}") from error
        yield from ((f"row {number:,}", row) for number, row in enumerate(array, start=1))
        return
    for number, line in itertools.chain([first], lines):
        try:
            yield f"line {number:,}", json.loads(line, object_pairs_hook=mark_repeated)
        except ValueError as error:
            raise StageError(f"{path}: not readable as JSON: line {number:,}: {error}") from error


def mark_repeated(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return a JSON object as a dictionary: Python alone would silently keep the last value of a repeated key."""
    row = dict(pairs)
    if len(row) < len(pairs):
        row |= {key: REPEATED for key, count in Counter(key for key, _ in pairs).items() if count > 1}
    return row


def read_parquet(path: Path, column: str) -> Iterator[str | None]:
    """Yield the column of each row of a Parquet file."""
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            check_column(column, table.schema_arrow.names, path)
            batches = table.iter_batches(BATCH_ROWS, columns=[column])
            yield from check_texts((text for batch in batches for text in batch[column].to_pylist()), path, column)
    except StageError:
        raise
    except Exception as error:  # pyarrow raises many types
        if getattr(error, "errno", None):
            raise
        raise StageError(f"{path}: not readable as PARQUET: {' '.join(str(error).split())[:300]}") from error


def read_saved(folder: Path) -> "dict[str, Dataset]":
    """Return the splits of a folder that save_to_disk wrote; a dataset without splits is `train`."""
    try:
        saved = import_datasets().load_from_disk(str(folder))
    except Exception as error:
        raise StageError(f"{folder}: damaged: expected a folder written by save_to_disk: {error}") from error
    return dict(saved) if hasattr(saved, "keys") else {"train": saved}


def read_column(table: "Dataset | IterableDataset", column: str, name: str) -> Iterator[str | None]:
    """Yield the column of each row, None where it has no text.

    Args:
        name: of the table, for error messages.
    """

    def texts() -> Iterator:
        for batch in table.with_format("arrow").iter(batch_size=BATCH_ROWS):
            check_column(column, batch.column_names, name)
            yield from batch[column].to_pylist()

    yield from check_texts(texts(), name, column)


def check_column(column: str | None, names: list[str], table: Path | str) -> None:
    """Refuse a table without the column, or with two of this name."""
    if column is None:
        raise params.null_column(names, table)
    if names.count(column) > 1:
        raise StageError(f"{table}: {names.count(column)} columns {column!r}: expected one of this name")
    if column not in names:
        known = ", ".join(names)[:300]
        raise StageError(f"{table}: no column {column!r}, only {known}: set text_column, beside dataset in params.yaml")


def check_texts(texts: Iterable, table: Path | str, column: str) -> Iterator[str | None]:
    """Yield the texts of the rows; refuse values that are none."""
    for number, text in enumerate(texts, start=1):
        yield check_text(text, f"{table}: row {number:,}", column)


def check_text(text: object, place: str, column: str) -> str | None:
    """Return the text of a row, or None; refuse a value that is none, and half of a surrogate pair."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise StageError(f"{place}: expected a string in column {column!r}, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StageError(f"{place}: column {column!r} is not Unicode: {error.reason}") from error
    return text


def import_datasets():
    """Import the package `datasets`, which logs errors that are reported here in one line."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.config.TORCH_AVAILABLE = False  # or it imports torch, which takes seconds and 180 MB, and is of no use
    return datasets
