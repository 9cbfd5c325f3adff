"""Every method against its formula: LoRA and its variants, how the factors start, and the factors quantized."""

import json
import math
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from gpt2lora.commands import dequantize
from gpt2lora.model import fake_quant, loading, lora, lora_forward, lora_init
from gpt2lora.model.device import pick_device
from gpt2lora.model.quantization import QuantizationParams
from gpt2lora.pipeline.cli import StageError
from gpt2lora.training import loop
from gpt2lora.training.loss import nll_sum
from gpt2lora.training.optimizer import make_optimizer

NF4 = QuantizationParams(bits=4, quant_type="nf4", double_quant=True)
INT8 = QuantizationParams(bits=8, quant_type="nf4", double_quant=False)
IDS = (torch.arange(3 * 40).reshape(3, 40) * 7 % 300).to(pick_device())


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request, tmp_path_factory) -> Path:
    """A model of Conv1D layers and one of Linear layers, both with weights large enough that every term counts."""
    torch.manual_seed(0)
    common = {"vocab_size": 300, "initializer_range": 0.3}
    if request.param == "gpt2":
        network = GPT2LMHeadModel(GPT2Config(n_positions=64, n_layer=2, n_embd=64, n_head=2, **common))
    else:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        network = LlamaForCausalLM(
            LlamaConfig(max_position_embeddings=64, tie_word_embeddings=False, **sizes, **common)
        )
    folder = tmp_path_factory.mktemp(request.param)
    network.save_pretrained(folder)
    return folder


def attach(folder: Path, quantization=None, **changes) -> tuple[torch.nn.Module, lora.LoraParams, dict]:
    """An adapter whose factors are both random, unless an init says what they are; what `save` needs, too."""
    chosen = tiny.low_rank(**changes)
    base = loading.load_base(folder, quantization, torch.float32)
    torch.manual_seed(0)
    network = lora.attach_lora(base, chosen)
    floats = lora.linear_layers(loading.load_base(folder, None, torch.float32))
    taken = lora_init.initialize_lora(lora.lora_layers(network), chosen.init, floats)
    if chosen.init == "default":
        disturb(network)
    return network, chosen, taken


def disturb(network: torch.nn.Module) -> None:
    """Change every trained value, as training does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def logits(network) -> torch.Tensor:
    network.eval()
    with torch.no_grad():
        return network(input_ids=IDS, use_cache=False).logits


def weight(layer) -> torch.Tensor:
    """The weight of a float layer as (out, in), in fp64."""
    return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach().double()


def passed_through(network) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each adapted layer's input and output in one pass of the model."""
    seen = {}
    hooks = [
        module.register_forward_hook(lambda _, x, y, name=name: seen.__setitem__(name, (x[0].detach(), y.detach())))
        for name, module in lora.lora_layers(network).items()
    ]
    logits(network)
    for hook in hooks:
        hook.remove()
    return seen


# The formula


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_layer_computes_w_x_plus_s_b_a_x(folder, use_rslora):
    network, _, _ = attach(folder, r=4, alpha=8, use_rslora=use_rslora)
    network.double()
    scale = 8 / math.sqrt(4) if use_rslora else 8 / 4
    for name, (x, y) in passed_through(network).items():
        module = lora.lora_layers(network)[name]
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        bias = 0 if module.base_layer.bias is None else module.base_layer.bias
        expected = x @ weight(module.base_layer).T + bias + scale * (x @ a.T) @ b.T
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-9)
        without = expected - scale * (x @ a.T) @ b.T
        assert (expected - without).abs().max() > 0.1 * expected.abs().max(), (
            f"the update of {name} is too small to see"
        )


@pytest.mark.parametrize("masked", [False, True])
def test_the_update_s_gradients_are_those_of_its_formula(masked):
    torch.manual_seed(0)
    shapes = {"y": (5, 7), "x": (5, 6), "a": (3, 6), "b": (7, 3)}
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes.values()]
    mask = torch.rand(5, 6) < 0.5 if masked else None
    y, x, a, b = tensors
    expected = y + 1.5 * (x * (1 if mask is None else mask)) @ a.T @ b.T

    def update(y, *others):
        return lora_forward.LowRankUpdate.apply(y.clone(), *others, mask, 1.5)  # which writes to the y that it gets

    torch.testing.assert_close(update(*tensors), expected)
    assert torch.autograd.gradcheck(update, tensors)


@pytest.mark.parametrize("keep", [lora_forward.dropout_mask, lora_forward.hash_dropout_mask])
def test_each_mask_drops_its_share_independently_of_place_and_of_other_masks(keep):
    torch.manual_seed(0)
    share, size = 0.05, (1024, 768)
    variance = share * (1 - share)

    def apart(product: torch.Tensor) -> float:
        """Return how many standard errors the mean of products of independent values is from 0."""
        return abs(float(product.double().mean())) / variance * product.numel() ** 0.5

    dropped, other = (1.0 - keep(torch.empty(size), share).float() - share for _ in range(2))
    assert dropped.unique().tolist() == pytest.approx([-share, 1 - share])
    assert abs(float(dropped.mean())) < 5 * (variance / dropped.numel()) ** 0.5
    assert apart(dropped * other) < 5
    for step in (1, 2, 3, 16, 64, 256):
        assert apart(dropped[step:] * dropped[:-step]) < 5
        assert apart(dropped[:, step:] * dropped[:, :-step]) < 5


@pytest.mark.parametrize("quantization", [None, NF4], ids=["float", "nf4"])
def test_a_pass_is_that_of_peft(folder, quantization):
    ours, _, _ = attach(folder, quantization)
    theirs, _, _ = attach(folder, quantization)
    for module in lora.lora_layers(theirs).values():
        del module.forward  # the faster one, which stands before the class's
    results = []
    for network in (ours, theirs):
        loop.set_base_dropout(network.train(), 0.0)
        nll = nll_sum(network, IDS[:, :-1], IDS[:, 1:], torch.float32)
        nll.backward()
        results.append([nll.detach(), *(p.grad for p in network.parameters() if p.requires_grad)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_dropout_falls_on_the_update_alone_while_training_and_keeps_its_mean(folder):
    network, _, _ = attach(folder, dropout=0.25)
    name, module = next(iter(lora.lora_layers(network).items()))
    x = torch.randn(2, 3, weight(module.base_layer).shape[1], device=IDS.device)
    with torch.no_grad():
        exact, base = module.eval()(x), module.base_layer(x)
        assert torch.equal(module(x), exact), name
        draws = torch.stack([module.train()(x) for _ in range(4000)])
    assert (draws[0] != draws[1]).any()
    deviation = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() < 6 * deviation + 1e-5).all()
    # Of x_i with probability 3/4, over 3/4: variance x_i^2 / 3 for each input.
    factor = 2 * module.lora_B["default"].weight @ module.lora_A["default"].weight
    expected = ((x[..., None, :] * factor) ** 2 / 3).sum(-1).sqrt()
    torch.testing.assert_close(draws.std(0), expected, rtol=0.1, atol=1e-4)
    assert (exact - base).abs().max() > 1e-2


def test_dora_scales_the_rows_of_the_sum_to_learned_lengths(folder):
    network, _, _ = attach(folder, r=4, alpha=8, use_dora=True)
    network.double()
    for name, (x, y) in passed_through(network).items():
        module = lora.lora_layers(network)[name]
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        total = weight(module.base_layer) + 2 * b @ a
        lengths = module.lora_magnitude_vector["default"].weight
        bias = 0 if module.base_layer.bias is None else module.base_layer.bias
        expected = x @ (lengths[:, None] * total / total.norm(dim=1, keepdim=True)).T + bias
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("quantization", [None, NF4, INT8], ids=["float", "nf4", "int8"])
@pytest.mark.parametrize("changes", [{"use_dora": True}, {"use_rslora": True}, {"bits": 8}, {"bits": 4}], ids=str)
def test_every_variant_trains_on_every_base_and_changes_nothing_else(folder, quantization, changes):
    network, _, _ = attach(folder, quantization, **changes)
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


# Which layers


@pytest.mark.parametrize(
    ("layers", "chosen"),
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
def test_layers_are_counted_from_0_and_ranges_include_their_ends(layers, chosen):
    names = [f"transformer.h.{layer}.{kind}" for layer in range(12) for kind in ("attn.c_attn", "mlp.c_proj")]
    found = lora.select_target_layers(names, tiny.low_rank(target_modules=["c_proj"], layers=layers))
    assert found == [f"transformer.h.{layer}.mlp.c_proj" for layer in chosen]


def test_names_and_layers_that_do_not_meet_are_refused():
    names = ["model.layers.0.q_proj", "model.layers.1.q_proj", "model.project_out"]
    with pytest.raises(
        StageError, match=r"lora\.layers: expected a layer that has one of model\.project_out, not \[0\]"
    ):
        lora.select_target_layers(names, tiny.low_rank(target_modules=["project_out"], layers=[0]))


def test_the_adapters_are_on_the_chosen_layers_and_no_other(folder):
    network, _, _ = attach(folder, layers="1-1")
    every = list(lora.linear_layers(network.get_base_model().__class__(network.config)))
    assert list(lora.lora_layers(network)) == [name for name in every if ".1." in name]
    assert len(lora.lora_layers(network)) == len(every) / 2


@pytest.mark.parametrize("quantization", [NF4, INT8], ids=["nf4", "int8"])
def test_all_48_projections_of_a_12_layer_gpt2_are_quantized_and_nothing_else(tmp_path, quantization):
    config = GPT2Config(vocab_size=300, n_positions=64, n_layer=12, n_embd=64, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    base = loading.load_base(tmp_path, quantization, torch.float32)
    kind = Linear4bit if quantization.bits == 4 else Linear8bitLt
    assert sum(type(module) is kind for module in base.modules()) == 48
    packed = {torch.uint8, torch.int8}
    assert sum(parameter.dtype in packed for parameter in base.parameters()) == 48
    floats = {name.split(".")[-2] for name, parameter in base.named_parameters() if parameter.dim() == 2} - {
        name.split(".")[-2] for name, parameter in base.named_parameters() if parameter.dtype in packed
    }
    assert floats == {"wte", "wpe"}


# How the factors start


@pytest.mark.parametrize("init", ["default", "pissa", "olora", "orthogonal"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["", "dora"])
def test_an_adapter_starts_as_nothing_whatever_its_init(folder, init, use_dora):
    plain = logits(loading.load_base(folder, None, torch.float32))
    chosen = tiny.low_rank(init=init, use_dora=use_dora)
    network = lora.attach_lora(loading.load_base(folder, None, torch.float32), chosen)
    lora_init.initialize_lora(lora.lora_layers(network), init, {})
    zero = [bool((module.lora_B["default"].weight == 0).all()) for module in lora.lora_layers(network).values()]
    assert all(zero) if init == "default" else not any(zero)
    torch.testing.assert_close(logits(network), plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))


def test_pissa_takes_the_largest_singular_triplets(folder):
    network, _, _ = attach(folder, init="pissa", r=4, alpha=8)
    original = lora.linear_layers(loading.load_base(folder, None, torch.float32))
    for name, module in lora.lora_layers(network).items():
        update = 2 * module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()
        before, rest = weight(original[name]), weight(module.base_layer)
        torch.testing.assert_close(update + rest, before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            torch.linalg.svdvals(update)[:4], torch.linalg.svdvals(before)[:4], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(torch.linalg.svdvals(rest)[0], torch.linalg.svdvals(before)[4], rtol=1e-4, atol=1e-5)


def test_olora_takes_an_orthonormal_factor(folder):
    network, _, _ = attach(folder, init="olora", r=4)
    for module in lora.lora_layers(network).values():
        b = module.lora_B["default"].weight
        torch.testing.assert_close(b.T @ b, torch.eye(4, device=b.device), rtol=0, atol=1e-5)
        assert torch.equal(module.lora_A["default"].weight.tril(-1), torch.zeros_like(module.lora_A["default"].weight))


def test_orthogonal_factors_are_random_and_their_product_is_nothing(folder):
    network, _, _ = attach(folder, init="orthogonal", r=4)
    for module in lora.lora_layers(network).values():
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        assert a.abs().mean() > 1e-2
        assert b.abs().mean() > 1e-2
        assert (b @ a).abs().max() < 1e-5 * a.abs().max() * b.abs().max() * 4


@pytest.mark.parametrize("quantization", [NF4, INT8], ids=["nf4", "int8"])
def test_loftq_leaves_only_the_smallest_singular_values_of_the_quantization_error(folder, quantization):
    network, _, _ = attach(folder, quantization, init="loftq", r=32, alpha=16)
    original = lora.linear_layers(loading.load_base(folder, None, torch.float32))
    for name, module in lora.lora_layers(network).items():
        base = module.base_layer
        with torch.no_grad():
            stored = (base(torch.eye(base.in_features, device=IDS.device)) - (0 if base.bias is None else base.bias)).T
        error = weight(original[name]) - stored.double()
        left = error - 0.5 * module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()
        torch.testing.assert_close(left.norm(), torch.linalg.svdvals(error)[32:].norm(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_took_from_the_base_is_saved_as_an_ordinary_one(folder, tmp_path, init, changes):
    network, chosen, taken = attach(folder, init=init, **changes)
    start = logits(network)
    disturb(network)
    expected = logits(network)
    assert (expected - start).abs().max() > 0.1 * start.abs().max()
    (tmp_path / "adapter").mkdir()
    lora.save_adapter(network, chosen, taken, tmp_path / "adapter")
    outside = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder).to(IDS.device), tmp_path / "adapter"
    )
    torch.testing.assert_close(logits(outside), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert outside.peft_config["default"].r == 8


def test_lora_plus_gives_the_factors_b_a_rate_of_their_own(folder):
    network, _, _ = attach(folder, use_dora=True)
    ones, sixteens = make_optimizer(network, tiny.train_params(lora_plus_ratio=16.0)).param_groups
    assert (ones["ratio"], sixteens["ratio"]) == (1.0, 16.0)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert {names[id(p)].split(".")[-3] for p in sixteens["params"]} == {"lora_B"}
    assert len(sixteens["params"]) == len(lora.lora_layers(network))
    trained = sum(parameter.requires_grad for parameter in network.parameters())
    assert len(ones["params"]) + len(sixteens["params"]) == trained


# The factors quantized


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(16, 768), (768, 16), (5, 7), (1, 64), (3, 43)], ids=str)
def test_every_value_is_within_half_a_step_of_its_own(bits, shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.rand(shape).exp()
    codes, scales = fake_quant.quantize(matrix, bits)
    restored = fake_quant.dequantize(codes, scales, matrix.shape)
    assert restored.shape == matrix.shape
    absmax = torch.nn.functional.pad(matrix.flatten(), (0, -matrix.numel() % 64)).view(-1, 64).abs().amax(1)
    # Half the widest gap between levels, and the rounding of the scale to bf16.
    gap = {8: 0.5 / 127, 4: 0.5 * float((fake_quant.NF4[1:] - fake_quant.NF4[:-1]).max())}[bits]
    error = torch.nn.functional.pad((restored - matrix).flatten(), (0, -matrix.numel() % 64)).view(-1, 64).abs().amax(1)
    assert (error <= (gap + 2**-8) * absmax).all()
    assert error.max() > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_what_was_quantized_stays_as_it_is_when_quantized_again(bits):
    torch.manual_seed(0)
    matrix = torch.randn(64, 48) * 1e-3
    once = fake_quant.dequantize(*fake_quant.quantize(matrix, bits), matrix.shape)
    again = fake_quant.dequantize(*fake_quant.quantize(once, bits), matrix.shape)
    assert torch.equal(once, again)


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zeros(bits):
    codes, scales = fake_quant.quantize(torch.zeros(4, 64), bits)
    assert torch.equal(fake_quant.dequantize(codes, scales, torch.Size((4, 64))), torch.zeros(4, 64))


def test_the_levels_are_those_of_bitsandbytes():
    from bitsandbytes.functional import get_4bit_type

    assert torch.equal(fake_quant.NF4, get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_forward_pass_takes_what_is_stored_and_the_gradient_passes_straight_through(folder, bits):
    network, _, _ = attach(folder, bits=bits)
    twin, _, _ = attach(folder, bits=16)
    with torch.no_grad():  # the twin's floats are what the other stores
        for name, module in lora.lora_layers(twin).items():
            for factor, other in (
                (module.lora_A, lora.lora_layers(network)[name].lora_A),
                (module.lora_B, lora.lora_layers(network)[name].lora_B),
            ):
                value = other["default"].weight
                factor["default"].weight.copy_(fake_quant.dequantize(*fake_quant.quantize(value, bits), value.shape))
                assert not torch.equal(factor["default"].weight, value)
    assert torch.equal(logits(network), logits(twin))
    for one in (network, twin):
        nll_sum(one, IDS[:, :-1], IDS[:, 1:], torch.float32).backward()
    gradients = [{n: p.grad for n, p in one.named_parameters() if p.requires_grad} for one in (network, twin)]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("quantization", [None, NF4], ids=["float", "nf4"])
@pytest.mark.parametrize("changes", [{"bits": 8}, {"bits": 4}, {"bits": 8, "use_dora": True}], ids=str)
def test_what_is_stored_is_what_was_trained_against_bit_for_bit(folder, tmp_path, quantization, changes):
    network, chosen, taken = attach(folder, quantization, **changes)
    expected = logits(network)
    lora.save_adapter(network, chosen, taken, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", fake_quant.QUANTIZED_WEIGHTS}
    stored = fake_quant.load_quantized(tmp_path)
    for name, module in lora.lora_layers(network).items():
        for factor in ("lora_A", "lora_B"):
            trained = getattr(module, factor)["default"].fake_quantized_weight()
            assert torch.equal(stored[f"base_model.model.{name}.{factor}.weight"].to(IDS.device), trained)
    loaded = lora.load_adapter(loading.load_base(folder, quantization, torch.float32), tmp_path)
    assert torch.equal(logits(loaded), expected)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("bits", [8, 4])
def test_compiled_layers_too_compute_with_what_is_stored(bits):
    torch.manual_seed(0)
    layer = fake_quant.FakeQuantLinear(torch.nn.Linear(96, 16, bias=False), bits)
    stored = torch.compile(lambda: layer.fake_quantized_weight() * 1.0, dynamic=False)()
    matrix = layer.weight
    assert torch.equal(stored, fake_quant.dequantize(*fake_quant.quantize(matrix, bits), matrix.shape))
    stored.backward(matrix.detach())
    assert torch.equal(matrix.grad, matrix)


def test_the_file_holds_codes_and_scales_and_no_float_of_a_factor(folder, tmp_path):
    for bits, kind in ((8, torch.int8), (4, torch.uint8)):
        network, chosen, _ = attach(folder, bits=bits)
        lora.save_adapter(network, chosen, {}, tmp_path)
        tensors = load_file(tmp_path / fake_quant.QUANTIZED_WEIGHTS)
        assert {tensor.dtype for name, tensor in tensors.items() if name.endswith(".codes")} == {kind}
        assert {tensor.dtype for name, tensor in tensors.items() if name.endswith(".scales")} == {torch.bfloat16}
        assert all(name.endswith((".codes", ".scales")) for name in tensors)


@pytest.mark.parametrize(("bits", "fewer"), [(8, 1.9), (4, 3.5)])
def test_a_stored_adapter_is_that_many_times_smaller_than_one_of_16_bits(tmp_path, bits, fewer):
    shapes = {"attn.c_attn": (768, 2304), "attn.c_proj": (768, 768), "mlp.c_fc": (768, 3072), "mlp.c_proj": (3072, 768)}
    tensors = {}
    for layer in range(12):
        for name, (inputs, outputs) in shapes.items():
            prefix = f"base_model.model.transformer.h.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(16, inputs)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, 16)
    fake_quant.save_quantized(tensors, bits, tmp_path)
    values = sum(tensor.numel() for tensor in tensors.values())
    assert 2 * values / (tmp_path / fake_quant.QUANTIZED_WEIGHTS).stat().st_size >= fewer
    assert sum(map(torch.Tensor.numel, fake_quant.load_quantized(tmp_path).values())) == values


@pytest.mark.parametrize("changes", [{"bits": 8}, {"bits": 4, "use_dora": True}], ids=str)
def test_an_expanded_adapter_is_an_ordinary_one(folder, tmp_path, changes):
    network, chosen, _ = attach(folder, **changes)
    (tmp_path / "adapter").mkdir()
    lora.save_adapter(network, chosen, {}, tmp_path / "adapter")
    loading.write_method(tmp_path / "adapter", "lora", None, folder)
    done = CliRunner().invoke(
        dequantize.main, ["--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "plain")]
    )
    assert done.exit_code == 0, done.output
    assert {file.name for file in (tmp_path / "plain").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    outside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder).to(IDS.device), tmp_path / "plain")
    expected = logits(network)
    torch.testing.assert_close(logits(outside), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_only_a_quantized_adapter_is_expanded_and_into_a_new_folder(folder, tmp_path):
    network, chosen, _ = attach(folder)
    (tmp_path / "adapter").mkdir()
    lora.save_adapter(network, chosen, {}, tmp_path / "adapter")
    options = ["--adapter", str(tmp_path / "adapter"), "--out"]
    done = CliRunner().invoke(dequantize.main, [*options, str(tmp_path / "plain")])
    assert (done.exit_code, "lora.bits 8 or 4" in done.output) == (1, True)
    assert not (tmp_path / "plain").exists()
    done = CliRunner().invoke(dequantize.main, [*options, str(tmp_path)])
    assert (done.exit_code, "expected the name of a new folder" in done.output) == (1, True)


def test_evaluation_reads_nothing_but_the_stored_form(folder, tmp_path):
    network, chosen, _ = attach(folder, bits=8)
    lora.save_adapter(network, chosen, {}, tmp_path)
    loading.write_method(tmp_path, "lora", None, folder)
    expected = logits(network)
    del network
    assert torch.equal(logits(loading.load_tuned(folder, tmp_path, torch.float32)), expected)
    tensors = fake_quant.load_quantized(tmp_path)
    fake_quant.save_quantized({name: 2 * tensor for name, tensor in tensors.items()}, 8, tmp_path)
    loading.write_method(tmp_path, "lora", None, folder)
    assert not torch.equal(logits(loading.load_tuned(folder, tmp_path, torch.float32)), expected)
    assert json.loads((tmp_path / "method.json").read_text())["method"] == "lora"
