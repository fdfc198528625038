"""Each form against its formula, written naively, and its bytes against the table of docs/linear-forms.md."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import contextlab.mixers  # noqa: F401  (registers every form)
from contextlab import registry
from contextlab.errors import InputError
from contextlab.mixers.forms import RoundedForm, build_form
from contextlab.mixers.forms.floats import Float4, Float8, MicroscalingFloat4, NvFloat4
from contextlab.mixers.forms.integer import Integers
from contextlab.mixers.forms.low_rank import LowRank
from contextlab.mixers.forms.ternary import Binary, Ternary
from contextlab.mixers.layers import TernaryLinear, is_plain, multiplications
from contextlab.ops.int8 import int8_dense
from contextlab.ops.rounding import E2M1


def drawn(outputs: int, inputs: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(outputs, inputs, dtype=dtype, generator=torch.Generator().manual_seed(inputs))


def nearest_integers(row: list[float], bits: int, zero: bool) -> list[float]:
    """One group, number by number."""
    if zero:
        least, step = min(row), (max(row) - min(row)) / (2**bits - 1)
        return [least + step * round((x - least) / step) for x in row]
    step = max(row, key=abs) / -(2 ** (bits - 1))
    return [step * min(max(round(x / step), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) for x in row]


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [None, 5, 64])
def test_integers_are_those_of_the_formula(bits: int, group: int | None, zero: bool) -> None:
    weight = drawn(3, 13)
    form = Integers.of(weight, bits=bits, group=group, zero=zero)
    size = 13 if group is None else group
    wanted = [
        [value for at in range(0, 13, size) for value in nearest_integers(row[at : at + size], bits, zero)]
        for row in weight.tolist()
    ]
    torch.testing.assert_close(form.dense(), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12)
    if not zero:
        torch.testing.assert_close(
            Integers.of(form.dense(), bits=bits, group=group).dense(), form.dense(), rtol=0, atol=0
        )


def test_two_4_bit_numbers_are_one_byte() -> None:
    form = Integers.of(drawn(6, 64, torch.float32), bits=4)
    assert form.codes.dtype == torch.uint8
    assert form.codes.shape == (6, 32)
    assert len(form.codes.unique()) > 16  # both halves are used


def naive_floats(row: list[float], scale: float) -> list[float]:
    """The nearest 4-bit floats; of two equally near the one with the even code."""
    found = []
    for x in row:
        near = min(range(8), key=lambda code: (abs(min(abs(x) / scale, 6.0) - E2M1[code]), code % 2))
        found.append(math.copysign(E2M1[near] * scale, x))
    return found


def test_4_bit_floats_are_those_of_the_formula() -> None:
    weight = drawn(3, 40)
    rows = weight.tolist()
    wanted = [naive_floats(row, max(map(abs, row)) / 6) for row in rows]
    torch.testing.assert_close(Float4.of(weight).dense(), torch.tensor(wanted, dtype=torch.float64))
    blocks = [[row[:32], row[32:]] for row in rows]
    wanted = [
        [v for block in row for v in naive_floats(block, 2.0 ** (math.floor(math.log2(max(map(abs, block)))) - 2))]
        for row in blocks
    ]
    found = MicroscalingFloat4.of(weight)
    torch.testing.assert_close(found.dense(), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=0)
    largest = max(abs(x) for row in rows for x in row) / (6 * 448)

    def block_scale(block: list[float]) -> float:
        wanted = torch.tensor(max(map(abs, block)) / 6 / largest, dtype=torch.float32)
        return float(wanted.to(torch.float8_e4m3fn).to(torch.float32)) * largest

    blocks = [[row[i : i + 16] for i in range(0, 40, 16)] for row in rows]
    wanted = [[v for block in row for v in naive_floats(block, block_scale(block))] for row in blocks]
    torch.testing.assert_close(NvFloat4.of(weight).dense(), torch.tensor(wanted, dtype=torch.float64))


def test_8_bit_floats_are_those_of_pytorch() -> None:
    weight = drawn(3, 40, torch.float32)
    scale = weight.abs().amax(1, keepdim=True) / 448
    wanted = (weight / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(Float8.of(weight).dense(), wanted, rtol=0, atol=0)
    assert Float8.of(weight * 1e-30).dense().isfinite().all()


def test_ternary_is_bitnets_and_the_mixers_own_layer() -> None:
    weight = drawn(4, 12, torch.float32)
    scale = weight.abs().mean()
    torch.testing.assert_close(Ternary.of(weight).dense(), (weight / scale).round().clamp(-1, 1) * scale)
    layer = TernaryLinear(12, 4)
    form = Ternary.of(layer.weight.detach(), activations=8)
    x = torch.randn(3, 12)
    torch.testing.assert_close(form(torch.nn.functional.rms_norm(x, (12,), eps=1e-6)), layer(x))


def test_binary_has_the_scale_of_least_error() -> None:
    weight = drawn(4, 12)
    form = Binary.of(weight)
    error = (form.dense() - weight).norm(dim=1)
    for factor in (0.99, 1.01):
        assert (error < (form.dense() * factor - weight).norm(dim=1)).all()


def test_low_rank_is_the_truncated_svd_and_of_full_rank_the_weight() -> None:
    weight = drawn(6, 9)
    torch.testing.assert_close(LowRank.of(weight, rank=6).dense(), weight, rtol=0, atol=1e-12)
    assert LowRank.of(weight, rank=100).rank == 6
    sizes = torch.linalg.svdvals(weight)
    error = (LowRank.of(weight, rank=2).dense() - weight).norm()
    torch.testing.assert_close(error, sizes[2:].norm())
    assert multiplications(LowRank.of(weight, rank=2)) == 2 * (6 + 9)


@pytest.mark.parametrize("name", ["int", "fp8", "fp4", "mxfp4", "nvfp4"])
def test_random_rounding_is_right_on_average_and_the_same_for_the_same_weight(name: str) -> None:
    options = {"bits": 4} if name == "int" else {}
    one = drawn(1, 16, torch.float32)
    weight = one.expand(4000, 16).clone()
    weight[:, 0] = 3.0  # so that all rows have one scale
    form = registry.lookup("linear", name).factory.of(weight, latent=True, rounding="stochastic", **options)
    form.train()
    rounded = form.dense().detach()
    assert torch.equal(rounded, form.dense().detach())
    assert not torch.equal(rounded[0], rounded[1])
    step = (rounded.amax(0) - rounded.amin(0)).clamp_min(1e-9)
    inside = weight[0].abs() < 2.9  # the largest may be cut off
    away = ((rounded.mean(0) - weight[0]).abs() / step)[inside]
    assert away.max() < 5 * 0.5 / math.sqrt(4000)
    form.eval()
    assert torch.equal(form.dense()[0], form.dense()[1])
    other = type(form).of(weight, latent=True, rounding="stochastic", seed=1, **options).train()
    assert not torch.equal(other.dense(), rounded)


BYTES = [
    ("low_rank", {"rank": 3}, (10 + 23) * 3 * 4),
    ("sparse", {"kept": 100}, 100 * 4 + 10 * 3),
    ("int", {}, 10 * 23 + 10 * 4),
    ("int", {"bits": 4, "group": 5}, 10 * 12 + 10 * 5 * 4),
    ("int", {"bits": 2, "group": None, "zero": True}, 10 * 6 + 10 * 2 * 4),
    ("ternary", {}, 10 * 5 + 4),
    ("binary", {}, 10 * 3 + 10 * 4),
    ("fp8", {}, 10 * 23 + 10 * 4),
    ("fp4", {}, 10 * 12 + 10 * 4),
    ("mxfp4", {}, 10 * 12 + 10),
    ("nvfp4", {}, 10 * 12 + 10 * 2 + 4),
    ("int", {"latent": True}, 10 * 23 * 4),
    ("rotated", {"form": "int"}, 10 * 23 + 10 * 4 + 3),
    ("scaled", {"form": "binary"}, 10 * 3 + 10 * 4 + 23 * 4),
    ("outliers", {"share": 0.1, "form": "fp8"}, 10 * 23 + 10 * 4 + 2 * 4 + 2 * 10 * 4),
    ("adapted", {"rank": 2, "form": "fp8"}, 10 * 23 + 10 * 4 + 2 * (23 + 10) * 4),
]


@pytest.mark.parametrize(("name", "options", "due"), BYTES)
def test_bytes_are_those_of_the_formula(name: str, options: dict, due: int) -> None:
    assert registry.lookup("linear", name).factory.nbytes(23, 10, True, **options) == due + 10 * 4


def test_every_form_has_its_bytes_in_the_table_above() -> None:
    assert {name for name, _, _ in BYTES} == {
        e.name for e in registry.entries("linear") if e.factory.__module__.startswith("contextlab.")
    }


ROUNDED = [each for each in BYTES if issubclass(registry.lookup("linear", each[0]).factory, RoundedForm)]


@pytest.mark.parametrize(("name", "options", "due"), ROUNDED)
def test_rows_made_dense_one_after_another_are_those_of_the_whole(name: str, options: dict, due: int) -> None:
    form = registry.lookup("linear", name).factory.of(drawn(10, 23), drawn(1, 10)[0], **options)
    x = drawn(3, 23)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        whole = form(x)
        patch.setattr("contextlab.mixers.forms.base.AT_ONCE", 4 * 23)
        calls: list[int] = []
        rows = type(form).rows
        patch.setattr(type(form), "rows", lambda *given: calls.append(1) or rows(*given))
        torch.testing.assert_close(form(x), whole)
    assert len(calls) == (0 if options.get("latent") else 3)


@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_few_tokens_in_bfloat16_take_the_int8_kernel_and_answer_as_the_dense_weight(tokens: int) -> None:
    form = Integers.of(drawn(32, 64, torch.float32), torch.ones(32), group=None).bfloat16()
    x = drawn(tokens, 64, torch.float32).bfloat16()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        calls: list[int] = []
        patch.setattr(
            "contextlab.mixers.forms.integer.int8_dense", lambda *given: calls.append(1) or int8_dense(*given)
        )
        y = form(x)
    wanted = x.float() @ form.dense().float().T + 1
    assert len(calls) == (tokens <= 8)
    assert y.dtype == torch.bfloat16
    assert (y.float() - wanted).norm() < 0.005 * wanted.norm()
    assert form(x[:0]).shape == (0, 32)
    assert form(x.requires_grad_()).requires_grad


def test_activations_of_8_bits_have_a_scale_for_each_token() -> None:
    weight, x = drawn(6, 23), drawn(4, 23) * torch.tensor([[1.0], [100.0], [1e-3], [1.0]])
    form = Integers.of(weight, activations=8)
    step = x.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(form(x), (x / step).round() * step @ form.dense().T)


def test_a_form_is_not_plain_and_is_no_linear_layer() -> None:
    form = build_form("int", inputs=4, outputs=6)
    assert not is_plain(form)
    assert not isinstance(form, torch.nn.Linear)
    assert "4, 6, bias=False" in repr(form)


def test_bad_options_are_told_in_one_line() -> None:
    with pytest.raises(InputError, match="unknown linear 'int4'; did you mean 'int'"):
        build_form("int4", inputs=4, outputs=6)
    with pytest.raises(InputError, match=r"bits: input should be 2, 4 or 8, got int 3"):
        build_form("int", inputs=4, outputs=6, bits=3)
    with pytest.raises(InputError, match="rank: linear 'low_rank' requires it"):
        build_form("low_rank", inputs=4, outputs=6)


def test_blocks_of_4_bit_floats_are_those_of_torchao() -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    weight = drawn(64, 96, torch.float32) * torch.linspace(0.01, 3, 64)[:, None]
    theirs = mx.MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32)
    assert torch.equal(theirs.dequantize(torch.float32), MicroscalingFloat4.of(weight).dense())
    everywhere = nv.per_tensor_amax_to_scale(weight.abs().max())
    theirs = nv.NVFP4Tensor.to_nvfp4(weight, 16, per_tensor_scale=everywhere)
    assert torch.equal(theirs.dequantize(torch.float32), NvFloat4.of(weight).dense())
