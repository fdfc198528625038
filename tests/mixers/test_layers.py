"""When a layer's weight may be read in place of calling it; peft and torchao themselves, where they are installed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from contextlab.mixers import build_mixer
from contextlab.mixers.layers import Linear, TernaryLinear, each_its_part, in_dtype_of, is_plain
from contextlab.models import build_model
from contextlab.testing.adapters import Int8, Lora


def with_(change: str) -> nn.Module:
    """A layer 4 -> 6 with something put on it."""
    layer = Linear(4, 6, bias=True)
    if change == "a hook":
        layer.register_forward_hook(lambda module, given, y: 2 * y)
    elif change == "a hook before":
        layer.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    elif change == "another forward":
        layer.forward = lambda x: x @ (2 * layer.weight).T  # type: ignore[method-assign]
    elif change == "a parametrization":
        parametrizations.weight_norm(layer)
    elif change == "int8":
        layer.weight = nn.Parameter(Int8.of(layer.weight.detach()), requires_grad=False)
    elif change == "LoRA":
        adapter = Lora(layer)
        nn.init.normal_(adapter.B)
        return adapter
    return layer


CHANGES = ("a hook", "a hook before", "another forward", "a parametrization", "int8", "LoRA")


def test_a_layer_with_nothing_on_it_is_plain() -> None:
    assert is_plain(Linear(4, 6))
    assert is_plain(nn.Linear(4, 6))
    assert not is_plain(TernaryLinear(4, 6))


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_with_something_on_it_is_called(change: str) -> None:
    layer, x = with_(change), torch.randn(2, 5, 3, 4)
    assert not is_plain(layer)
    y = layer(x)
    torch.testing.assert_close(in_dtype_of(x.double(), layer), y.double())
    for part in range(3):
        expected = y[:, :, part, 2 * part : 2 * part + 2]
        torch.testing.assert_close(each_its_part(x, layer)[:, :, part], expected)


@pytest.mark.parametrize("bias", [True, False])
def test_a_plain_layer_is_read_to_the_same_numbers(bias: bool) -> None:
    layer, x = Linear(4, 6, bias=bias).double(), torch.randn(2, 5, 3, 4, dtype=torch.float64)
    called = layer(x)
    torch.testing.assert_close(in_dtype_of(x, layer), called)
    for part in range(3):
        torch.testing.assert_close(each_its_part(x, layer)[:, :, part], called[:, :, part, 2 * part : 2 * part + 2])
    half = Linear(4, 6, bias=bias).bfloat16()
    assert in_dtype_of(x, half).dtype == torch.float64
    torch.testing.assert_close(in_dtype_of(x, half), copy.deepcopy(half).double()(x))


def test_a_hook_sees_the_calls_of_a_mixer_that_reads_weights() -> None:
    mixer, seen = build_mixer("rwkv7", width=8, heads=2), []
    mixer.in_proj.register_forward_hook(lambda module, given, y: seen.append(given[0].shape))
    mixer(torch.randn(1, 3, 8))
    assert seen == [torch.Size((1, 3, 3, 8))]


@pytest.mark.parametrize("preset", ["rwkv7", "transformer"])
def test_peft_trains_and_merges(preset: str) -> None:
    peft = pytest.importorskip("peft")
    model = build_model(preset, width=16, depth=1, read_in="token", input_size=7, output_size=7).double()
    tokens = torch.randint(7, (2, 9))
    before = model(tokens)
    config = peft.LoraConfig(r=2, target_modules=r"blocks\..*_(proj|in|out)|blocks\..*\.up", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).double()
    y = adapted(tokens)
    assert not torch.allclose(y, before)
    y.square().sum().backward()
    trained = [(name, parameter.grad) for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) >= 6
    assert all(gradient is not None and gradient.any() for _, gradient in trained), [n for n, g in trained if g is None]
    torch.testing.assert_close(adapted.merge_and_unload()(tokens), y, rtol=0, atol=1e-9)


def test_torchao_int8_runs() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    mixer, x = build_mixer("rwkv7", width=32), torch.randn(1, 6, 32)
    expected = mixer(x)[0].detach()
    quantization.quantize_(mixer, quantization.Int8WeightOnlyConfig())
    with torch.no_grad():
        y, _ = mixer(x)
    assert float((y - expected).norm() / expected.norm()) < 0.05
