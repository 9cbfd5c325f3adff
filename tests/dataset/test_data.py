"""The corpus: articles, splits, token rows; on the real WikiText-2 too, where the environment names its folder."""

import hashlib
import json
import os
import random
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from gpt2lora.dataset import articles, blocks, tokenizer
from gpt2lora.pipeline.cli import StageError
from gpt2lora.sample import corpus
from gpt2lora.sources import hub
from stages import base, prepare, tokenize

WIKITEXT2 = os.environ.get("WIKITEXT2_DIR", "")
WIKITEXT2_RAW = os.environ.get("WIKITEXT2_RAW_DIR", "")
GPT2_TOKENIZER = os.environ.get("GPT2_TOKENIZER_DIR", "")
needs_wikitext2 = pytest.mark.skipif(not WIKITEXT2, reason="WIKITEXT2_DIR: a folder with WikiText-2")
needs_raw = pytest.mark.skipif(not WIKITEXT2_RAW, reason="WIKITEXT2_RAW_DIR: a folder with test.txt of WikiText-2 raw")
needs_tokenizer = pytest.mark.skipif(not GPT2_TOKENIZER, reason="GPT2_TOKENIZER_DIR: a folder with GPT-2's tokenizer")
DIGESTS = {
    "train": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
    "validation": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
}
RAW_TEST_DIGEST = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
ARTICLES = {"train": 600, "validation": 60, "test": 60}
GPT2_TOKENS = {"train": 2_448_382, "validation": 258_659, "test": 295_877}

LINES = (
    " \n",
    "\n",
    " = A = \n",
    " = B ( c ) = \n",
    " = = Part = = \n",
    " = = = Deep = = = \n",
    " text , \n",
    " = x\n",
    "y",
)
wikitext = st.lists(st.sampled_from(LINES), max_size=30).map("".join) | st.text(alphabet=" =\nab")
streams = st.integers(0, 200).map(lambda length: np.arange(length, dtype=np.uint16))
PAD = 9999


def article(number: int) -> str:
    return f" \n = Title {number} = \n \n The text of number {number} . \n"


def run(command, *arguments) -> str:
    result = CliRunner().invoke(command, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def workplace(tmp_path, tiny_corpus, monkeypatch):
    """A working directory with the shipped params.yaml, whose preset `local` has the tiny corpus."""
    shutil.copyfile(tiny.ROOT / "params.yaml", tmp_path / "params.yaml")
    tiny.set_param(tmp_path, "preset", "local")
    tiny.set_param(tmp_path, "presets.local.dataset", str(tiny_corpus))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny_model):
    return tokenizer.load_tokenizer(tiny_model)


# Articles


@given(wikitext)
def test_the_articles_of_a_text_joined_are_the_text(text):
    pieces = articles.split_articles(text)
    assert "".join(pieces) == text
    assert all(pieces)


def test_an_article_begins_with_its_title_and_holds_its_sections():
    first = " \n = One = \n \n Text . \n \n = = Part = = \n \n More . \n \n = = = Deep = = = \n \n"
    assert articles.split_articles(first + " = Two = \n \n Text . \n") == [first, " = Two = \n \n Text . \n"]


def test_a_formula_that_looks_like_a_title_starts_no_article():
    text = " \n = One = \n \n where \n = mass times c = \n and so on . \n \n = = Part = = \n \n"
    assert articles.split_articles(text) == [text]


def test_a_text_without_titles_is_one_article():
    assert articles.split_articles("one\n\ntwo\n") == ["one\n\ntwo\n"]
    assert articles.split_articles("") == []


# Splits


@given(st.integers(3, 60), st.floats(0.01, 0.98), st.floats(0.01, 0.98))
def test_a_cut_has_three_parts_none_empty_that_make_up_the_whole(count, validation_share, test_share):
    parts = prepare.partition(list(range(count)), validation_share, test_share)
    assert list(parts) == ["train", "validation", "test"]
    assert all(parts.values())
    assert [item for part in parts.values() for item in part] == list(range(count))


def test_one_text_is_split_by_whole_articles_in_the_shares_asked_for(tmp_path):
    pieces = [article(number) for number in range(40)]
    (tmp_path / "corpus.txt").write_text("".join(pieces))
    splits = prepare.split_text(tmp_path / "corpus.txt", 0.1, 0.2, seed=0)
    parts = {split: articles.split_articles(text) for split, text in splits.items()}
    assert {split: len(part) for split, part in parts.items()} == {"train": 28, "validation": 4, "test": 8}
    # An article's leading blank line ends the article before it: compare without.
    titles = [piece.strip() for part in parts.values() for piece in part]
    assert sorted(titles) == sorted(piece.strip() for piece in pieces)
    assert all(part == sorted(part, key=lambda piece: int(piece.split()[2])) for part in parts.values())


def test_the_same_seed_gives_the_same_splits_and_another_seed_others(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text("".join(map(article, range(40))))
    assert prepare.split_text(file, 0.1, 0.1, seed=1) == prepare.split_text(file, 0.1, 0.1, seed=1)
    assert prepare.split_text(file, 0.1, 0.1, seed=1) != prepare.split_text(file, 0.1, 0.1, seed=2)


def test_one_text_without_articles_is_split_by_lines_in_their_order(tmp_path):
    text = "".join(f"line {number}\r\n" for number in range(20))
    (tmp_path / "corpus.txt").write_bytes(text.encode())
    splits = prepare.split_text(tmp_path / "corpus.txt", 0.1, 0.1, seed=0)
    assert "".join(splits[split] for split in ("train", "validation", "test")) == text
    assert splits["test"] == "line 18\r\nline 19\r\n"


def test_a_text_too_short_to_split_is_refused(tmp_path):
    (tmp_path / "corpus.txt").write_text("one\ntwo\n")
    with pytest.raises(StageError, match="2 lines: expected at least three"):
        prepare.split_text(tmp_path / "corpus.txt", 0.1, 0.1, seed=0)


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 10), (0.25, 5), (0.001, 1)])
def test_a_fraction_keeps_whole_articles_in_their_order(fraction, count):
    pieces = articles.split_articles("".join(map(article, range(20))))
    kept = prepare.take_fraction("".join(pieces), fraction, seed=0)
    found = [piece for piece in pieces if piece in kept]
    assert len(found) == count
    assert "".join(found) == kept
    assert prepare.take_fraction("".join(pieces), fraction, seed=0) == kept


def test_the_whole_fraction_keeps_every_byte():
    text = "\n\n = A = \n no article \n"
    assert prepare.take_fraction(text, 1.0, seed=0) == text


@pytest.mark.parametrize("name", ["valid", "validation", "dev"])
def test_the_second_split_may_have_any_of_its_usual_names(workplace, name):
    folder = workplace / "corpus"
    folder.mkdir()
    for split in ("train", name, "test"):
        (folder / f"{split}.txt").write_bytes(f"{split}\r\n \n".encode())
    tiny.set_param(workplace, "presets.local.dataset", "corpus")
    run(prepare.main, "--out", "raw")
    written = {file.name: file.read_bytes() for file in Path("raw").glob("*.txt")}
    assert written == {
        "train.txt": b"train\r\n \n",
        "validation.txt": f"{name}\r\n \n".encode(),
        "test.txt": b"test\r\n \n",
    }


def test_rows_of_the_hub_become_the_lines_of_the_release():
    assert list(map(hub.restore_line, ["", " = A = \n", "no newline"])) == [" \n", " = A = \n", "no newline\n"]


# The embedded sample's text


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that cannot be imported."""
    folder = tmp_path / "site" / "trapped"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text('"""The package."""\nraise SystemExit("it was imported")\n')
    (folder / "inner" / "__init__.py").write_text("")
    (folder / "inner" / "b.py").write_text('def f():\n    """Return nothing."""\n\nclass C:\n    """A class."""\n')
    (folder / "a.py").write_text('"""A module."""\n')
    (folder / "template.py").write_text('"""Not Python: """ {{ name }}')
    (folder / "tests").mkdir()
    (folder / "tests" / "test_a.py").write_text('"""A test."""')
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def test_docstrings_are_harvested_without_an_import(package):
    assert corpus.package_folder("trapped") == package
    assert corpus.docstring_articles(package) == [
        " \n = trapped.__init__ = \n \nThe package.\n",
        " \n = trapped.a = \n \nA module.\n",
        " \n = trapped.inner.b = \n \nReturn nothing.\n\nA class.\n",
    ]


def test_the_harvest_is_the_same_in_whatever_order_a_disk_lists_its_files(package, monkeypatch):
    expected = corpus.docstring_articles(package)
    files = list(package.rglob("*.py"))
    for seed in range(5):
        monkeypatch.setattr(Path, "rglob", lambda *_, seed=seed: iter(random.Random(seed).sample(files, len(files))))
        assert corpus.docstring_articles(package) == expected


def test_the_sample_is_split_by_modules(workplace, package, monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLE_PACKAGE", "trapped")
    tiny.set_param(workplace, "preset", "sample")
    run(prepare.main, "--out", "raw")
    found = [articles.split_articles((workplace / "raw" / f"{split}.txt").read_text()) for split in blocks.SPLITS]
    assert sorted(piece for split in found for piece in split) == corpus.docstring_articles(package)
    assert [len(split) for split in found] == [1, 1, 1]


def test_the_sample_s_base_is_made_of_what_is_installed(workplace, monkeypatch):
    texts = [
        f" \n = module {number} = \n \nReturn the {number}th of the numbers, counted from one.\n"
        for number in range(120)
    ]
    monkeypatch.setattr(corpus, "docstring_articles", lambda _: texts)
    tiny.set_param(workplace, "preset", "sample")
    output = run(base.main, "--out", "made")
    assert "tokens in its vocabulary" in output
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in Path("made").iterdir()}
    first = (workplace / "made" / "model.safetensors").read_bytes()
    run(base.main, "--out", "again")
    assert (workplace / "again" / "model.safetensors").read_bytes() == first


# Token rows


@given(streams, st.integers(1, 50))
def test_every_token_of_a_packed_stream_but_the_first_is_a_target_once(stream, block_size):
    packed = blocks.pack_blocks(stream, block_size, PAD)
    assert packed.ids.shape == (len(packed), block_size + 1)
    inputs = [ids[: length - 1] for ids, length in zip(packed.ids, packed.lengths, strict=True)]
    targets = [ids[1:length] for ids, length in zip(packed.ids, packed.lengths, strict=True)]
    assert np.concatenate([*inputs, stream[:0]]).tolist() == stream[:-1].tolist()
    assert np.concatenate([*targets, stream[:0]]).tolist() == stream[1:].tolist()
    assert packed.targets == max(0, len(stream) - 1)


@given(streams, st.integers(1, 50))
def test_only_the_last_packed_row_is_padded(stream, block_size):
    packed = blocks.pack_blocks(stream, block_size, PAD)
    assert (packed.lengths[:-1] == block_size + 1).all()
    assert (packed.lengths >= 2).all()
    padding = np.arange(block_size + 1) >= packed.lengths[:, None]
    assert (packed.ids[padding] == PAD).all()
    assert (packed.ids[~padding] != PAD).all()


@given(st.lists(st.integers(2, 30), max_size=8), st.integers(1, 20))
def test_a_padded_row_holds_one_text_cut_to_what_the_model_reads(lengths, block_size):
    texts = [np.arange(length, dtype=np.uint16) for length in lengths]
    padded = blocks.pad_texts(texts, block_size, PAD)
    assert padded.ids.shape == (len(texts), block_size + 1)
    for ids, length, text in zip(padded.ids, padded.lengths, texts, strict=True):
        assert length == min(len(text), block_size + 1)
        assert ids.tolist() == text[:length].tolist() + [PAD] * (block_size + 1 - length)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=8), st.data())
def test_the_targets_of_some_rows_are_all_their_tokens_but_the_first(lengths, data):
    split = blocks.pad_texts([np.zeros(length, np.uint16) for length in lengths], 8, PAD)
    places = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True))
    assert split.count_targets(np.array(places, dtype=int)) == sum(lengths[place] - 1 for place in places)
    assert split.targets == sum(lengths) - len(lengths)


def test_rows_come_back_from_disk_as_they_were(tmp_path):
    written = blocks.pack_blocks(np.arange(100, dtype=np.uint32), 16, PAD)
    blocks.save_blocks(written, tmp_path, "test")
    read = blocks.load_blocks(tmp_path, "test")
    assert read.ids.dtype == np.uint32
    assert (read.ids == written.ids).all()
    assert (read.lengths == written.lengths).all()
    assert isinstance(read.ids, np.memmap)


def test_ids_take_two_bytes_while_they_fit():
    assert [blocks.token_dtype(size) for size in (300, 50_257, 65_536, 65_537)] == [np.uint16] * 3 + [np.uint32]


@given(wikitext)
@example("text \n \n = A = \n \n = A = \n \n")  # one blank line does not serve two titles
def test_articles_start_where_a_text_read_line_by_line_is_split(text):
    found = []
    for starts, line in articles.mark_article_starts(re.findall(r".*\n|.+", text)):
        if starts or not found:
            found.append("")
        found[-1] += line
    assert found == articles.split_articles(text)


@given(streams, st.integers(1, 30), st.integers(1, 40), st.booleans())
def test_rows_packed_and_saved_piece_by_piece_are_the_same_bytes(tmp_path_factory, stream, block_size, size, wide):
    folder, dtype = tmp_path_factory.mktemp("rows"), np.uint32 if wide else np.uint16
    stream = stream.astype(dtype)
    blocks.save_blocks(blocks.pack_blocks(stream, block_size, PAD), folder, "whole")
    pieces = (stream[start : start + size] for start in range(0, len(stream), size))
    blocks.save_stream(blocks.pack_stream(pieces, block_size, PAD), block_size + 1, dtype, folder, "parts")
    for kind in ("", ".lengths"):
        assert (folder / f"parts{kind}.npy").read_bytes() == (folder / f"whole{kind}.npy").read_bytes()


# The tokenize stage


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_the_tokens_of_any_text_decode_to_the_text(tiny_tokenizer, text):
    ids = next(tokenizer.encode_texts(tiny_tokenizer, [text], np.uint16))
    assert tiny_tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text


def test_the_end_of_text_spelled_out_in_a_corpus_is_text(tiny_tokenizer):
    text = f" one {tiny.END} two{tiny.END}"
    ids = next(tokenizer.encode_texts(tiny_tokenizer, [text], np.uint16))
    assert tiny_tokenizer.token_to_id(tiny.END) not in ids
    assert tiny_tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text


def test_texts_are_encoded_alike_in_batches_of_any_size(tiny_tokenizer, monkeypatch):
    texts = [article(number) for number in range(20)]
    whole = [ids.tolist() for ids in tokenizer.encode_texts(tiny_tokenizer, texts, np.uint16)]
    monkeypatch.setattr(tokenizer, "BATCH_CHARACTERS", 100)
    assert [ids.tolist() for ids in tokenizer.encode_texts(tiny_tokenizer, texts, np.uint16)] == whole


def tokens(folder: Path, layout: str, block_size: int | None, base_model: Path) -> dict:
    """Run prepare and tokenize; return the manifest."""
    tiny.set_param(folder, "tokenize.layout", layout)
    tiny.set_param(folder, "tokenize.block_size", block_size)
    run(prepare.main, "--out", "raw")
    run(tokenize.main, "--raw", "raw", "--base", base_model, "--out", "tokens")
    return json.loads(Path("tokens/manifest.json").read_text())


def real_ids(split: blocks.Blocks) -> list[list[int]]:
    return [ids[:length].tolist() for ids, length in zip(split.ids, split.lengths, strict=True)]


def test_the_packed_layout_is_the_articles_with_an_end_of_text_between(workplace, tiny_model, tiny_tokenizer):
    manifest = tokens(workplace, "packed", 32, tiny_model)
    for split in blocks.SPLITS:
        first, *others = real_ids(blocks.load_blocks(Path("tokens"), split))
        stream = first + [token for ids in others for token in ids[1:]]
        texts = articles.split_articles(Path(f"raw/{split}.txt").read_text())
        assert tiny_tokenizer.decode(stream, skip_special_tokens=False) == tiny.END.join(texts)
        count = manifest["splits"][split]
        assert count["texts"] == len(texts)
        assert count["tokens"] == len(stream) - (len(texts) - 1)
        assert count["predicted_tokens"] == len(stream) - 1
        assert all(len(ids) == 33 for ids in [first, *others][:-1])


def test_the_padded_layout_is_a_paragraph_a_row_that_ends_itself(workplace, tiny_model, tiny_tokenizer):
    manifest = tokens(workplace, "padded", 20, tiny_model)
    end = tiny_tokenizer.token_to_id(tiny.END)
    for split in blocks.SPLITS:
        found = real_ids(blocks.load_blocks(Path("tokens"), split))
        texts = [line for line in Path(f"raw/{split}.txt").read_text().split("\n") if line.strip()]
        expected = [[*tiny_tokenizer.encode(text).ids, end][:21] for text in texts]
        assert found == expected
        assert {len(ids) == 21 for ids in found} == {True, False}, "rows of both kinds: cut and padded"
        assert manifest["splits"][split]["predicted_tokens"] == sum(map(len, expected)) - len(expected)


def test_without_a_block_size_rows_are_as_long_as_the_model_reads(workplace, tiny_model):
    assert tokens(workplace, "packed", None, tiny_model)["block_size"] == tiny.POSITIONS
    assert blocks.load_blocks(Path("tokens"), "train").ids.shape[1] == tiny.POSITIONS + 1


def test_a_large_vocabulary_takes_four_bytes_an_id(workplace, tiny_model):
    large = workplace / "large"
    shutil.copytree(tiny_model, large)
    config = json.loads((large / "config.json").read_text())
    (large / "config.json").write_text(json.dumps(config | {"vocab_size": 70_000}))
    assert tokens(workplace, "packed", 32, tiny_model)["dtype"] == "uint16"
    narrow = blocks.load_blocks(Path("tokens"), "train").ids
    assert tokens(workplace, "packed", 32, large)["dtype"] == "uint32"
    wide = blocks.load_blocks(Path("tokens"), "train").ids
    assert (narrow.dtype, wide.dtype) == (np.uint16, np.uint32)
    assert (narrow == wide).all()


def test_tokens_are_the_same_bytes_on_every_run(workplace, tiny_model):
    tokens(workplace, "packed", 32, tiny_model)
    first = {file.name: file.read_bytes() for file in Path("tokens").iterdir()}
    tokens(workplace, "packed", 32, tiny_model)
    assert {file.name: file.read_bytes() for file in Path("tokens").iterdir()} == first


# The real WikiText-2


@needs_wikitext2
def test_wikitext2_comes_out_of_prepare_byte_for_byte(workplace):
    tiny.set_param(workplace, "presets.local.dataset", WIKITEXT2)
    run(prepare.main, "--out", "raw")
    written = {split: (workplace / "raw" / f"{split}.txt").read_bytes() for split in blocks.SPLITS}
    assert {split: hashlib.sha256(data).hexdigest() for split, data in written.items()} == DIGESTS
    assert {split: len(articles.split_articles(data.decode())) for split, data in written.items()} == ARTICLES


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_long_texts_are_encoded_alike_in_pieces_of_any_size(layout, workplace, tiny_model, tiny_corpus, monkeypatch):
    expected = tokens(workplace, layout, 20, tiny_model)
    written = {file.name: file.read_bytes() for file in (workplace / "tokens").iterdir()}
    found = []
    monkeypatch.setattr(tokenizer, "PIECE_CHARACTERS", 90)
    monkeypatch.setattr(
        tokenizer, "find_cut", lambda *arguments, cut=tokenizer.find_cut: found.append(cut(*arguments)) or found[-1]
    )
    assert tokens(workplace, layout, 20, tiny_model) == expected
    assert {file.name: file.read_bytes() for file in (workplace / "tokens").iterdir()} == written
    assert len(list(filter(None, found))) > 40 or layout == "padded", "articles were cut"


def test_a_text_is_cut_only_where_it_is_encoded_alike(tiny_tokenizer):
    text = "the river reached  the quiet \n \n valley"
    place = tokenizer.find_cut(tiny_tokenizer, text)
    assert text[place:] == " \n \n valley" or text[place:] == " quiet \n \n valley"
    assert tokenizer.find_cut(tiny_tokenizer, "word" * 100) == 0
    apart = Tokenizer(WordLevel({"a b c": 0, "?": 1}, unk_token="?"))  # whose tokens reach over white space
    assert tokenizer.find_cut(apart, "a b c") == 0


def test_memory_does_not_grow_with_the_text(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "PIECE_CHARACTERS", 2_000)
    monkeypatch.setattr(tokenizer, "BATCH_CHARACTERS", 10_000)

    def peak(lines: int) -> int:
        counts = {"texts": 0, "tokens": 0}
        text = ((False, " the river reached the quiet valley \n") for _ in range(lines))
        tracemalloc.start()
        stream = tokenizer.encode_articles(tiny_tokenizer, text, 0, np.uint16, counts)
        held = sum(len(part) for part in blocks.pack_stream(stream, 50, 0))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert held == -(-(counts["tokens"] - 1) // 50)
        return found

    short = peak(1_000)
    assert peak(8_000) < 1.2 * short


@needs_wikitext2
@needs_tokenizer
def test_wikitext2_has_the_known_number_of_gpt2_tokens(workplace):
    from transformers import GPT2Config, GPT2LMHeadModel

    shutil.copytree(GPT2_TOKENIZER, "gpt2", copy_function=shutil.copyfile)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=2, n_head=1)).save_pretrained("gpt2")
    tiny.set_param(workplace, "presets.local.model", "gpt2")
    run(base.main, "--out", "base")
    tiny.set_param(workplace, "presets.local.dataset", WIKITEXT2)
    manifest = tokens(workplace, "packed", None, "base")
    assert {split: counts["tokens"] for split, counts in manifest["splits"].items()} == GPT2_TOKENS
    assert manifest["end_of_text_id"] == 50_256
    assert manifest["vocabulary_size"] == 50_257
    for split, counts in manifest["splits"].items():
        assert counts["predicted_tokens"] == GPT2_TOKENS[split] + ARTICLES[split] - 2, "with the separators"


@needs_raw
def test_rows_of_the_raw_test_split_become_the_release_byte_for_byte():
    data = (Path(WIKITEXT2_RAW) / "test.txt").read_bytes()
    assert hashlib.sha256(data).hexdigest() == RAW_TEST_DIGEST
    lines = [f"{line}\n" for line in data.decode().split("\n")[:-1]]
    on_the_hub = ["" if line == " \n" else line for line in lines]
    assert "".join(map(hub.restore_line, on_the_hub)).encode() == data
    assert len(articles.split_articles(data.decode())) == ARTICLES["test"]
