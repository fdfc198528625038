"""Conversions to fewer bits: against their formulas and each other, on layers and on a small model."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from contextlab import registry
from contextlab.convert import build_conversion, shrink
from contextlab.convert.base import relative_error
from contextlab.convert.bits.gptq import round_with_feedback
from contextlab.errors import InputError
from contextlab.mixers.forms.integer import Integers
from contextlab.mixers.forms.wrapped import Outliers, Rotated, Scaled
from contextlab.models import build_model, linear_layers, pack_forms
from contextlab.testing.conversions import calibration, small_model


def layer(outputs: int = 6, inputs: int = 24, seed: int = 0, rows: int = 200) -> tuple[Tensor, Tensor]:
    """A weight, and inputs [rows, inputs] that are alike with a few that are large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    x = x + 0.7 * x.roll(1, 1)
    x[:, 3] *= 12
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), x


def naive(weight: Tensor, hessian: Tensor, bits: int) -> Tensor:
    """GPTQ with a scale for each output, by one inverse for each column (2210.17323, eq. 2 and 3)."""
    scale = Integers.of(weight, bits=bits, group=None).scale
    found, half = weight.clone(), 2 ** (bits - 1)
    for place in range(weight.shape[1]):
        inverse = hessian[place:, place:].inverse()
        value = (found[:, place] / scale[:, 0]).round().clamp(-half, half - 1) * scale[:, 0]
        change = (found[:, place] - value) / inverse[0, 0]
        found[:, place:] -= change[:, None] * inverse[0]
        found[:, place] = value
    return found


@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_is_the_recursion_column_by_column(bits: int) -> None:
    weight, x = layer()
    moment = x.T @ x
    form = Integers.of(weight, bits=bits, group=None)
    round_with_feedback(form, weight, moment, "natural", 1e-12)
    torch.testing.assert_close(form.dense(), naive(weight, moment, bits), rtol=0, atol=1e-6)


def test_gptq_is_no_better_than_the_best_of_all_roundings_of_a_row_and_near_it() -> None:
    ours, best, nearest = 0.0, 0.0, 0.0
    for seed in range(25):
        weight, x = layer(1, 4, seed)
        moment = x.T @ x
        form = Integers.of(weight, bits=2, group=None)
        scale = form.scale.item()
        every = torch.tensor(list(itertools.product(range(-2, 2), repeat=4)), dtype=torch.float64) * scale
        errors = [relative_error(weight, row[None], moment)[0] for row in every]
        nearest += relative_error(weight, form.dense(), moment)[0]
        round_with_feedback(form, weight, moment, "activations", 1e-9)
        got = relative_error(weight, form.dense(), moment)[0]
        assert got >= min(errors) - 1e-9
        ours, best = ours + got, best + min(errors)
    assert best < ours < nearest


@pytest.mark.parametrize("order", ["natural", "activations"])
@pytest.mark.parametrize("group", [None, 8, 200])
@pytest.mark.parametrize("zero", [False, True])
def test_gptq_loses_less_than_the_nearest_for_all_groups(group: int | None, zero: bool, order: str) -> None:
    weight, x = layer(12, 150)
    moment = x.T @ x
    form = Integers.of(weight, bits=2, group=group, zero=zero)
    before, _ = relative_error(weight, form.dense(), moment)
    round_with_feedback(form, weight, moment, order, 0.01)
    assert relative_error(weight, form.dense(), moment)[0] < 0.8 * before


def test_a_rotation_alone_changes_nothing_and_spreads_what_is_large() -> None:
    weight, x = layer(5, 23)
    exact = Rotated.of(weight, form="low_rank", options={"rank": 5})
    torch.testing.assert_close(exact.dense(), weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(exact(x), x @ weight.T, rtol=0, atol=1e-9)
    assert not torch.allclose(Rotated.of(weight, seed=1).inner.dense(), Rotated.of(weight).inner.dense())
    weight, _ = layer(16, 64)
    weight[:, 5] *= 20
    forms = Integers.of(weight, bits=4), Rotated.of(weight, options={"bits": 4})
    errors = [(form.dense() - weight).norm() for form in forms]
    assert errors[1] < 0.75 * errors[0]


def test_awq_scales_what_meets_large_inputs_and_is_never_worse_than_the_nearest() -> None:
    model, data = small_model(), calibration()
    awq, rtn = (build_conversion(name, bits=2, group=8)(model, data) for name in ("awq", "rtn"))
    first = [line for line in awq.lines if line.layer.startswith("blocks.0.mixer.qkv")]
    assert first[0].error <= next(line.error for line in rtn.lines if line.layer == first[0].layer)
    weight, x = layer(16, 24)
    form = Scaled.of(weight, options={"bits": 2, "group": None})
    before, _ = relative_error(weight, form.dense(), x.T @ x)
    build_conversion("awq", bits=2, group=None).fill(form, weight, x.T @ x)
    after, _ = relative_error(weight, form.dense(), x.T @ x)
    assert after < 0.8 * before
    assert form.scale.argmax() == 3
    torch.testing.assert_close(form(x), x @ form.dense().T)


def test_outliers_keep_the_columns_of_large_inputs_exactly() -> None:
    weight, x = layer(8, 24)
    for zero in (False, True):
        options = {"bits": 2, "group": 8, "zero": zero}
        form = Outliers.of(weight, share=0.1, options=options)
        build_conversion("outliers", share=0.1, **options).fill(form, weight, x.T @ x)
        assert form.columns.tolist()[0] == 3
        torch.testing.assert_close(form.dense()[:, form.columns], weight[:, form.columns])
        torch.testing.assert_close(form(x), x @ form.dense().T)
    assert form.kept.shape == (8, 2)


def test_rounding_to_the_nearest_is_that_of_the_forms() -> None:
    model = small_model("gated_delta_net")
    made = build_conversion("rtn", to="nvfp4")(model).model
    for name, each in linear_layers(model).items():
        wanted = registry.lookup("linear", "nvfp4").factory.of(each.weight.detach())
        assert torch.equal(made.get_submodule(name).dense(), wanted.dense())


def test_bytes_are_told_and_fall() -> None:
    model = build_model("mamba2", width=64, depth=1, read_in="token", input_size=9, output_size=9)
    converted = build_conversion("rtn", bits=4, group=32)(model)
    saved = sum(line.bytes_before - line.bytes_after for line in converted.lines)
    assert model.weight_nbytes - converted.model.weight_nbytes == saved
    assert all(line.did == "int, 5 bits a weight" for line in converted.lines if line.layer.endswith("in_proj"))


def test_layers_after_another_conversion_are_left_as_they_are() -> None:
    model = small_model()
    once = build_conversion("rtn", to="ternary", layers="*.mlp.*")(model).model
    twice = build_conversion("rtn", bits=8)(once).model
    assert [each.form for each in twice.spec.linear] == ["ternary", "int"]
    assert type(twice.blocks[0].mlp.up).__name__ == "Ternary"
    assert type(twice.blocks[0].mixer.qkv_proj).__name__ == "Integers"
    with pytest.raises(InputError, match="layers: the 12 that '\\*' names are stored as int, ternary already"):
        build_conversion("rtn")(twice)


@pytest.mark.parametrize("method", ["rtn:bits=8", "magnitude", "magnitude:packed=true", "svd:rank=2", "laser:layers=*"])
def test_a_line_says_which_layers_are_passed_over(method: str) -> None:
    found = shrink(small_model(), ["rtn:bits=4,layers=blocks.0.*", method])
    over = [line for line in found.steps[1].lines if line.did == "left as it is: int already"]
    assert [line.layer for line in over] == [line.layer for line in found.steps[0].lines]
    assert all(line.error == 0 and line.bytes_before == line.bytes_after for line in over)
    assert len(found.steps[1].lines) == 12


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(InputError, match="bits: of whole numbers only; leave it out for nvfp4"):
        build_conversion("rtn", to="nvfp4", bits=8)
    with pytest.raises(InputError, match="gptq: needs data to calibrate on"):
        build_conversion("gptq")(small_model())
    with pytest.raises(InputError, match="options.bits: input should be 2, 4 or 8, got int 3"):
        build_model("transformer", input_size=3, output_size=3,
                    linear=[{"layers": "*", "form": "rotated", "options": {"options": {"bits": 3}}}])  # fmt: skip


def test_latent_weights_within_a_form_are_packed() -> None:
    inner = {"form": "int", "options": {"bits": 4, "latent": True}}
    model = build_model("transformer", width=16, depth=1, read_in="token", input_size=9, output_size=9,
                        linear=[{"layers": "*", "form": "rotated", "options": inner}])  # fmt: skip
    packed = pack_forms(model)
    tokens = torch.arange(9)[None]
    torch.testing.assert_close(packed(tokens), model(tokens))
    assert packed.weight_nbytes < model.weight_nbytes
    assert packed.spec.linear[0].options == {"form": "int", "options": {"bits": 4}}


def test_latent_weights_are_healed_and_packed() -> None:
    model = small_model()
    latent = build_conversion("rotate", bits=2, group=8, latent=True)(model).model
    assert latent.weight_nbytes >= model.weight_nbytes
    packed = build_conversion("pack")(latent)
    plain = build_conversion("rotate", bits=2, group=8)(model).model
    assert packed.model.spec == plain.spec == build_conversion("pack").plan(latent.spec)
    x = torch.arange(12)[None]
    torch.testing.assert_close(packed.model(x), plain(x))
    torch.testing.assert_close(packed.model(x), latent(x))
    assert sum(line.bytes_before - line.bytes_after for line in packed.lines) > 0
    with pytest.raises(InputError, match="pack: no linear layer of the model has a latent weight"):
        build_conversion("pack")(plain)
