"""Run a stage that must refuse its input: one error line, exit code 1, and no file changed."""

import json
import traceback
from pathlib import Path

import click
from click.testing import CliRunner


def read_files(folder: Path) -> dict[str, bytes | None]:
    """Return the bytes of everything below `folder`, by path; None for a folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def error_line(stage: click.Command, *arguments) -> str:
    """Run a stage that must fail and leave the working directory unchanged; return its error line."""
    before = read_files(Path.cwd())
    result = CliRunner().invoke(stage, list(map(str, arguments)))
    assert isinstance(result.exception, SystemExit), "".join(traceback.format_exception(result.exception))
    assert result.exit_code == 1, result.output
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("Error: ")] == lines[-1:]
    assert "Traceback" not in result.output
    assert read_files(Path.cwd()) == before
    return lines[-1].removeprefix("Error: ")


def input_options(stage: str) -> list[str]:
    """Return the options of a stage that name its inputs in the folder data."""
    names = {
        "tokenize": ["raw", "base"],
        "train": ["tokens", "base"],
        "evaluate": ["raw", "tokens", "base", "adapter"],
    }[stage]
    return [part for name in names for part in (f"--{name}", f"data/{name}")]


def update_json(file: Path, **values) -> None:
    """Change some values of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
