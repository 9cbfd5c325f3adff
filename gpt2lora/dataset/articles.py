"""Split a text in WikiText's format into articles, at its top-level headings."""

import itertools
import re
from collections.abc import Iterable, Iterator

# A title is ` = Title = ` between blank lines. Deeper headings are ` = = Section = = `. Formulas that look like a
# title (31 lines of WikiText-2) have no blank lines around them.
HEADING, BLANK = r" = (?!= ).*(?<! =) = \n", r" ?\n"
TITLE = re.compile(f"^{BLANK}({HEADING}){BLANK}", re.MULTILINE)
HEADING_LINE = re.compile(HEADING)


def split_articles(text: str) -> list[str]:
    """Split `text` before the title of every article; the joined articles are `text` again.

    Blank lines before the first title belong to the first article. A text without titles is one article.
    """
    starts = [match.start(1) for match in TITLE.finditer(text)]
    if starts and not text[: starts[0]].strip():
        starts = starts[1:]
    edges = [0, *starts, len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges) if start < end]


def mark_article_starts(lines: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """Yield each line with whether `split_articles` would split there; only two lines are held at a time."""
    before, was_title, empty = "", False, True
    for line, after in itertools.pairwise(itertools.chain(lines, [""])):
        around = before in (" \n", "\n") and after in (" \n", "\n")
        is_title = around and HEADING_LINE.fullmatch(line) is not None
        yield is_title and not empty, line
        before = "" if was_title else line  # one blank line cannot belong to two titles
        was_title, empty = is_title, empty and not line.strip()
