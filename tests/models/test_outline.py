"""Models in outline tell what the whole ones would."""

from __future__ import annotations

import pytest
import torch

from contextlab import registry
from contextlab.models import ModelSpec, build_model, preset
from contextlab.models.outline import one_of_each, without_memory


@pytest.mark.parametrize("name", registry.names("model"))
def test_a_model_without_memory_counts_as_the_whole_does(name):
    spec = preset(name)
    if spec.input_size is None:
        spec = preset(name, read_in="token", input_size=11, output_size=11)
    if spec.width > 128:
        pytest.skip("large")
    outline, whole = without_memory(spec), build_model(spec)
    assert outline is not None
    assert all(parameter.is_meta for parameter in outline.parameters())
    assert outline.parameter_count == whole.parameter_count
    assert outline.flops(32) == whole.flops(32)


def test_one_of_each_kind_of_layer_is_left():
    shared = {"mixer": "attention", "kv": "shared"}
    spec = ModelSpec.parse(
        {
            "width": 8, "heads": 2, "depth": 14, "loops": 5, "input_size": 3, "output_size": 2,
            "layers": ["mamba2", "mamba2", "attention", shared, shared, "mamba2", {"mixer": "gla", "share": "a"}],
        }
    )  # fmt: skip
    short = one_of_each(spec)
    assert [(each.mixer, each.kv) for each in short.layers] == [
        ("mamba2", "own"), ("attention", "own"), ("attention", "shared"), ("mamba2", "own"), ("gla", "own"),
    ]  # fmt: skip
    assert (short.depth, short.loops) == (5, 2)
    assert build_model(short)(torch.randn(1, 4, 3)).shape == (1, 4, 2)
