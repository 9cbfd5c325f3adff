"""Cut the splits that a corpus lacks from `train`, and keep a share of each split: by whole documents, in order.

All functions read and write files line by line, with a byte for each document in memory.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from gpt2lora.dataset.articles import mark_article_starts
from gpt2lora.dataset.documents import DOCUMENTS, find_split, read_lines
from gpt2lora.pipeline.cli import StageError

LINE_CHARACTERS = 100_000  # a longer line is read in several pieces
PYTHON_SAMPLE = 1_000_000  # of more numbers, a sample of Python's takes 60 bytes each
Marked = Iterator[tuple[bool, str]]  # pieces of a text, each with whether a unit starts there, after the first


def assign(count: int, shares: dict[str, float], seed: int | None) -> list[str] | bytearray:
    """Return for each of `count` units the number of its split: 0 for train, then in the order of `shares`.

    Args:
        shares: of the splits that are cut from train; none of the splits is empty.
        seed: None keeps the units in their order, with train first.
    """
    order = range(count) if seed is None else draw(count, count, seed)
    owners, end = bytearray(count), count
    for number, split in reversed(list(enumerate(shares, 1))):
        size = min(max(1, round(count * shares[split])), end - number)
        for index in itertools.islice(order, end - size, end):
            owners[index] = number
        end -= size
    return owners


def draw(count: int, size: int, seed: int):
    """Return `size` of the numbers below `count` in random order."""
    if count <= PYTHON_SAMPLE:
        return random.Random(seed).sample(range(count), size)
    import numpy as np

    return np.random.default_rng(seed).permutation(np.arange(count, dtype=np.uint32))[:size]


def distribute(marked: Iterable[tuple[bool, str]], owners: bytearray, files: list[Path | None]) -> None:
    """Write each unit into the file with the number that `owners` gives it; None drops it."""
    outs = [file and file.open("w", encoding="utf-8", newline="") for file in files]
    try:
        unit = 0
        for starts, piece in marked:
            unit += starts
            if out := outs[owners[unit]]:
                out.write(piece)
    finally:
        for out in filter(None, outs):
            out.close()


def cut_splits(folder: Path, shares: dict[str, float], seed: int, source: str) -> dict[str, int | str]:
    """Cut splits from train: at random by documents or articles, else by lines in their order.

    Args:
        shares: of the splits to cut, such as {"validation": 0.1, "test": 0.1}.
        source: the corpus, for error messages.

    Returns:
        The number of units of each split, and in "unit" what they are.
    """
    train, needed = find_split(folder, "train"), len(shares) + 1
    unit, mark, count = find_units(train, needed, ("documents",), ("articles", "lines"))
    if count < needed:
        few = {2: "two", 3: "three"}[needed]
        what = f"{few} documents" if unit == "documents" else f"{few} articles or {few} lines"
        hint = "" if unit == "documents" else "; prepare.document_separator divides a text otherwise"
        raise StageError(f"{source}: {count} {unit}: expected at least {what} to split{hint}")
    owners = assign(count, shares, None if unit == "lines" else seed)
    new = train.with_name("cut")
    distribute(mark(train), owners, [new, *(folder / f"{split}{train.suffix}" for split in shares)])
    new.replace(train)
    return {"unit": unit} | {split: owners.count(number) for number, split in enumerate(("train", *shares))}


def keep_fraction(file: Path, fraction: float, seed: int) -> dict[str, int | str]:
    """Keep a random share of a split, at least one unit: by documents or articles, else by paragraphs, else by lines.

    Returns:
        The numbers of units "kept" and "of" how many, and in "unit" what they are.
    """
    unit, mark, count = find_units(file, 2, ("documents",), ("articles", "paragraphs", "lines"))
    kept = bytearray(count)
    for index in draw(count, min(count, max(1, round(count * fraction))), seed):
        kept[index] = 1
    new = file.with_name("kept")
    distribute(mark(file), kept, [None, new])
    new.replace(file)
    return {"unit": unit, "kept": kept.count(1), "of": count}


def find_units(
    file: Path, needed: int, of_documents: tuple[str, ...], of_text: tuple[str, ...]
) -> tuple[str, Callable[[Path], Marked], int]:
    """Return the first kind of unit of which a split has as many as needed, or the last one, and how many it has."""
    kinds = of_documents if file.suffix == DOCUMENTS else of_text
    for kind in kinds:
        count = count_units(UNITS[kind](file))
        if count >= needed:
            break
    return kind, UNITS[kind], count


def count_units(marked: Marked) -> int:
    """Return the number of units; a text without any piece has none."""
    count, pieces = 0, 0
    for starts, _ in marked:
        count, pieces = count + starts, 1
    return count + pieces


def mark_articles(file: Path) -> Marked:
    """Yield the lines of a file, each with whether an article starts there."""
    return mark_article_starts(read_lines(file, LINE_CHARACTERS))


def mark_lines(file: Path) -> Marked:
    """Yield the lines of a file, each with whether it starts there, after the first."""
    ended = False
    for piece in read_lines(file, LINE_CHARACTERS):
        yield ended, piece
        ended = piece.endswith("\n")


def mark_paragraphs(file: Path) -> Marked:
    """Yield the lines of a file, each with whether it is the first one after blank lines."""
    seen, blank = False, False
    for line in read_lines(file, LINE_CHARACTERS):
        text = bool(line.strip())
        yield seen and blank and text, line
        seen, blank = seen or text, not text


UNITS = {"documents": mark_lines, "articles": mark_articles, "paragraphs": mark_paragraphs, "lines": mark_lines}
