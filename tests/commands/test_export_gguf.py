"""export --gguf: a file for llama.cpp that computes what the tuned model computes."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from small_models import logits, write_llama
from transformers import AutoModelForCausalLM

from gpt2lora.commands import export, export_gguf
from gpt2lora.model import loading
from gpt2lora.pipeline.cli import StageError

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
LLAMA3 = [
    {"type": "Split", "pattern": {"Regex": export_gguf.LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
    BYTE_LEVEL | {"use_regex": False},
]


@pytest.fixture(params=["gpt2", "llama"])
def base(request, tmp_path, tiny_corpus, monkeypatch) -> Path:
    """A base with large weights, so that errors show, and an adapter of it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tiny.write_model(Path(request.param), tiny_corpus, spread=0.1)
    if request.param == "llama":
        write_llama(path, initializer_range=0.1, num_attention_heads=4, num_key_value_heads=2)
    tiny.write_adapter(Path("adapter"), path)
    return path


def run_export(base: Path, *arguments, exit_code: int = 0) -> str:
    command = ["--base", str(base), "--adapter", "adapter", "--out", "model.gguf", "--gguf", *arguments]
    result = CliRunner().invoke(export.main, command, catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.output


def error_line(base: Path) -> str:
    """Run an export that must fail and write nothing; return its error line."""
    before = set(Path.cwd().rglob("*"))
    line = run_export(base, "f16", exit_code=1).splitlines()[-1]
    assert set(Path.cwd().rglob("*")) == before
    return line.removeprefix("Error: ")


# The file


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.01), ("q8_0", 0.15)])
def test_transformers_reads_the_tuned_model_from_the_file(base, kind, tolerance):
    pytest.importorskip("gguf")
    output = run_export(base, kind)
    assert f"for llama.cpp, each read back as {kind} rounds it" in output
    tuned = loading.load_tuned(base, Path("adapter"), torch.float32)
    # transformers takes no number of positions from a GGUF file of a GPT-2.
    config = loading.load_config(base)
    read = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf", config=config, dtype=torch.float32)
    expected = logits(tuned)
    difference = (logits(read) - expected).abs().max()
    assert difference < tolerance * expected.abs().max()
    assert Path("model.Modelfile").read_text().splitlines() == [
        "FROM ./model.gguf",
        'TEMPLATE """{{ .Prompt }}"""',
        'PARAMETER stop "<|endoftext|>"',
        f"PARAMETER num_ctx {config.max_position_embeddings}",
    ]


def test_the_tokenizer_is_that_of_the_base(base):
    gguf = pytest.importorskip("gguf")
    run_export(base, "f16")
    fields = gguf.GGUFReader("model.gguf").fields
    content = json.loads((base / "tokenizer.json").read_text())
    vocabulary = {token: number for number, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    assert {token: vocabulary[token] for token in content["model"]["vocab"]} == content["model"]["vocab"]
    assert fields["tokenizer.ggml.merges"].contents() == [" ".join(merge) for merge in content["model"]["merges"]]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == content["model"]["vocab"]["<|endoftext|>"]
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_a_file_that_differs_is_noticed(base):
    pytest.importorskip("gguf")
    run_export(base, "q8_0")
    network = export.merge_adapter(base, Path("adapter"), "lora", None, "original")
    export_gguf.check_file(Path("model.gguf"), network)
    values = next(value for name, value in network.named_parameters() if value.ndim > 1 and ".0." in name)
    with torch.no_grad():
        values[3, 5] += 0.05 * values.abs().max()
    with pytest.raises(StageError, match="is not in the file as it was trained"):
        export_gguf.check_file(Path("model.gguf"), network)


def test_frequencies_of_a_longer_context_are_in_the_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    network = loading.load_fp32(write_llama(tmp_path / "base", rope_parameters=rope), tmp_path / "base")
    arrays = dict(export_gguf.named_arrays(network, gguf.MODEL_ARCH.LLAMA))
    assert arrays["rope_freqs.weight"] == pytest.approx(4.0)


# Errors


def test_without_the_package_one_line_says_how_to_install_it(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert error_line(base) == "--gguf needs the package gguf: pip install 'gguf>=0.17', or '.[gguf]' here"


@pytest.mark.parametrize("name", ["model.gguf", "model.Modelfile"])
def test_an_existing_file_is_kept(base, name):
    Path(name).write_text("mine")
    assert error_line(base) == f"{name} exists: name a new file"


def test_a_model_of_another_type_is_refused(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", shutil)  # any module
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "opt"}))
    line = f"--gguf writes GPT-2- and Llama-like models, and {base} has model_type opt: leave --gguf out"
    assert error_line(base) == line


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "gpt2", "activation_function": "gelu_new"}, None),
        ({"model_type": "gpt2", "activation_function": "relu"}, "activation_function relu"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ({"model_type": "llama", "rope_scaling": None}, None),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "llama3"}}, None),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "yarn"}}, "rope_type yarn"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias True"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window 4096"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise(config, expected):
    assert export_gguf.unsupported_model(config) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": LLAMA3}}, "ignore_merges None"),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "another splitting of words than GPT-2's or"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "another splitting of words than GPT-2's or Llama 3's byte-level"),
        ({"pre_tokenizer": None}, "another splitting of words than GPT-2's or Llama 3's byte-level BPE"),
        ({"normalizer": {"type": "NFC"}}, "a normalizer (NFC)"),
        ({"model": {"type": "Unigram"}}, "another splitting of words than GPT-2's or Llama 3's byte-level BPE"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "another splitting of words than GPT-2's or Llama 3's by"),
        ({"added_tokens": [{"content": "<mask>", "lstrip": True}]}, "spaces stripped beside <mask>"),
    ],
)
def test_tokenizers_that_llama_cpp_lacks(change, expected):
    found = export_gguf.unsupported_tokenizer({"model": {"type": "BPE"}, "pre_tokenizer": BYTE_LEVEL} | change)
    assert found is None if expected is None else found.startswith(expected)


def test_llama_3_splits_words_in_its_own_way():
    content = {"model": {"type": "BPE", "ignore_merges": True}}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": LLAMA3}
    assert export_gguf.unsupported_tokenizer(content) is None
    assert export_gguf.pre_tokenizer(content) == "llama-bpe"
