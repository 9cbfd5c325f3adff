"""Documents are kept apart from prepare to the protocols of evaluate; special tokens in a text are counted."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from bad_input import error_line, update_json
from local_preset import write_params
from tokenizers import AddedToken, Tokenizer
from training_runs import run_stage

from gpt2lora.dataset import blocks, tokenizer
from gpt2lora.evaluation import protocols, samples
from gpt2lora.pipeline.schemas import LAYOUTS
from stages import prepare, tokenize

TEXTS = [f"The river {n} , crossed .\n\n = the king = \n\nA town {tiny.END}\n <sep> {n}" for n in range(12)]
BLOCK_SIZE = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_model) -> Path:
    """The tiny model with a special token <sep>, as a user adds one."""
    folder = tmp_path_factory.mktemp("sep") / "model"
    shutil.copytree(tiny_model, folder)
    changed = Tokenizer.from_file(str(folder / "tokenizer.json"))
    changed.add_special_tokens([AddedToken("<sep>", special=True)])
    changed.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": changed.get_vocab_size()}))
    return folder


@pytest.fixture
def folder(tmp_path, tiny_corpus, monkeypatch) -> Path:
    """The working directory, with a table of documents as corpus."""
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path, tiny_corpus)
    (tmp_path / "corpus").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / f"corpus/{split}.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    for key, value in {"presets.local.dataset": "corpus", "presets.local.text_column": "body"}.items():
        tiny.set_param(tmp_path, key, value)
    tiny.set_param(tmp_path, "tokenize.block_size", BLOCK_SIZE)
    return tmp_path


def run_tokenize(model: Path, **settings) -> dict:
    """Run tokenize; return its manifest."""
    for key, value in settings.items():
        tiny.set_param(Path(), f"tokenize.{key}", value)
    run_stage(tokenize.main, "--raw", "raw", "--base", model, "--out", "tokens")
    return json.loads(Path("tokens/manifest.json").read_text())


def encode(model: Path, text: str) -> list[int]:
    return tokenizer.load_tokenizer(model).encode(text, add_special_tokens=False).ids


def joined(model: Path) -> list[int]:
    """The ids of all documents, with the end-of-text id between them."""
    end = Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id(tiny.END)
    return [id for text in TEXTS for id in [*encode(model, text), end]][:-1]


def test_every_form_of_a_corpus_gives_the_same_tokens(folder, model):
    run_stage(prepare.main, "--out", "raw")
    manifest = run_tokenize(model)
    expected = {split: manifest["files"][f"{split}.npy"] for split in blocks.SPLITS}
    stream = blocks.load_blocks(Path("tokens"), "train", ())
    ids = np.concatenate([stream.ids[0, :1], stream.ids[:, 1:].reshape(-1)[: stream.targets]]).tolist()
    assert ids == joined(model)
    assert manifest["splits"]["train"]["texts"] == len(TEXTS)

    for path in (folder / "corpus").iterdir():
        path.rename(path.with_suffix(".txt")).write_text("\r\n<sep2>\r\n".join(TEXTS).replace("\n\n", "\r\n\r\n"))
    tiny.set_param(folder, "prepare.document_separator", "<sep2>")
    run_stage(prepare.main, "--out", "raw")
    assert {split: run_tokenize(model)["files"][f"{split}.npy"] for split in blocks.SPLITS} == expected


def test_the_size_of_pieces_does_not_change_the_tokens(folder, model, monkeypatch):
    run_stage(prepare.main, "--out", "raw")
    expected = run_tokenize(model)
    monkeypatch.setattr(tokenizer, "PIECE_CHARACTERS", 20)
    monkeypatch.setattr(tokenize, "PIECE_CHARACTERS", 20)
    assert run_tokenize(model) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_protocols_score_documents_by_themselves(folder, model, layout):
    run_stage(prepare.main, "--out", "raw")
    manifest = run_tokenize(model, layout=layout)
    text = protocols.read_test_text(Path("raw"))
    assert text == TEXTS
    words, size = sum(len(each.split()) for each in TEXTS), sum(len(each.encode()) for each in TEXTS)

    native = protocols.build_task("native", BLOCK_SIZE, manifest, text, Path("tokens"), model)
    if layout == "packed":
        assert native.windows.ids.tolist() == joined(model)
        assert (native.words, native.bytes) == (words, size)
    else:
        assert len(native.windows) == 4 * len(TEXTS) == manifest["splits"]["test"]["texts"]

    hf = protocols.build_task("hf", BLOCK_SIZE, manifest, text, Path("tokens"), model)
    assert hf.windows.ids.tolist() == encode(model, "\n\n".join(TEXTS))
    assert (hf.words, hf.bytes) == (words, size)

    harness = protocols.build_task("lm-eval", BLOCK_SIZE, manifest, text, Path("tokens"), model)
    pages = [encode(model, protocols.detokenize(each)) for each in TEXTS]
    assert harness.windows.targets.tolist() == [id for page in pages for id in page]
    assert harness.bytes == size


def test_prompts_are_beginnings_of_documents(folder, model):
    prompts = samples.choose_prompts(TEXTS, tokenizer.load_tokenizer(model), BLOCK_SIZE, [])
    assert prompts.ids == [encode(model, TEXTS[number])[: BLOCK_SIZE // 2] for number in (0, 6, 11)]


def test_a_changed_document_is_noticed(folder, model):
    run_stage(prepare.main, "--out", "raw")
    with Path("raw/test.jsonl").open("a") as file:
        file.write("{}\n")
    line = error_line(tokenize.main, "--raw", "raw", "--base", model, "--out", "tokens")
    assert line.startswith("raw/test.jsonl is damaged")


# Special tokens


@pytest.mark.parametrize("layout", LAYOUTS)
def test_added_tokens_are_tokens_and_control_tokens_letters(folder, model, layout):
    run_stage(prepare.main, "--out", "raw")
    manifest = run_tokenize(model, layout=layout)
    counts = {"special_tokens": {"<sep>": 12}, "control_tokens_as_letters": {tiny.END: 12}}
    assert counts.items() <= manifest["splits"]["train"].items()
    assert (np.load("tokens/train.npy")[:, 1:] == tiny.VOCABULARY).sum() == 12
    assert manifest["special_tokens"] is False

    manifest = run_tokenize(model, layout=layout, special_tokens=True)
    assert manifest["splits"]["train"]["special_tokens"] == {tiny.END: 12, "<sep>": 12}
    assert (np.load("tokens/train.npy")[:, 1:] == tiny.VOCABULARY).sum() == 12
    task = protocols.build_task("hf", BLOCK_SIZE, manifest, TEXTS, Path("tokens"), model)
    assert (task.windows.ids == manifest["end_of_text_id"]).sum() == 12


def test_a_corpus_without_special_tokens_names_none(folder, tiny_model, tiny_corpus):
    tiny.set_param(folder, "presets.local.dataset", str(tiny_corpus))
    run_stage(prepare.main, "--out", "raw")
    assert set(run_tokenize(tiny_model)["splits"]["test"]) == {"texts", "tokens", "rows", "predicted_tokens"}


def test_what_padded_rows_cut_is_counted(folder, model):
    run_stage(prepare.main, "--out", "raw")
    test = run_tokenize(model, layout="padded", block_size=4)["splits"]["test"]
    lengths = [len(encode(model, part)) + 1 for text in TEXTS for part in text.split("\n") if part]
    assert test["tokens"] == sum(lengths)
    assert test["cut_tokens"] == sum(max(0, length - 5) for length in lengths) > 0


# What a tokenizer does not keep


def change_tokenizer(model: Path, folder: Path, change) -> Path:
    """Copy the model with a tokenizer changed by a function of its settings."""
    shutil.copytree(model, folder)
    settings = json.loads((folder / "tokenizer.json").read_text())
    change(settings)
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    return folder


def test_words_that_a_tokenizer_lacks_are_counted(folder, model, tmp_path):
    words = {"[UNK]": 0, "The": 1, "river": 2, "<|endoftext|>": 3}

    def change(settings):
        settings["model"] = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
        settings |= {"pre_tokenizer": {"type": "Whitespace"}, "decoder": None, "added_tokens": []}

    run_stage(prepare.main, "--out", "raw")
    changed = change_tokenizer(model, tmp_path / "words", change)
    output = run_stage(tokenize.main, "--raw", "raw", "--base", changed, "--out", "tokens")
    test = json.loads(Path("tokens/manifest.json").read_text())["splits"]["test"]
    known = 2 * len(TEXTS)
    assert test["unknown_tokens"] == test["tokens"] - known > 0
    assert f"warning: test: {test['unknown_tokens']:,} tokens are [UNK], for what the tokenizer lacks" in output


@pytest.mark.parametrize("normalizer", [None, {"type": "Lowercase"}])
def test_characters_that_a_tokenizer_changes_are_reported(folder, model, tmp_path, normalizer):
    run_stage(prepare.main, "--out", "raw")
    changed = change_tokenizer(model, tmp_path / "lower", lambda settings: settings.update(normalizer=normalizer))
    output = run_stage(tokenize.main, "--raw", "raw", "--base", changed, "--out", "tokens")
    test = json.loads(Path("tokens/manifest.json").read_text())["splits"]["test"]
    assert test.get("changed_texts") == (len(TEXTS) if normalizer else None)
    line = f"warning: test: the tokenizer changes or drops characters of {len(TEXTS)} texts"
    assert (line in output) == bool(normalizer)


def test_an_end_of_text_that_the_tokenizer_does_not_name_is_said(folder, model, tmp_path):
    run_stage(prepare.main, "--out", "raw")
    changed = change_tokenizer(model, tmp_path / "no-eos", lambda settings: None)
    (changed / "tokenizer_config.json").write_text("{}")
    update_json(changed / "config.json", eos_token_id=5)
    output = run_stage(tokenize.main, "--raw", "raw", "--base", changed, "--out", "tokens")
    token = Tokenizer.from_file(str(changed / "tokenizer.json")).id_to_token(5)
    line = f"the tokenizer has no eos_token: texts end with {token!r}, eos_token_id 5 of config.json"
    assert line in output


# Memory

MEMORY = """
from stages import prepare
prepare.main.main(["--out", "raw"], standalone_mode=False)
# Not ru_maxrss, which counts the process that started this one.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak memory of a process")
@pytest.mark.parametrize("name", ["plain.txt", "separated.txt", "rows.jsonl"])
def test_prepare_needs_no_more_memory_for_a_larger_corpus(folder, name):
    paragraph = "the river crossed the old town " * 20
    line = {
        "plain.txt": f"{paragraph}\n\n",
        "separated.txt": f"{paragraph}<sep>",
        "rows.jsonl": f'{{"body": "{paragraph}"}}\n',
    }
    tiny.set_param(folder, "presets.local.dataset", name)
    tiny.set_param(folder, "prepare.fraction", 0.5)
    tiny.set_param(folder, "prepare.document_separator", "<sep>" if name == "separated.txt" else None)

    def peak_megabytes(size: int) -> float:
        Path(name).write_text(line[name] * (size // len(line[name])))
        environment = tiny.environment() | {"PYTHONPATH": str(tiny.ROOT)}
        done = subprocess.run([sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.splitlines()[-1]) / 1000

    # The reader of tables reads ahead: it holds all of a small file, and no more of 200 MB than of 50.
    small, large = peak_megabytes(50_000_000), peak_megabytes(200_000_000)
    assert large < 400
    assert large - small < 40
