"""What a user's git and shell do to a clone and to the values of -S."""

import re
import shlex
import subprocess
import sys

import pytest
import tiny
from ruamel.yaml import YAML


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of the working tree with two commits."""
    folder = tmp_path_factory.mktemp("clones") / "repository"
    tiny.copy_project(folder)
    tiny.commit(folder, "A first commit")
    tiny.run(folder, "git", "-c", "user.name=T", "-c", "user.email=t@x", "commit", "--allow-empty", "-qm", "Another")
    return folder


def test_a_shallow_clone_is_refused_before_the_demo_runs(repository, tmp_path):
    """There `dvc exp run --temp` runs everything, exits with 0, and the experiment is lost."""
    tiny.run(tmp_path, "git", "clone", "--quiet", "--depth", "1", f"file://{repository}", "clone")
    command = [sys.executable, "tools/demo.py"]
    demo = subprocess.run(command, cwd=tmp_path / "clone", env=tiny.environment(), capture_output=True, text=True)
    assert demo.returncode == 1
    assert demo.stderr.startswith("Error: this clone is shallow")
    assert "run `git fetch --unshallow` first" in demo.stderr
    assert not demo.stdout


def test_a_clone_with_autocrlf_has_the_same_bytes(repository, tmp_path):
    """Other bytes of code and parameters would rerun every stage."""
    tiny.run(tmp_path, "git", "-c", "core.autocrlf=true", "clone", "--quiet", str(repository), "clone")
    names = tiny.run(repository, "git", "ls-files", "-z").split("\0")[:-1]
    assert len(names) > 100
    assert [
        name for name in names if (tmp_path / "clone" / name).read_bytes() != (repository / name).read_bytes()
    ] == []


def test_the_quoting_in_the_readme_works(tmp_path, monkeypatch):
    from dvc.utils.hydra import apply_overrides, get_hydra_sweeps

    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_bytes((tiny.ROOT / "params.yaml").read_bytes())
    example = re.search(r"`(-S \".*?\")`", (tiny.ROOT / "README.md").read_text(encoding="utf-8"))[1]
    option, value = shlex.split(example)
    assert option == "-S"
    (sweep,) = get_hydra_sweeps({"params.yaml": [value]})  # of --queue, where a comma separates values
    apply_overrides("params.yaml", sweep["params.yaml"])
    written = YAML(typ="safe").load(tmp_path / "params.yaml")
    assert written["presets"]["local"]["dataset"] == "~/my texts/a, b=c.txt"
