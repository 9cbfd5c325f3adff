"""The same bytes everywhere: in clones in other folders and environments, with DVC's remote, and in parallel runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from dvc_yaml import stages_run
from every_method import METHODS, OUTPUTS
from tiny import ROOT, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# They differ in every variable. In the second one text is ASCII: LC_ALL=C without UTF-8 mode and locale coercion.
ENVIRONMENTS = [
    {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "TZ": "UTC0", "UMASK": "002", "RAYON_NUM_THREADS": "1"},
    {
        "PYTHONHASHSEED": "4242",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "TZ": "XYZ-13:45",
        "UMASK": "077",
        "RAYON_NUM_THREADS": "2",
    },
]
NO_NETWORK = """
import socket

def refuse(self, address):
    raise OSError(f"there is no network: {address}")

class Offline(socket.socket):
    def connect(self, address):
        return super().connect(address) if self.family == socket.AF_UNIX else refuse(self, address)
    connect_ex = connect

socket.socket = Offline
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """The tiny corpus with an article that is not ASCII."""
    folder = tiny.write_corpus(tmp_path_factory.mktemp("reproducible") / "corpus", seed=1)
    for split in tiny.SPLITS:
        with (folder / f"{split}.txt").open("a", encoding="utf-8", newline="") as file:
            file.write(" = Ålesund, 日本 = \n \n The café in Ålesund costs 5 € , “quoted” . \n \n")
    return folder


@pytest.fixture(scope="module")
def author(tmp_path_factory, tiny_model, corpus) -> Path:
    """A project that was run, committed, and pushed to its git remote and its DVC remote, both local folders."""
    remotes = tmp_path_factory.mktemp("remotes")
    project = tiny.make_project(tmp_path_factory.mktemp("author") / "project", tiny_model, corpus)
    run(project, "git", "init", "--quiet", "--bare", "--initial-branch=main", str(remotes / "git"))
    run(project, "git", "remote", "add", "origin", str(remotes / "git"))
    run(project, "dvc", "remote", "add", "--default", "shared", str(remotes / "dvc"))
    run(project, "dvc", "repro")
    run(project, "dvc", "push")
    tiny.commit(project, "A first run")
    run(project, "git", "push", "--quiet", "origin", "main")
    return project


@pytest.fixture
def clone(author, tmp_path) -> Path:
    """A fresh clone of the author's git remote."""
    return make_clone(author, tmp_path / "clone")


@pytest.fixture(scope="module")
def clones(author, tmp_path_factory) -> list[Path]:
    """Two clones in which every method has run, each in another environment."""
    folder = tmp_path_factory.mktemp("clones")
    clones = [make_clone(author, folder / name) for name in ("one", "deeper/and ünlike the other")]
    for project, variables in zip(clones, ENVIRONMENTS, strict=True):
        command = 'umask $UMASK && exec "$0" "$@"'
        script = [sys.executable, str(ROOT / "tests/helpers/every_method.py"), *METHODS]
        path = os.pathsep.join([str(project), str(ROOT / "tests")])
        run(project, "sh", "-c", command, *script, PYTHONPATH=path, **variables)
    return clones


def make_clone(author: Path, folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    origin = run(author, "git", "remote", "get-url", "origin").strip()
    run(folder.parent, "git", "clone", "--quiet", origin, str(folder))
    return folder


def read_files(project: Path, *names: str) -> dict[str, bytes]:
    """Return the bytes of files, and of all files in folders, by their path in the project."""
    contents = {}
    for name in names:
        files = [project / name] if (project / name).is_file() else sorted((project / name).rglob("*"))
        files = [file for file in files if file.is_file()]
        assert files, f"{project} has no {name}"
        contents |= {file.relative_to(project).as_posix(): file.read_bytes() for file in files}
    return contents


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> set[str]:
    """Return the names of the files that differ, or that only one of both has."""
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


# Clones


@pytest.mark.parametrize("name", METHODS)
def test_clones_in_other_environments_write_the_same_bytes(clones, name):
    one, other = (read_files(project / "results" / name, *OUTPUTS) for project in clones)
    assert differing(one, other) == set()
    assert {"data/raw/test.txt", "data/tokens/manifest.json", "metrics/eval.json"} < one.keys()


def test_the_methods_and_environments_of_clones_differ(clones):
    scores = {(clones[0] / "results" / name / "metrics/eval.json").read_bytes() for name in METHODS}
    assert len(scores) == len(METHODS)
    modes = [(project / "results/lora/data/raw/test.txt").stat().st_mode & 0o777 for project in clones]
    assert modes == [0o664, 0o600]


def test_the_number_of_threads_is_recorded(clones):
    for project in clones:
        record = json.loads((project / "metrics/environment.json").read_text(encoding="utf-8"))
        assert record["train"]["threads"] == int(os.environ["OMP_NUM_THREADS"])


def test_stages_write_the_same_bytes_with_and_without_dvc(author, clones):
    assert differing(read_files(author, *OUTPUTS), read_files(clones[0] / "results/lora", *OUTPUTS)) == set()


# Remotes


@pytest.fixture
def offline(tmp_path) -> dict[str, str]:
    """Environment variables under which Python reaches no network."""
    (tmp_path / "offline").mkdir()
    (tmp_path / "offline/sitecustomize.py").write_text(NO_NETWORK, encoding="utf-8")
    variables = {"PYTHONPATH": str(tmp_path / "offline")}
    code = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')"
    assert "there is no network" in run(tmp_path, sys.executable, "-c", code, fails=True, **variables)
    return variables


@pytest.mark.parametrize("commands", [["dvc repro --pull"], ["dvc pull", "dvc repro"]], ids=" && ".join)
def test_a_clone_pulls_all_outputs_and_runs_nothing(author, clone, offline, commands):
    printed = "".join(run(clone, *command.split(), **offline) for command in commands)
    assert set(stages_run(printed)) <= {"sources"}
    names = ("data/base", "data/environment", *OUTPUTS, "metrics")
    assert differing(read_files(author, *names), read_files(clone, *names)) == set()
    assert run(clone, "git", "status", "--short") == ""


DRY_RUN = ("dvc", "repro", "--dry", "--allow-missing")


def test_the_lock_file_of_a_clone_is_up_to_date(clone):
    printed = run(clone, *DRY_RUN)
    assert "Data and pipelines are up to date." in printed
    assert stages_run(printed) == []


@pytest.mark.parametrize(
    ("file", "pattern", "replacement", "stage"),
    [
        ("params.yaml", "learning_rate: 1.0e-3", "learning_rate: 2.0e-3", "train"),
        ("stages/train.py", '"""train: ', '"""Train: ', "train"),
        ("dvc.lock", r"(?s)(\n  train:.* path: data/adapter\n[^-]* md5: )\w{8}", r"\g<1>00000000", "evaluate"),
    ],
    ids=["parameter", "code", "hash"],
)
def test_an_outdated_lock_file_is_detected(clone, file, pattern, replacement, stage):
    text, count = re.subn(pattern, replacement, (clone / file).read_text(encoding="utf-8"), count=1)
    assert count == 1
    (clone / file).write_text(text, encoding="utf-8")
    # The clone lacks the inputs, and without them DVC cannot even plan to run the stage.
    assert f"failed to reproduce '{stage}'" in run(clone, *DRY_RUN, fails=True)


# Parallel runs


def test_experiments_of_a_parallel_queue_can_be_shared(author, clones, clone):
    """They have the same bytes as the same methods run alone."""
    run(author, "dvc", "exp", "run", "--queue", "--name", "quantized", "-S", "method=qlora")
    run(author, "dvc", "exp", "run", "--queue", "--name", "full", "-S", "method=full")
    run(author, "dvc", "exp", "run", "--run-all", "--jobs", "2")
    printed = run(author, "dvc", "exp", "push", "origin", "quantized", "full")
    assert "Pushed experiment" in printed

    run(clone, "dvc", "exp", "pull", "origin", "quantized", "full")
    for experiment, method in (("quantized", "qlora, 4 bits"), ("full", "full")):
        run(clone, "dvc", "exp", "apply", experiment)
        expected = read_files(clones[0] / "results" / method, *OUTPUTS)
        assert differing(read_files(clone, *OUTPUTS), expected) == set()
        assert set(stages_run(run(clone, "dvc", "repro"))) <= {"sources"}


def test_a_second_dvc_repro_stops_at_the_lock_of_the_first(author, clone):
    run(clone, "dvc", "pull")
    run(clone, "dvc", "repro", "sources")
    command = ["dvc", "repro", "--force", "--single-item", "train"]
    variables = tiny.environment() | {"PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    with subprocess.Popen(command, cwd=clone, env=variables, **pipes) as first:
        assert any("Running stage 'train'" in line for line in first.stdout)
        second_output = run(clone, *command, fails=True)
        first_output = first.stdout.read()
    assert first.returncode == 0, first_output
    assert "is busy, it is being blocked by:" in second_output
    assert f"(PID {first.pid}): " in second_output
    assert "train: validation loss" not in second_output

    assert set(stages_run(run(clone, "dvc", "repro"))) <= {"sources"}
    names = ("data/base", *OUTPUTS)
    assert differing(read_files(author, *names), read_files(clone, *names)) == set()
