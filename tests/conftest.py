import os
from pathlib import Path

import pytest
import tiny

# Before torch is imported: so small a model gains nothing from more threads, and loses much on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests compare bits and kernels of the CPU, also where there is a GPU. `TEST_ON_GPU=1 pytest tests/test_methods.py`
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
