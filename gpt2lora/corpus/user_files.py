"""The user's own files: which of them hold which split, and each split as one file of data/raw."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from gpt2lora.corpus.tables import SAVED, SUFFIXES, read_column, read_saved, read_tables, table_suffix
from gpt2lora.corpus.text_files import COMPRESSED, normalize_line_ends, read_pieces, split_documents
from gpt2lora.dataset.articles import mark_article_starts
from gpt2lora.dataset.documents import DOCUMENTS, TEXT, write_documents
from gpt2lora.pipeline import params
from gpt2lora.pipeline.cli import StageError, echo
from gpt2lora.sources.hub import restore_line

SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "dev", "val"), "test": ("test",)}
SHARD = re.compile(r"(\w+?)(?:[-_](\d{1,18})(?:[-_]of[-_](\d{1,18}))?)?")  # train, train_0, or train-00000-of-00002
SEPARATOR_KEY = "prepare.document_separator"
FIRST_ROWS = 1000  # of a dataset on the hub: they show what a row is


def write_splits(
    source: Path, column: str | None, separator: str | None, folder: Path
) -> tuple[dict[str, Counter], list[str]]:
    """Write the splits of a file or folder into `folder`; return what was changed in each, and what was not used.

    A single file becomes `train`.

    Args:
        column: of a table, the one that holds the texts.
        separator: between the documents of a text, or None for a text of articles.
    """
    if source.is_dir() and any((source / name).is_file() for name in SAVED):
        refuse_separator(separator, source)
        splits, unused = read_splits(read_saved(source), source)
        rows = {split: read_column(saved, column, f"{source}, {split}") for split, saved in splits.items()}
        return {split: write_rows(texts, folder, split, normalize=True) for split, texts in rows.items()}, unused
    files, unused = find_files(source) if source.is_dir() else ({"train": [source]}, [])
    found, changes = Counter(), {}
    for split, paths in files.items():
        changes[split] = counts = Counter()
        if table_suffix(paths[0]):
            refuse_separator(separator, paths[0])
            changes[split] = write_rows(read_tables(paths, column), folder, split, normalize=True)
        elif separator is None:
            with (folder / f"{split}{TEXT}").open("w", encoding="utf-8", newline="") as out:
                out.writelines(read_pieces(paths[0], counts))
        else:
            documents = split_documents(read_pieces(paths[0], counts), separator, found)
            write_rows(documents, folder, split, normalize=False)
    if separator is not None and not sum(found.values()):
        raise params.invalid(SEPARATOR_KEY, separator, f"a string that stands in {source}, or null")
    return changes, unused


def write_rows(texts: Iterable[str | None], folder: Path, split: str, normalize: bool) -> Counter:
    """Write rows as documents; return how many blank ones were left out, and how many line ends normalized."""
    counts = Counter()

    def kept() -> Iterator[str]:
        for text in texts:
            if text is None or not text.strip():
                counts["blank_documents"] += 1
            else:
                yield normalize_line_ends(text, counts) if normalize else text

    write_documents(kept(), folder / f"{split}{DOCUMENTS}")
    return counts


def write_hub_rows(rows: dict[str, Iterable[str | None]], folder: Path) -> dict[str, Counter]:
    """Write rows of the hub, unchanged, as documents; those of WikiText, which are lines, as a text of articles."""
    if not are_lines(rows["train"]):
        return {split: write_rows(texts, folder, split, normalize=False) for split, texts in rows.items()}
    for split, lines in rows.items():
        with (folder / f"{split}{TEXT}").open("w", encoding="utf-8", newline="") as out:
            out.writelines(map(restore_line, lines))
    return {split: Counter() for split in rows}


def are_lines(rows: Iterable[str | None]) -> bool:
    """Tell whether rows are the lines of WikiText, of which some are titles between blank ones."""
    first = [row or "" for row in itertools.islice(rows, FIRST_ROWS)]
    return any(starts for starts, _ in mark_article_starts(["text\n", "\n", *map(restore_line, first)]))


def refuse_separator(separator: str | None, source: Path | str) -> None:
    """Refuse a separator for a corpus whose rows are its documents."""
    if separator is not None:
        raise params.invalid(SEPARATOR_KEY, separator, f"null, since {source} has documents of its own")


def read_splits(splits: dict, source: Path | str) -> tuple[dict, list[str]]:
    """Return `splits`, a dictionary by their usual names, by the names of this pipeline, and which were not used."""
    named = {split: [name for name in names if name in splits] for split, names in SPLIT_NAMES.items()}
    if not named["train"]:
        raise StageError(f"{source}: no split train, only {', '.join(splits)}")
    used = {split: names[0] for split, names in named.items() if names}
    return {split: splits[name] for split, name in used.items()}, [name for name in splits if name not in used.values()]


def find_files(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the files of each split in a folder, or in its subfolder `data`: one, or the shards of a table.

    Also return the names of the other texts and tables there, and of what is named like a split.
    """
    places = [place for place in (folder, folder / "data") if place.is_dir()]
    for place in places:
        files: dict[str, list[Path]] = {}
        for path in sorted(place.iterdir()):
            if split := split_of(path):
                files.setdefault(split, []).append(path)
        if "train" in files:
            for paths in files.values():
                check_shards(paths)
            used = {path for paths in files.values() for path in paths}
            unused = [str(path.relative_to(folder)) for path in list_candidates(places) if path not in used]
            return {split: files[split] for split in SPLIT_NAMES if split in files}, unused
    names = ", ".join(sorted(path.name for path in folder.iterdir())) or "no files"
    raise StageError(
        f"{folder}: no train.txt among {names[:200]}: expected train.txt, validation.txt (or valid, dev) and test.txt, "
        f"or tables of these names ({', '.join(SUFFIXES)}); validation and test may be absent"
    )


def list_candidates(places: list[Path]) -> Iterator[Path]:
    """Yield the texts and tables in some folders, and all else there that is named like a split, such as `test.md`."""
    for path in (path for place in places for path in sorted(place.iterdir())):
        if named_split(path) or (is_text_or_table(path) and path.is_file()):
            yield path


def split_of(path: Path) -> str | None:
    """Return the split that a file's name stands for, None for another file; refuse a link to nothing."""
    split = named_split(path) if is_text_or_table(path) else None
    if split and path.is_symlink() and not path.exists():
        raise StageError(f"{path}: a link to {path.readlink()}, which does not exist: mend the link, or remove it")
    return split if path.is_file() else None


def is_text_or_table(path: Path) -> bool:
    """Tell whether a name is that of a text or table, compressed or not."""
    suffixes = path.name.lower().split(".")[1:]
    if suffixes and f".{suffixes[-1]}" in COMPRESSED:
        suffixes.pop()
    return len(suffixes) == 1 and f".{suffixes[0]}" in (TEXT, *SUFFIXES)


def named_split(path: Path) -> str | None:
    """Return the split that the first part of a name stands for, None if it stands for none."""
    shard = parse_shard(path)
    return next((split for split, names in SPLIT_NAMES.items() if shard and shard[1] in names), None)


def parse_shard(path: Path) -> re.Match | None:
    """Return the parts of a file's name: a word, the number of the shard, and of how many it is one."""
    return SHARD.fullmatch(path.name.lower().split(".")[0])


def check_shards(paths: list[Path]) -> None:
    """Refuse several files of one split, unless they are all the shards of one table."""
    shards = [parse_shard(path) for path in paths]
    one_table = all(shard[2] for shard in shards) and len({table_suffix(path) for path in paths} - {None}) == 1
    if len(paths) > 1 and not one_table:
        names = ", ".join(path.name for path in paths)
        raise StageError(f"{paths[0].parent}: {names}: expected one file for a split, or the shards of one table")
    if shards[0][2]:
        totals = {int(shard[3] or 0) for shard in shards}
        check_numbers([int(shard[2]) for shard in shards], totals, paths)


def check_numbers(numbers: list[int], totals: set[int], paths: list[Path]) -> None:
    """Refuse shards of which some are missing or there twice, or that are not of one table.

    Args:
        numbers: of the shards, counted from 0 or 1. Where no total is named, other numbers are names, such as years.
        totals: that the shards name, 0 for none.
    """
    total = max(totals)
    if total:
        first = int(0 not in numbers and total in numbers)
        expected = range(first, first + total)
    else:
        expected = range(min(numbers), max(numbers) + 1) if min(numbers) <= 1 else sorted(set(numbers))
    if len(totals) > 1 or len(numbers) != len(expected) or sorted(numbers) != list(expected):
        names = ", ".join(path.name for path in paths)[:200]
        missing = next((f": number {number} is missing" for number in expected if number not in numbers), "")
        raise StageError(f"{paths[0].parent}: {names}: expected each shard of one table once{missing}")


def warn_about_json(source: Path, folder: Path) -> None:
    """Say that a text looks like a table of JSON."""
    for file in folder.glob(f"*{TEXT}"):
        with file.open(encoding="utf-8") as text:
            line = text.readline(10_000)
        try:
            keys = json.loads(line).keys()
        except (ValueError, AttributeError):
            continue
        echo(
            f"prepare: warning: {source} is read as plain text, but its first line is JSON with "
            f"{', '.join(keys)[:200]}: name the file .jsonl to train on one of its columns"
        )
        return
