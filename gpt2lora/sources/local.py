"""Models and texts on the local disk."""

import contextlib
import json
import os
import re
from pathlib import Path

from gpt2lora.pipeline import params
from gpt2lora.pipeline.cli import StageError
from gpt2lora.pipeline.params import invalid, seen_from

SAMPLE = "sample"
TEXT_OR_WEIGHTS = re.compile(r".*\.(txt|text|md|jsonl?|csv|tsv|parquet|arrow|gz|zst|zip|safetensors|bin|gguf)", re.I)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_local_path(key: str, source: str | None, revision: str | None) -> Path | None:
    """Return `source` as a path on the local disk, or None if it is an id on the hub.

    Args:
        key: the parameter that holds `source`, for error messages.

    Raises:
        StageError: `source` is empty, the path does not exist, or a local path was given a revision.
    """
    if not source:
        raise invalid(key, source, "a folder or an id on the hub")
    path = Path(os.path.expanduser(source))
    if os.path.exists(path):  # unlike Path.exists, it does not raise at names that are too long
        if revision:
            raise invalid(f"{key}_revision", revision, f"null, since {source} is on this disk")
        return path
    seen = seen_from(path)
    if source.startswith((".", "/", "~")) or not HUB_ID.fullmatch(source):
        raise StageError(f"params.yaml: {key}: {source!r} does not exist, {seen}")
    if not revision and TEXT_OR_WEIGHTS.fullmatch(source):
        hub = f"as an id on the hub it needs its full commit hash in {key}_revision"
        raise StageError(f"params.yaml: {key}: {source!r} does not exist, {seen}; {hub}")
    return None


def read_license(folder: Path) -> dict[str, dict[str, str]]:
    """Return {"license": ...} as a model's README.md, its model card, or else its config.json has it; {} if neither."""
    keys = ("license", "license_name", "license_link")
    for name in ("README.md", "config.json"):
        with contextlib.suppress(Exception):  # neither file must be in order
            text = (folder / name).read_text(encoding="utf-8")
            block = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.S) if name == "README.md" else None
            content = params.parse_yaml(block[1]) if name == "README.md" else json.loads(text)
            found = {key: content[key] for key in keys if isinstance(content.get(key), str)}
            if "license" in found:
                return {"license": found}
    return {}


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file without translating newlines."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise StageError(
            f"{path}: not UTF-8 at byte {error.start:,}: {error.reason}; convert the file to UTF-8"
        ) from error
