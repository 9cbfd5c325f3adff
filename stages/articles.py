"""Articles: a text in the form of WikiText, cut where its top-level headings stand."""

import itertools
import re

# ` = Title = ` between blank lines. Deeper headings read ` = = Section = = `; formulas that look like a title
# (31 lines of WikiText-2) have no blank lines around them.
TITLE = re.compile(r"^ ?\n( = (?!= ).*(?<! =) = \n) ?\n", re.MULTILINE)


def split(text: str) -> list[str]:
    """Cut `text` before every article's title; joined, the pieces are `text` again.

    Blank lines before the first title belong to its article; a text without titles is one article.
    """
    starts = [match.start(1) for match in TITLE.finditer(text)]
    if starts and not text[: starts[0]].strip():
        starts = starts[1:]
    edges = [0, *starts, len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges) if start < end]
