"""Magnitude pruning against PyTorch's own pruning and sparsifier."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from contextlab import build_model
from contextlab.convert import build_conversion
from contextlab.convert.layers import linear_layers
from contextlab.convert.sparse.masks import largest
from contextlab.errors import InputError
from contextlab.testing.conversions import calibration, small_model


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
def test_a_share_of_each_layer_is_what_pytorch_prunes(share):
    model = small_model()
    made = build_conversion("magnitude", share=share)(model).model
    for name, layer in linear_layers(model).items():
        theirs = nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64)
        theirs.weight = nn.Parameter(layer.weight.detach().clone())
        prune.l1_unstructured(theirs, "weight", amount=share)
        assert torch.equal(made.get_submodule(name).weight, theirs.weight), name


def test_two_of_four_is_what_pytorchs_sparsifier_keeps():
    sparsifier = pytest.importorskip("torch.ao.pruning").WeightNormSparsifier(1.0, (1, 4), 2)
    model = small_model()
    made = build_conversion("magnitude", pattern="2:4")(model).model
    theirs = nn.Sequential(model.blocks[0].mlp.up)
    sparsifier.prepare(theirs, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    assert torch.equal(made.blocks[0].mlp.up.weight, theirs[0].weight)


def test_each_row_loses_its_share():
    made = build_conversion("magnitude", share=0.25, scope="row")(small_model()).model
    for layer in linear_layers(made).values():
        assert ((layer.weight == 0).sum(1) == round(0.25 * layer.in_features)).all()


def test_equal_scores_lose_no_more_than_the_share():
    assert largest(torch.zeros(3, 4), 0.5).sum() == 6


def test_lines_tell_zeros_and_errors():
    model, data = small_model(), calibration()
    for given, of in ((None, "weights"), (data, "outputs")):
        lines = build_conversion("magnitude", share=0.5)(model, given).lines
        assert [line.layer for line in lines] == list(linear_layers(model))
        assert {line.of for line in lines} == {of}
        assert all(line.did == "0.5 of the weights are zero" and 0 < line.error < 1 for line in lines)


def test_layers_are_chosen_by_name():
    model = small_model()
    made = build_conversion("magnitude", layers="blocks.1.*")(model)
    assert {line.layer.split(".")[1] for line in made.lines} == {"1"}
    assert torch.equal(made.model.blocks[0].mlp.up.weight, model.blocks[0].mlp.up.weight)
    with pytest.raises(InputError, match=r"layers: no linear layer is called 'blocks\.0\.mlp\.upp'; did you mean 'bl"):
        build_conversion("magnitude", layers="blocks.0.mlp.upp")(model)


def test_layers_that_a_pattern_does_not_fit_stay_dense():
    model = build_model({"width": 10, "depth": 1, "heads": 1, "mlp_ratio": 1.6, "input_size": 3, "output_size": 1})
    lines = build_conversion("magnitude", pattern="2:4")(model).lines
    told = {line.layer.removeprefix("blocks.0."): line.did for line in lines}
    assert told["mixer.qkv_proj"] == "left dense: 10 inputs are no multiple of 4"
    assert told["mlp.out_proj"] == "0.5 of the weights are zero"
    with pytest.raises(InputError, match=r"7 divides the inputs of no layer \(10, 16\); the nearest pattern is 3:8"):
        build_conversion("magnitude", pattern="3:7").plan(model.spec)


@pytest.mark.parametrize("options", [{}, {"pattern": "1:4"}, {"share": 0.3, "scope": "row"}])
def test_packed_it_answers_the_same_in_fewer_bytes(options):
    model = small_model()
    plain, packed = (build_conversion("magnitude", packed=each, **options)(model) for each in (False, True))
    for name, layer in linear_layers(plain.model).items():
        form = packed.model.get_submodule(name)
        assert torch.equal(form.dense(), layer.weight), name
        assert form.kept == int((layer.weight != 0).sum())
    for before, after in zip(plain.lines, packed.lines, strict=True):
        assert after.did == f"{before.did}, packed"
        assert after.error == before.error
    saved = sum(line.bytes_before - line.bytes_after for line in packed.lines)
    assert model.weight_nbytes - packed.model.weight_nbytes == saved > 0
    assert len(packed.model.spec.linear) == 4, "a pattern for each layer of a block"


def test_what_packing_would_make_no_smaller_is_stored_as_it_is():
    found = build_conversion("magnitude", share=0.01, packed=True)(small_model())
    assert found.model.spec.linear == ()
    assert not any("packed" in line.did for line in found.lines)
