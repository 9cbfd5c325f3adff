"""generate: the model's own continuation, the same for the same seed, and nothing else on the terminal."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from gpt2lora.commands import generate
from gpt2lora.dataset.tokenizer import load_tokenizer
from gpt2lora.model import loading, quantization

NF4 = quantization.QuantizationParams(bits=4, quant_type="nf4", double_quant=True)
PROMPT = "the river reached"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_corpus):
    folder = tmp_path_factory.mktemp("generate")
    tiny.write_model(folder / "data" / "base", tiny_corpus, spread=0.1)
    tiny.write_adapter(folder / "data" / "adapter", folder / "data" / "base", NF4)
    return folder


@pytest.fixture(autouse=True)
def inside(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


def run(*arguments, exit_code: int = 0):
    result = CliRunner().invoke(generate.main, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result


def text(*arguments) -> str:
    return run(*arguments, "--max-new-tokens", 30).stdout


def greedy_text(network, prompt: str, new: int = 30) -> str:
    """The likeliest token, again and again, without the model's own generation loop."""
    tokenizer = load_tokenizer(Path("data/base"))
    ids = tokenizer.encode(prompt).ids or [tokenizer.token_to_id(tiny.END)]
    for _ in range(new):
        with torch.no_grad():
            ids.append(int(network(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids) + "\n"


@pytest.mark.parametrize("prompt", [PROMPT, ""])
def test_greedy_takes_the_tuned_model_s_likeliest_tokens(prompt):
    tuned = loading.load_tuned(Path("data/base"), Path("data/adapter"), torch.float32)
    assert text(prompt, "--greedy") == greedy_text(tuned, prompt)


def test_the_base_is_the_float_model_as_it_was():
    expected = greedy_text(AutoModelForCausalLM.from_pretrained("data/base"), PROMPT)
    assert text(PROMPT, "--greedy", "--base") == expected != text(PROMPT, "--greedy")


def test_the_base_needs_no_adapter(workplace, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "base").symlink_to(workplace / "data" / "base")
    monkeypatch.chdir(tmp_path)
    assert text(PROMPT, "--base").startswith(PROMPT)
    line = run(PROMPT, "--max-new-tokens", 1, exit_code=1).output
    assert line.startswith("Error: data/adapter/method.json is missing: run `dvc repro train`")


def test_the_same_seed_gives_the_same_text_and_another_another():
    assert text(PROMPT) == text(PROMPT, "--seed", 0) != text(PROMPT, "--seed", 1)
    assert text(PROMPT).startswith(PROMPT)


@pytest.mark.parametrize("option", [("--top-k", 1), ("--top-p", 1e-6), ("--temperature", 0.01)])
def test_narrow_sampling_is_greedy(option):
    assert text(PROMPT, *option, "--seed", 3) == text(PROMPT, "--greedy") != text(PROMPT, "--seed", 3)


def test_top_k_zero_draws_among_all_tokens():
    assert text(PROMPT, "--top-k", 0) == text(PROMPT, "--top-k", tiny.VOCABULARY) != text(PROMPT)


def test_a_repetition_penalty_avoids_what_was_said():
    def repeated(*options) -> int:
        ids = load_tokenizer(Path("data/base")).encode(text("a", "--greedy", *options)).ids
        return len(ids) - len(set(ids))

    assert repeated("--repetition-penalty", 10) < repeated() - 5


def test_the_end_of_text_is_a_token_in_a_prompt():
    assert text(tiny.END) == text("")


@pytest.fixture
def steps(monkeypatch) -> list[None]:
    """As many entries as tokens were computed so far."""
    forward, done = GPT2LMHeadModel.forward, []

    def counted(*given, **named):
        done.append(None)
        return forward(*given, **named)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", counted)
    return done


def test_the_end_of_a_text_ends_the_output(tmp_path, monkeypatch, tiny_corpus, steps):
    base = tiny.write_model(tmp_path / "data" / "base", tiny_corpus)
    network = GPT2LMHeadModel.from_pretrained(base)
    end = network.config.eos_token_id
    with torch.no_grad():
        network.transformer.ln_f.bias.copy_(100 * network.lm_head.weight[end])
    network.save_pretrained(base)
    monkeypatch.chdir(tmp_path)
    assert run(PROMPT, "--base", "--greedy", "--max-new-tokens", 20).stdout == PROMPT + "\n"
    assert len(steps) == 1


def test_the_text_comes_as_it_is_generated(steps):
    class Screen(io.StringIO):
        def write(self, written):
            seen.append((len(steps), written))

    seen = []
    with contextlib.redirect_stdout(Screen()):
        generate.main([PROMPT, "--max-new-tokens", "30"], standalone_mode=False)
    assert len(steps) == 30
    assert len({step for step, written in seen if written}) > 3


def test_nothing_but_the_text_and_one_line(workplace):
    command = [sys.executable, "-m", "gpt2lora", "generate", PROMPT, "--max-new-tokens", "30"]
    environment = tiny.environment() | {"PYTHONPATH": str(tiny.ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0
    assert done.stdout == text(PROMPT)
    assert re.fullmatch(r"generate: tuned model \(qlora\) on CPU \(\d+ threads\), seed 0\n", done.stderr)


@pytest.mark.parametrize(
    ("prompt", "new", "advice"),
    [(PROMPT, 62, "at most --max-new-tokens "), ("the river " * 80, 1, "shorten the prompt")],
)
def test_more_tokens_than_positions(prompt, new, advice):
    count = len(load_tokenizer(Path("data/base")).encode(prompt).ids)
    (line,) = run(prompt, "--max-new-tokens", new, exit_code=1).output.splitlines()
    numbers = (
        f"Error: {count:,} tokens of the prompt and {new} new ones are {count + new:,}, the model has 64 positions"
    )
    assert line.startswith(f"{numbers}: {advice}")


def test_all_positions_can_be_used():
    count = len(load_tokenizer(Path("data/base")).encode(PROMPT).ids)
    assert text(PROMPT) != run(PROMPT, "--max-new-tokens", 64 - count).stdout
    assert run(PROMPT, "--max-new-tokens", 64 - count + 1, exit_code=1).output.endswith(
        f"at most --max-new-tokens {64 - count}\n"
    )


@pytest.mark.parametrize(
    "option",
    [
        "--temperature=0",
        "--temperature=-1",
        "--temperature=nan",
        "--temperature=inf",
        "--top-p=0",
        "--top-p=1.1",
        "--top-p=nan",
        "--top-k=-1",
        "--repetition-penalty=0",
        "--max-new-tokens=0",
        "--seed=-1",
        f"--seed={2**64}",
    ],
)
def test_options_out_of_range(option):
    assert f"Error: Invalid value for '{option.partition('=')[0]}'" in run(PROMPT, option, exit_code=2).output


def test_the_largest_options_work():
    options = ["--temperature=100", "--repetition-penalty=100", "--top-k=100000", f"--seed={2**64 - 1}"]
    assert text(PROMPT, *options) != text(PROMPT)


def test_a_prompt_that_is_not_utf_8():
    assert run("a\udcff", exit_code=1).output == "Error: the prompt is not UTF-8\n"
