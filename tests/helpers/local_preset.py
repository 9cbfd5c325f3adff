"""A folder for single stages: its params.yaml has a given corpus as preset `local`."""

import shutil
from pathlib import Path

import tiny


def write_params(folder: Path, corpus: Path) -> Path:
    """Copy the repository's params.yaml into a folder, and choose the preset `local` with this corpus."""
    shutil.copyfile(tiny.ROOT / "params.yaml", folder / "params.yaml")
    tiny.set_param(folder, "preset", "local")
    tiny.set_param(folder, "presets.local.dataset", str(corpus))
    return folder


def make_article(number: int) -> str:
    return f" \n = Title {number} = \n \n The text of number {number} . \n"
