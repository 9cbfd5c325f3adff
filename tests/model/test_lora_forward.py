"""The forward pass of a layer with an adapter, against its formula and PEFT's: values, gradients and dropout."""

import math

import pytest
import tiny
import torch
from small_models import IDS, INT8, NF4, float_weight, load, logits, new_adapter, random_adapter
from transformers.pytorch_utils import Conv1D

from gpt2lora.model import dora_forward, loading, lora, lora_forward
from gpt2lora.pipeline.cli import StageError
from gpt2lora.training import dropout
from gpt2lora.training.loss import nll_sum


def layer_inputs_and_outputs(network) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the input and the output of each layer with an adapter in one forward pass of the model."""
    seen = {}
    hooks = [
        module.register_forward_hook(lambda _, x, y, name=name: seen.__setitem__(name, (x[0].detach(), y.detach())))
        for name, module in lora.lora_layers(network).items()
    ]
    logits(network)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_lora_layer_computes_w_x_plus_s_b_a_x(model_folder, use_rslora):
    network, _, _ = random_adapter(model_folder, r=4, alpha=8, use_rslora=use_rslora)
    network.double()
    scale = 8 / math.sqrt(4) if use_rslora else 8 / 4
    for name, (x, y) in layer_inputs_and_outputs(network).items():
        module = lora.lora_layers(network)[name]
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        bias = 0 if module.base_layer.bias is None else module.base_layer.bias
        update = scale * (x @ a.T) @ b.T
        expected = x @ float_weight(module.base_layer).T + bias + update
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-9)
        assert update.abs().max() > 0.1 * expected.abs().max(), f"the update of {name} is too small to see"


def test_dora_scales_the_rows_of_the_sum_to_learned_norms(model_folder):
    network, _, _ = random_adapter(model_folder, r=4, alpha=8, use_dora=True)
    network.double()
    for name, (x, y) in layer_inputs_and_outputs(network).items():
        module = lora.lora_layers(network)[name]
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        total = float_weight(module.base_layer) + 2 * b @ a
        norms = module.lora_magnitude_vector["default"].weight
        bias = 0 if module.base_layer.bias is None else module.base_layer.bias
        expected = x @ (norms[:, None] * total / total.norm(dim=1, keepdim=True)).T + bias
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-9)


def test_dora_s_norms_are_right_in_bf16_beside_large_biases(model_folder):
    network, _, _ = random_adapter(model_folder, r=4, alpha=8, use_dora=True)
    dora_forward.fuse_dora(network, "default")
    for name, layer in lora.lora_layers(network).items():
        if layer.base_layer.bias is not None:
            torch.nn.init.normal_(layer.base_layer.bias, std=150)  # as in Qwen2's keys
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = (float_weight(layer.base_layer) + 2 * b @ a).norm(dim=1).float()
        with torch.autocast(IDS.device.type, torch.bfloat16):
            found = dora_forward.norms(layer, torch.bfloat16)
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("init", ["default", "pissa", "olora", "orthogonal"])
def test_dora_begins_as_the_base_in_bf16(model_folder, init):
    """Also with a large scale, alpha / r, for which olora subtracts much from the base."""
    expected = nll_sum(load(model_folder), IDS[:, :-1], IDS[:, 1:], torch.float32)
    chosen = tiny.low_rank(init=init, use_dora=True, r=2 if init == "orthogonal" else 1, alpha=32)
    network, _ = loading.load_for_training(model_folder, "lora", None, chosen, torch.bfloat16)
    found = nll_sum(network, IDS[:, :-1], IDS[:, 1:], torch.bfloat16)
    assert float(found) == pytest.approx(float(expected), rel=1e-2)


def test_dora_refuses_rows_of_zeros(gpt2_folder):
    base = load(gpt2_folder)
    with torch.no_grad():
        base.transformer.h[1].mlp.c_fc.weight[:, 3] = 0  # of Conv1D: the weights of one output
    network = lora.attach_lora(base, tiny.low_rank(use_dora=True))
    with pytest.raises(StageError, match=r"^transformer\.h\.1\.mlp\.c_fc has a row of zeros"):
        dora_forward.fuse_dora(network, "default")


def test_the_update_of_a_conv1d_layer_is_not_transposed(gpt2_folder):
    network = new_adapter(gpt2_folder, r=4, alpha=8, target_modules=["attn.c_attn"])
    layer = network.get_base_model().transformer.h[0].attn.c_attn
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = torch.randn(5, 64, device=IDS.device)
    assert type(layer.base_layer) is Conv1D
    torch.testing.assert_close(layer(x), layer.base_layer(x) + (8 / 4) * x @ a.T @ b.T)


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradients_of_the_update_are_those_of_its_formula(masked):
    torch.manual_seed(0)
    shapes = {"y": (5, 7), "x": (5, 6), "a": (3, 6), "b": (7, 3)}
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes.values()]
    mask = torch.rand(5, 6) < 0.5 if masked else None
    y, x, a, b = tensors
    expected = y + 1.5 * (x * (1 if mask is None else mask)) @ a.T @ b.T

    def update(y, *others):
        return lora_forward.LowRankUpdate.apply(y.clone(), *others, mask, 1.5)  # a copy, since it overwrites y

    torch.testing.assert_close(update(*tensors), expected)
    assert torch.autograd.gradcheck(update, tensors)


@pytest.mark.parametrize("make_mask", [lora_forward.dropout_mask, lora_forward.hash_dropout_mask])
def test_dropout_masks_drop_their_share_independently(make_mask):
    torch.manual_seed(0)
    share, size = 0.05, (1024, 768)
    variance = share * (1 - share)

    def standard_errors(product: torch.Tensor) -> float:
        """Return by how many standard errors the mean of products of independent values differs from 0."""
        return abs(float(product.double().mean())) / variance * product.numel() ** 0.5

    dropped, other = (1.0 - make_mask(torch.empty(size), share).float() - share for _ in range(2))
    assert dropped.unique().tolist() == pytest.approx([-share, 1 - share])
    assert abs(float(dropped.mean())) < 5 * (variance / dropped.numel()) ** 0.5
    assert standard_errors(dropped * other) < 5, "independent of another mask"
    for distance in (1, 2, 3, 16, 64, 256):
        assert standard_errors(dropped[distance:] * dropped[:-distance]) < 5, "independent of other rows"
        assert standard_errors(dropped[:, distance:] * dropped[:, :-distance]) < 5, "independent of other columns"


@pytest.mark.parametrize("quantization", [None, INT8, NF4], ids=["float", "int8", "nf4"])
@pytest.mark.parametrize(
    "changes", [{}, {"use_dora": True}, {"use_dora": True, "bits": 8, "use_rslora": True}], ids=str
)
def test_loss_and_gradients_equal_those_of_peft(model_folder, quantization, changes):
    ours, _, _ = random_adapter(model_folder, quantization, **changes)
    theirs, _, _ = random_adapter(model_folder, quantization, **changes)
    dora_forward.fuse_dora(ours, "default")
    assert all("forward" in vars(module) for module in lora.lora_layers(ours).values())
    for module in lora.lora_layers(theirs).values():
        vars(module).pop("forward", None)  # our forward pass, which hides the one of PEFT's class
    results = []
    for network in (ours, theirs):
        dropout.set_base_dropout(network.train(), 0.0)
        nll = nll_sum(network, IDS[:, :-1], IDS[:, 1:], torch.float32)
        nll.backward()
        results.append([nll.detach(), *(p.grad for p in network.parameters() if p.requires_grad)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_dropout_acts_on_the_update_alone_and_keeps_its_mean(model_folder):
    network, _, _ = random_adapter(model_folder, dropout=0.25)
    name, module = next(iter(lora.lora_layers(network).items()))
    x = torch.randn(2, 3, float_weight(module.base_layer).shape[1], device=IDS.device)
    with torch.no_grad():
        exact, base = module.eval()(x), module.base_layer(x)
        assert torch.equal(module(x), exact), name
        draws = module.train()(x.repeat(4000, 1, 1, 1))  # each with a mask of its own
        assert (module(x) != module(x)).any()
    assert (draws[0] != draws[1]).any()
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() < 6 * standard_error + 1e-5).all()
    # An input x_i is kept with probability 3/4 and then divided by 3/4: its variance is x_i^2 / 3.
    factor = 2 * module.lora_B["default"].weight @ module.lora_A["default"].weight
    expected = ((x[..., None, :] * factor) ** 2 / 3).sum(-1).sqrt()
    torch.testing.assert_close(draws.std(0), expected, rtol=0.1, atol=1e-4)
    assert (exact - base).abs().max() > 1e-2
