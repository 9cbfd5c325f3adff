"""Generation with a cache of the tokens before, and without one for models that transformers has none for."""

import json

import every_model
import pytest
import torch
from small_models import load, write_gpt2, write_llama
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


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(150))},
        {"cache_implementation": "static"},  # a cache whose unfilled places a mask hides
        {"num_beams": 4, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True},
        {"stop_strings": ["a"]},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("write_model", [write_gpt2, write_llama])
def test_generation_config_json_changes_nothing(tmp_path, write_model, settings):
    write_model(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    expected = generation.generate(load(tmp_path), ids, 0, **OPTIONS)
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert generation.generate(load(tmp_path), ids, 0, **OPTIONS).tolist() == expected.tolist()


def test_a_model_that_cannot_generate_is_refused_in_one_line(tiny_model, monkeypatch):
    model = load(tiny_model)

    def fail(**_):
        raise ValueError("no such layer\nand more")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(StageError) as caught:
        generation.generate(model, torch.tensor([[5]]), 0, **OPTIONS)
    line = "GPT2LMHeadModel cannot generate text (ValueError: no such layer); take another model"
    assert str(caught.value.message) == line
