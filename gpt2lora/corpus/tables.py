"""Tables with a column of texts, read by `datasets` in pieces: JSON, CSV, TSV, Parquet, folders of save_to_disk."""

import glob
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2lora.corpus.text_files import COMPRESSED, require_zstandard
from gpt2lora.pipeline.cli import StageError
from gpt2lora.sources.hub import ENVIRONMENT

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# By suffix: the builder of `datasets`.
BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
SAVED = ("dataset_dict.json", "state.json")  # files of folders that save_to_disk wrote: of splits, of one dataset
BATCH_ROWS = 1000


def table_suffix(path: Path) -> str | None:
    """Return the suffix of a table, such as ".csv" for x.csv.gz; None for a file that is no table."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in BUILDERS else None


def read_tables(files: list[Path], column: str) -> Iterator[str | None]:
    """Yield the column of each row of some tables of one kind."""
    for path in files:
        if path.suffix.lower() == ".zst":
            require_zstandard(path)
        if path.suffix.lower() in COMPRESSED and table_suffix(path) == ".parquet":
            raise StageError(f"{path}: Parquet is compressed inside: expected the file without {path.suffix}")
        if path.stat().st_size == 0:
            raise StageError(f"{path}: is empty: expected rows with a column {column!r}")
    suffix = table_suffix(files[0])
    # pandas would read the words NA, null and None as missing, and numbers as numbers.
    options = {
        "json": {"on_mixed_types": None, "parse_agent_traces": False},
        "csv": {"sep": "\t" if suffix == ".tsv" else ",", "converters": {column: str}, "na_filter": False},
        "parquet": {"batch_size": BATCH_ROWS},
    }[BUILDERS[suffix]]
    name = str(files[0]) if len(files) == 1 else f"{files[0].parent}/{files[0].name} and others"
    try:
        datasets = import_datasets()
        paths = [glob.escape(os.path.abspath(path)) for path in files]
        table = datasets.load_dataset(BUILDERS[suffix], data_files=paths, split="train", streaming=True, **options)
        yield from read_column(table, column, name)
    except StageError:
        raise
    except Exception as error:  # pandas, pyarrow and datasets raise many types
        if getattr(error, "errno", None):
            raise
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        advice = "; convert the file to UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise StageError(f"{name}: not readable as {suffix[1:].upper()}: {reason[:300]}{advice}") from error


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
    number = 0
    for batch in table.with_format("arrow").iter(batch_size=BATCH_ROWS):
        if column not in batch.column_names:
            names = ", ".join(batch.column_names)
            raise StageError(
                f"{name}: no column {column!r}, only {names[:300]}: set text_column, beside dataset in params.yaml"
            )
        for text in batch[column].to_pylist():
            number += 1
            if text is not None and not isinstance(text, str):
                kind = type(text).__name__
                raise StageError(f"{name}: row {number:,}: expected a string in column {column!r}, not {kind}")
            yield text


def import_datasets():
    """Import the package `datasets`, which logs errors that are reported here in one line."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.config.TORCH_AVAILABLE = False  # or it imports torch, which takes seconds and 180 MB, and is of no use
    return datasets
