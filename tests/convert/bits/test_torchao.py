"""torchao's own numbers in our form: against its tensors and layers, and against rtn; without it, one line."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from contextlab import load_model, save_model
from contextlab.convert import build_conversion
from contextlab.errors import InputError, ResourceError
from contextlab.models import build_model, linear_layers

TOKENS = torch.arange(12)[None]


def model():
    """Two blocks of mixers of two kinds, in float32."""
    sizes = {"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2, "input_size": 12, "output_size": 12}
    return build_model({**sizes, "read_in": "token", "layers": ["attention", "mamba2"]}).eval()


def test_without_torchao_the_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ResourceError, match="torchao: needs the package torchao; pip install 'contextlab"):
        build_conversion("torchao")(model())


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 8), (4, 8), (2, 8)])
def test_the_numbers_are_those_of_torchao(bits, group, tmp_path):
    ao = pytest.importorskip("torchao.quantization")
    before = model()
    made = build_conversion("torchao", bits=bits, group=group)(before)
    fine = ao.PerAxis(0) if group is None else ao.PerGroup(group)
    configs = [ao.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=fine)]
    if bits == 8 and group is None:
        configs.append(ao.Int8WeightOnlyConfig())
    for name, layer in linear_layers(before).items():
        for config in configs:
            theirs = nn.Linear(layer.in_features, layer.out_features, bias=False)
            theirs.weight = nn.Parameter(layer.weight.detach().clone())
            ao.quantize_(theirs, config)
            assert torch.equal(made.model.get_submodule(name).dense(), theirs.weight.dequantize())
    ours = build_conversion("rtn", bits=bits, group=group)(before)
    for line, other in zip(made.lines, ours.lines, strict=True):
        assert line.layer == other.layer
        assert line.bytes_after == other.bytes_after
        assert line.error == pytest.approx(
            other.error, rel=0.6 if bits == 2 else 0.35
        )  # 2 bits: steps of a 1.5th, and of half
    save_model(made.model, tmp_path / "saved")
    assert torch.equal(load_model(tmp_path / "saved")(TOKENS), made.model(TOKENS))


def test_int8_dynamic_answers_as_torchao_does():
    ao = pytest.importorskip("torchao.quantization")
    before = model()
    made = build_conversion("torchao", activations=8)(before).model
    generator = torch.Generator().manual_seed(0)
    for name, layer in linear_layers(before).items():
        theirs = nn.Linear(layer.in_features, layer.out_features, bias=False)
        theirs.weight = nn.Parameter(layer.weight.detach().clone())
        ao.quantize_(theirs, ao.Int8DynamicActivationInt8WeightConfig())
        x = torch.randn(20, layer.in_features, generator=generator)
        with torch.no_grad():
            wanted = theirs(x)
            assert (made.get_submodule(name)(x) - wanted).norm() < 0.02 * wanted.norm()


def test_what_does_not_fit_is_one_line():
    pytest.importorskip("torchao")
    with pytest.raises(
        InputError, match="does not divide the 16 inputs of blocks.0.mixer.qkv_proj; 4 is the nearest that"
    ):
        build_conversion("torchao", group=5)(model())
