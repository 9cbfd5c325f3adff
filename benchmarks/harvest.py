"""harvest: the English prose among the documentation that is installed on a machine, as a corpus.

in   docstrings, .rst, .md, .txt, package metadata, manual and info pages, POD and /usr/share/doc below --root
out  FOLDER/{train,validation,test}.txt, UTF-8: articles in the form of WikiText, one paragraph a line
"""

import gzip
import hashlib
import os
import random
import re
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click

from benchmarks import markup
from gpt2lora.dataset import articles
from gpt2lora.pipeline.artifacts import atomic_output
from gpt2lora.pipeline.cli import StageError, command, echo
from gpt2lora.sample import corpus
from stages import prepare

VALIDATION_SHARE, TEST_SHARE = 0.01, 0.01  # of the documents
# Tests and tables say little in prose; packages of other people, which the sample leaves out, are the bulk here.
SKIPPED = corpus.SKIPPED - {"site-packages", "dist-packages"} | {"__pycache__", ".git"}
MAN_PAGE = re.compile(r"/man/man\d\w*/[^/]+$")  # those of other languages lie in man/LANGUAGE/man1
PLAIN = re.compile(r"\.(rst|md|txt|info|info-\d+)$|/share/doc/[^/]+/(README|NEWS|FAQ|copyright)[^/]*$")
LARGEST_FILE = 10_000_000  # bytes; what is larger is a table
SHORTEST_DOCUMENT = 200  # characters of prose
BULLET = re.compile(r"\s*([-*+•]|\d+[.)]|:\w+.*?:|@\w+)\s")
COMMON = """
a all also an and any are as at be been but by can do does each for from has have if in into is it its may more must no
not of on one only or other same should so such than that the their then there these they this to used was we when where
which will with would you your
"""
ENGLISH = frozenset(COMMON.split())  # its commonest words


@command
@click.option("--out", type=Path, required=True, help="Folder of the three text files.")
@click.option("--root", type=Path, multiple=True, help="Folder to search. Default: /usr and this Python's own folders.")
@click.option("--megabytes", type=click.FloatRange(min=0, min_open=True), help="Keep so much, chosen at random.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the split and of the choice.")
def main(out: Path, root: tuple[Path, ...], megabytes: float | None, seed: int) -> None:
    """Collect the prose of the installed documentation into FOLDER."""
    from tqdm import tqdm

    roots = root or (Path("/usr"), Path(sys.base_prefix), Path(sys.prefix))
    for folder in roots:
        if not folder.is_dir():
            raise StageError(f"--root {folder}: no such folder")
    files = find(roots, out)
    echo(f"harvest: {len(files):,} files below {', '.join(map(str, roots))}")

    seen: set[bytes] = set()
    found: list[str] = []
    read = 0  # characters of prose, copies included
    with ProcessPoolExecutor() as pool, tqdm(total=len(files), unit="file", desc="harvest", mininterval=2) as bar:
        for file, texts in zip(files, pool.map(prose_of, files, chunksize=64), strict=True):
            bar.update()
            read += sum(map(len, texts))
            new = unseen(texts, seen)
            if sum(map(len, new)) >= SHORTEST_DOCUMENT:
                found.append(article(title(file), new))
    echo(f"harvest: {read / 1e6:.1f} M characters of prose, {sum(map(len, found)) / 1e6:.1f} M without copies")
    if megabytes:
        found = choose(found, megabytes * 1e6, seed)
    if len(found) < 3:
        raise StageError(f"{len(found)} documents with prose: expected at least three; name more folders with --root")
    with atomic_output(out) as folder:
        folder.mkdir()
        for split, text in prepare.assign_articles(found, VALIDATION_SHARE, TEST_SHARE, seed).items():
            data = text.encode()
            (folder / f"{split}.txt").write_bytes(data)
            echo(f"harvest: {split:10} {len(data) / 1e6:8.2f} MB, {len(articles.split_articles(text)):>7,} documents")


def find(roots: tuple[Path, ...], out: Path) -> list[str]:
    """Return the files that may hold prose, each once, sorted within each root.

    Links are not followed; `out`, where an earlier harvest may lie, is left out.
    """
    found: dict[str, None] = {}
    own = os.path.realpath(out)
    for root in roots:
        for folder, folders, names in os.walk(os.path.realpath(root)):
            folders[:] = sorted(name for name in set(folders) - SKIPPED if os.path.join(folder, name) != own)
            for path in (os.path.join(folder, name) for name in sorted(names)):
                if reader(path) and not os.path.islink(path) and os.path.getsize(path) <= LARGEST_FILE:
                    found[path] = None
    return list(found)


def reader(path: str):
    """Return the function that makes paragraphs of a file's text, or None for a file of another kind."""
    bare = path.removesuffix(".gz")
    if path.endswith(".py"):
        return markup.python
    if path.endswith((".pod", ".pm")):
        return markup.pod
    if path.endswith((".dist-info/METADATA", ".egg-info/PKG-INFO")):
        return markup.metadata
    if MAN_PAGE.search(bare):
        return markup.roff
    return markup.plain if PLAIN.search(bare) else None


def prose_of(path: str) -> list[str]:
    """Return the paragraphs of prose in a file, each on one line; none where the file is not UTF-8 or not readable."""
    warnings.simplefilter("ignore")  # of other people's escape sequences
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            data = file.read(LARGEST_FILE)
        texts = reader(path)(data.decode("utf-8"))
        return [line for text in texts for block in blocks(text) if is_prose(line := markup.inline(block))]
    except (OSError, EOFError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
        return []  # a broken link or archive, another encoding, a template, a file for another Python


def blocks(text: str) -> list[str]:
    """Return a text's paragraphs, cut at lines without a word, before list items, and where the indent falls back."""
    found: list[list[str]] = []
    indents: list[int] = []  # of the lines of the open paragraph; none when a blank line came last
    for line in text.expandtabs().splitlines():
        indent = len(line) - len(line.lstrip())
        if not any(map(str.isalnum, line)):  # blank, or the line under a heading
            indents = []
            continue
        # The first line of a paragraph may stand further in than the others.
        if not indents or BULLET.match(line) or (len(indents) > 1 and indent < indents[-1]):
            found.append([])
            indents = []
        found[-1].append(line.strip())
        indents.append(indent)
    return [" ".join(lines) for lines in found]


def is_prose(text: str) -> bool:
    """Tell running English text from code, tables, lists of names, encoded data and other languages."""
    words = text.split()
    if len(words) < 8 or max(map(len, words)) > 40 or not text.isprintable() or text.startswith(("=", ">>>", "$ ")):
        return False
    letters = sum(character.isalpha() or character == " " for character in text)
    symbols = sum(character in "{}[]<>=_|\\/*#;+~^@$%&" for character in text)
    common = sum(word.lower().strip(".,:;()\"'") in ENGLISH for word in words)
    return letters >= 0.85 * len(text) and symbols <= 0.02 * len(text) and common >= 0.2 * len(words)


def unseen(texts: list[str], seen: set[bytes]) -> list[str]:
    """Return the paragraphs that are new, and remember them; those that differ in digits or signs only are the same."""
    new = []
    for text in texts:
        letters = "".join(filter(str.isalpha, text)).casefold()
        key = hashlib.blake2b(letters.encode(), digest_size=10).digest()
        if key not in seen:
            seen.add(key)
            new.append(text)
    return new


def article(name: str, texts: list[str]) -> str:
    return f" \n = {name} = \n \n" + "".join(f" {text} \n" for text in texts)


def title(path: str) -> str:
    """Return the name of a document: of its file, and of the folder that holds it."""
    folder, file = path.removesuffix(".gz").split("/")[-2:]
    return f"{folder} {file.rpartition('.')[0] or file}".replace("=", " ").strip()


def choose(documents: list[str], size: float, seed: int) -> list[str]:
    """Return whole documents, chosen at random, in their order, that together hold at most `size` bytes."""
    kept = []
    for place in random.Random(seed).sample(range(len(documents)), len(documents)):
        size -= len(documents[place].encode())
        if size < 0:
            break
        kept.append(place)
    return [documents[place] for place in sorted(kept)]


if __name__ == "__main__":
    main()
