"""What dvc.yaml declares, and what the code imports."""

import ast
import re
from pathlib import Path

import yaml
from tiny import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
CODE = ("stages", "gpt2lora")


def stages_run(output: str) -> list[str]:
    return re.findall(r"Running stage '(\w+)'", output)


def declared_leaves(stage: str, project: Path) -> set[str]:
    """Return the parameters that a stage declares, by their full names: a section stands for its keys."""
    values = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    leaves = set()
    for key in STAGES[stage]["params"]:
        key = key.replace("${preset}", values["preset"]).replace("${method}", values["method"])
        found = values
        for part in key.split("."):
            found = found[part]
        leaves |= {f"{key}.{leaf}" for leaf in found} if isinstance(found, dict) else {key}
    return leaves


def declared_files(stage: str, *kinds: str) -> set[str]:
    entries = [entry for kind in kinds for entry in STAGES[stage].get(kind, [])]
    return {next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries}


def declared_code(stage: str) -> set[str]:
    """Return the files and folders of code that a stage depends on."""
    return {name for name in declared_files(stage, "deps") if name.split("/")[0] in CODE}


def imported_files(stage: str, root: Path) -> set[str]:
    """Return the files below `root` that `python -m stages.STAGE` imports, now or later, itself included.

    An `__init__.py` that holds nothing but a docstring is left out: no edit of it changes what a stage does.
    """
    found: set[str] = set()
    waiting = ["stages", f"stages.{stage}"]
    while waiting:
        module = waiting.pop().replace(".", "/")
        name = f"{module}/__init__.py" if (root / module).is_dir() else f"{module}.py"
        if name not in found and (root / name).is_file():  # else a name that the module defines
            tree = ast.parse((root / name).read_text(encoding="utf-8"))
            if not is_docstring(tree):
                found.add(name)
            waiting += imported_names(tree)
    return found


def is_docstring(tree: ast.Module) -> bool:
    return len(tree.body) == 1 and ast.get_docstring(tree) is not None


def imported_names(tree: ast.AST) -> list[str]:
    """Return what a file imports from CODE, as dotted names, also inside functions.

    What stands below `if TYPE_CHECKING:` never runs. There are no relative imports.
    """
    names = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for branch in node.orelse:
                names += imported_names(ast.Module([branch], []))
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names += imported_names(node)
    return [name for name in names if name.split(".")[0] in CODE]
