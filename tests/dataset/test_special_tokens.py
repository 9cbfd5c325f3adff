"""Control tokens in a text are letters for every kind of tokenizer, or counted; where special tokens are named."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordLevel
from transformers import AutoTokenizer

from gpt2lora.dataset import tokenizer
from gpt2lora.dataset.special_tokens import special_token, watch_special_tokens

LETTERS = ["<", "/", "s", ">", "a", "b", "▁"]


def write_tokenizer(folder: Path, model: models.Model, *control: str, **settings) -> Path:
    """Write a tokenizer with control tokens that its model's own vocabulary holds, the first as eos_token."""
    written = Tokenizer(model)
    written.pre_tokenizer = None if isinstance(model, Unigram) else pre_tokenizers.Split(" ", "isolated")
    written.add_special_tokens([AddedToken(token, special=True) for token in control])
    written.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": control[0]} | settings))
    return folder


def count(folder: Path, text: str, special_tokens: bool = False) -> tuple[list[str], dict, dict]:
    """Return a text's tokens, and how often special ones are found as tokens and as letters."""
    loaded = tokenizer.load_tokenizer(folder, special_tokens)
    found = watch_special_tokens(folder, loaded, tokenizer.end_of_text_id(folder, {"vocab_size": 100}, loaded))
    encoding = loaded.encode(text, add_special_tokens=False)
    found.add(text, encoding.ids)
    tokens = {loaded.id_to_token(id): number for id, number in found.tokens.items() if number}
    return encoding.tokens, tokens, {token: number for token, number in found.letters.items() if number}


MODELS = {
    "unigram": Unigram([("<unk>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in [*LETTERS, " "])], unk_id=0),
    "words": WordLevel({token: id for id, token in enumerate(["<unk>", "</s>", "<", "/s>", "a", "b", " "])}, "<unk>"),
    "bpe": BPE({token: id for id, token in enumerate(["</s>", *LETTERS, " "])}, [], ignore_merges=True),
    "merges": BPE(
        {token: id for id, token in enumerate([*LETTERS, " ", "</", "s>", "</s>"])},
        [("<", "/"), ("s", ">"), ("</", "s>")],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_control_token_of_the_models_own_vocabulary_is_letters(tmp_path, name):
    folder, text = write_tokenizer(tmp_path, MODELS[name], "</s>"), "a </s> b </s>"
    tokens, as_tokens, as_letters = count(folder, text)
    assert "</s>" not in tokens and "".join(tokens) == text
    assert (as_tokens, as_letters) == ({}, {"</s>": 2})
    tokens, as_tokens, as_letters = count(folder, text, special_tokens=True)
    assert tokens == ["a", " ", "</s>", " ", "b", " ", "</s>"]
    assert (as_tokens, as_letters) == ({"</s>": 2}, {})


def test_control_tokens_that_cannot_be_letters_are_counted_as_tokens(tmp_path):
    bpe = BPE({token: id for id, token in enumerate([*LETTERS, " ", "</s>"])}, [])
    folder = write_tokenizer(tmp_path, bpe, "</s>", "b", pad_token="b")
    assert count(folder, "a b </s> b")[1:] == ({"b": 2}, {"</s>": 1})


def test_the_unknown_token_is_counted_as_unknown_alone(tmp_path):
    words = WordLevel({"<unk>": 0, "</s>": 1, "a": 2, " ": 3}, "<unk>")
    folder = write_tokenizer(tmp_path, words, "</s>", "<unk>", unk_token="<unk>")
    assert count(folder, "a <unk> b") == (["a", " ", "<unk>", " ", "<unk>"], {}, {})


def test_an_end_of_text_that_is_no_added_token_is_counted(tmp_path):
    folder = write_tokenizer(tmp_path, MODELS["bpe"], "</s>", eos_token="a")
    assert count(folder, "a b a")[1] == {"a": 2}


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("value", ["a", {"content": "a", "lstrip": False}, None])
def test_special_tokens_are_those_that_transformers_reads(tmp_path, value, complete):
    """special_tokens_map.json goes before tokenizer_config.json, unless that one names all added tokens."""
    decoder = {"added_tokens_decoder": {}} if complete else {}
    folder = write_tokenizer(tmp_path, MODELS["bpe"], "</s>", tokenizer_class="PreTrainedTokenizerFast", **decoder)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": value, "bos_token": "b"}))
    expected = AutoTokenizer.from_pretrained(folder)
    assert special_token(folder, "eos_token") == expected.eos_token
    assert special_token(folder, "bos_token") == expected.bos_token == (None if complete else "b")
    (folder / "tokenizer_config.json").unlink()
    assert special_token(folder, "bos_token") == "b"
