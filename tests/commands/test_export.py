"""The command export: a plain transformers folder with the outputs of the tuned model, for every kind of base."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from gpt2lora.commands import export, exported_files
from gpt2lora.dataset import blocks
from gpt2lora.model import loading, lora
from gpt2lora.model import quantization as quantization_module
from gpt2lora.pipeline import artifacts
from gpt2lora.pipeline.cli import StageError
from gpt2lora.pipeline.schemas import QuantizationParams
from gpt2lora.scoring import log_likelihood
from gpt2lora.training import loss

IDS = torch.arange(3 * 40).reshape(3, 40) * 7 % 300
NF4 = QuantizationParams(bits=4, quant_type="nf4", double_quant=True)
FP4 = QuantizationParams(bits=4, quant_type="fp4", double_quant=False)
INT8 = QuantizationParams(bits=8, quant_type="nf4", double_quant=False)
VARIANTS = {"plain": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}, "8 bits": {"bits": 8}}
of_each_base = pytest.mark.parametrize("base", ["gpt2", "llama"])
COMPARISON = re.compile(
    r"loss (?P<loss>\S+) nats/token, as tuned (?P<tuned>\S+), difference (?P<change>[+-]\S+); "
    r"logits differ by at most (?P<logits>[^\s,]+)"
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny_corpus):
    """A folder with two base models: gpt2 (Conv1D) and llama (nn.Linear), with large weights, so that errors show."""
    folder = tmp_path_factory.mktemp("export")
    tiny.write_model(folder / "gpt2", tiny_corpus, spread=0.1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    for file in (folder / "gpt2").glob("tokenizer*"):
        (folder / "llama" / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(autouse=True)
def inside_a_folder(bases, tmp_path, monkeypatch):
    """Change to a new folder that holds the two bases."""
    monkeypatch.chdir(tmp_path)
    for base in ("gpt2", "llama"):
        Path(base).symlink_to(bases / base)


def run_export(base: str, *arguments, exit_code: int = 0) -> str:
    command = ["--base", base, "--adapter", "adapter", "--out", "out", *map(str, arguments)]
    result = CliRunner().invoke(export.main, command, catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.output


def error_line(base: str, *arguments) -> str:
    """Run an export that must fail and write nothing; return its error line."""
    before = set(os.listdir())
    line = run_export(base, *arguments, exit_code=1).splitlines()[-1]
    assert line.startswith("Error: ")
    assert set(os.listdir()) == before
    return line.removeprefix("Error: ")


def comparison(output: str) -> dict[str, float]:
    """Return the losses and differences that export printed."""
    return {name: float(value) for name, value in COMPARISON.search(output).groupdict().items()}


def logits(network) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(input_ids=IDS, use_cache=False).logits


def load_exported():
    return AutoModelForCausalLM.from_pretrained("out")


def load_tuned(base: str):
    return loading.load_tuned(Path(base), Path("adapter"), torch.float32)


def adapted_weights(network) -> dict[str, torch.Tensor]:
    """Return the weights that have an adapter, each as (out, in)."""
    transposed = lora.is_fan_in_fan_out(network)
    return {name: layer.weight.T if transposed else layer.weight for name, layer in lora.linear_layers(network).items()}


def adapter_update(name: str) -> torch.Tensor:
    """Return what the adapter adds to a weight, (out, in): alpha / r times B A."""
    values = load_file("adapter/adapter_model.safetensors")
    a, b = (values[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
    return 8 / 4 * b @ a


# The weights


@of_each_base
@pytest.mark.parametrize("quantization", [None, NF4, FP4], ids=["float", "nf4", "fp4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_export_has_the_outputs_of_the_tuned_model(base, quantization, variant):
    tiny.write_adapter(Path("adapter"), Path(base), quantization, **VARIANTS[variant])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fan_in_fan_out")
        run_export(base)
    expected = logits(load_tuned(base))
    torch.testing.assert_close(logits(load_exported()), expected, rtol=0, atol=1e-4)
    assert (logits(AutoModelForCausalLM.from_pretrained(base)) - expected).abs().max() > 1


def test_the_export_of_lora_has_the_outputs_of_peft_itself():
    tiny.write_adapter(Path("adapter"), Path("gpt2"))
    run_export("gpt2", "--onto", "original")
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("gpt2"), "adapter"))
    torch.testing.assert_close(logits(load_exported()), expected, rtol=0, atol=1e-4)


@of_each_base
def test_8_bit_weights_are_exported_as_integers_times_scales(base):
    tiny.write_adapter(Path("adapter"), Path(base), INT8)
    output = run_export(base)
    quantized = loading.load_base(Path(base), INT8, torch.float32)
    weights = adapted_weights(load_exported())
    assert len(weights) == (8 if base == "gpt2" else 14)
    for name, weight in weights.items():
        layer = quantized.get_submodule(name)
        expected = layer.weight.data * (layer.state.SCB / 127)[:, None] + adapter_update(name)
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(logits(load_exported()), logits(load_tuned(base)), rtol=0, atol=1e-3)
    assert abs(comparison(output)["change"]) < 1e-5


@of_each_base
@pytest.mark.parametrize("quantization", [NF4, INT8], ids=["nf4", "int8"])
def test_onto_original_adds_the_update_to_the_float_weights(base, quantization):
    tiny.write_adapter(Path("adapter"), Path(base), quantization)
    output = run_export(base, "--onto", "original")
    originals = adapted_weights(AutoModelForCausalLM.from_pretrained(base))
    for name, weight in adapted_weights(load_exported()).items():
        torch.testing.assert_close(weight, originals[name] + adapter_update(name), rtol=0, atol=1e-6, msg=name)
    assert "qlora on the original base" in output
    assert comparison(output)["logits"] > 1e-2
    assert comparison(output)["change"] != 0


def test_weights_without_an_adapter_are_those_of_the_base():
    tiny.write_adapter(Path("adapter"), Path("gpt2"), NF4)
    run_export("gpt2")
    exported, base = load_file("out/model.safetensors"), load_file("gpt2/model.safetensors")
    assert set(exported) == set(base)
    assert {value.dtype for value in exported.values()} == {torch.float32}
    adapted = {f"{name}.weight" for name in lora.linear_layers(load_exported())}
    assert {name for name in base if torch.equal(exported[name], base[name])} == set(base) - adapted


def test_a_fully_trained_model_is_exported_unchanged():
    network = loading.load_base(Path("gpt2"), None, torch.float32)
    with torch.no_grad():
        network.transformer.h[0].mlp.c_fc.weight += 0.1
    network.save_pretrained("adapter")
    loading.write_method(Path("adapter"), "full", None, Path("gpt2"))
    assert "all weights: loss" in run_export("gpt2")
    assert file_bytes("out", "model.safetensors") == file_bytes("adapter", "model.safetensors")
    torch.testing.assert_close(logits(load_exported()), logits(load_tuned("gpt2")), rtol=0, atol=1e-4)
    check_files("gpt2")


# The files


@of_each_base
@pytest.mark.parametrize("quantization", [None, NF4], ids=["float", "nf4"])
def test_all_files_but_the_weights_are_those_of_the_base(base, quantization):
    tiny.write_adapter(Path("adapter"), Path(base), quantization)
    run_export(base)
    check_files(base)


def file_bytes(folder: str, name: str) -> bytes:
    return Path(folder, name).read_bytes()


def check_files(base: str) -> None:
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(os.listdir("out")) == names
    assert {path.stat().st_mode & 0o777 for path in Path("out").iterdir()} == {0o666 & ~artifacts._UMASK}
    assert file_bytes("out", "tokenizer.json") == file_bytes(base, "tokenizer.json")
    expected = json.loads(file_bytes(base, "tokenizer_config.json"))
    # What transformers 4 knows, beside the names of transformers 5.
    assert json.loads(file_bytes("out", "tokenizer_config.json")) == expected | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }
    expected = json.loads(file_bytes(base, "config.json"))
    expected |= {"n_ctx": 64} if base == "gpt2" else {"rope_theta": 10000.0}
    assert json.loads(file_bytes("out", "config.json")) == expected
    assert "gelu_new" in file_bytes("out", "config.json").decode() or base == "llama"
    text = " the river reached the coast . "
    assert AutoTokenizer.from_pretrained("out")(text) == AutoTokenizer.from_pretrained(base)(text)


def test_a_base_in_half_precision_is_exported_in_fp32():
    GPT2LMHeadModel.from_pretrained("gpt2", dtype=torch.bfloat16).save_pretrained("half")
    for file in Path("gpt2").glob("tokenizer*"):
        Path("half", file.name).write_bytes(file.read_bytes())
    tiny.write_adapter(Path("adapter"), Path("half"))
    run_export("half")
    assert json.loads(file_bytes("out", "config.json"))["dtype"] == "float32"
    assert {value.dtype for value in load_file("out/model.safetensors").values()} == {torch.float32}


def test_the_config_holds_what_transformers_4_reads():
    """Keys that transformers 5 does not write any more: without rope_theta, transformers 4 would take 10,000."""
    rope = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    for folder, content in (
        ("old", {"rope_theta": 5e5, "rope_scaling": {"type": "linear"}, "torch_dtype": "float16", "auto_map": {}}),
        ("new", {"rope_parameters": rope, "dtype": "float32", "extra_special_tokens": ["<sep>"]}),
    ):
        Path(folder).mkdir()
        for name in ("config.json", "tokenizer_config.json"):
            Path(folder, name).write_text(json.dumps(content))
    exported_files.complete_config(Path("old"), Path("new"))
    exported_files.copy_tokenizer(Path("new"), Path("new"))
    config = json.loads(file_bytes("new", "config.json"))
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert not {"torch_dtype", "auto_map"} & set(config)
    tokenizer = json.loads(file_bytes("new", "tokenizer_config.json"))
    assert tokenizer["additional_special_tokens"] == ["<sep>"]
    assert "extra_special_tokens" not in tokenizer


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("phi", {"partial_rotary_factor": 0.75}),
        ("gpt_neox", {"rotary_pct": 0.75, "rotary_emb_base": 5e4}),
        ("gpt_neox_japanese", {"rotary_pct": 0.75, "rotary_emb_base": 5e4}),
    ],
)
def test_the_config_holds_the_share_of_rotated_dimensions(model_type, expected):
    """Without it transformers 4 would take a default: silently another model."""
    rope = {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.75}
    CONFIG_MAPPING[model_type](rope_parameters=rope).save_pretrained("saved")
    exported_files.complete_config(Path("saved"), Path("saved"))
    config = json.loads(file_bytes("saved", "config.json"))
    assert config == config | expected
    assert AutoConfig.from_pretrained("saved").rope_parameters == rope


def test_the_model_card_has_the_figures_of_this_adapter_alone():
    tiny.write_adapter(Path("adapter"), Path("gpt2"))
    result = [EvalResult("text-generation", "me/texts", "texts", "loss", 2.0, dataset_split="validation")]
    data = ModelCardData(base_model="me/gpt2", library_name="peft", model_name="m", eval_results=result)
    Path("adapter/README.md").write_text(
        f"---\n{data.to_yaml()}\n---\n\n# A LoRA adapter for m\n\n## Load\n\nby PEFT\n"
    )
    Path("metrics").mkdir()
    Path("metrics/eval.json").write_text(json.dumps({"tuned": {"loss": 1.5, "accuracy": 0.25}}))
    for digest, expected in (("other", {}), (artifacts.file_digest(Path("adapter/method.json")), {"loss": 1.5})):
        Path("metrics/environment.json").write_text(json.dumps({"evaluate": {"adapter": digest}}))
        output = run_export("gpt2")
        assert ("is not of this adapter: the model card has no figures of the test split" in output) != bool(expected)
        card = ModelCard.load("out/README.md", ignore_metadata_errors=False)
        assert (card.data.library_name, card.data.base_model_relation) == ("transformers", "finetune")
        test = {each.metric_type: each.metric_value for each in card.data.eval_results if each.dataset_split == "test"}
        assert test == (expected | {"accuracy": 0.25} if expected else {})
        assert "# A LoRA adapter merged into m\n" in card.text
        assert "by PEFT" not in card.text
        assert 'AutoModelForCausalLM.from_pretrained(".")' in card.text
        shutil.rmtree("out")


def test_an_empty_folder_is_filled():
    tiny.write_adapter(Path("adapter"), Path("gpt2"))
    Path("out").mkdir()
    run_export("gpt2")
    check_files("gpt2")


# The output


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_the_printed_losses_are_those_of_the_validation_split(onto):
    tiny.write_adapter(Path("adapter"), Path("gpt2"), NF4)
    random = np.random.default_rng(1)
    split = blocks.pack_blocks(random.integers(300, size=10 * 32, dtype=np.uint16), 32, 0)
    Path("tokens").mkdir()
    blocks.save_blocks(split, Path("tokens"), "validation")
    output = run_export("gpt2", "--onto", onto, "--tokens", "tokens")
    first = blocks.Blocks(split.ids[:8], split.lengths[:8])
    assert f"on {first.targets} tokens of the validation split" in output
    exported, tuned = load_exported(), load_tuned("gpt2")
    losses = [log_likelihood.validation_loss(network, first, 3, torch.float32, "") for network in (exported, tuned)]
    printed = comparison(output)
    assert [printed["loss"], printed["tuned"]] == pytest.approx(losses, abs=6e-5)
    assert printed["change"] == pytest.approx(losses[0] - losses[1], abs=2e-6)
    inputs, _ = loss.make_batch(first, np.arange(8), torch.device("cpu"))
    with torch.no_grad():
        exported_logits, tuned_logits = (network.eval()(input_ids=inputs).logits for network in (exported, tuned))
    difference = float((exported_logits - tuned_logits).abs().max())
    assert printed["logits"] == pytest.approx(difference, rel=0.05 if onto == "original" else 1, abs=1e-5)


def test_export_prints_three_lines_and_no_warnings(capfd):
    tiny.write_adapter(Path("adapter"), Path("gpt2"), NF4)
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()  # pytest shows more than Python does
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        output = run_export("gpt2")  # stderr included
    assert [line.partition(" ")[0] for line in output.splitlines()] == ["export:"] * 3
    assert [str(each.message) for each in caught] == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_process_of_export_prints_nothing_else():
    """Of what it imports, either. `generate` has such a test that is not slow."""
    tiny.write_adapter(Path("adapter"), Path("gpt2"), NF4)
    command = [sys.executable, "-m", "gpt2lora", "export", "--base", "gpt2", "--adapter", "adapter", "--out", "out"]
    environment = tiny.environment() | {"PYTHONPATH": str(tiny.ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    assert [line.partition(" ")[0] for line in done.stdout.splitlines()] == ["export:"] * 3


# Errors


@pytest.mark.parametrize("method", ["lora", "full"])
def test_onto_dequantized_is_refused_for_a_float_base(method):
    tiny.write_adapter(Path("adapter"), Path("gpt2"))
    loading.write_method(Path("adapter"), method, None, Path("gpt2"))
    line = error_line("gpt2", "--onto", "dequantized")
    assert line.startswith("--onto dequantized: the adapter was trained on a float")


def test_a_folder_with_files_is_refused_and_kept():
    Path("out").mkdir()
    Path("out", "mine").write_text("mine")
    assert error_line("gpt2") == "out exists and is not an empty folder: name a new one"
    assert os.listdir("out") == ["mine"]


def test_a_file_is_refused_and_kept():
    Path("out").write_text("mine")
    assert error_line("gpt2") == "out exists and is not an empty folder: name a new one"
    assert Path("out").read_text() == "mine"


def test_a_missing_adapter_is_refused():
    assert error_line("gpt2").startswith("adapter/method.json is missing")


def test_a_pickled_adapter_is_refused():
    tiny.write_adapter(Path("adapter"), Path("gpt2"))
    torch.save(load_file("adapter/adapter_model.safetensors"), "adapter/adapter_model.bin")
    Path("adapter/adapter_model.safetensors").unlink()
    assert error_line("gpt2").startswith("adapter/adapter_model.safetensors is missing: run `dvc repro train`")


@pytest.mark.parametrize("other", ["llama", "wide"])
def test_an_adapter_of_another_base_is_refused(other):
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_layer=2, n_embd=128, n_head=2)).save_pretrained("wide")
    tiny.write_adapter(Path("adapter"), Path("gpt2"))
    assert error_line(other).startswith(
        f"{other}/model.safetensors is damaged, or not the one that adapter/method.json rec"
    )
    with pytest.raises(StageError, match=r"^adapter does not fit the base, was it trained on another\? "):
        lora.load_adapter(loading.load_base(Path(other), None, torch.float32), Path("adapter"))


def test_a_missing_base_is_refused():
    tiny.write_adapter(Path("adapter"), Path("gpt2"))
    assert error_line("nowhere").startswith("nowhere/model.safetensors is missing")


def test_an_export_that_differs_from_the_tuned_model_is_refused(monkeypatch):
    tiny.write_adapter(Path("adapter"), Path("gpt2"), NF4)
    # Without it, the adapter is merged into the original base.
    monkeypatch.setattr(quantization_module, "dequantize_into", lambda *_: None)
    expected = r"export: not the model that was trained: a logit differs by \S+, less than \S+ was"
    assert re.match(expected, error_line("gpt2"))


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_an_adapter_with_nan_is_refused(onto):
    tiny.write_adapter(Path("adapter"), Path("gpt2"), NF4)
    values = load_file("adapter/adapter_model.safetensors")
    values[min(values)][0, 0] = float("nan")
    save_file(values, "adapter/adapter_model.safetensors", metadata={"format": "pt"})
    loading.write_method(Path("adapter"), "qlora", NF4, Path("gpt2"))
    assert error_line("gpt2", "--onto", onto).startswith("export: not the model that was trained")
