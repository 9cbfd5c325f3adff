"""The command generate: continuations of base and tuned model, sampling options, output, and errors."""

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
from gpt2lora.model import loading
from gpt2lora.pipeline.schemas import QuantizationParams

NF4 = QuantizationParams(bits=4, quant_type="nf4", double_quant=True)
PROMPT = "the river reached"


@pytest.fixture(scope="module")
def tuned_project(tmp_path_factory, tiny_corpus):
    """A folder with data/base and data/adapter."""
    folder = tmp_path_factory.mktemp("generate")
    tiny.write_model(folder / "data" / "base", tiny_corpus, spread=0.1)
    tiny.write_adapter(folder / "data" / "adapter", folder / "data" / "base", NF4)
    return folder


@pytest.fixture(autouse=True)
def inside_the_project(tuned_project, monkeypatch):
    monkeypatch.chdir(tuned_project)


def run_generate(*arguments, exit_code: int = 0):
    result = CliRunner().invoke(generate.main, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result


def generate_text(*arguments) -> str:
    """Return the prompt and 30 new tokens."""
    return run_generate(*arguments, "--max-new-tokens", 30).stdout


def greedy_text(network, prompt: str, new: int = 30) -> str:
    """Append the likeliest token `new` times, without transformers' generation loop; return the text."""
    tokenizer = load_tokenizer(Path("data/base"))
    ids = tokenizer.encode(prompt).ids or [tokenizer.token_to_id(tiny.END)]
    for _ in range(new):
        with torch.no_grad():
            ids.append(int(network(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids) + "\n"


@pytest.mark.parametrize("prompt", [PROMPT, ""])
def test_greedy_takes_the_likeliest_tokens_of_the_tuned_model(prompt):
    tuned = loading.load_tuned(Path("data/base"), Path("data/adapter"), torch.float32)
    assert generate_text(prompt, "--greedy") == greedy_text(tuned, prompt)


def test_the_option_base_uses_the_float_model_before_training():
    expected = greedy_text(AutoModelForCausalLM.from_pretrained("data/base"), PROMPT)
    assert generate_text(PROMPT, "--greedy", "--base") == expected != generate_text(PROMPT, "--greedy")


def test_a_prompt_begins_as_the_tokenizer_begins_a_text(tuned_project, tmp_path, monkeypatch):
    """A model that was trained on texts after <bos> continues a prompt badly without it."""
    without = generate_text(PROMPT, "--greedy", "--base")
    tiny.write_begin_of_text(tmp_path / "data" / "base", tuned_project / "data" / "base", f"{tiny.END} {tiny.END} $A")
    monkeypatch.chdir(tmp_path)
    expected = greedy_text(AutoModelForCausalLM.from_pretrained("data/base"), PROMPT)
    assert generate_text(PROMPT, "--greedy", "--base") == expected != without


def test_the_option_base_needs_no_adapter(tuned_project, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "base").symlink_to(tuned_project / "data" / "base")
    monkeypatch.chdir(tmp_path)
    assert generate_text(PROMPT, "--base").startswith(PROMPT)
    line = run_generate(PROMPT, "--max-new-tokens", 1, exit_code=1).output
    assert line.startswith("Error: data/adapter/method.json is missing: run `dvc repro train`")


def test_the_seed_determines_the_text():
    assert generate_text(PROMPT) == generate_text(PROMPT, "--seed", 0) != generate_text(PROMPT, "--seed", 1)
    assert generate_text(PROMPT).startswith(PROMPT)


@pytest.mark.parametrize("option", [("--top-k", 1), ("--top-p", 1e-6), ("--temperature", 0.01)])
def test_sampling_one_token_is_greedy(option):
    greedy = generate_text(PROMPT, "--greedy")
    assert generate_text(PROMPT, *option, "--seed", 3) == greedy != generate_text(PROMPT, "--seed", 3)


def test_top_k_0_samples_among_all_tokens():
    all_tokens = generate_text(PROMPT, "--top-k", tiny.VOCABULARY)
    assert generate_text(PROMPT, "--top-k", 0) == all_tokens != generate_text(PROMPT)


def test_a_repetition_penalty_avoids_repetitions():
    def repeated(*options) -> int:
        ids = load_tokenizer(Path("data/base")).encode(generate_text("a", "--greedy", *options)).ids
        return len(ids) - len(set(ids))

    assert repeated("--repetition-penalty", 10) < repeated() - 5


def test_end_of_text_in_a_prompt_is_the_token():
    assert generate_text(tiny.END) == generate_text("")


@pytest.fixture
def steps(monkeypatch) -> list[None]:
    """A list with one entry for each forward pass so far, without those that try a model when it is loaded."""
    forward, passes = GPT2LMHeadModel.forward, []

    def counting_forward(*arguments, **options):
        if options.get("use_cache") is not False:
            passes.append(None)
        return forward(*arguments, **options)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", counting_forward)
    return passes


def test_generation_stops_at_the_end_of_text_token(tmp_path, monkeypatch, tiny_corpus, steps):
    base = tiny.write_model(tmp_path / "data" / "base", tiny_corpus)
    network = GPT2LMHeadModel.from_pretrained(base)
    end = network.config.eos_token_id
    with torch.no_grad():
        network.transformer.ln_f.bias.copy_(100 * network.lm_head.weight[end])
    network.save_pretrained(base)
    monkeypatch.chdir(tmp_path)
    assert run_generate(PROMPT, "--base", "--greedy", "--max-new-tokens", 20).stdout == PROMPT + "\n"
    assert len(steps) == 1


def test_the_text_is_printed_while_it_is_generated(steps):
    class Screen(io.StringIO):
        def write(self, text):
            writes.append((len(steps), text))

    writes = []
    with contextlib.redirect_stdout(Screen()):
        generate.main([PROMPT, "--max-new-tokens", "30"], standalone_mode=False)
    assert len(steps) == 30
    assert len({step for step, text in writes if text}) > 3


def test_stdout_is_the_text_and_stderr_one_line():
    command = [sys.executable, "-m", "gpt2lora", "generate", PROMPT, "--max-new-tokens", "30"]
    environment = tiny.environment() | {"PYTHONPATH": str(tiny.ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0
    assert done.stdout == generate_text(PROMPT)
    assert re.fullmatch(r"generate: tuned model \(qlora\) on CPU \(\d+ threads\), seed 0\n", done.stderr)


def test_more_tokens_than_the_context_are_refused():
    (line,) = run_generate(PROMPT, "--max-new-tokens", 62, exit_code=1).output.splitlines()
    count = len(load_tokenizer(Path("data/base")).encode(PROMPT).ids)
    assert line == f"Error: {count} tokens of the prompt leave room for at most {64 - count} new tokens, not 62"
    prompt = "the river " * 80
    (line,) = run_generate(prompt, exit_code=1).output.splitlines()
    count = len(load_tokenizer(Path("data/base")).encode(prompt).ids)
    assert line == f"Error: {count} tokens of the prompt, the model has 64 positions: shorten the prompt"


def test_by_default_there_are_as_many_tokens_as_the_context_has_room_for():
    count = len(load_tokenizer(Path("data/base")).encode(PROMPT).ids)
    assert run_generate(PROMPT).stdout == run_generate(PROMPT, "--max-new-tokens", 64 - count).stdout


def test_all_of_the_context_can_be_used():
    count = len(load_tokenizer(Path("data/base")).encode(PROMPT).ids)
    assert generate_text(PROMPT) != run_generate(PROMPT, "--max-new-tokens", 64 - count).stdout
    line = run_generate(PROMPT, "--max-new-tokens", 64 - count + 1, exit_code=1).output
    assert line.endswith(f"at most {64 - count} new tokens, not {64 - count + 1}\n")


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
        f"--seed={2**32}",
    ],
)
def test_an_option_out_of_range_is_refused(option):
    assert f"Error: Invalid value for '{option.partition('=')[0]}'" in run_generate(PROMPT, option, exit_code=2).output


def test_the_largest_values_of_options_work():
    options = ["--temperature=100", "--repetition-penalty=100", "--top-k=100000", f"--seed={2**32 - 1}"]
    assert generate_text(PROMPT, *options) != generate_text(PROMPT)


def test_a_prompt_that_is_not_utf8_is_refused():
    assert run_generate("a\udcff", exit_code=1).output == "Error: the prompt is not UTF-8\n"
