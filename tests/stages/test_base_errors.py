"""A model that base cannot use: one line, and earlier outputs unchanged. Pickles and code are never copied or run."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from bad_input import error_line, update_json
from click.testing import CliRunner
from small_models import write_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, RobertaConfig, RobertaForCausalLM

from gpt2lora.dataset import tokenizer
from gpt2lora.model.layers import load_on_meta
from gpt2lora.model.loading import load_fp32
from gpt2lora.pipeline.cli import StageError
from gpt2lora.pipeline.context import check_floats, choose_block_size, read_config
from stages import base

# Configuration and weights


def test_a_missing_configuration_is_reported(stage_folder):
    (stage_folder / "model" / "config.json").unlink()
    assert error_line(base.main).startswith("model: no config.json: ")


def test_a_configuration_of_no_language_model_is_refused(stage_folder):
    (stage_folder / "model" / "config.json").write_text("{}")
    assert error_line(base.main).startswith("model: config.json holds no vocab_size: ")


@pytest.mark.parametrize(("key", "value"), [("n_positions", -3), ("n_positions", "64"), ("vocab_size", "300")])
def test_an_invalid_size_in_the_configuration_is_refused(stage_folder, key, value):
    update_json(stage_folder / "model" / "config.json", **{key: value})
    assert error_line(base.main) == f"model: config.json: {key} is {value!r}: expected an integer above 0"


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_weights_that_are_quantized_already_are_refused(stage_folder, method):
    update_json(stage_folder / "model" / "config.json", quantization_config={"quant_method": method})
    line = error_line(base.main)
    assert line.startswith(f"model: its weights are quantized already (config.json: quantization_config, {method})")
    assert line.endswith("model.dequantize().save_pretrained(folder, save_original_format=False)")


def test_a_float_copy_is_saved_as_the_line_says(stage_folder):
    source = write_llama(stage_folder / "llama")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = AutoModelForCausalLM.from_pretrained(source, quantization_config=nf4, dtype=torch.float32)
    quantized.save_pretrained(stage_folder / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(stage_folder / "quantized", dtype=torch.float32)
    loaded.dequantize().save_pretrained(stage_folder / "float", save_original_format=False)
    check_floats(read_config(stage_folder / "float", "float"), "float")
    copy = load_fp32(stage_folder / "float", stage_folder / "float")
    for value, original in zip(copy.parameters(), load_fp32(source, source).parameters(), strict=True):
        assert (value - original).abs().max() < 0.2 * original.abs().max()  # the error of 4 bits


def test_damaged_weights_are_reported(stage_folder):
    """The file is a pointer, as in a clone without Git LFS."""
    (stage_folder / "model" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "model.safetensors" in error_line(base.main)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_model_with_only_pickled_weights_is_refused(stage_folder, name):
    (stage_folder / "model" / "model.safetensors").rename(stage_folder / "model" / name)
    line = error_line(base.main)
    assert line.startswith(f"model: no *.safetensors ({name}: pickled weights can run code, so they are refused)")


def test_pickles_and_code_are_not_copied(stage_folder):
    others = {"pytorch_model.bin", "modeling_gpt2.py", "tf_model.h5", "tokenizer.pkl", "tokenizer_gpt.py"}
    needed = {path.name for path in (stage_folder / "model").iterdir()}
    for name in others:
        (stage_folder / "model" / name).write_text("never read")
    result = CliRunner().invoke(base.main, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert {path.name for path in Path("data/base").iterdir()} == needed | {"manifest.json"}


def test_a_missing_shard_is_named(stage_folder):
    weights = {"transformer.wte.weight": "model.safetensors", "transformer.wpe.weight": "model-2.safetensors"}
    (stage_folder / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    line = "model: model-2.safetensors is missing, one of 2 files that model.safetensors.index.json names"
    assert error_line(base.main) == line


def test_an_adapter_beside_the_model_is_refused(stage_folder):
    """transformers loads it with the model, of which only the weights would be copied."""
    (stage_folder / "model/adapter_config.json").write_text("{}")
    line = error_line(base.main)
    assert line.startswith("model: holds an adapter beside the model (adapter_config.json)")
    assert line.endswith("merge it into the model, or give the model alone and set lora.start_from to the adapter")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"model_type": "t5"}, "transformers has no causal language model 't5', and code that comes with a model is"),
        ({"is_encoder_decoder": True}, "gpt2 has an encoder and a decoder: expected a causal language model"),
    ],
)
def test_a_model_of_another_kind_is_refused_before_anything_is_trained(stage_folder, values, line):
    update_json(stage_folder / "model/config.json", **values)
    assert error_line(base.main).startswith(f"model: {line}")


@pytest.mark.parametrize(
    "values", [{"n_head": "two"}, {"n_embd": 64.5}, {"n_head": 0}, {"eos_token_id": "0"}, {"n_layer": "x"}], ids=str
)
def test_a_value_that_transformers_refuses_is_one_line(stage_folder, values):
    update_json(stage_folder / "model/config.json", **values)
    with pytest.raises(StageError, match=r"^model: transformers itself cannot load this model \("):
        load_on_meta(Path("model"))


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_that_only_another_file_adds_are_refused(stage_folder, name):
    content = {"River": 300} if name == "added_tokens.json" else {"added_tokens_decoder": {"300": {"content": "River"}}}
    (stage_folder / "model" / name).write_text(json.dumps(content))
    line = f"model: tokenizer.json lacks the token 'River', which {name} adds: save the tokenizer again"
    assert error_line(base.main).startswith(line)


# Parameters that do not fit the model


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("tokenize.block_size", 65, "at most 64, the model's n_positions, not 65"),
        ("evaluate.stride", 65, "1 to 64, the block size, or null, not 65"),
        ("lora.target_modules", ["q_proj"], "all-linear or names among attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj"),
        ("lora.layers", "1-5", "all, or numbers from 0 to 1, the layers of this model, not 2"),
    ],
)
def test_a_parameter_that_does_not_fit_is_refused_before_copying(stage_folder, monkeypatch, key, value, expected):
    monkeypatch.setattr(base, "copy_model", lambda *_: pytest.fail("the weights were copied"))
    tiny.set_param(stage_folder, "tokenize.block_size", None)
    tiny.set_param(stage_folder, key, value)
    assert error_line(base.main).startswith(f"params.yaml: {key}: expected {expected}")


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_longrope_is_trained_within_its_short_context(stage_folder, key):
    """Beyond it, transformers computes the short rows of a batch with the factors of its longest one."""
    rope = {key: {"rope_type": "longrope"}, "original_max_position_embeddings": 16}
    update_json(stage_folder / "model/config.json", **rope)
    tiny.set_param(stage_folder, "tokenize.block_size", 17)
    assert error_line(base.main).startswith("params.yaml: tokenize.block_size: expected at most 16, ")
    config = read_config(stage_folder / "model", "model")
    assert choose_block_size(None, config, 0) == choose_block_size(16, config, 0) == 16


@pytest.mark.parametrize("padding", [1, 4])
def test_roberta_has_fewer_positions_than_its_config_says(padding):
    """Its first token has the position after the padding id."""
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    config = RobertaConfig(is_decoder=True, max_position_embeddings=34, vocab_size=50, pad_token_id=padding, **size)
    context = choose_block_size(None, config.to_dict(), 0)
    assert context == 33 - padding
    model = RobertaForCausalLM(config).eval()
    model(input_ids=torch.full((1, context), 7))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(input_ids=torch.full((1, context + 1), 7))


def test_the_sample_s_sizes_are_known_before_it_is_trained(stage_folder, monkeypatch):
    from gpt2lora.sample import model

    monkeypatch.setattr(model, "make_sample_model", lambda *_: pytest.fail("the sample's model was trained"))
    tiny.set_param(stage_folder, "preset", "sample")
    tiny.set_param(stage_folder, "tokenize.block_size", 129)
    line = error_line(base.main)
    assert line == "params.yaml: tokenize.block_size: expected at most 128, the model's n_positions, not 129"


# Code that comes with a model


@pytest.fixture
def add_code(stage_folder, monkeypatch):
    """A function that adds code to the model, which exits if it runs, and sets the model's type."""

    def add(model_type: str) -> None:
        classes = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
        update_json(stage_folder / "model" / "config.json", model_type=model_type, auto_map=classes)
        code = "raise SystemExit('the code that came with the model ran')\n"
        (stage_folder / "model" / "modeling_own.py").write_text(code)

    monkeypatch.setattr("builtins.input", lambda *_: "y")  # the answer if transformers asks whether to run it
    return add


def test_a_model_that_needs_its_own_code_is_refused(add_code):
    add_code("own")
    line = error_line(base.main)
    assert (
        line == "model: transformers has no causal language model 'own', and code that comes with a model is never run"
    )
    for load in (load_on_meta, load_fp32):
        with pytest.raises(StageError, match="code that comes with a model is never run"):
            load(Path("model"), *[Path("model")] * (load is load_fp32))


def test_code_that_a_model_does_not_need_is_ignored(add_code):
    add_code("gpt2")
    result = CliRunner().invoke(base.main, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert type(load_fp32(Path("model"), Path("model"))).__name__ == "GPT2LMHeadModel"
    assert not list(Path("data/base").glob("*.py"))


# Tokenizer


@pytest.mark.parametrize("remaining", ["", "vocab.json", "merges.txt"])
def test_a_missing_tokenizer_is_reported(stage_folder, remaining):
    folder = stage_folder / "model"
    parts = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    if remaining == "vocab.json":
        (folder / remaining).write_text(json.dumps(parts["vocab"]))
    if remaining == "merges.txt":
        (folder / remaining).write_text("".join(f"{one} {other}\n" for one, other in parts["merges"]))
    line = error_line(base.main)
    assert line == "model: no tokenizer: expected tokenizer.json, or vocab.json and merges.txt"


def test_a_damaged_tokenizer_is_reported(stage_folder):
    (stage_folder / "model" / "tokenizer.json").write_text('{"version": "1.0"')
    assert "tokenizer.json" in error_line(base.main)


def test_a_truncated_vocabulary_is_reported(stage_folder):
    (stage_folder / "model" / "tokenizer.json").unlink()
    (stage_folder / "model" / "vocab.json").write_text('{"a": ')
    (stage_folder / "model" / "merges.txt").write_text("#version: 0.2\na b\n")
    assert error_line(base.main).startswith("model: the tokenizer's files are damaged: ")


def test_added_tokens_of_a_slow_tokenizer_are_kept(stage_folder):
    source = stage_folder / "model"
    vocabulary = json.loads((source / "tokenizer.json").read_text())["model"]
    (source / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
    (source / "merges.txt").write_text("\n".join(" ".join(pair) for pair in vocabulary["merges"]))
    (source / "added_tokens.json").write_text(json.dumps({"<extra>": len(vocabulary["vocab"])}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    update_json(source / "config.json", vocab_size=400)
    assert CliRunner().invoke(base.main, catch_exceptions=False).exit_code == 0
    saved = tokenizer.load_tokenizer(Path("data/base"))
    assert saved.token_to_id("<extra>") == len(vocabulary["vocab"])


def test_more_tokens_than_embedding_rows_are_refused(stage_folder):
    update_json(stage_folder / "model" / "config.json", vocab_size=299)
    line = error_line(base.main)
    assert line == "model: the tokenizer has an id 299, the embedding only 299 rows: not a pair"


def test_a_token_id_without_an_embedding_row_is_refused(stage_folder):
    """There are fewer tokens than rows, but one id lies far beyond the last row."""
    file = stage_folder / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 70_000
    file.write_text(json.dumps(content))
    assert error_line(base.main) == "model: the tokenizer has an id 70,000, the embedding only 300 rows: not a pair"
