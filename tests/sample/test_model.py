"""The base model of the embedded sample, trained on installed documentation."""

from pathlib import Path

import tiny
from local_preset import write_params
from training_runs import run_stage

from gpt2lora.sample import corpus
from stages import base


def test_the_same_documentation_gives_the_same_model(tmp_path, tiny_corpus, monkeypatch):
    monkeypatch.chdir(write_params(tmp_path, tiny_corpus))
    texts = [
        f" \n = module {number} = \n \nReturn the {number}th of the numbers, counted from one.\n"
        for number in range(120)
    ]
    monkeypatch.setattr(corpus, "docstring_articles", lambda _: texts)
    tiny.set_param(tmp_path, "preset", "sample")
    output = run_stage(base.main, "--out", "first")
    assert "tokens in its vocabulary" in output
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in Path("first").iterdir()}
    first = (tmp_path / "first" / "model.safetensors").read_bytes()
    run_stage(base.main, "--out", "second")
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == first
