import gc
import os
import shutil
import signal
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner
from training_runs import make_training_folder, run_stage

# Set before torch is imported. More threads make so small a model no faster, and much slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests compare bytes and the kernels of the CPU, so they hide a GPU. `TEST_ON_GPU=1 pytest tests/model tests/training`
# runs on a GPU the tests that hold there as well.
if not os.environ.get("TEST_ON_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# A shell's background job ignores Ctrl-C; so would the processes to which tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What tests import, above all torch and transformers, stays: searching all of it for garbage takes seconds.
gc.disable()

# Tests that one worker of pytest-xdist runs, since they share a fixture that takes long to make.
SHARED = {
    "every_method": ("stages/test_evaluate.py", "stages/test_evaluate_errors.py", "stages/test_outputs.py"),
    "finished_project": ("stages/test_dvc_repro.py", "stages/test_dvc_yaml.py", "stages/test_experiments.py"),
    "run_group": ("/distributed/",),
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `--dist loadfile`, one worker runs all files that share a fixture."""
    from xdist.scheduler.loadfile import LoadFileScheduling

    class SharedFixtures(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return next((fixture for fixture, parts in SHARED.items() if any(part in file for part in parts)), file)

    return SharedFixtures(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """A folder with train.txt, valid.txt and test.txt."""
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_corpus) -> Path:
    """A folder with config.json, model.safetensors, tokenizer.json and tokenizer_config.json."""
    return tiny.write_model(tmp_path_factory.mktemp("model") / "model", tiny_corpus)


@pytest.fixture
def project(tmp_path, tiny_model, tiny_corpus) -> Path:
    """A repository with the tiny model and the tiny corpus as preset `local`, in which nothing has run yet."""
    return tiny.make_project(tmp_path / "project", tiny_model, tiny_corpus)


# The outputs of a run


@pytest.fixture(scope="session")
def stage_outputs(tmp_path_factory, tiny_model, tiny_corpus) -> dict[str, Path]:
    """The outputs of base, prepare, tokenize and train, by the option that reads each of them."""
    folder = tiny.make_project(tmp_path_factory.mktemp("outputs") / "project", tiny_model, tiny_corpus)
    from stages import base, prepare, tokenize, train

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in (base.main, prepare.main, tokenize.main, train.main):
            result = CliRunner().invoke(stage, catch_exceptions=False)
            assert result.exit_code == 0, result.output
    outputs = {name: folder / "data" / name for name in ("base", "raw", "tokens", "adapter")}
    return outputs | {"loss": folder / "metrics/loss.csv"}


@pytest.fixture
def data(stage_outputs, tmp_path, monkeypatch) -> Path:
    """The folder data with a copy of these outputs, for the test to damage, in the working directory."""
    project = stage_outputs["base"].parents[1]
    shutil.copytree(project / "data", tmp_path / "data", ignore=shutil.ignore_patterns(".*", "environment"))
    (tmp_path / "metrics").mkdir()
    for name in ("params.yaml", "metrics/loss.csv"):
        shutil.copyfile(project / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return Path("data")


# A training that is interrupted


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory, tiny_model, tiny_corpus) -> Path:
    """A folder in which base, prepare and tokenize have run, for a training of 16 steps."""
    folder = make_training_folder(tmp_path_factory.mktemp("prepared") / "project", tiny_model, tiny_corpus)
    from stages import base, prepare, tokenize

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in (base.main, prepare.main, tokenize.main):
            run_stage(stage)
    return folder


@pytest.fixture
def training_folder(tmp_path, prepared_folder, monkeypatch) -> Path:
    """The working directory: a copy of the prepared folder, in which train can run."""
    folder = tmp_path / "training"
    shutil.copytree(prepared_folder, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def stop_training(monkeypatch):
    """A function that runs train, sends it a signal during a step, and returns what it printed."""
    from gpt2lora.training import loop
    from stages import train

    def stop(stop_step: int, number: int = signal.SIGTERM) -> str:
        def lr_and_signal(step, *others):
            if step == stop_step:
                os.kill(os.getpid(), number)
            return lr_at_step(step, *others)

        lr_at_step = loop.lr_at_step
        with monkeypatch.context() as patch:
            patch.setattr(loop, "lr_at_step", lr_and_signal)
            return run_stage(train.main, code=128 + number)

    return stop
