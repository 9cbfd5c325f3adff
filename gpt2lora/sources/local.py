"""Where a preset's model or dataset comes from: the hub, this disk, or the embedded sample."""

import os
import re
from pathlib import Path

from gpt2lora.pipeline.cli import Stop
from gpt2lora.pipeline.params import wrong

SAMPLE = "sample"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def local(key: str, source: str | None, revision: str | None) -> Path | None:
    """Return the path that `source` names on this disk, or None when it is an id on the hub.

    Args:
        key: the parameter that holds `source`, for the error lines.

    Raises:
        Stop: nothing is named, the path does not exist, or a path was given a revision.
    """
    if not source:
        raise wrong(key, source, "a folder or an id on the hub")
    path = Path(os.path.expanduser(source))
    if os.path.exists(path):  # Path's own methods raise at a name too long, or a ~ of nobody
        if revision:
            raise wrong(f"{key}_revision", revision, f"null, since {source} is on this disk")
        return path
    if source.startswith((".", "/", "~")) or not HUB_ID.fullmatch(source):
        raise Stop(f"params.yaml: {key}: {source!r} does not exist, seen from {Path.cwd()}")
    return None


def read_text(path: Path) -> str:
    """Return the text of a file, every byte of it: no newline is translated."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise Stop(f"{path}: not UTF-8 at byte {error.start:,}: {error.reason}; convert the file to UTF-8") from error
