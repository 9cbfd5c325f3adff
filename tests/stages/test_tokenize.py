"""The stage tokenize: the rows of both layouts; on the real WikiText-2 where it is at hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from bad_input import update_json
from local_preset import write_params
from training_runs import run_stage
from wikitext import ARTICLES, GPT2_TOKENIZER, GPT2_TOKENS, WIKITEXT2, needs_tokenizer, needs_wikitext2

from gpt2lora.dataset import articles, blocks, tokenizer
from stages import base, prepare, tokenize


@pytest.fixture
def folder(tmp_path, tiny_corpus, monkeypatch) -> Path:
    """A working directory with params.yaml, whose preset `local` has the tiny corpus."""
    monkeypatch.chdir(tmp_path)
    return write_params(tmp_path, tiny_corpus)


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny_model):
    return tokenizer.load_tokenizer(tiny_model)


def run_tokenize(folder: Path, layout: str, block_size: int | None, base_model: Path) -> dict:
    """Run prepare and tokenize; return the manifest."""
    tiny.set_param(folder, "tokenize.layout", layout)
    tiny.set_param(folder, "tokenize.block_size", block_size)
    run_stage(prepare.main, "--out", "raw")
    run_stage(tokenize.main, "--raw", "raw", "--base", base_model, "--out", "tokens")
    return json.loads(Path("tokens/manifest.json").read_text())


def token_files() -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path("tokens").iterdir()}


def unpadded_rows(split: blocks.Blocks) -> list[list[int]]:
    return [ids[:length].tolist() for ids, length in zip(split.ids, split.lengths, strict=True)]


def test_packed_rows_are_the_articles_separated_by_end_of_text(folder, tiny_model, tiny_tokenizer):
    manifest = run_tokenize(folder, "packed", 32, tiny_model)
    for split in blocks.SPLITS:
        first, *others = unpadded_rows(blocks.load_blocks(Path("tokens"), split, ()))
        stream = first + [token for ids in others for token in ids[1:]]
        texts = articles.split_articles(Path(f"raw/{split}.txt").read_text())
        assert tiny_tokenizer.decode(stream, skip_special_tokens=False) == tiny.END.join(texts)
        counts = manifest["splits"][split]
        assert counts["texts"] == len(texts)
        assert counts["tokens"] == len(stream) - (len(texts) - 1)
        assert counts["predicted_tokens"] == len(stream) - 1
        assert all(len(ids) == 33 for ids in [first, *others][:-1])


def test_a_padded_row_is_a_paragraph_ended_by_end_of_text(folder, tiny_model, tiny_tokenizer):
    manifest = run_tokenize(folder, "padded", 20, tiny_model)
    end = tiny_tokenizer.token_to_id(tiny.END)
    for split in blocks.SPLITS:
        rows = unpadded_rows(blocks.load_blocks(Path("tokens"), split, ()))
        texts = [line for line in Path(f"raw/{split}.txt").read_text().split("\n") if line.strip()]
        expected = [[*tiny_tokenizer.encode(text).ids, end][:21] for text in texts]
        assert rows == expected
        assert {len(ids) == 21 for ids in rows} == {True, False}, "some rows are full, some padded"
        assert manifest["splits"][split]["predicted_tokens"] == sum(map(len, expected)) - len(expected)


def test_the_default_block_size_is_the_models_context(folder, tiny_model):
    assert run_tokenize(folder, "packed", None, tiny_model)["block_size"] == tiny.POSITIONS
    assert blocks.load_blocks(Path("tokens"), "train", ()).ids.shape[1] == tiny.POSITIONS + 1


@pytest.mark.parametrize(("positions", "expected"), [(512, 512), (1024, 1024), (131_072, 1024)])
def test_the_default_block_size_is_at_most_1024(folder, tmp_path, tiny_model, positions, expected):
    model = shutil.copytree(tiny_model, tmp_path / "long")
    update_json(model / "config.json", n_positions=positions)
    assert run_tokenize(folder, "packed", None, model)["block_size"] == expected
    output = run_stage(tokenize.main, "--raw", "raw", "--base", model, "--out", "tokens")
    line = "tokenize: blocks of 1,024 of the model's 131,072 tokens: tokenize.block_size"
    assert (line in output) is (positions > expected)
    assert run_tokenize(folder, "packed", positions, model)["block_size"] == positions


def test_ids_of_a_large_vocabulary_have_four_bytes(folder, tiny_model):
    large = folder / "large"
    shutil.copytree(tiny_model, large)
    config = json.loads((large / "config.json").read_text())
    (large / "config.json").write_text(json.dumps(config | {"vocab_size": 70_000}))
    assert run_tokenize(folder, "packed", 32, tiny_model)["dtype"] == "uint16"
    two_bytes = blocks.load_blocks(Path("tokens"), "train", ()).ids
    assert run_tokenize(folder, "packed", 32, large)["dtype"] == "uint32"
    four_bytes = blocks.load_blocks(Path("tokens"), "train", ()).ids
    assert (two_bytes.dtype, four_bytes.dtype) == (np.uint16, np.uint32)
    assert (two_bytes == four_bytes).all()


def test_every_run_writes_the_same_bytes(folder, tiny_model):
    run_tokenize(folder, "packed", 32, tiny_model)
    first = token_files()
    run_tokenize(folder, "packed", 32, tiny_model)
    assert token_files() == first


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_size_of_pieces_does_not_change_the_tokens(layout, folder, tiny_model, tiny_corpus, monkeypatch):
    expected = run_tokenize(folder, layout, 20, tiny_model)
    files = token_files()
    cuts, find_cut = [], tokenizer.find_cut

    def recording_find_cut(*arguments) -> int:
        cuts.append(find_cut(*arguments))
        return cuts[-1]

    monkeypatch.setattr(tokenizer, "PIECE_CHARACTERS", 90)
    monkeypatch.setattr(tokenizer, "find_cut", recording_find_cut)
    assert run_tokenize(folder, layout, 20, tiny_model) == expected
    assert token_files() == files
    assert len(list(filter(None, cuts))) > 40 or layout == "padded", "articles were cut"


@needs_wikitext2
@needs_tokenizer
def test_wikitext2_has_the_known_number_of_gpt2_tokens(folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    shutil.copytree(GPT2_TOKENIZER, "gpt2", copy_function=shutil.copyfile)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=2, n_head=1)).save_pretrained("gpt2")
    tiny.set_param(folder, "presets.local.model", "gpt2")
    run_stage(base.main, "--out", "base")
    tiny.set_param(folder, "presets.local.dataset", WIKITEXT2)
    manifest = run_tokenize(folder, "packed", None, "base")
    assert {split: counts["tokens"] for split, counts in manifest["splits"].items()} == GPT2_TOKENS
    assert manifest["end_of_text_id"] == 50_256
    assert manifest["vocabulary_size"] == 50_257
    for split, counts in manifest["splits"].items():
        assert counts["predicted_tokens"] == GPT2_TOKENS[split] + ARTICLES[split] - 2, "with the separators"
