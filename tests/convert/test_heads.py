"""Fewer heads: which go, by brute force; what is left computes what the old layer does without them."""

from __future__ import annotations

import pytest
import torch

from contextlab import build_model
from contextlab.convert import build_conversion
from contextlab.convert.heads import kept_groups
from contextlab.errors import InputError
from contextlab.testing.conversions import calibration, small_model, tokens
from tests.convert.sparse.test_by_inputs import layer

SIZES = {"width": 16, "depth": 2, "heads": 4, "input_size": 12, "output_size": 12, "read_in": "token"}


def test_the_head_that_goes_is_the_one_that_adds_least():
    weight, x = layer(outputs=5, inputs=6)
    added = [float((x[:, 2 * g : 2 * g + 2] @ weight[:, 2 * g : 2 * g + 2].T).norm()) for g in range(3)]
    expected = sorted(sorted(range(3), key=added.__getitem__)[1:])
    assert kept_groups(weight, x.T @ x, 2, 2).tolist() == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 2},
        {"kv_heads": 2, "head_dim": 6, "bias": True, "qk_norm": True},
        {"output_gate": True, "short_conv": 3, "position": "none"},
    ],
)
def test_what_is_left_is_the_layer_without_the_heads(options):
    model = build_model({**SIZES, "layers": [{"mixer": "attention", "options": options}]}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    data = calibration()
    plain = build_conversion("heads", share=0.5, refit=False)(model, data)
    solved = build_conversion("heads", share=0.5)(model, data)
    assert solved.lines[0].error < plain.lines[0].error
    old, new = model.blocks[0].mixer, plain.model.blocks[0].mixer
    assert (new.heads, new.kv_heads, new.head_dim) == (2, old.kv_heads // 2, old.head_dim)
    assert plain.lines[0].did == f"{old.kv_heads} key heads are {new.kv_heads}"
    assert plain.model.state_nbytes(9) < model.state_nbytes(9)
    name = "blocks.0.mixer.out_proj"
    per = old.out_proj.in_features // old.kv_heads
    stays = kept_groups(old.out_proj.weight, data.inputs_of(model, [name])[name], per, new.kv_heads).tolist()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        for group in set(range(old.kv_heads)) - set(stays):
            old.out_proj.weight[:, group * per : (group + 1) * per] = 0
        torch.testing.assert_close(new(x)[0], old(x)[0])


def test_layers_that_cannot_lose_heads_keep_them_or_are_told():
    layers = ["attention", "gla", {"mixer": "attention", "options": {"kv_heads": 1}}]
    model = build_model({**SIZES, "depth": 3, "layers": layers}).double()
    found = build_conversion("heads", share=0.5)(model, calibration())
    assert [line.layer for line in found.lines] == ["blocks.0.mixer"]
    assert found.model(tokens()).isfinite().all()
    for spec in ({"layers": ["gla"]}, {"layers": ["attention"], "position": "alibi"}):
        with pytest.raises(InputError, match="heads: no layer of mixer 'attention' with several key heads"):
            build_conversion("heads").plan(build_model({**SIZES, **spec}).spec)
    narrow = build_conversion("svd", rank=2)(small_model()).model
    with pytest.raises(InputError, match=r"heads: blocks\.0\.mixer is not stored densely"):
        build_conversion("heads", share=0.5)(narrow, calibration())
