"""The text of the embedded sample: docstrings of an installed package, which is never imported."""

import random
from pathlib import Path

import pytest
import tiny
from local_preset import write_params
from training_runs import run_stage

from gpt2lora.dataset import articles, blocks
from gpt2lora.sample import corpus
from stages import prepare


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that cannot be imported."""
    folder = tmp_path / "site" / "unimportable"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text('"""The package."""\nraise SystemExit("it was imported")\n')
    (folder / "inner" / "__init__.py").write_text("")
    (folder / "inner" / "b.py").write_text('def f():\n    """Return nothing."""\n\nclass C:\n    """A class."""\n')
    (folder / "a.py").write_text('"""A module."""\n')
    (folder / "template.py").write_text('"""Not Python: """ {{ name }}')
    (folder / "tests").mkdir()
    (folder / "tests" / "test_a.py").write_text('"""A test."""')
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def test_docstrings_are_collected_without_an_import(package):
    assert corpus.package_folder("unimportable") == package
    assert corpus.docstring_articles(package) == [
        " \n = unimportable.__init__ = \n \nThe package.\n",
        " \n = unimportable.a = \n \nA module.\n",
        " \n = unimportable.inner.b = \n \nReturn nothing.\n\nA class.\n",
    ]


def test_the_order_of_files_on_disk_does_not_matter(package, monkeypatch):
    expected = corpus.docstring_articles(package)
    files = list(package.rglob("*.py"))
    for seed in range(5):
        monkeypatch.setattr(Path, "rglob", lambda *_, seed=seed: iter(random.Random(seed).sample(files, len(files))))
        assert corpus.docstring_articles(package) == expected


def test_the_sample_is_split_by_modules(package, tmp_path, tiny_corpus, monkeypatch):
    monkeypatch.chdir(write_params(tmp_path, tiny_corpus))
    monkeypatch.setattr(prepare, "SAMPLE_PACKAGE", "unimportable")
    tiny.set_param(tmp_path, "preset", "sample")
    run_stage(prepare.main, "--out", "raw")
    splits = [articles.split_articles((tmp_path / "raw" / f"{split}.txt").read_text()) for split in blocks.SPLITS]
    assert sorted(piece for split in splits for piece in split) == corpus.docstring_articles(package)
    assert [len(split) for split in splits] == [1, 1, 1]
