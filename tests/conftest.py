import os
import shutil
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner

# Before torch is imported: so small a model gains nothing from more threads, and loses much on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests compare bits and kernels of the CPU, also where there is a GPU. `TEST_ON_GPU=1 pytest tests/model/test_lora.py`
# runs there what holds on both.
if not os.environ.get("TEST_ON_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


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
    """A repository of its own, nothing run yet, whose preset `local` is the tiny model and the tiny corpus."""
    return tiny.make_project(tmp_path / "project", tiny_model, tiny_corpus)


@pytest.fixture(scope="session")
def made(tmp_path_factory, tiny_model, tiny_corpus):
    """The outputs of a run that went well, by the name of the option that reads them."""
    folder = tiny.make_project(tmp_path_factory.mktemp("errors") / "project", tiny_model, tiny_corpus)
    from stages import base, prepare, tokenize, train

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in (base.main, prepare.main, tokenize.main, train.main):
            result = CliRunner().invoke(stage, catch_exceptions=False)
            assert result.exit_code == 0, result.output
    found = {name: folder / "data" / name for name in ("base", "raw", "tokens", "adapter")}
    return found | {"loss": folder / "metrics/loss.csv"}


@pytest.fixture
def data(made, tmp_path, monkeypatch):
    """A copy of a run's outputs, to break, in a working directory."""
    project = made["base"].parents[1]
    shutil.copytree(project / "data", tmp_path / "data", ignore=shutil.ignore_patterns(".*", "environment"))
    (tmp_path / "metrics").mkdir()
    for name in ("params.yaml", "metrics/loss.csv"):
        shutil.copyfile(project / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return Path("data")
