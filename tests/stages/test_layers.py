"""Which package may import which: stages -> library, and inside the library only downwards."""

import ast
import subprocess
import sys

import pytest
from dvc_yaml import imported_names
from tiny import ROOT

# A package may import itself and the packages named here, no other.
MAY_IMPORT = {
    "pipeline": set(),
    "sources": {"pipeline"},
    "sample": {"pipeline"},
    "dataset": {"pipeline"},
    "corpus": {"dataset", "sources", "pipeline"},
    "distributed": {"pipeline"},
    "model": {"dataset", "sources", "sample", "pipeline"},
    "scoring": {"distributed", "model", "dataset", "sources", "sample", "pipeline"},
    "training": {"distributed", "scoring", "model", "dataset", "sources", "sample", "pipeline"},
    "evaluation": {"scoring", "model", "dataset", "sources", "sample", "pipeline"},
    "base": {"sources", "pipeline"},
    "inference": {"evaluation", "scoring", "dataset", "pipeline"},
    "commands": {"inference", "training", "evaluation", "scoring", "model", "dataset", "sources", "sample", "pipeline"},
}


def imports_of(folder: str) -> dict[str, set[str]]:
    """Return the dotted names of this repository that each Python file below a folder imports."""
    files = (ROOT / folder).rglob("*.py")
    return {
        file.relative_to(ROOT).as_posix(): set(imported_names(ast.parse(file.read_text(encoding="utf-8"))))
        for file in files
    }


def test_every_package_is_in_the_table():
    folders = {path.name for path in (ROOT / "gpt2lora").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == set(MAY_IMPORT)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_is_below_it(package):
    allowed = {f"gpt2lora.{name}" for name in MAY_IMPORT[package] | {package}}
    for file, names in imports_of(f"gpt2lora/{package}").items():
        assert {".".join(name.split(".")[:2]) for name in names} <= allowed, file


def test_no_stage_imports_a_stage():
    for file, names in imports_of("stages").items():
        assert not {name for name in names if name.startswith("stages")}, file


def test_no_stage_imports_the_commands():
    for file, names in imports_of("stages").items():
        assert not {name for name in names if name.startswith("gpt2lora.commands")}, file


def test_dvc_sees_only_the_python_files_of_the_library():
    kept, ignored = "gpt2lora/model/lora.py", "gpt2lora/model/__pycache__/lora.cpython-311.pyc"
    command = [sys.executable, "-m", "dvc", "check-ignore", kept, ignored, "gpt2lora/notes.txt", "stages/train.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [ignored, "gpt2lora/notes.txt"]
