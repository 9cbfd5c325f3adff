"""Articles: a text in the form of WikiText, cut where its top-level headings stand."""

import itertools
import re
from collections.abc import Iterable, Iterator

# ` = Title = ` between blank lines. Deeper headings read ` = = Section = = `; formulas that look like a title
# (31 lines of WikiText-2) have no blank lines around them.
HEADING, BLANK = r" = (?!= ).*(?<! =) = \n", r" ?\n"
TITLE = re.compile(f"^{BLANK}({HEADING}){BLANK}", re.MULTILINE)
HEADING_LINE = re.compile(HEADING)


def split(text: str) -> list[str]:
    """Cut `text` before every article's title; joined, the pieces are `text` again.

    Blank lines before the first title belong to its article; a text without titles is one article.
    """
    starts = [match.start(1) for match in TITLE.finditer(text)]
    if starts and not text[: starts[0]].strip():
        starts = starts[1:]
    edges = [0, *starts, len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges) if start < end]


def starts(lines: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """Yield each line, and before it whether `split` cuts there: a text of any length, two lines at a time."""
    before, was_title, empty = "", False, True
    for line, after in itertools.pairwise(itertools.chain(lines, [""])):
        around = before in (" \n", "\n") and after in (" \n", "\n")
        is_title = around and HEADING_LINE.fullmatch(line) is not None
        yield is_title and not empty, line
        before = "" if was_title else line  # one blank line does not serve two titles
        was_title, empty = is_title, empty and not line.strip()
