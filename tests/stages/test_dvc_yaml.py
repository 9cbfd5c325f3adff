"""dvc.yaml declares for each stage the files that it imports and the parameters that it reads, and no others."""

import ast
import dataclasses
import importlib
import shutil
from pathlib import Path

import pytest
import yaml
from dvc_yaml import STAGES, declared_code, declared_files, declared_params, imported_files, is_docstring
from tiny import ROOT, set_param

pytestmark = pytest.mark.timeout(300)


# Imported files


def declared_modules(stage: str, root: Path) -> dict[str, set[str]]:
    """Return the Python files that each file or folder of code stands for that a stage declares."""
    modules = {}
    for name in declared_code(stage):
        files = (root / name).rglob("*.py") if (root / name).is_dir() else [root / name]
        modules[name] = {
            file.relative_to(root).as_posix() for file in files if not is_docstring(ast.parse(file.read_text()))
        }
    return modules


@pytest.mark.parametrize("stage", STAGES)
def test_the_declared_files_are_the_imported_ones(stage):
    assert set.union(*declared_modules(stage, ROOT).values()) == imported_files(stage, ROOT)


@pytest.mark.parametrize("stage", STAGES)
def test_no_dependency_is_empty_or_part_of_another(stage):
    modules = declared_modules(stage, ROOT)
    assert all(modules.values())
    assert sum(map(len, modules.values())) == len(set.union(*modules.values()))


@pytest.mark.parametrize(
    ("line", "followed"),
    [
        ("from gpt2lora.model import b", True),
        ("from gpt2lora.model import a, b as c", True),
        ("from gpt2lora.model.b import thing", True),
        ("import gpt2lora.model.b", True),
        ("from gpt2lora.model import through", True),
        ("def f():\n    from gpt2lora.model import b", True),
        ("try:\n    import json\nexcept ImportError:\n    from gpt2lora.model import b", True),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from gpt2lora.model import b", True),
        ("if TYPE_CHECKING:\n    from gpt2lora.model import b", False),
        ("if TYPE_CHECKING:\n    if True:\n        from gpt2lora.model.b import thing", False),
        ("from gpt2lora.model.other import b", False),
        ("import b", False),
        ("# from gpt2lora.model import b", False),
    ],
)
def test_imports_are_followed(tmp_path, line, followed):
    (tmp_path / "stages").mkdir()
    (tmp_path / "gpt2lora/model").mkdir(parents=True)
    sources = {
        "stages/__init__": "import json",
        "stages/a": line,
        "gpt2lora/__init__": '"""A docstring."""',
        "gpt2lora/model/__init__": '"""A docstring."""',
        "gpt2lora/model/b": "",
        "gpt2lora/model/other": "",
        "gpt2lora/model/through": "def f():\n    from gpt2lora.model import b",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    files = imported_files("a", tmp_path)
    assert {"stages/__init__.py", "stages/a.py"} <= files
    assert not any(name.startswith("gpt2lora") and name.endswith("__init__.py") for name in files)
    assert ("gpt2lora/model/b.py" in files) == followed


# Parameters


@pytest.fixture
def params_read(monkeypatch) -> set[str]:
    """The dotted names of the parameters that stages read while the test runs.

    A key of a section counts when its attribute of the dataclass is read, but not when `__post_init__` checks it.
    """
    from gpt2lora.pipeline import params

    read = set()
    section, value = params.section, params.value

    def recording_section(key, schema):
        names = {field.name for field in dataclasses.fields(schema)}

        class Recording(schema):
            def __getattribute__(self, name):
                if name in names:
                    read.add(f"{key}.{name}")
                return super().__getattribute__(name)

        result = section(key, schema)
        result.__class__ = Recording
        return result

    def recording_value(key, kind):
        read.add(key)
        return value(key, kind)

    monkeypatch.setattr(params, "section", recording_section)
    monkeypatch.setattr(params, "value", recording_value)
    return read


@pytest.fixture
def fake_hub(monkeypatch, tiny_model, tiny_corpus) -> None:
    """A hub on which every model is the tiny model and every dataset the tiny corpus."""
    from gpt2lora.sources import hub

    splits = {"train": "train", "validation": "valid", "test": "test"}
    rows = {split: (tiny_corpus / f"{name}.txt").read_text().splitlines() for split, name in splits.items()}
    monkeypatch.setattr(hub, "fetch_config", lambda name, revision: tiny_model)
    monkeypatch.setattr(hub, "fetch_model", lambda name, revision: tiny_model)
    monkeypatch.setattr(hub, "fetch_dataset", lambda name, config, revision, column: rows)


# Runs of each stage that together read all of its parameters.
VARIANTS = {
    "sources": [{}, {"preset": "gpt2"}],
    "base": [{}, {"preset": "gpt2"}],
    "prepare": [{}, {"preset": "gpt2"}],
    "tokenize": [{}],
    "train": [{}, {"method": "qlora"}, {"method": "full"}],
    "evaluate": [{}],
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_uses_exactly_what_it_declares(stage, finished_project, params_read, fake_hub, monkeypatch, tmp_path):
    used, declared = set(), set()
    for number, variant in enumerate(VARIANTS[stage]):
        # The folder holds only what the stage declares.
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(finished_project / "params.yaml", folder)
        inputs = {name for name in declared_files(stage, "deps")} - declared_code(stage)
        for name in inputs:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            source = finished_project / name
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / name)
        for key, value in variant.items():
            set_param(folder, key, value)

        monkeypatch.chdir(folder)
        params_read.clear()
        module = importlib.import_module(f"stages.{stage}")
        for check in ("check_params", "check_context", "check_layers"):  # these decide nothing, they only refuse
            monkeypatch.setattr(module, check, lambda *_: None, raising=False)
        module.main.main([], standalone_mode=False)

        outputs = declared_files(stage, "outs", "metrics", "plots")
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"params.yaml"}
        if stage == "sources":  # DVC must not know the links to the user's files as outputs, which it may change
            files -= {"data/sources/model", "data/sources/dataset", "data/sources/adapter"}
        assert all((folder / name).exists() for name in outputs)
        assert all(any(f"{name}/".startswith(f"{known}/") for known in inputs | outputs) for name in files), files

        # A key counts as the same in every preset and method.
        values = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
        for names, result in ((params_read, used), (declared_params(stage, folder), declared)):
            names = {name.replace(f"presets.{values['preset']}.", "presets.${preset}.") for name in names}
            result |= {name.replace(f"methods.{values['method']}.", "methods.${method}.") for name in names}
    assert used == declared


CODE = sorted(
    path.relative_to(ROOT).as_posix() for name in ("stages", "gpt2lora") for path in (ROOT / name).rglob("*.py")
)


@pytest.mark.parametrize("name", sorted(set(CODE) - {"gpt2lora/pipeline/params.py"}))
def test_only_the_params_module_reads_params_yaml(name):
    nodes = list(ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))))
    assert not [node for node in nodes if isinstance(node, ast.Constant) and node.value == "params.yaml"]
    assert not [node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) == "params.FILE"]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {
        module for module in modules if module and module.split(".")[0] in ("yaml", "ruamel", "omegaconf", "dvc")
    }
