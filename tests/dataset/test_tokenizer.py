"""Encoding texts: the ids decode to the text, in batches and pieces of any size, in bounded memory."""

import tracemalloc

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from local_preset import make_article
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from wikitext import GPT2_TOKENIZER, needs_tokenizer

from gpt2lora.dataset import blocks, tokenizer


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny_model):
    return tokenizer.load_tokenizer(tiny_model)


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_the_ids_of_any_text_decode_to_the_text(tiny_tokenizer, text):
    ids = next(tokenizer.encode_texts(tiny_tokenizer, [text], np.uint16))
    assert tiny_tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text


def test_end_of_text_written_in_a_corpus_is_plain_text(tiny_tokenizer):
    text = f" one {tiny.END} two{tiny.END}"
    ids = next(tokenizer.encode_texts(tiny_tokenizer, [text], np.uint16))
    assert tiny_tokenizer.token_to_id(tiny.END) not in ids
    assert tiny_tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text


# The prefix


@pytest.mark.parametrize("template", [None, f"{tiny.END} $A", f"{tiny.END} {tiny.END} $A {tiny.END}", f"$A {tiny.END}"])
def test_the_prefix_is_what_transformers_puts_before_a_text(tmp_path, tiny_model, template):
    folder = tiny.write_begin_of_text(tmp_path / "model", tiny_model, template)
    encoded, plain = (
        AutoTokenizer.from_pretrained(folder)("a river", add_special_tokens=special)["input_ids"]
        for special in (True, False)
    )
    prefix = tokenizer.text_prefix(tokenizer.load_tokenizer(folder))
    assert encoded[: len(prefix) + len(plain)] == [*prefix, *plain]
    assert len(prefix) == (template or "$A").split().index("$A")


def test_the_prefix_is_found_in_any_alphabet():
    nucleotides = Tokenizer(BPE({"<bos>": 0, "A": 1, "C": 2, "G": 3, "T": 4}, []))
    nucleotides.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    assert tokenizer.text_prefix(nucleotides) == [0]
    nucleotides.post_processor = TemplateProcessing(single="$A <bos>", special_tokens=[("<bos>", 0)])
    assert tokenizer.text_prefix(nucleotides) == []


@needs_tokenizer
def test_gpt2_has_no_prefix(tmp_path):
    AutoTokenizer.from_pretrained(GPT2_TOKENIZER).save_pretrained(tmp_path)
    assert tokenizer.text_prefix(tokenizer.load_tokenizer(tmp_path)) == []


# Batches and pieces


def test_the_batch_size_does_not_change_the_ids(tiny_tokenizer, monkeypatch):
    texts = [make_article(number) for number in range(20)]
    expected = [ids.tolist() for ids in tokenizer.encode_texts(tiny_tokenizer, texts, np.uint16)]
    monkeypatch.setattr(tokenizer, "BATCH_CHARACTERS", 100)
    assert [ids.tolist() for ids in tokenizer.encode_texts(tiny_tokenizer, texts, np.uint16)] == expected


def test_a_text_is_cut_only_where_its_tokens_stay_the_same(tiny_tokenizer):
    text = "the river reached  the quiet \n \n valley"
    edge = tokenizer.find_cut(tiny_tokenizer, text)
    assert text[edge:] == " \n \n valley" or text[edge:] == " quiet \n \n valley"
    assert tokenizer.find_cut(tiny_tokenizer, "word" * 100) == 0
    across_spaces = Tokenizer(WordLevel({"a b c": 0, "?": 1}, unk_token="?"))  # a token may contain white space
    assert tokenizer.find_cut(across_spaces, "a b c") == 0


def test_memory_does_not_grow_with_the_text(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "PIECE_CHARACTERS", 2_000)
    monkeypatch.setattr(tokenizer, "BATCH_CHARACTERS", 10_000)

    def peak_memory(lines: int) -> int:
        counts = {"texts": 0, "tokens": 0}
        text = ((False, " the river reached the quiet valley \n") for _ in range(lines))
        tracemalloc.start()
        stream = tokenizer.encode_articles(tiny_tokenizer, text, 0, np.uint16, counts)
        rows = sum(len(part) for part in blocks.pack_stream(stream, 50, 0))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert rows == -(-(counts["tokens"] - 1) // 50)
        return peak

    short = peak_memory(1_000)
    assert peak_memory(8_000) < 1.2 * short
