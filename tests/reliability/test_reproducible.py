"""The same bytes everywhere: clones in other folders and environments, DVC's remote, experiments, two runs at once."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from every_method import METHODS, OUTPUTS
from tiny import ROOT, run

pytestmark = pytest.mark.timeout(300)

# Each has what the other has not; C with both switches off is a locale in which text is ASCII.
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
    """The tiny corpus, and an article beyond ASCII."""
    folder = tiny.write_corpus(tmp_path_factory.mktemp("reproducible") / "corpus", seed=1)
    for split in tiny.SPLITS:
        with (folder / f"{split}.txt").open("a", encoding="utf-8", newline="") as file:
            file.write(" = Ålesund, 日本 = \n \n The café in Ålesund costs 5 € , “quoted” . \n \n")
    return folder


@pytest.fixture(scope="module")
def author(tmp_path_factory, tiny_model, corpus) -> Path:
    """A project with a folder as DVC remote and a bare repository as git remote: run, committed, pushed to both."""
    shared = tmp_path_factory.mktemp("shared")
    project = tiny.make_project(tmp_path_factory.mktemp("author") / "project", tiny_model, corpus)
    run(project, "git", "init", "--quiet", "--bare", "--initial-branch=main", str(shared / "git"))
    run(project, "git", "remote", "add", "origin", str(shared / "git"))
    run(project, "dvc", "remote", "add", "--default", "shared", str(shared / "dvc"))
    run(project, "dvc", "repro")
    run(project, "dvc", "push")
    tiny.commit(project, "A first run")
    run(project, "git", "push", "--quiet", "origin", "main")
    return project


@pytest.fixture
def clone(author, tmp_path) -> Path:
    """A fresh clone of the author's git remote."""
    return fresh_clone(author, tmp_path / "clone")


@pytest.fixture(scope="module")
def pair(author, tmp_path_factory) -> list[Path]:
    """Two clones in which every method has run, each under another environment."""
    folder = tmp_path_factory.mktemp("pair")
    clones = [fresh_clone(author, folder / name) for name in ("one", "deeper/and ünlike the other")]
    for project, variables in zip(clones, ENVIRONMENTS, strict=True):
        command = 'umask $UMASK && exec "$0" "$@"'
        script = [sys.executable, str(ROOT / "tests/helpers/every_method.py"), *METHODS]
        path = os.pathsep.join([str(project), str(ROOT / "tests")])
        run(project, "sh", "-c", command, *script, PYTHONPATH=path, **variables)
    return clones


def fresh_clone(author: Path, folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    origin = run(author, "git", "remote", "get-url", "origin").strip()
    run(folder.parent, "git", "clone", "--quiet", origin, str(folder))
    return folder


def contents(project: Path, *names: str) -> dict[str, bytes]:
    """Return the bytes of these files, and of all files in these folders, by name."""
    found = {}
    for name in names:
        files = [project / name] if (project / name).is_file() else sorted((project / name).rglob("*"))
        files = [file for file in files if file.is_file()]
        assert files, f"{project} has no {name}"
        found |= {file.relative_to(project).as_posix(): file.read_bytes() for file in files}
    return found


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> set[str]:
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


def stages_run(output: str) -> list[str]:
    return re.findall(r"Running stage '(\w+)'", output)


# The same bytes


@pytest.mark.parametrize("name", METHODS)
def test_clones_in_other_folders_and_environments_give_the_same_bytes(pair, name):
    one, other = (contents(project / "results" / name, *OUTPUTS) for project in pair)
    assert differing(one, other) == set()
    assert {"data/raw/test.txt", "data/tokens/manifest.json", "metrics/eval.json"} < one.keys()


def test_the_environments_were_unlike(pair):
    scores = {(pair[0] / "results" / name / "metrics/eval.json").read_bytes() for name in METHODS}
    assert len(scores) == len(METHODS)  # no method passed for another
    modes = [(project / "results/lora/data/raw/test.txt").stat().st_mode & 0o777 for project in pair]
    assert modes == [0o664, 0o600]


def test_the_number_of_threads_is_recorded(pair):
    for project in pair:
        record = json.loads((project / "metrics/environment.json").read_text(encoding="utf-8"))
        assert record["train"]["threads"] == int(os.environ["OMP_NUM_THREADS"])


def test_dvc_gives_the_bytes_of_the_stages_by_themselves(author, pair):
    assert differing(contents(author, *OUTPUTS), contents(pair[0] / "results/lora", *OUTPUTS)) == set()


# Shared


@pytest.fixture
def offline(tmp_path) -> dict[str, str]:
    """Variables under which Python reaches no network."""
    (tmp_path / "offline").mkdir()
    (tmp_path / "offline/sitecustomize.py").write_text(NO_NETWORK, encoding="utf-8")
    variables = {"PYTHONPATH": str(tmp_path / "offline")}
    code = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')"
    assert "there is no network" in run(tmp_path, sys.executable, "-c", code, fails=True, **variables)
    return variables


@pytest.mark.parametrize("commands", [["dvc repro --pull"], ["dvc pull", "dvc repro"]], ids=" && ".join)
def test_a_clone_pulls_what_others_made_and_runs_nothing(author, clone, offline, commands):
    printed = "".join(run(clone, *command.split(), **offline) for command in commands)
    assert stages_run(printed) == []
    everything = ("data/base", "data/environment", *OUTPUTS, "metrics")
    assert differing(contents(author, *everything), contents(clone, *everything)) == set()
    assert run(clone, "git", "status", "--short") == ""


DRY = ("dvc", "repro", "--dry", "--allow-missing")


def test_the_lock_file_of_a_clone_is_up_to_date(clone):
    printed = run(clone, *DRY)
    assert "Data and pipelines are up to date." in printed
    assert stages_run(printed) == []


@pytest.mark.parametrize(
    ("file", "found", "instead", "stage"),
    [
        ("params.yaml", "learning_rate: 2.0e-3", "learning_rate: 1.0e-3", "train"),
        ("stages/train.py", '"""train: ', '"""Train: ', "train"),
        ("dvc.lock", r"(?s)(\n  train:.* path: data/adapter\n[^-]* md5: )\w{8}", r"\g<1>00000000", "evaluate"),
    ],
    ids=["parameter", "code", "hash"],
)
def test_a_lock_file_that_is_not_up_to_date_is_seen(clone, file, found, instead, stage):
    text, count = re.subn(found, instead, (clone / file).read_text(encoding="utf-8"), count=1)
    assert count == 1
    (clone / file).write_text(text, encoding="utf-8")
    # Without its inputs, DVC cannot even plan the stage that it would run.
    assert f"failed to reproduce '{stage}'" in run(clone, *DRY, fails=True)


# At once


def test_experiments_of_a_parallel_queue_are_right_and_travel(author, pair, clone):
    run(author, "dvc", "exp", "run", "--queue", "--name", "quantized", "-S", "method=qlora")
    run(author, "dvc", "exp", "run", "--queue", "--name", "whole", "-S", "method=full")
    run(author, "dvc", "exp", "run", "--run-all", "--jobs", "2")
    printed = run(author, "dvc", "exp", "push", "origin", "quantized", "whole")
    assert "Pushed experiment" in printed

    run(clone, "dvc", "exp", "pull", "origin", "quantized", "whole")
    for name, method in (("quantized", "qlora of 4 bits"), ("whole", "full")):
        run(clone, "dvc", "exp", "apply", name)
        alone = contents(pair[0] / "results" / method, *OUTPUTS)
        assert differing(contents(clone, *OUTPUTS), alone) == set()
        assert stages_run(run(clone, "dvc", "repro")) == []


def test_of_two_runs_at_once_one_stops_at_the_lock_and_nothing_is_damaged(author, clone):
    run(clone, "dvc", "pull")
    command = ["dvc", "repro", "--force", "--single-item", "train"]
    variables = tiny.environment() | {"PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    with subprocess.Popen(command, cwd=clone, env=variables, **pipes) as first:
        assert any("Running stage 'train'" in line for line in first.stdout)
        refused = run(clone, *command, fails=True)
        rest = first.stdout.read()
    assert first.returncode == 0, rest
    assert "is busy, it is being blocked by:" in refused
    assert f"(PID {first.pid}): " in refused
    assert "train: validation loss" not in refused

    assert stages_run(run(clone, "dvc", "repro")) == []
    assert differing(contents(author, "data/base", *OUTPUTS), contents(clone, "data/base", *OUTPUTS)) == set()
