"""A split in data/raw: train.txt, a text whose articles begin at titles, or train.jsonl, a document in each line.

A line of train.jsonl is `{"text": "..."}`. So a document may hold any text, and ends where it ended in its source.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from gpt2lora.dataset.articles import mark_article_starts, split_articles
from gpt2lora.pipeline.artifacts import digests, require_file
from gpt2lora.pipeline.cli import StageError
from gpt2lora.pipeline.progress_bar import progress_bar

DOCUMENTS, TEXT = ".jsonl", ".txt"
Text = str | list[str]  # of a whole split: a text of articles, or documents


def find_split(raw: Path, split: str) -> Path:
    """Return the file of a split."""
    documents = raw / f"{split}{DOCUMENTS}"
    return documents if documents.exists() else require_file(raw / f"{split}{TEXT}", "prepare")


def write_documents(documents: Iterable[str], file: Path) -> None:
    """Write documents, one a line."""
    with file.open("w", encoding="utf-8", newline="") as out:
        out.writelines(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)


def read_lines(path: Path, max_length: int = -1, label: str | None = None) -> Iterator[str]:
    """Yield the lines of a file without translating newlines; longer lines are split after `max_length` characters.

    Args:
        label: of a progress bar; None for none.
    """
    size = path.stat().st_size
    with (
        path.open(encoding="utf-8", newline="\n") as file,
        progress_bar(label, size, "B", unit_scale=True, leave=False, disable=label is None) as bar,
    ):
        try:
            while line := file.readline(max_length):
                bar.update(file.buffer.tell() - bar.n)
                yield line
        except UnicodeDecodeError as error:
            raise StageError(f"{path} is not UTF-8 ({error}): run `dvc repro --force prepare`") from error


def read_documents(path: Path, label: str | None = None) -> Iterator[str]:
    """Yield the documents of a file that `write_documents` wrote."""
    for line in read_lines(path, label=label):
        try:
            yield json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise StageError(f"{path} is damaged ({error}): run `dvc repro --force prepare`") from error


def read_marked(path: Path, max_length: int, label: str | None = None) -> Iterator[tuple[bool, str]]:
    """Yield the text of a split in pieces, each with whether an article or document starts there, after the first.

    Args:
        max_length: of a piece, in characters. An article's pieces end where its lines end.
    """
    if path.suffix == TEXT:
        yield from mark_article_starts(read_lines(path, max_length, label))
        return
    for number, document in enumerate(read_documents(path, label)):
        for start in range(0, len(document), max_length):
            yield number > 0 and start == 0, document[start : start + max_length]


def read_texts(path: Path, label: str | None = None) -> Iterator[str]:
    """Yield the lines of a text, or the documents."""
    return read_lines(path, label=label) if path.suffix == TEXT else read_documents(path, label)


def split_digests(raw: Path) -> dict[str, str]:
    """Return the SHA-256 of each split in data/raw, by the name of its file."""
    return digests(raw, f"*{TEXT}") | digests(raw, f"*{DOCUMENTS}")


def read_split(path: Path) -> Text:
    """Return a whole split: its text, or its documents."""
    return path.read_bytes().decode("utf-8") if path.suffix == TEXT else list(read_documents(path))


def split_documents(text: Text) -> list[str]:
    """Return the articles of a text; documents are returned as they are."""
    return split_articles(text) if isinstance(text, str) else text


def whole_texts(text: Text) -> list[str]:
    """Return a text, or documents, as a list."""
    return [text] if isinstance(text, str) else text
