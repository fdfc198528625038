"""Low rank against NumPy, theorems and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from contextlab import build_model, load_model, save_model
from contextlab.convert import build_conversion
from contextlab.convert.base import relative_error
from contextlab.convert.layers import linear_layers
from contextlab.convert.low_rank.base import factors
from contextlab.convert.low_rank.svd import Asvd, SvdLlm
from contextlab.errors import InputError
from contextlab.testing.conversions import calibration, small_model, tokens
from tests.convert.sparse.test_by_inputs import layer


def test_svd_is_numpys():
    model = small_model()
    made = build_conversion("svd", rank=3)(model).model
    for name, dense in linear_layers(model).items():
        left, values, right = np.linalg.svd(dense.weight.detach().numpy())
        nearest = left[:, :3] * values[:3] @ right[:3]
        np.testing.assert_allclose(made.get_submodule(name).dense().detach().numpy(), nearest, atol=1e-12)


@pytest.mark.parametrize("tokens_", [40, 3])  # 3 do not fill the space of 6 inputs
@pytest.mark.parametrize("rank", [1, 2])
def test_what_svd_llm_loses_is_the_singular_values_that_are_cut(rank, tokens_):
    weight, x = layer(outputs=5, inputs=6, tokens=tokens_)
    moment = x.T @ x
    root, inverse = SvdLlm(rank=rank).root(weight, moment, None)
    torch.testing.assert_close(root @ root.T, moment)
    up, down = factors(weight, rank, root, inverse)
    lost = (x @ (weight - up @ down).T).square().sum()
    cut = torch.linalg.svdvals(x @ weight.T)[rank:].square().sum()  # of the outputs themselves: none of rank do better
    torch.testing.assert_close(lost, cut, rtol=1e-8, atol=1e-10)


def test_svd_llm_is_the_papers_where_its_cholesky_factor_is():
    weight, x = layer(outputs=5, inputs=6)
    root = torch.linalg.cholesky(x.T @ x)
    left, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
    theirs = left[:, :2] * values[:2] @ right[:2] @ torch.linalg.inv(root)
    up, down = factors(weight, 2, *SvdLlm(rank=2).root(weight, x.T @ x, None))
    torch.testing.assert_close(up @ down, theirs)


def test_asvd_scales_columns_by_mean_sizes():
    weight, x = layer(outputs=5, inputs=6)
    scale = torch.tensor([float(x[:, j].abs().mean()) ** 0.5 for j in range(6)], dtype=torch.float64)
    left, values, right = torch.linalg.svd(weight * scale)
    theirs = left[:, :2] * values[:2] @ right[:2] / scale
    up, down = factors(weight, 2, *Asvd(rank=2).root(weight, None, x.abs().mean(0)))
    torch.testing.assert_close(up @ down, theirs)
    model = small_model()
    sizes = calibration().mean_sizes_of(model, ["blocks.0.mixer.qkv_proj"])["blocks.0.mixer.qkv_proj"]
    (seen,) = (calibration().rows_of(model, ["blocks.0.mixer.qkv_proj"], 10_000).values(),)
    torch.testing.assert_close(sizes, next(iter(seen)).abs().mean(0))


def test_errors_fall_from_plain_to_whitened():
    model, data = small_model(), calibration()
    first = "blocks.0.mixer.qkv_proj"
    errors = {
        name: build_conversion(name, rank=3, layers=first)(model, data).lines[0].error
        for name in ("svd", "asvd", "svd_llm")
    }
    assert errors["svd_llm"] < min(errors["svd"], errors["asvd"])
    made = build_conversion("svd", rank=3, layers=first)(model).model
    moment = data.inputs_of(model, [first])[first]
    own = relative_error(model.get_submodule(first).weight, made.get_submodule(first).dense(), moment)
    assert own == (pytest.approx(errors["svd"]), "outputs")


def test_what_would_not_be_smaller_stays_dense():
    model = small_model()  # 16 x 16 and 16 x 48 and 16 x 32
    found = build_conversion("svd", rank=9)(model)
    told = {
        line.layer.removeprefix("blocks.0."): line.did for line in found.lines if line.layer.startswith("blocks.0.")
    }
    assert told["mixer.out_proj"] == "left dense: two factors would take no fewer numbers"
    assert told["mixer.qkv_proj"] == "rank 9 of 16"
    assert [(each.layers, each.options) for each in found.model.spec.linear] == [
        ("blocks.*.mixer.qkv_proj", {"rank": 9}),
        ("blocks.*.mlp.up", {"rank": 9}),
        ("blocks.*.mlp.out_proj", {"rank": 9}),
    ]
    narrow = build_conversion("svd", ratio=0.25)(model)
    before, after = (sum(getattr(line, part) for line in narrow.lines) for part in ("bytes_before", "bytes_after"))
    assert 0.2 < after / before <= 0.25
    assert model.weight_nbytes - narrow.model.weight_nbytes == before - after


def test_single_layers_and_biases_are_stored_and_loaded(tmp_path):
    sizes = {"input_size": 12, "output_size": 12, "read_in": "token"}
    bias = {"mixer": "attention", "options": {"bias": True}}
    model = build_model({"width": 16, "depth": 3, "heads": 2, "layers": [bias], **sizes}).double()
    with torch.no_grad():
        model.blocks[1].mixer.out_proj.bias.normal_()
    found = build_conversion("svd_llm", rank=4, layers="blocks.1.mixer.*")(model, calibration())
    assert [each.layers for each in found.model.spec.linear] == ["blocks.1.mixer.qkv_proj", "blocks.1.mixer.out_proj"]
    again = load_model(save_model(found.model, tmp_path / "small")).eval()
    assert torch.equal(again(tokens()), found.model(tokens()))
    assert torch.equal(again.blocks[1].mixer.out_proj.bias, model.blocks[1].mixer.out_proj.bias)


def test_laser_makes_one_matrix_of_small_rank_densely():
    model = small_model()
    found = build_conversion("laser", layers="blocks.2.mlp.up", keep=0.25)(model, calibration())
    assert torch.linalg.matrix_rank(found.model.blocks[2].mlp.up.weight) == 4
    assert found.model.weight_nbytes == model.weight_nbytes
    assert [line.layer for line in found.lines] == ["blocks.2.mlp.up"]
    whole = build_conversion("laser", layers="*", keep=1.0)(model).model
    torch.testing.assert_close(whole(tokens()), model(tokens()))


def test_a_narrow_layer_is_no_layer_to_be_narrowed_again():
    once = build_conversion("svd", rank=2)(small_model()).model
    with pytest.raises(InputError, match=r"layers: the 12 that '\*' names are stored as low_rank already"):
        build_conversion("svd", rank=1)(once)
    with pytest.raises(InputError, match="rank and ratio: each says how large the factors are"):
        build_conversion("svd", rank=1, ratio=0.5)
