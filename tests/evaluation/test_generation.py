"""Generation with a cache of the tokens before, and without one for models that transformers has none for."""

import every_model
import pytest
import torch
from small_models import load
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from gpt2lora.evaluation import generation
from gpt2lora.pipeline.cli import StageError

OPTIONS = {"max_new_tokens": 5, "do_sample": False}


def test_a_model_without_a_cache_generates_the_likeliest_tokens(tiny_model, capsys):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(every_model.small_config("jamba")).eval()
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="Cache"):
        model.generate(input_ids=ids, **OPTIONS)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    found = generation.generate(model, ids, 299, streamer=TextStreamer(tokenizer), **OPTIONS)
    expected = ids
    for _ in range(5):
        with torch.no_grad():
            following = model(input_ids=expected, use_cache=False).logits[:, -1].argmax(-1)
        expected = torch.cat([expected, following[:, None]], 1)
    assert found.tolist() == expected.tolist()
    assert capsys.readouterr().out == tokenizer.decode(found[0]) + "\n", "the prompt is printed once"


def test_a_model_that_cannot_generate_is_refused_in_one_line(tiny_model, monkeypatch):
    model = load(tiny_model)

    def fail(**_):
        raise ValueError("no such layer\nand more")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(StageError) as caught:
        generation.generate(model, torch.tensor([[5]]), 0, **OPTIONS)
    line = "GPT2LMHeadModel cannot generate text (ValueError: no such layer); take another model"
    assert str(caught.value.message) == line
