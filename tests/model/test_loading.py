"""The model: which layers get an adapter, how a base is quantized, and that neither changes what is computed."""

import json
import warnings

import pytest
import tiny
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from gpt2lora.model import loading, lora
from gpt2lora.model.quantization import QuantizationParams, count_frozen_bytes, count_frozen_parameters
from gpt2lora.pipeline.cli import StageError
from gpt2lora.training import loss

LAYERS, WIDTH = 2, 64
KINDS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
IN_OUT = {"attn.c_attn": (64, 192), "attn.c_proj": (64, 64), "mlp.c_fc": (64, 256), "mlp.c_proj": (256, 64)}  # at WIDTH
BLOCK, NESTED_BLOCK = 64, 256  # weights that share a scale, and scales that share one
IDS = torch.arange(3 * 40).reshape(3, 40) * 7 % 300
FLOAT = None
NF4 = QuantizationParams(bits=4, quant_type="nf4", double_quant=True)
NF4_ONE_LEVEL = QuantizationParams(bits=4, quant_type="nf4", double_quant=False)
FP4 = QuantizationParams(bits=4, quant_type="fp4", double_quant=True)
INT8 = QuantizationParams(bits=8, quant_type="nf4", double_quant=False)
BASES = {"float": FLOAT, "nf4": NF4, "nf4, one level": NF4_ONE_LEVEL, "fp4": FP4, "int8": INT8}
of_every_base = pytest.mark.parametrize("quantization", BASES.values(), ids=BASES)
of_quantized_bases = pytest.mark.parametrize("quantization", list(BASES.values())[1:], ids=list(BASES)[1:])


def low_rank(**changes) -> lora.LoraParams:
    return tiny.low_rank(**changes)


def load(folder, quantization=FLOAT, dtype=torch.float32):
    return loading.load_base(folder, quantization, dtype)


def logits(network, dtype=torch.float32) -> torch.Tensor:
    network.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return network(input_ids=IDS, use_cache=False).logits


def adapted(network) -> set[str]:
    names = {name for name, module in network.get_base_model().named_modules() if hasattr(module, "lora_A")}
    return {name.removeprefix("transformer.h.") for name in names}


def step(network, dtype=torch.float32) -> None:
    """Train one step."""
    network.train()
    loss.nll_sum(network, IDS, IDS, dtype).backward()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter -= 0.1 * parameter.grad.sign()
                parameter.grad = None


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """A GPT-2 with large weights, so that its activations leave the range where all gelus are alike."""
    folder = tmp_path_factory.mktemp("lively")
    torch.manual_seed(0)
    size = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": 2}
    config = GPT2Config(vocab_size=300, n_positions=64, initializer_range=0.3, **size)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


# The base


def test_the_faster_gelu_computes_what_the_original_does(lively):
    original = AutoModelForCausalLM.from_pretrained(lively)
    assert original.config.activation_function == "gelu_new"
    ours = load(lively)
    assert ours.config.activation_function == "gelu_pytorch_tanh"
    expected = logits(original)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_a_float_base_is_the_folder_s_weights_in_fp32(tiny_model):
    original, ours = AutoModelForCausalLM.from_pretrained(tiny_model), load(tiny_model, dtype=torch.bfloat16)
    expected = original.state_dict()
    assert set(ours.state_dict()) == set(expected)
    for name, value in ours.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name]), name


@of_quantized_bases
def test_a_quantized_base_keeps_embeddings_and_head_in_floats(tiny_model, quantization):
    base = load(tiny_model, quantization)
    kind = Linear8bitLt if quantization.bits == 8 else Linear4bit
    quantized = {name.removeprefix("transformer.h.") for name, module in base.named_modules() if type(module) is kind}
    assert quantized == {f"{layer}.{name}" for layer in range(LAYERS) for name in KINDS}
    stored = torch.int8 if quantization.bits == 8 else torch.uint8
    for name, parameter in base.named_parameters():
        matrix = name.endswith(tuple(f"{kind}.weight" for kind in KINDS))
        assert parameter.dtype == (stored if matrix else torch.float32), name
    assert type(base.lm_head) is torch.nn.Linear
    assert base.lm_head.weight is base.transformer.wte.weight
    if quantization.bits == 4:
        state = base.transformer.h[0].mlp.c_fc.weight.quant_state
        assert (state.quant_type, state.nested) == (quantization.quant_type, quantization.double_quant)


@of_quantized_bases
@torch.no_grad()
def test_quantized_layers_compute_nearly_what_the_float_layers_do(lively, quantization):
    exact, near = load(lively).transformer.h[1], load(lively, quantization).transformer.h[1]
    for kind, (inputs, _) in IN_OUT.items():
        x = torch.randn(20, inputs)
        expected = exact.get_submodule(kind)(x)
        error = float((near.get_submodule(kind)(x) - expected).norm() / expected.norm())
        assert 0 < error < (0.02 if quantization.bits == 8 else 0.2), "1.4 where a square matrix is transposed"


def test_a_4_bit_layer_that_a_cpu_computes_wrongly_is_refused(tmp_path):
    config = GPT2Config(vocab_size=300, n_positions=64, n_layer=1, n_embd=32, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(StageError, match=r"transformer\.h\.0\.attn\.c_attn has 32 inputs"):
        load(tmp_path, NF4)
    load(tmp_path, INT8)


@of_quantized_bases
def test_frozen_bytes_are_every_byte_of_the_base(tiny_model, quantization):
    base = load(tiny_model, quantization)
    network = lora.attach_lora(base, low_rank())
    count = 4 * (300 + 64) * WIDTH  # wte, which is the head, too; wpe
    count += 4 * 2 * WIDTH * (2 * LAYERS + 1)  # layer norms
    for inputs, outputs in IN_OUT.values():
        weights = inputs * outputs
        blocks = weights // BLOCK
        each = 4 * outputs  # bias
        if quantization.bits == 8:
            each += weights + 4 * outputs
        elif quantization.double_quant:
            each += weights // 2 + 16 * 4  # two weights a byte; what each of the 16 values means
            each += blocks + 4 * -(-blocks // NESTED_BLOCK) + 256 * 4 + 4  # scales, their scales, their code, offset
        else:
            each += weights // 2 + 16 * 4 + 4 * blocks
        count += LAYERS * each
    assert count_frozen_bytes(network) == count
    step(network)
    logits(network)
    assert count_frozen_bytes(network) == count, "after training and evaluation"


@of_every_base
def test_frozen_parameters_are_the_base_s_however_they_are_stored(tiny_model, quantization):
    expected = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    network = lora.attach_lora(load(tiny_model, quantization), low_rank())
    assert count_frozen_parameters(network) == expected


def test_frozen_bytes_of_a_float_base_are_four_a_parameter(tiny_model):
    network = lora.attach_lora(load(tiny_model), low_rank())
    assert count_frozen_bytes(network) == 4 * count_frozen_parameters(network)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@of_quantized_bases
def test_evaluating_between_two_steps_neither_crashes_nor_changes_the_base(tiny_model, quantization, dtype):
    network = lora.attach_lora(load(tiny_model, quantization, dtype), low_rank())
    frozen = {name: value.clone() for name, value in network.named_parameters() if not value.requires_grad}
    step(network, dtype)
    before = logits(network, dtype)
    assert torch.equal(logits(network, dtype), before)
    step(network, dtype)
    assert not torch.equal(logits(network, dtype), before)
    for name, value in network.named_parameters():
        assert name not in frozen or torch.equal(value, frozen[name]), name


def test_4_bit_layers_never_repack_their_weights(tiny_model):
    """On a CPU without AVX512_BF16 the test above passes either way."""
    layers = [module for module in load(tiny_model, NF4).modules() if isinstance(module, Linear4bit)]
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


# The adapter


@of_every_base
def test_all_linear_is_every_layer_of_the_blocks_and_nothing_else(tiny_model, quantization):
    network = lora.attach_lora(load(tiny_model, quantization), low_rank())
    assert adapted(network) == {f"{layer}.{name}" for layer in range(LAYERS) for name in KINDS}


@pytest.mark.parametrize(
    ("wanted", "kinds"),
    [
        (["mlp.c_proj"], ["mlp.c_proj"]),
        (["c_proj"], ["attn.c_proj", "mlp.c_proj"]),
        (["attn.c_attn", "c_fc"], ["attn.c_attn", "mlp.c_fc"]),
        (KINDS, KINDS),
    ],
)
def test_a_name_means_the_layers_that_end_in_it(tiny_model, wanted, kinds):
    network = lora.attach_lora(load(tiny_model), low_rank(target_modules=wanted))
    assert adapted(network) == {f"{layer}.{name}" for layer in range(LAYERS) for name in kinds}


def test_a_whole_name_means_one_layer(tiny_model):
    network = lora.attach_lora(load(tiny_model), low_rank(target_modules=["transformer.h.1.mlp.c_proj"]))
    assert adapted(network) == {"1.mlp.c_proj"}


def test_a_name_ends_at_a_dot():
    layers = ["h.0.attn.c_proj", "h.0.crossattn.c_proj", "h.0.mlp.c_proj"]
    assert lora.select_target_layers(layers, low_rank(target_modules=["attn.c_proj"])) == ["h.0.attn.c_proj"]
    assert (
        lora.select_target_layers(layers, low_rank(target_modules=["h.0.crossattn.c_proj", "mlp.c_proj"])) == layers[1:]
    )


@pytest.mark.parametrize("name", ["q_proj", "proj", "wte", "lm_head", "mlp", "c_proj.", ""])
def test_a_name_that_matches_no_linear_layer_is_refused_and_the_layers_listed(tiny_model, name):
    with pytest.raises(StageError) as caught:
        lora.attach_lora(load(tiny_model), low_rank(target_modules=["attn.c_attn", name]))
    expected = f"expected all-linear or names among {', '.join(KINDS)}, not {name!r}"
    assert caught.value.format_message() == f"params.yaml: lora.target_modules: {expected}"


@of_every_base
def test_only_the_two_factors_require_gradients_and_they_are_fp32(tiny_model, quantization):
    network = lora.attach_lora(load(tiny_model, quantization), low_rank())
    trained = {name: value for name, value in network.named_parameters() if value.requires_grad}
    assert len(trained) == 2 * len(KINDS) * LAYERS
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert {value.dtype for value in trained.values()} == {torch.float32}
    for kind, (inputs, outputs) in IN_OUT.items():
        shapes = {tuple(value.shape) for name, value in trained.items() if f".0.{kind}." in name}
        assert shapes == {(4, inputs), (outputs, 4)}


@of_every_base
def test_a_new_adapter_changes_no_logit(tiny_model, quantization):
    base = load(tiny_model, quantization)
    expected = logits(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # where PEFT puts a layer's orientation right
        network = lora.attach_lora(base, low_rank(dropout=0.5))
    assert torch.equal(logits(network), expected)


def test_an_adapter_adds_alpha_over_r_times_b_a(lively):
    network = lora.attach_lora(load(lively), low_rank(r=4, alpha=8, target_modules=["attn.c_attn"]))
    layer = network.get_base_model().transformer.h[0].attn.c_attn
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = torch.randn(5, WIDTH)
    assert type(layer.base_layer) is Conv1D
    torch.testing.assert_close(layer(x), layer.base_layer(x) + (8 / 4) * x @ a.T @ b.T)


def test_the_seed_decides_the_first_values(tiny_model):
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        network = lora.attach_lora(load(tiny_model), low_rank())
        values.append(torch.cat([value.flatten() for value in network.parameters() if value.requires_grad]))
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


@of_every_base
def test_a_saved_adapter_comes_back_with_the_same_logits(lively, tmp_path, quantization):
    network = lora.attach_lora(load(lively, quantization), low_rank())
    step(network)
    lora.save_adapter(network, low_rank(), {}, tmp_path)
    loading.write_method(tmp_path, "qlora" if quantization else "lora", quantization, lively)
    loaded = loading.load_tuned(lively, tmp_path, torch.float32)
    assert torch.equal(logits(loaded), logits(network))
    assert not torch.equal(logits(network), logits(load(lively, quantization)))


def test_a_saved_adapter_lists_its_layers_in_order(tiny_model, tmp_path):
    lora.save_adapter(lora.attach_lora(load(tiny_model), low_rank()), low_rank(), {}, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        f"transformer.h.{layer}.{name}" for layer in range(LAYERS) for name in KINDS
    )
    assert config["fan_in_fan_out"] is True
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


# Another architecture


@pytest.mark.parametrize("quantization", [FLOAT, NF4], ids=["float", "nf4"])
def test_a_llama_works_too(llama, quantization):
    base = load(llama, quantization)
    expected = logits(base)
    network = lora.attach_lora(base, low_rank())
    names = {name.split(".", 2)[2] for name, module in base.named_modules() if hasattr(module, "lora_A")}
    assert names == {
        *(f"{layer}.self_attn.{kind}_proj" for layer in range(LAYERS) for kind in "qkvo"),
        *(f"{layer}.mlp.{kind}_proj" for layer in range(LAYERS) for kind in ("gate", "up", "down")),
    }
    assert torch.equal(logits(network), expected)
    step(network)
    assert not torch.equal(logits(network), expected)
    assert count_frozen_parameters(network) == sum(value.numel() for value in load(llama).parameters())
