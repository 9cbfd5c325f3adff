"""The text of the embedded sample: docstrings of Python code that is already installed."""

import ast
import importlib.util
import sysconfig
from pathlib import Path

STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
# Folders with little prose: tests, generated tables, other packages.
SKIPPED = {"test", "tests", "site-packages", "dist-packages", "encodings", "idlelib", "lib2to3", "turtledemo"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def package_folder(name: str) -> Path:
    """Return the folder of an installed package, without importing it."""
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


def docstring_articles(folder: Path) -> list[str]:
    """Return one article in WikiText's format for each Python module below `folder` that has docstrings.

    The files are parsed, never run. Modules are sorted by name, so that the same files give the same bytes.
    """
    return [
        f" \n = {_module_name(path, folder)} = \n \n{text}\n"
        for path in sorted(folder.rglob("*.py"))
        if SKIPPED.isdisjoint(path.relative_to(folder).parts) and (text := _docstrings(path))
    ]


def _module_name(path: Path, folder: Path) -> str:
    return ".".join(path.relative_to(folder.parent).with_suffix("").parts)


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return ""  # a template or a file for another Python
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
    return "\n\n".join(text for text in texts if text)
