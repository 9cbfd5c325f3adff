"""Progress: a bar in a terminal; in a pipe or a log file a line every 10 s."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_INTERVAL = 10.0  # seconds
LINE_FORMAT = "{desc}: {n_fmt} of {total_fmt} {unit}, {remaining} left{postfix}"


class Lines:
    """The standard error, to which each state of a bar is written as a line of its own."""

    def write(self, text: str) -> None:
        if shown := text.strip():
            sys.stderr.write(f"{shown}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(label: str, total: int, unit: str, **options) -> "tqdm":
    """Return a progress bar on the standard error. options: of tqdm."""
    from tqdm import tqdm

    options |= {"desc": label, "total": total, "unit": unit}
    if sys.stderr.isatty():
        return tqdm(mininterval=0.5, **options)
    # With a number of iterations given, tqdm's thread that watches slow bars prints no lines of its own.
    timing = {"delay": LINE_INTERVAL, "mininterval": LINE_INTERVAL, "miniters": 1}
    return tqdm(file=Lines(), bar_format=LINE_FORMAT, **options | timing | {"leave": False})
