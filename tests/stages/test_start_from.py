"""lora.start_from: training begins from the values of an adapter of the same kind, whoever wrote it."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from bad_input import error_line
from dvc_yaml import computing_stages_run
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from small_models import write_mixtral
from training_runs import run_stage
from transformers import AutoModelForCausalLM

from gpt2lora.model import layers, loading, lora
from gpt2lora.pipeline import adapter_files, schemas
from gpt2lora.pipeline.cli import StageError
from stages import base, sources, train

LAYERS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def start_values(model: Path, **changes) -> dict[str, torch.Tensor]:
    """Return the adapter with which training begins on a model."""
    network, _ = loading.load_for_training(model, "lora", None, tiny.low_rank(**changes), torch.float32)
    return get_peft_model_state_dict(network)


def check_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"bits": 8}, {"bits": 4, "use_rslora": True}], ids=str)
def test_training_begins_from_the_values_of_an_adapter(tmp_path, tiny_model, changes):
    adapter = tiny.write_adapter(tmp_path / "adapter", tiny_model, **changes)
    values = start_values(tiny_model, start_from=str(adapter), **changes)
    check_equal(values, lora.read_adapter(adapter))
    assert min(value.abs().max() for value in values.values()) > 0


def test_an_adapter_of_experts(tmp_path):
    """The adapter that `train` writes for a mixture; with dropout PEFT adapts no experts."""
    base = write_mixtral(tmp_path / "base")
    adapter = tiny.write_adapter(tmp_path / "adapter", base)
    layers.check_target_layers(base, tiny.low_rank(start_from=str(adapter)))
    check_equal(start_values(base, start_from=str(adapter)), lora.read_adapter(adapter))
    for change in ({"dropout": 0.1}, {"bits": 8}, {"layers": [0]}):
        with pytest.raises(StageError, match=r"lora\.dropout 0, .* not 'one with model\.layers\.0\.mlp\.experts"):
            layers.check_target_layers(base, tiny.low_rank(start_from=str(adapter), **change))


def test_an_adapter_that_peft_wrote_elsewhere(tmp_path, tiny_model):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(tmp_path)
    chosen = {"target_modules": ["attn.c_attn"], "start_from": str(tmp_path)}
    adapter_files.check_start(tiny.low_rank(**chosen))
    check_equal(start_values(tiny_model, **chosen), load_file(tmp_path / "adapter_model.safetensors"))


def test_a_run_goes_on_where_another_ended(training_folder, tmp_path):
    run_stage(train.main)
    first = json.loads(Path("metrics/train.json").read_text())
    assert "start_from" not in first
    adapter = Path("data/adapter").rename(tmp_path / "first")
    tiny.set_param(training_folder, "lora.start_from", str(adapter))
    tiny.set_param(training_folder, "train.epochs", 2)
    output = run_stage(train.main)
    digest = adapter_files.file_digest(adapter / "adapter_model.safetensors")
    assert f"train: starts from the adapter {adapter}, SHA-256 {digest}" in output
    second = json.loads(Path("metrics/train.json").read_text())
    assert second["start_validation_loss"] == first["best_validation_loss"]
    assert second["best_validation_loss"] < first["best_validation_loss"]
    assert second["start_from"] == {"folder": str(adapter), "sha256": digest}
    card = Path("data/adapter/README.md").read_text()
    assert f"| started from | the adapter `first`, SHA-256 `{digest}` |" in card


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_dvc_sees_when_the_adapter_changes(finished, tmp_path):
    adapter = shutil.copytree(finished / "data/adapter", tmp_path / "first")
    weights = adapter / "adapter_model.safetensors"
    tiny.set_param(finished, "lora.start_from", str(adapter))
    assert computing_stages_run(tiny.run(finished, "dvc", "repro")) == ["train", "evaluate"]
    assert computing_stages_run(tiny.run(finished, "dvc", "repro")) == []
    weights.chmod(0o644)
    save_file({name: value / 2 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    assert computing_stages_run(tiny.run(finished, "dvc", "repro")) == ["train", "evaluate"]
    assert adapter_files.file_digest(weights) in (finished / "metrics/train.json").read_text()
    output = tiny.run(finished, "dvc", "exp", "run", "--temp", "-S", "train.epochs=2")
    assert computing_stages_run(output) == ["train", "evaluate"]
    output = tiny.run(finished, "dvc", "exp", "run", "-S", "lora.start_from=data/adapter", fails=True)
    assert "lora.start_from: expected a folder outside data/" in output
    assert (finished / "data/adapter/method.json").exists()


# Errors


@pytest.fixture
def adapter(stage_folder, tiny_model) -> Path:
    """An adapter that fits the model, the section `lora` and its start_from in the working directory's params.yaml."""
    path = tiny.write_adapter(stage_folder / "first", tiny_model, r=16, alpha=32)
    tiny.set_param(stage_folder, "lora.start_from", "first")
    return path


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("lora.r", 8, "lora.r: expected 16, as in the adapter of lora.start_from, not 8"),
        ("lora.alpha", 8.0, "lora.alpha: expected 32, as in the adapter of lora.start_from, not 8.0"),
        ("lora.use_dora", True, "lora.use_dora: expected false, as in the adapter of lora.start_from, not true"),
        ("lora.use_rslora", True, "lora.use_rslora: expected false, as in the adapter of lora.start_from, not true"),
        (
            "lora.init",
            "pissa",
            "lora.init: expected default, since lora.start_from gives the initial values, not",
        ),
        ("lora.start_from", "", "lora.start_from: expected a folder, or null, not ''"),
        ("lora.start_from", 7, "lora.start_from: '7' does not exist, seen from"),
        ("lora.start_from", "data/adapter", "lora.start_from: expected a folder outside data/, whose files a run rep"),
        ("lora.start_from", "model", "lora.start_from: model/adapter_config.json: missing; expected the folder of a"),
        ("method", "full", "lora.start_from: expected null with full: it is an adapter, not 'first'"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(stage_folder, adapter, key, value, expected):
    tiny.set_param(stage_folder, key, value)
    assert error_line(sources.main).startswith(f"params.yaml: {expected}")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"peft_type": "IA3"}, "first/adapter_config.json: peft_type 'IA3'; expected the folder of a LoRA adapter"),
        ({"rank_pattern": {"c_attn": 8}}, "expected an adapter of LoRA, rsLoRA or DoRA alone, not 'rank_pattern'"),
        ({"bias": "all"}, "expected an adapter of LoRA, rsLoRA or DoRA alone, not 'bias'"),
        ({"init_lora_weights": "pissa"}, "expected an adapter of the whole base, not of what its init left of it, not"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(adapter, change, expected):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert error_line(sources.main).startswith(f"params.yaml: lora.start_from: {expected}")


def test_files_that_are_no_safetensors_are_refused(adapter):
    weights = adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    assert error_line(sources.main).startswith("first/adapter_model.safetensors is damaged, or a pointer of Git LFS:")
    weights.rename(adapter / "adapter_model.bin")
    assert error_line(sources.main).startswith("first: no adapter_model.safetensors (adapter_model.bin: pickled weigh")
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json: not readable" in error_line(sources.main)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("lora.layers", 0, "not 'one with transformer.h.1.attn.c_attn, transformer.h.1.attn.c_proj"),
        ("lora.target_modules", LAYERS[1:], "not 'one with transformer.h.0.attn.c_attn, transformer.h.1.attn.c_attn'"),
    ],
)
def test_other_layers_are_refused_before_the_base_is_fetched(stage_folder, adapter, key, value, expected):
    tiny.set_param(stage_folder, key, value)
    line = error_line(base.main)
    assert line.startswith("params.yaml: lora.start_from: expected an adapter of the layers that lora.target_mod")
    assert expected in line


def test_an_adapter_of_a_wider_base_is_refused(stage_folder, adapter):
    file = adapter / "adapter_model.safetensors"
    save_file({name: torch.cat([value, value], -1) for name, value in load_file(file).items()}, file)
    line = error_line(base.main)
    assert line.startswith("params.yaml: lora.start_from: expected layers of the base, 64 x 192, not '128 x")


def test_values_that_are_not_finite_are_refused(tmp_path, tiny_model):
    file = tiny.write_adapter(tmp_path / "first", tiny_model) / "adapter_model.safetensors"
    values = load_file(file)
    min(values.items())[1][0, 0] = float("nan")
    save_file(values, file)
    with pytest.raises(StageError, match="holds values that are not finite"):
        start_values(tiny_model, start_from=str(file.parent))


def test_a_folder_that_is_gone_stops_only_what_reads_it(stage_folder, inputs):
    """`dvc repro --pull` goes on elsewhere from what was made of it."""
    tiny.set_param(stage_folder, "lora.start_from", "gone")
    schemas.check_params()
    expected = f"params.yaml: lora.start_from: 'gone' does not exist, seen from {stage_folder}"
    assert error_line(sources.main) == expected
    assert error_line(train.main, *inputs["train"]) == expected
