"""Samples: the choice of prompts, and the end of a continuation."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from gpt2lora.dataset.tokenizer import load_tokenizer
from gpt2lora.evaluation import samples


@pytest.mark.parametrize("context", [1, 2, 7, 32, 64, 1024])
def test_prompt_and_continuation_fit_into_the_context(context, tiny_model, tiny_corpus):
    text = (tiny_corpus / "test.txt").read_text()
    prompts = samples.choose_prompts(text, load_tokenizer(tiny_model), context, [])
    assert len(prompts.ids) == 3
    (length,) = set(map(len, prompts.ids))
    assert 1 <= length <= 32
    assert 1 <= prompts.new_tokens <= 48
    assert length + prompts.new_tokens <= max(context, 2)
    if context == 1024:
        assert (length, prompts.new_tokens) == (32, 48)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one", ["one"]),
        ("one \n \n one \n", ["one", "one"]),
        ("the first line\nthe second\n\nthe\nthe fourth line\n", ["the", "the", "the"]),
        ("the river " * 100_000, ["the river the river"]),
    ],
)
def test_without_articles_prompts_are_beginnings_of_paragraphs(text, expected, tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    prompts = samples.choose_prompts(text, tokenizer, 64, [])
    assert len(set(map(len, prompts.ids))) == 1
    texts = [tokenizer.decode(ids) for ids in prompts.ids]
    assert len(texts) == len(expected)
    assert all(text.strip().startswith(beginning) for text, beginning in zip(texts, expected, strict=True)), texts


def test_a_continuation_ends_before_the_end_of_text_token(tiny_model):
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    end = network.config.eos_token_id
    with torch.no_grad():
        network.transformer.ln_f.bias.copy_(10_000 * network.lm_head.weight[end])
    assert samples.generate_samples(network, samples.Prompts([[5, 6], [7, 8]], 10, []), end) == [[], []]


def test_prompts_are_continued_after_the_prefix(tiny_model):
    network = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    seen = []
    network.transformer.wte.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].tolist()))
    continued = samples.generate_samples(network, samples.Prompts([[5, 6], [7, 8]], 3, [9]), end=0)
    assert seen[0] == [[9, 5, 6], [9, 7, 8]]
    assert len(continued) == 2
