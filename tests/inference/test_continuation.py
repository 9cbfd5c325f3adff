"""Continuations of several models at once: their text is that of `gpt2lora generate`, and they can be stopped."""

import itertools
import threading
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from transformers import GPT2LMHeadModel

from gpt2lora.commands import generate
from gpt2lora.dataset.tokenizer import load_tokenizer
from gpt2lora.inference.continuation import Sampling, continue_prompt
from gpt2lora.inference.prompt import encode_prompt
from gpt2lora.model import loading
from gpt2lora.pipeline.cli import StageError

PROMPT, NEW = "the river reached", 30


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_corpus) -> Path:
    """A folder with data/base and data/adapter."""
    folder = tmp_path_factory.mktemp("continuation")
    tiny.write_model(folder / "data" / "base", tiny_corpus, spread=0.1)
    tiny.write_adapter(folder / "data" / "adapter", folder / "data" / "base")
    return folder


@pytest.fixture(scope="module")
def models(project) -> dict[str, torch.nn.Module]:
    base, adapter = project / "data/base", project / "data/adapter"
    return {
        "base": loading.load_base(base, None, torch.float32),
        "tuned": loading.load_tuned(base, adapter, torch.float32),
    }


@pytest.fixture
def texts_of(project, models, monkeypatch):
    """A function that returns an iterator over the continuations of a prompt."""
    monkeypatch.chdir(project)
    tokenizer = load_tokenizer(Path("data/base"), special_tokens=True)
    end = models["base"].config.eos_token_id

    def continued(prompt: str = PROMPT, **options):
        ids = encode_prompt(tokenizer, prompt, end)
        return continue_prompt(models, tokenizer, ids, end, Sampling(**{"max_new_tokens": NEW} | options))

    return continued


def last(texts) -> dict[str, str]:
    *_, final = texts
    return final


def command_text(prompt: str, *options: str) -> str:
    """Return what the command generate prints after the prompt."""
    arguments = [prompt, "--max-new-tokens", str(NEW), *options]
    result = CliRunner().invoke(generate.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


OPTIONS = [
    {},
    {"seed": 5},
    {"greedy": True},
    {"temperature": 0.7, "top_k": 5},
    {"top_k": 0, "top_p": 0.8, "repetition_penalty": 1.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_both_texts_are_those_of_the_command(texts_of, options):
    flags = []
    for name, value in options.items():
        flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    final = last(texts_of(**options))
    for name, flag in (("base", ["--base"]), ("tuned", [])):
        assert PROMPT + final[name].removesuffix("\n") == command_text(PROMPT, *flags, *flag).removesuffix("\n")
    assert final["base"] != final["tuned"]


@pytest.mark.parametrize("prompt", ["", "a 🦆 swims"])
def test_any_prompt_is_continued(texts_of, prompt):
    assert all(last(texts_of(prompt)).values())


def test_people_do_not_disturb_each_other(texts_of):
    alone = [last(texts_of(seed=seed)) for seed in range(4)]
    together = [None] * 4

    def run(seed):
        together[seed] = last(texts_of(seed=seed))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_texts_grow_piece_by_piece(texts_of):
    texts = list(texts_of())
    assert len(texts) > 3
    for before, after in itertools.pairwise(texts):
        assert all(after[name].startswith(before[name]) for name in after)
        assert before != after


def test_a_reader_who_stops_ends_both_models(texts_of, models, monkeypatch):
    passes = []
    forward = GPT2LMHeadModel.forward
    monkeypatch.setattr(
        GPT2LMHeadModel, "forward", lambda *args, **options: passes.append(0) or forward(*args, **options)
    )
    before, texts = threading.active_count(), texts_of()
    next(texts)
    texts.close()
    assert threading.active_count() == before
    assert 0 < len(passes) < 2 * NEW


def test_an_error_of_a_model_reaches_the_reader(texts_of, models, monkeypatch):
    def fail(*arguments, **options):
        raise ValueError("no cache here")

    monkeypatch.setattr(models["tuned"], "generate", fail)
    with pytest.raises(StageError, match=r"cannot generate text \(ValueError: no cache here\)"):
        list(texts_of())
