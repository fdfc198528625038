"""Narrower MLPs against least squares and brute force on tiny layers."""

from __future__ import annotations

import itertools

import pytest
import torch

from contextlab import build_model
from contextlab.convert import Calibration, build_conversion
from contextlab.convert.channels import kept_channels, refitted
from contextlab.errors import InputError
from contextlab.testing.conversions import calibration, small_model, tokens
from tests.convert.sparse.test_by_inputs import layer


def test_what_is_left_is_the_least_squares_solution():
    weight, hidden = layer(outputs=4, inputs=7)
    stays = kept_channels(weight, hidden.T @ hidden, 4)
    expected = torch.linalg.lstsq(hidden[:, stays], hidden @ weight.T).solution.T
    torch.testing.assert_close(refitted(weight, hidden.T @ hidden, stays), expected, rtol=1e-5, atol=1e-6)


def test_one_channel_that_goes_is_the_one_that_costs_least():
    weight, hidden = layer(outputs=4, inputs=7)
    stays = kept_channels(weight, hidden.T @ hidden, 6).tolist()
    costs = {}
    for kept in itertools.combinations(range(7), 6):
        gone = [j for j in range(7) if j not in kept]
        costs[kept] = float((hidden[:, gone] @ weight[:, gone].T).norm())
    assert tuple(stays) == min(costs, key=costs.get)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu", "geglu", "relu2"])
def test_every_dense_mlp_is_narrower_and_computes_with_what_stays(mlp):
    sizes = {"input_size": 12, "output_size": 12, "read_in": "token"}
    model = build_model({"width": 16, "depth": 2, "heads": 2, "mlp": mlp, **sizes}).double()
    data = calibration()
    plain = build_conversion("channels", share=0.4, refit=False)(model, data)
    solved = build_conversion("channels", share=0.4)(model, data)
    hidden = model.blocks[0].mlp.out_proj.in_features
    left = plain.model.blocks[0].mlp.out_proj.in_features
    assert left == hidden - round(0.4 * hidden)
    assert plain.lines[0].did == f"{hidden} channels are {left}"
    assert solved.lines[0].error < plain.lines[0].error
    assert plain.model.flops(9) < model.flops(9)
    assert plain.lines[0].bytes_after / plain.lines[0].bytes_before == pytest.approx(left / hidden)
    moment = data.inputs_of(model, ["blocks.0.mlp.out_proj"])["blocks.0.mlp.out_proj"]
    stays = kept_channels(model.blocks[0].mlp.out_proj.weight, moment, left)
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    mine, theirs = model.blocks[0].mlp, plain.model.blocks[0].mlp
    with torch.no_grad():
        gone = [j for j in range(hidden) if j not in stays.tolist()]
        mine.out_proj.weight[:, gone] = 0
        torch.testing.assert_close(theirs(x), mine(x))


def test_layers_with_mlps_of_their_own_keep_them():
    layers = [{"mixer": "attention", "mlp": {"kind": "swiglu", "options": {"ratio": 3}}}, "gla"]
    sizes = {"input_size": 12, "output_size": 12, "read_in": "token"}
    model = build_model({"width": 16, "depth": 4, "heads": 2, "layers": layers, **sizes})
    made = build_conversion("channels", share=0.5)(model, calibration()).model
    assert [block.mlp.out_proj.in_features for block in made.blocks] == [16, 32, 16, 32]
    assert made.spec.pattern()[0].mlp.kind == "swiglu"


def test_what_cannot_be_narrowed_is_refused():
    sizes = {"input_size": 12, "output_size": 12, "read_in": "token"}
    for mlp, kinds in (("moe", "moe"), ("none", "none")):
        model = build_model({"width": 16, "depth": 1, "heads": 2, "mlp": mlp, **sizes})
        with pytest.raises(
            InputError, match=f"channels: cuts dense and gated MLPs such as 'gelu', the model has {kinds}"
        ):
            build_conversion("channels")(model, Calibration.of_tokens(tokens()))
    narrow = build_conversion("svd", rank=2)(small_model()).model
    with pytest.raises(InputError, match="is not stored densely; cut channels before other methods"):
        build_conversion("channels")(narrow, calibration())
