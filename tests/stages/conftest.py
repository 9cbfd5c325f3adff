"""Working directories for the tests of stages."""

import shutil
from pathlib import Path

import pytest
import tiny
from dvc_yaml import STAGES, stages_run
from evaluated_methods import run_every_method

from gpt2lora.evaluation import passage, plots

OUTPUTS = ("data/base", "data/raw", "data/tokens", "data/adapter")


@pytest.fixture
def stage_folder(tmp_path, monkeypatch, tiny_model, tiny_corpus) -> Path:
    """The working directory: outputs of an earlier run, and copies of the model and the corpus to damage."""
    folder = tmp_path / "stage"
    folder.mkdir()
    for name in ("params.yaml", "dvc.yaml"):  # by which errors tell that this is a repository's root
        shutil.copyfile(tiny.ROOT / name, folder / name)
    shutil.copytree(tiny_model, folder / "model")
    shutil.copytree(tiny_corpus, folder / "corpus")
    for output in OUTPUTS:
        (folder / output).mkdir(parents=True)
        (folder / output / "earlier").write_text("output")
    (folder / "metrics").mkdir()
    for name in ("train.json", "train_timings.json", "loss.csv", "eval.json"):
        (folder / "metrics" / name).write_text("earlier output")
    for key, value in {
        "preset": "local",
        "presets.local.model": "model",
        "presets.local.dataset": "corpus",
        "tokenize.block_size": 32,
        "train.epochs": 1,
    }.items():
        tiny.set_param(folder, key, value)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def inputs(stage_outputs) -> dict[str, list]:
    """For each stage, the options that name the outputs of a successful run as its inputs."""
    names = {
        "tokenize": ["raw", "base"],
        "train": ["tokens", "base"],
        "evaluate": ["raw", "tokens", "base", "adapter", "loss"],
    }
    return {
        stage: [part for name in options for part in (f"--{name}", stage_outputs[name])]
        for stage, options in names.items()
    }


@pytest.fixture(scope="session")
def finished_project(tmp_path_factory, tiny_model, tiny_corpus) -> Path:
    """A project after its first `dvc repro`, committed."""
    project = tiny.make_project(tmp_path_factory.mktemp("finished") / "project", tiny_model, tiny_corpus)
    assert stages_run(tiny.run(project, "dvc", "repro")) == list(STAGES)
    tiny.commit(project, "A first run")
    return project


@pytest.fixture
def finished(finished_project) -> Path:
    """The finished project, restored to its first run after the test."""
    yield finished_project
    tiny.run(finished_project, "git", "reset", "--hard", "--quiet")
    tiny.run(finished_project, "git", "clean", "-fdq")
    tiny.run(finished_project, "dvc", "checkout", "--quiet")


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Let `train` and `evaluate` draw no pictures, which take longer than all else that they do for a tiny model."""
    patch.setattr(plots, "draw_plots", lambda *_: None)
    patch.setattr(passage, "draw_passage", lambda *_: None)


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    draw_nothing(monkeypatch)


@pytest.fixture(scope="session")
def every_method(tmp_path_factory, tiny_model, tiny_corpus) -> Path:
    """A project in which every method was trained and evaluated, each into a folder with its name, without pictures."""
    folder = tiny.make_project(tmp_path_factory.mktemp("methods") / "project", tiny_model, tiny_corpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        draw_nothing(patch)
        run_every_method(folder)
    return folder


@pytest.fixture
def methods_folder(every_method, monkeypatch) -> Path:
    """The working directory: this project. Its params.yaml is restored after the test."""
    monkeypatch.chdir(every_method)
    original = (every_method / "params.yaml").read_bytes()
    yield every_method
    (every_method / "params.yaml").write_bytes(original)
