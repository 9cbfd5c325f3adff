"""Running a stage that must refuse its input: one line, exit code 1, and nothing in the working directory changed."""

import traceback
from pathlib import Path

import click
from click.testing import CliRunner


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def refusal(stage: click.Command, *arguments) -> str:
    """Run a stage in the working directory, which must stay as it is; return its one line."""
    before = contents(Path.cwd())
    result = CliRunner().invoke(stage, list(map(str, arguments)))
    assert isinstance(result.exception, SystemExit), "".join(traceback.format_exception(result.exception))
    assert result.exit_code == 1, result.output
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("Error: ")] == lines[-1:]
    assert "Traceback" not in result.output
    assert contents(Path.cwd()) == before
    return lines[-1].removeprefix("Error: ")


def options(stage: str) -> list[str]:
    names = {
        "tokenize": ["raw", "base"],
        "train": ["tokens", "base"],
        "evaluate": ["raw", "tokens", "base", "adapter"],
    }[stage]
    return [part for name in names for part in (f"--{name}", f"data/{name}")]
