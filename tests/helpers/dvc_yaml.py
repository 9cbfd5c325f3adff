"""What dvc.yaml declares for each stage, and which files of the repository a stage imports."""

import ast
import re
from pathlib import Path

import yaml
from tiny import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
CODE_FOLDERS = ("stages", "gpt2lora")


def stages_run(output: str) -> list[str]:
    """Return the stages that DVC ran, according to what it printed."""
    return re.findall(r"Running stage '(\w+)'", output)


def computing_stages_run(output: str) -> list[str]:
    """Return the stages that DVC ran without `sources`, which writes links in no time and is in no cache."""
    return [stage for stage in stages_run(output) if stage != "sources"]


def declared_params(stage: str, project: Path) -> set[str]:
    """Return the dotted names of the parameters that a stage declares; a section counts as all of its keys."""
    values = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    names = set()
    for key in STAGES[stage]["params"]:
        key = key.replace("${preset}", values["preset"]).replace("${method}", values["method"])
        value = values
        for part in key.split("."):
            value = value[part]
        names |= {f"{key}.{name}" for name in value} if isinstance(value, dict) else {key}
    return names


def declared_files(stage: str, *kinds: str) -> set[str]:
    """Return the files and folders that a stage declares under some of deps, outs, metrics and plots."""
    entries = [entry for kind in kinds for entry in STAGES[stage].get(kind, [])]
    return {next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries}


def declared_code(stage: str) -> set[str]:
    """Return the files and folders of code that a stage depends on."""
    return {name for name in declared_files(stage, "deps") if name.split("/")[0] in CODE_FOLDERS}


def imported_files(stage: str, root: Path) -> set[str]:
    """Return the files below `root` that `python -m stages.STAGE` can import, directly or not, its script included.

    An `__init__.py` that holds only a docstring is left out, since no change to it changes what a stage does.
    """
    files: set[str] = set()
    modules = ["stages", f"stages.{stage}"]
    while modules:
        path = modules.pop().replace(".", "/")
        name = f"{path}/__init__.py" if (root / path).is_dir() else f"{path}.py"
        if name not in files and (root / name).is_file():  # otherwise it is a name that a module defines
            tree = ast.parse((root / name).read_text(encoding="utf-8"))
            if not is_docstring(tree):
                files.add(name)
            modules += imported_names(tree)
    return files


def is_docstring(tree: ast.Module) -> bool:
    """Tell whether a module holds only a docstring."""
    return len(tree.body) == 1 and ast.get_docstring(tree) is not None


def imported_names(tree: ast.AST) -> list[str]:
    """Return the dotted names that a file imports from CODE_FOLDERS, also those imported inside functions.

    Imports below `if TYPE_CHECKING:` never run, so they are left out. Relative imports are not allowed.
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
    return [name for name in names if name.split(".")[0] in CODE_FOLDERS]
