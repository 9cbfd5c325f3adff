"""dvc.yaml tells the truth: what reruns what, the files and parameters of each stage, what experiments leave behind."""

import ast
import csv
import dataclasses
import importlib
import io
import json
import math
import shutil
import time
from pathlib import Path

import pytest
import tiny
import yaml
from dvc_yaml import STAGES, declared_code, declared_files, declared_leaves, imported_files, is_docstring, stages_run
from tiny import ROOT, run, set_param

NAMES = ("eval.json", "loss.csv", "positions.csv", "train.json", "train_timings.json")
PLOTS = ("accuracy_by_position", "gradient_norm", "learning_rate", "loss_by_position", "loss_by_step", "loss_by_tokens")
METRICS = {*(f"metrics/{name}" for name in NAMES), *(f"metrics/plots/{name}.png" for name in PLOTS)}

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def finished_project(tmp_path_factory, tiny_model, tiny_corpus) -> Path:
    """A project after its first run, committed."""
    project = tiny.make_project(tmp_path_factory.mktemp("finished") / "project", tiny_model, tiny_corpus)
    assert stages_run(run(project, "dvc", "repro")) == list(STAGES)
    tiny.commit(project, "A first run")
    return project


@pytest.fixture
def finished(finished_project) -> Path:
    """That project, put back to its first run after the test."""
    yield finished_project
    run(finished_project, "git", "reset", "--hard", "--quiet")
    run(finished_project, "git", "clean", "-fdq")
    run(finished_project, "dvc", "checkout", "--quiet")


def repro(project: Path) -> list[str]:
    """Return the stages that `dvc repro` runs; the run cache would restore a run from another test instead."""
    return stages_run(run(project, "dvc", "repro", "--no-run-cache"))


def changed_files(project: Path) -> set[str]:
    """Return what git calls changed or new."""
    return {line[3:] for line in run(project, "git", "status", "--short", "--untracked-files=all").splitlines()}


# What reruns what


def test_a_first_run_adds_nothing_but_the_lock_file_and_metrics(finished):
    added = run(finished, "git", "show", "--format=", "--name-status", "HEAD").split("\n")
    assert set(filter(None, added)) == {f"A\t{name}" for name in {"dvc.lock", *METRICS}}


def test_nothing_reruns_when_nothing_changed(finished):
    started = time.perf_counter()
    assert repro(finished) == []
    seconds = time.perf_counter() - started
    print(f"dvc repro with nothing to do: {seconds:.2f} s")
    assert seconds < 3
    assert changed_files(finished) == set()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"method": "full"}, "train evaluate"),
        ({"train.learning_rate": 0.02, "lora.r": 3}, "train evaluate"),
        ({"tokenize.block_size": 24}, "tokenize train evaluate"),
        ({"evaluate.batch_size": 5}, "evaluate"),
        ({"evaluate.protocol": "hf", "evaluate.stride": 16}, "evaluate"),
        ({"prepare.fraction": 0.5}, "prepare tokenize train evaluate"),
        # Of variants that are not chosen:
        ({"methods.qlora.bits": 8, "methods.qlora.quant_type": "fp4", "methods.qlora.double_quant": False}, ""),
        ({"presets.gpt2.model": "other/model", "presets.gpt2.dataset": "other/data", "presets.sample.model": None}, ""),
    ],
    ids=lambda case: case if isinstance(case, str) else next(iter(case)),
)
def test_a_parameter_reruns_the_stages_that_use_it(finished, values, expected):
    for key, value in values.items():
        set_param(finished, key, value)
    assert repro(finished) == expected.split()
    assert changed_files(finished) <= {"params.yaml", "dvc.lock", *METRICS}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("params.yaml", ""),
        ("stages/train.py", "train"),  # the adapter comes out the same, byte for byte: evaluate need not run
    ],
)
def test_a_comment_reruns_the_stages_that_use_the_file(finished, name, expected):
    with (finished / name).open("a", encoding="utf-8") as file:
        file.write("# a comment\n")
    assert repro(finished) == expected.split()


def test_a_failed_stage_loses_nothing(finished):
    def contents() -> dict[str, bytes]:
        files = [path for folder in ("data", "metrics") for path in (finished / folder).rglob("*") if path.is_file()]
        return {path.relative_to(finished).as_posix(): path.read_bytes() for path in files}

    before = contents()
    assert {name.split("/")[1] for name in before} >= {"adapter", "base", "raw", "tokens", "eval.json", "train.json"}
    set_param(finished, "train.learning_rate", -1)
    output = run(finished, "dvc", "repro", fails=True)
    assert stages_run(output) == ["train"]
    assert "train.learning_rate" in output

    # DVC removes a stage's own outputs before it runs. With the old value back, its run cache has them all.
    own = tuple(declared_files("train", "outs", "metrics", "plots"))
    after = contents()
    assert all(after[name] == content for name, content in before.items() if not name.startswith(own))
    run(finished, "git", "checkout", "params.yaml")
    assert stages_run(run(finished, "dvc", "repro")) == []
    assert contents() == before
    assert changed_files(finished) == set()


# The files a stage imports


def files_of(stage: str, root: Path) -> dict[str, set[str]]:
    """Return for each file or folder of code that a stage declares the Python files that it stands for."""
    found = {}
    for name in declared_code(stage):
        files = (root / name).rglob("*.py") if (root / name).is_dir() else [root / name]
        found[name] = {
            file.relative_to(root).as_posix() for file in files if not is_docstring(ast.parse(file.read_text()))
        }
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_every_imported_file_is_a_dependency_and_no_other(stage):
    assert set.union(*files_of(stage, ROOT).values()) == imported_files(stage, ROOT)


@pytest.mark.parametrize("stage", STAGES)
def test_a_dependency_holds_code_and_none_holds_another(stage):
    found = files_of(stage, ROOT)
    assert all(found.values())
    assert sum(map(len, found.values())) == len(set.union(*found.values()))


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
    found = imported_files("a", tmp_path)
    assert {"stages/__init__.py", "stages/a.py"} <= found
    assert not any(name.startswith("gpt2lora") and name.endswith("__init__.py") for name in found)
    assert ("gpt2lora/model/b.py" in found) == followed


# The parameters a stage reads


@pytest.fixture
def reads(monkeypatch) -> set[str]:
    """The parameters that stages read while the test runs, by their full names, as far as they use them.

    A section's keys count when an attribute of the dataclass is read; the checks in `__post_init__` do not.
    """
    from gpt2lora.pipeline import params

    found = set()
    section, value = params.section, params.value

    def recording_section(key, schema):
        names = {field.name for field in dataclasses.fields(schema)}

        class Recording(schema):
            def __getattribute__(self, name):
                if name in names:
                    found.add(f"{key}.{name}")
                return super().__getattribute__(name)

        result = section(key, schema)
        result.__class__ = Recording
        return result

    def recording_value(key, kind):
        found.add(key)
        return value(key, kind)

    monkeypatch.setattr(params, "section", recording_section)
    monkeypatch.setattr(params, "value", recording_value)
    return found


@pytest.fixture
def hub_of_folders(monkeypatch, tiny_model, tiny_corpus):
    """In the place of the hub: it has every model and every dataset."""
    from gpt2lora.sources import hub

    splits = {"train": "train", "validation": "valid", "test": "test"}
    rows = {split: (tiny_corpus / f"{name}.txt").read_text().splitlines() for split, name in splits.items()}
    monkeypatch.setattr(hub, "fetch_model", lambda name, revision: tiny_model)
    monkeypatch.setattr(hub, "fetch_dataset", lambda name, config, revision: rows)


# Between them, the variants of a stage read every key.
VARIANTS = {
    "base": [{}, {"preset": "gpt2"}],
    "prepare": [{}, {"preset": "gpt2"}],
    "tokenize": [{}],
    "train": [{}, {"method": "qlora"}, {"method": "full"}],
    "evaluate": [{}],
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_uses_what_it_declares_and_nothing_else(stage, finished, reads, hub_of_folders, monkeypatch, tmp_path):
    used, declared = set(), set()
    for number, variant in enumerate(VARIANTS[stage]):
        # Only what the stage declares is there.
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(finished / "params.yaml", folder)
        inputs = {name for name in declared_files(stage, "deps")} - declared_code(stage)
        for name in inputs:
            (folder / name).parent.mkdir(exist_ok=True)
            (shutil.copytree if (finished / name).is_dir() else shutil.copyfile)(finished / name, folder / name)
        for key, value in variant.items():
            set_param(folder, key, value)

        monkeypatch.chdir(folder)
        reads.clear()
        importlib.import_module(f"stages.{stage}").main.main([], standalone_mode=False)

        outputs = declared_files(stage, "outs", "metrics", "plots")
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"params.yaml"}
        assert all((folder / name).exists() for name in outputs)
        assert all(any(f"{name}/".startswith(f"{known}/") for known in inputs | outputs) for name in files), files

        # Which preset or method a key was read from does not matter.
        values = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
        for names, into in ((reads, used), (declared_leaves(stage, folder), declared)):
            names = {name.replace(f"presets.{values['preset']}.", "presets.${preset}.") for name in names}
            into |= {name.replace(f"methods.{values['method']}.", "methods.${method}.") for name in names}
    assert used == declared


CODE = sorted(
    path.relative_to(ROOT).as_posix() for name in ("stages", "gpt2lora") for path in (ROOT / name).rglob("*.py")
)


@pytest.mark.parametrize("name", sorted(set(CODE) - {"gpt2lora/pipeline/params.py"}))
def test_params_yaml_is_read_in_one_place(name):
    nodes = list(ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))))
    assert not [node for node in nodes if isinstance(node, ast.Constant) and node.value == "params.yaml"]
    assert not [node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) == "params.FILE"]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {module for module in modules if module and module.split(".")[0] in ("yaml", "omegaconf", "dvc")}


# Experiments


def experiments(project: Path) -> dict[str, dict[str, str]]:
    """Return the table of `dvc exp show`, by experiment."""
    rows = csv.DictReader(io.StringIO(run(project, "dvc", "exp", "show", "--csv")))
    return {row["Experiment"] or row["rev"]: row for row in rows}


def test_an_experiment_in_the_workspace(finished):
    output = run(finished, "dvc", "exp", "run", "--name", "quantized", "-S", "method=qlora")
    assert stages_run(output) == ["train", "evaluate"]
    changed = {"params.yaml", "dvc.lock", *METRICS} - {"metrics/plots/learning_rate.png"}  # drawn again, the same
    assert changed_files(finished) == changed

    changes = json.loads(run(finished, "dvc", "metrics", "diff", "--json"))
    bytes_held = changes["metrics/train.json"]["frozen_base_bytes"]
    assert bytes_held["new"] < bytes_held["old"]
    assert changes["metrics/eval.json"]["tuned.loss"]["diff"] != 0
    rows = [row for file in changes.values() for row in file.values()]
    assert all(math.isfinite(number) for row in rows for number in row.values())

    table = experiments(finished)
    assert table["quantized"]["method"] == "qlora"
    assert table["main"]["method"] == "lora"
    assert table["quantized"]["tuned.loss"] == table["workspace"]["tuned.loss"] != table["main"]["tuned.loss"]

    run(finished, "dvc", "plots", "show")
    page = (finished / "dvc_plots/index.html").read_text(encoding="utf-8")
    assert "Loss while training" in page
    assert "validation_loss" in page
    assert "metrics_plots_loss_by_position.png" in page  # shown without a network, too
    assert changed_files(finished) == changed


def test_an_experiment_in_a_temporary_folder(finished):
    output = run(finished, "dvc", "exp", "run", "--temp", "--name", "apart", "-S", "train.learning_rate=5e-5")
    assert stages_run(output) == ["train", "evaluate"]
    assert changed_files(finished) == set()
    assert float(experiments(finished)["apart"]["train.learning_rate"]) == 5e-5

    # Its report comes with it, and the records of the stages that it did not run are those of the first run.
    before = json.loads((finished / "metrics/environment.json").read_text(encoding="utf-8"))
    run(finished, "dvc", "exp", "apply", "apart")
    after = json.loads((finished / "metrics/environment.json").read_text(encoding="utf-8"))
    same = {stage for stage in after if after[stage] == before[stage]}
    assert same == {"base", "prepare", "tokenize"}
    loss = json.loads((finished / "metrics/eval.json").read_text(encoding="utf-8"))["tuned"]["loss"]
    assert f"| {loss:.4f} |" in (finished / "metrics/report.md").read_text(encoding="utf-8")


def test_queued_experiments(finished):
    run(finished, "dvc", "exp", "run", "--queue", "-S", "method=lora,qlora", "-S", "train.learning_rate=0.005")
    output = run(finished, "dvc", "exp", "run", "--run-all")
    assert stages_run(output) == ["train", "evaluate"] * 2
    assert changed_files(finished) == set()
    table = experiments(finished).values()
    done = [row for row in table if row["State"] == "Success" and row["train.learning_rate"] == "0.005"]
    assert sorted(row["method"] for row in done) == ["lora", "qlora"]
    assert all(float(row["tuned.loss"]) < float(row["base.loss"]) for row in done)


SHARED, APART = ["base", "prepare", "tokenize"], ["train", "evaluate"]


def test_temporary_experiments_of_a_clone_share_what_they_can(project):
    """Without a dvc.lock in git: with one, DVC runs what its cache lacks of it, and never looks into the run cache."""
    for method, expected in (("lora", [*SHARED, *APART]), ("qlora", APART)):
        output = run(project, "dvc", "exp", "run", "--temp", "--name", method, "-S", f"method={method}")
        assert stages_run(output) == expected
    assert run(project, "git", "status", "--short") == ""


def test_queued_experiments_of_a_clone_share_what_they_can(project):
    run(project, "dvc", "exp", "run", "--queue", "-S", "method=lora,qlora")
    output = run(project, "dvc", "exp", "run", "--run-all")
    assert stages_run(output) == [*SHARED, *APART, *APART]
    assert run(project, "git", "status", "--short") == ""


def test_an_unknown_method_stops_before_any_stage(finished):
    output = run(finished, "dvc", "exp", "run", "-S", "method=typo", fails=True)
    assert stages_run(output) == []
    assert "methods.typo" in output
