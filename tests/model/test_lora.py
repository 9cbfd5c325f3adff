"""The adapter: which layers get one, what training changes, and the files in which it is saved."""

import json
import warnings

import every_model
import pytest
import torch
from peft import PeftModel
from small_models import (
    IDS,
    INT8,
    LAYERS,
    NF4,
    PROJECTIONS,
    change_trained,
    load,
    logits,
    new_adapter,
    on_every_base,
    random_adapter,
    train_one_step,
    write_llama,
    write_mixtral,
)
from tiny import low_rank
from training_steps import frozen_values
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from gpt2lora.model import lora
from gpt2lora.model.loading import cast_frozen, load_for_training
from gpt2lora.model.quantization import count_frozen_parameters
from gpt2lora.pipeline import adapter_files
from gpt2lora.pipeline.cli import StageError
from gpt2lora.training.loss import nll_sum


def adapted_layers(network) -> set[str]:
    """Return the names of the layers with an adapter, without the prefix that they share in GPT-2."""
    names = {name for name, module in network.get_base_model().named_modules() if hasattr(module, "lora_A")}
    return {name.removeprefix("transformer.h.") for name in names}


# Which layers


@on_every_base
def test_all_linear_is_every_linear_layer_of_the_blocks(tiny_model, quantization):
    network = new_adapter(tiny_model, quantization)
    assert adapted_layers(network) == {f"{layer}.{name}" for layer in range(LAYERS) for name in PROJECTIONS}


@pytest.mark.parametrize(
    ("target_modules", "projections"),
    [
        (["mlp.c_proj"], ["mlp.c_proj"]),
        (["c_proj"], ["attn.c_proj", "mlp.c_proj"]),
        (["attn.c_attn", "c_fc"], ["attn.c_attn", "mlp.c_fc"]),
        (list(PROJECTIONS), list(PROJECTIONS)),
    ],
)
def test_a_target_module_is_every_layer_whose_name_ends_in_it(tiny_model, target_modules, projections):
    network = new_adapter(tiny_model, target_modules=target_modules)
    assert adapted_layers(network) == {f"{layer}.{name}" for layer in range(LAYERS) for name in projections}


def test_a_full_name_is_one_layer(tiny_model):
    network = new_adapter(tiny_model, target_modules=["transformer.h.1.mlp.c_proj"])
    assert adapted_layers(network) == {"1.mlp.c_proj"}


def test_a_target_module_matches_only_after_a_dot():
    layers = ["h.0.attn.c_proj", "h.0.crossattn.c_proj", "h.0.mlp.c_proj"]
    assert lora.select_target_layers(layers, low_rank(target_modules=["attn.c_proj"])) == ["h.0.attn.c_proj"]
    assert (
        lora.select_target_layers(layers, low_rank(target_modules=["h.0.crossattn.c_proj", "mlp.c_proj"])) == layers[1:]
    )


@pytest.mark.parametrize("name", ["q_proj", "proj", "wte", "lm_head", "mlp", "c_proj.", ""])
def test_an_unknown_target_module_is_refused_with_those_known(tiny_model, name):
    with pytest.raises(StageError) as caught:
        new_adapter(tiny_model, target_modules=["attn.c_attn", name])
    expected = f"expected all-linear or names among {', '.join(PROJECTIONS)}, not {name!r}"
    assert caught.value.format_message() == f"params.yaml: lora.target_modules: {expected}"


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        ("all", range(12)),
        ("6-11", range(6, 12)),
        ("3-3", [3]),
        ([0, 11], [0, 11]),
        (5, [5]),
        ("5", [5]),
        (" 0 - 1", [0, 1]),
    ],
)
def test_layers_count_from_0_and_ranges_include_both_ends(layers, numbers):
    names = [f"transformer.h.{layer}.{kind}" for layer in range(12) for kind in ("attn.c_attn", "mlp.c_proj")]
    selected = lora.select_target_layers(names, low_rank(target_modules=["c_proj"], layers=layers))
    assert selected == [f"transformer.h.{number}.mlp.c_proj" for number in numbers]


def test_layers_without_any_target_module_are_refused():
    names = ["model.layers.0.q_proj", "model.layers.1.q_proj", "model.project_out"]
    with pytest.raises(
        StageError, match=r"lora\.layers: expected a layer that has one of model\.project_out, not \[0\]"
    ):
        lora.select_target_layers(names, low_rank(target_modules=["project_out"], layers=[0]))


def test_only_the_selected_layers_get_an_adapter(model_folder):
    network, _, _ = random_adapter(model_folder, layers="1-1")
    names = list(lora.linear_layers(network.get_base_model().__class__(network.config)))
    assert list(lora.lora_layers(network)) == [name for name in names if ".1." in name]
    assert len(lora.lora_layers(network)) == len(names) / 2


# What is trained


@on_every_base
def test_only_the_factors_are_trainable_and_they_are_fp32(tiny_model, quantization):
    network = new_adapter(tiny_model, quantization)
    trained = {name: value for name, value in network.named_parameters() if value.requires_grad}
    assert len(trained) == 2 * len(PROJECTIONS) * LAYERS
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert {value.dtype for value in trained.values()} == {torch.float32}
    for projection, (inputs, outputs) in PROJECTIONS.items():
        shapes = {tuple(value.shape) for name, value in trained.items() if f".0.{projection}." in name}
        assert shapes == {(4, inputs), (outputs, 4)}


@on_every_base
def test_a_new_adapter_changes_no_logit(tiny_model, quantization):
    base = load(tiny_model, quantization)
    expected = logits(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's, where it corrects fan_in_fan_out
        network = lora.attach_lora(base, low_rank(dropout=0.5))
    assert torch.equal(logits(network), expected)


def test_the_seed_determines_the_initial_factors(tiny_model):
    values = []
    for seed in (1, 1, 2):
        network = new_adapter(tiny_model, seed=seed)
        values.append(torch.cat([value.flatten() for value in network.parameters() if value.requires_grad]))
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


@pytest.mark.parametrize("quantization", [None, NF4, INT8], ids=["float", "nf4", "int8"])
@pytest.mark.parametrize("changes", [{"use_dora": True}, {"use_rslora": True}, {"bits": 8}, {"bits": 4}], ids=str)
def test_every_variant_trains_the_adapter_alone_on_every_base(model_folder, quantization, changes):
    network, _, _ = random_adapter(model_folder, quantization, **changes)
    frozen = {n: p.detach().clone() for n, p in network.named_parameters() if not p.requires_grad}
    trained = {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3 if ".weight" in name else -1] for name in trained} <= {
        "lora_A",
        "lora_B",
        "lora_magnitude_vector",
    }
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        network.train()
        loss = nll_sum(network, IDS[:, :-1], IDS[:, 1:], torch.float32) / IDS[:, 1:].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, parameter in network.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
        else:
            assert not torch.equal(parameter, trained[name]), name


@pytest.mark.parametrize("quantization", [None, NF4], ids=["float", "nf4"])
def test_a_llama_gets_an_adapter_and_trains_it(tmp_path, quantization):
    base = load(write_llama(tmp_path, initializer_range=0.02), quantization)
    expected = logits(base)
    network = lora.attach_lora(base, low_rank())
    names = {name.split(".", 2)[2] for name, module in base.named_modules() if hasattr(module, "lora_A")}
    assert names == {
        *(f"{layer}.self_attn.{kind}_proj" for layer in range(LAYERS) for kind in "qkvo"),
        *(f"{layer}.mlp.{kind}_proj" for layer in range(LAYERS) for kind in ("gate", "up", "down")),
    }
    assert torch.equal(logits(network), expected)
    train_one_step(network)
    assert not torch.equal(logits(network), expected)
    assert count_frozen_parameters(network) == sum(value.numel() for value in load(tmp_path).parameters())


def test_weights_that_no_adapter_reaches_are_named(tiny_model):
    assert lora.weights_without_adapter(new_adapter(tiny_model)) == (0.0, [])
    assert lora.weights_without_adapter(load(tiny_model)) == (0.0, [])  # all are trained
    share, names = lora.weights_without_adapter(new_adapter(tiny_model, NF4, target_modules=["attn.c_attn", "c_fc"]))
    assert names == ["attn.c_proj.weight", "mlp.c_proj.weight"]
    assert share == 100 * (64 * 64 + 256 * 64) / (12 * 64 * 64)


def test_experts_held_as_parameters_get_no_adapter_with_dropout_and_are_named(tmp_path):
    write_mixtral(tmp_path)
    network = new_adapter(tmp_path, dropout=0.05)
    share, names = lora.weights_without_adapter(network)
    assert names == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"]
    experts, attention = 4 * 3 * 64 * 32 + 4 * 64, 4 * 64 * 64
    assert share == 100 * experts / (experts + attention)


def test_training_begins_from_the_adapter_of_a_mixture(tmp_path):
    write_mixtral(tmp_path / "base")
    network, chosen, _ = random_adapter(tmp_path / "base")
    lora.save_adapter(network, chosen, {}, tmp_path / "adapter")
    start = low_rank(start_from=str(tmp_path / "adapter"))
    adapter_files.check_start(start)
    started, _ = load_for_training(tmp_path / "base", "lora", None, start, torch.float32)
    assert torch.equal(logits(started), logits(network))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_get_an_adapter_without_dropout(tmp_path, dtype):
    write_mixtral(tmp_path / "base")
    network = new_adapter(tmp_path / "base")
    assert lora.weights_without_adapter(network)[1] == ["mlp.gate.weight"]
    cast_frozen(network, dtype)
    before = frozen_values(network)
    train_one_step(network, dtype)
    assert all(parameter.abs().max() > 0 for name, parameter in network.named_parameters() if ".lora_B." in name)
    assert all(torch.equal(value, before[name]) for name, value in frozen_values(network).items())
    if dtype == torch.bfloat16:
        return
    expected = logits(network)
    lora.save_adapter(network, low_rank(), {}, tmp_path / "adapter")
    loaded = lora.load_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "adapted", "left"),
    [
        # PEFT takes gate_proj and the like for the experts' own, and would leave the dense layer without an adapter.
        ("glm4_moe", {"q_proj", "k_proj", "v_proj", "o_proj"}, {"mlp.gate_proj.weight", "mlp.experts.gate_up_proj"}),
        # Its router is a subclass of nn.Linear that returns two tensors.
        ("llama4_text", {"q_proj", "k_proj", "v_proj", "o_proj"}, {"feed_forward.router.weight"}),
    ],
)
def test_layers_that_peft_takes_for_others_get_no_adapter_and_are_named(kind, adapted, left):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(every_model.small_config(kind))
    network = lora.attach_lora(model, low_rank(dropout=0.05))
    kinds = {name.rpartition(".")[2] for name in lora.lora_layers(network)}
    assert kinds - {"gate_proj", "up_proj", "down_proj"} == adapted
    assert set(lora.weights_without_adapter(network)[1]) >= left


@pytest.mark.parametrize(("kind", "lost"), [("laguna", "mlp.shared_experts."), ("inkling2_text", "sconv.weight_proj")])
def test_layers_that_peft_renames_on_loading_get_no_adapter_and_peft_reads_all_others(kind, lost, tmp_path):
    """PEFT would leave out their values with a warning."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(every_model.small_config(kind))
    assert any(lost in name for name, _ in base.named_modules())
    base.save_pretrained(tmp_path / "base")
    network = new_adapter(tmp_path / "base")
    assert not any(lost in name for name in lora.lora_layers(network))
    assert any(lost in f"{name}." for name in lora.weights_without_adapter(network)[1])
    change_trained(network)
    expected = logits(network)
    lora.save_adapter(network, low_rank(), {}, tmp_path / "adapter")
    assert torch.equal(logits(lora.load_adapter(load(tmp_path / "base"), tmp_path / "adapter")), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's, of tensors that are missing
        theirs = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(theirs), expected)


def test_layers_that_a_fused_kernel_of_mamba_reads_get_no_adapter():
    model = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50, state_size=4))
    kinds = {name.rpartition(".")[2] for name in lora.lora_layers(lora.attach_lora(model, low_rank()))}
    assert kinds == {"in_proj", "x_proj", "dt_proj"}


@pytest.mark.parametrize("bits", [16, 8])
def test_layers_with_a_forward_of_their_own_train_in_bf16(tmp_path, bits):
    """Falcon's layers are a subclass of nn.Linear, which `lora_forward` does not compute."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}
    FalconForCausalLM(FalconConfig(**sizes)).save_pretrained(tmp_path)
    network = new_adapter(tmp_path, bits=bits)
    cast_frozen(network, torch.bfloat16)
    before = logits(network, torch.bfloat16)
    train_one_step(network, torch.bfloat16)
    assert not torch.equal(logits(network, torch.bfloat16), before)


# Files


def test_a_saved_adapter_lists_its_layers_in_order(tiny_model, tmp_path):
    lora.save_adapter(new_adapter(tiny_model), low_rank(), {}, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        f"transformer.h.{layer}.{name}" for layer in range(LAYERS) for name in PROJECTIONS
    )
    assert config["fan_in_fan_out"] is True
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_saved_adapter_lists_its_experts_in_order(tmp_path):
    write_mixtral(tmp_path / "base", num_hidden_layers=4)
    lora.save_adapter(new_adapter(tmp_path / "base"), low_rank(), {}, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    names = [f"model.layers.{layer}.mlp.experts.{name}" for layer in range(4) for name in ("down_proj", "gate_up_proj")]
    assert config["target_parameters"] == names
