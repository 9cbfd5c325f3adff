"""Experiments and adapters for others: in the order of README, through a git remote and a remote of DVC."""

from pathlib import Path

import pytest
import tiny
from bad_input import read_files
from dvc_yaml import computing_stages_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_experiments_carry_their_data_once_the_remote_is_committed(project, tmp_path):
    """An experiment keeps the configuration that it was made with: without a remote, only its git part is pushed."""
    git, remote = tmp_path / "git", tmp_path / "remote"
    tiny.run(project, "git", "init", "--quiet", "--bare", "--initial-branch=main", str(git))
    tiny.run(project, "git", "remote", "add", "origin", str(git))
    tiny.run(project, "dvc", "exp", "run", "--temp", "--name", "before")
    tiny.run(project, "dvc", "remote", "add", "--default", "shared", str(remote))
    tiny.commit(project, "A remote")
    tiny.run(project, "git", "push", "--quiet", "origin", "main")
    tiny.run(project, "dvc", "exp", "push", "origin", "before")
    assert not remote.exists()

    # The same experiment once more comes from the cache.
    output = tiny.run(project, "dvc", "exp", "run", "--temp", "--name", "after")
    assert computing_stages_run(output) == []
    assert "files uploaded" in tiny.run(project, "dvc", "exp", "push", "origin", "after")

    clone = tmp_path / "clone"
    tiny.run(tmp_path, "git", "clone", "--quiet", str(git), str(clone))
    tiny.run(clone, "dvc", "exp", "pull", "origin", "after")
    tiny.run(clone, "dvc", "exp", "apply", "after")
    tiny.commit(clone, "The adapter")
    tiny.run(clone, "git", "tag", "--annotate", "adapter@v1.0.0", "--message", "The first")
    tiny.run(clone, "git", "push", "--quiet", "origin", "main", "adapter@v1.0.0")

    printed = tiny.run(tmp_path, "dvc", "artifacts", "get", str(git), "adapter")
    assert "Downloaded 4 file(s) to 'adapter'" in printed
    expected = {Path(name).name: content for name, content in read_files(clone / "data/adapter").items()}
    assert {Path(name).name: content for name, content in read_files(tmp_path / "adapter").items()} == expected
    assert "adapter_model.safetensors" in expected
