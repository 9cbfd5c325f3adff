"""atomic_output: an output is complete, old or new, whatever fails or is killed while it is written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bad_input import read_files

from gpt2lora.pipeline import artifacts
from gpt2lora.pipeline.artifacts import atomic_output
from gpt2lora.pipeline.cli import StageError


@pytest.fixture(params=["folder", "file"])
def target(tmp_path, request) -> Path:
    """An earlier output, a folder or a file, with nothing beside it."""
    path = tmp_path / "out" / "target"
    if request.param == "folder":
        path.mkdir(parents=True)
        (path / "old").write_text("old")
    else:
        path.parent.mkdir()
        path.write_text("old")
    return path


def test_files_are_readable_as_the_umask_says(target):
    with atomic_output(target) as new:
        write_new(target, new)
        files = [path for path in (new, *new.rglob("*")) if path.is_file()]
        for path in files:
            path.chmod(0o600)  # as safetensors does
    files = [path for path in (target, *target.rglob("*")) if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~artifacts._UMASK}


def write_new(target: Path, new: Path) -> None:
    """Write an output of the same kind as `target` to the path `new`."""
    if target.is_dir():
        new.mkdir()
        (new / "new").write_text("new")
    else:
        new.write_text("new")


def test_a_new_output_replaces_the_old_one(target):
    is_folder = target.is_dir()
    with atomic_output(target) as new:
        write_new(target, new)
        assert (target / "old" if is_folder else target).read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert (target / "new" if is_folder else target).read_text() == "new"
    assert not is_folder or [path.name for path in target.iterdir()] == ["new"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_keeps_the_old_output_and_nothing_else(target, error):
    before = read_files(target.parent)
    with pytest.raises(error), atomic_output(target) as new:
        write_new(target, new)
        raise error
    assert read_files(target.parent) == before


def test_a_block_that_writes_nothing_keeps_the_old_output(target):
    before = read_files(target.parent)
    with pytest.raises(FileNotFoundError), atomic_output(target):
        pass
    assert read_files(target.parent) == before


def test_the_remains_of_a_killed_run_are_removed(target):
    for suffix in ("new", "old"):
        (target.parent / f".target.{suffix}").mkdir()
        (target.parent / f".target.{suffix}" / "half").write_text("half")
    with atomic_output(target) as new:
        assert not new.exists()
        write_new(target, new)
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_missing_parent_folders_are_created(tmp_path):
    with atomic_output(tmp_path / "a" / "b" / "numbers.npy") as file:
        np.save(file.open("wb"), np.arange(3))
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["numbers.npy"]


def test_every_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda number: calls.append(os.readlink(f"/proc/self/fd/{number}")) or fsync(number)
    )
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("replace") or replace(*names))
    with atomic_output(tmp_path / "out") as folder:
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "file").write_text("bytes")
    new = f"{tmp_path}/.out.new"
    assert calls == [new, f"{new}/inner", f"{new}/inner/file", "replace", str(tmp_path)]


def test_a_half_removed_old_output_is_never_restored(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    for name in "abc":
        (target / name).write_text("old")

    def remove_one_file_and_exit(path):
        (path / "a").unlink()
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit), atomic_output(target) as folder:
        folder.mkdir()
        patch.setattr(artifacts.shutil, "rmtree", remove_one_file_and_exit)
    shutil.rmtree(target)  # as DVC does before it runs a stage again
    with pytest.raises(StageError), atomic_output(target):
        raise StageError("the next run fails")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_between_the_two_renames_restores_the_old(tmp_path):
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "file").write_text("old")
    (tmp_path / ".out.new").mkdir()
    with pytest.raises(StageError), atomic_output(tmp_path / "out"):
        raise StageError("the next run fails")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/file"]


def test_a_second_writer_is_refused_and_damages_nothing(target):
    """In one folder two stages that were started by hand would otherwise mix their files in one output."""
    program = "from pathlib import Path\nfrom gpt2lora.pipeline.artifacts import atomic_output\n"
    program += f"with atomic_output(Path({str(target)!r})) as new:\n    new.write_text('other')"
    with atomic_output(target) as new:
        write_new(target, new)
        other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert other.returncode and f"{target} is being written by another process" in other.stderr
    assert (target / "new" if target.is_dir() else target).read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0, "the lock is free again"
