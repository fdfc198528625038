"""Wanda and SparseGPT against the formulas by loops, and against brute force on tiny layers."""

from __future__ import annotations

import itertools

import pytest
import torch

from contextlab.convert import build_conversion
from contextlab.convert.sparse.sparsegpt import SparseGpt
from contextlab.convert.sparse.wanda import Wanda
from contextlab.errors import InputError
from contextlab.testing.conversions import calibration, small_model


def layer(outputs=3, inputs=6, tokens=40, seed=0):
    """A weight and inputs [N, I] that are correlated and of unlike sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight, x, mix = (
        torch.randn(*size, generator=generator, dtype=torch.float64)
        for size in ((outputs, inputs), (tokens, inputs), (inputs, inputs))
    )
    return weight, x @ (mix + torch.eye(inputs)) * torch.arange(1, inputs + 1)


def lost(weight, other, x):
    return float((x @ (weight - other).T).square().sum())


@pytest.mark.parametrize("share", [0.0, 1 / 3, 0.5])
def test_wanda_takes_the_smallest_of_each_row(share):
    weight, x = layer()
    got = Wanda(share=share).thinned(weight, x.T @ x)
    for row, new in zip(weight, got, strict=True):
        scores = [abs(float(row[j])) * float(x[:, j].norm()) for j in range(6)]
        gone = sorted(range(6), key=scores.__getitem__)[: round(share * 6)]
        assert new.tolist() == [0.0 if j in gone else float(row[j]) for j in range(6)]


def test_wanda_keeps_the_best_of_neighbours():
    weight, x = layer()
    got = Wanda(pattern="1:3").thinned(weight, x.T @ x)
    for row, new in zip(weight, got, strict=True):
        for first in (0, 3):
            scores = [abs(float(row[j])) * float(x[:, j].norm()) for j in range(first, first + 3)]
            best = first + scores.index(max(scores))
            assert new[first : first + 3].nonzero().flatten().tolist() == [best - first]


def test_wanda_is_brute_force_where_inputs_are_uncorrelated():
    """Then the loss is the sum of the squared scores, so that of all choices of a row none is better."""
    weight, x = layer(outputs=2, inputs=5)
    x = torch.linalg.qr(x).Q * torch.arange(1, 6)
    got = Wanda(share=0.4).thinned(weight, x.T @ x)
    for row, new in zip(weight, got, strict=True):
        choices = []
        for gone in itertools.combinations(range(5), 2):
            other = row.clone()
            other[list(gone)] = 0
            choices.append(lost(row[None], other[None], x))
        assert lost(row[None], new[None], x) == pytest.approx(min(choices))


def naive_sparsegpt(weight, x, share, damping):
    """Optimal brain surgery, a weight after the other in order: remove, then solve for those that are still free."""
    moment = x.T @ x
    moment = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    inverse = [torch.linalg.inv(moment[j:, j:]) for j in range(len(moment))]  # with the columns before j fixed
    costs = torch.stack([weight[:, j].square() / inverse[j][0, 0] for j in range(len(moment))], 1)
    order = costs.flatten().argsort()[: round(share * weight.numel())]
    gone = torch.zeros(weight.numel(), dtype=torch.bool)
    gone[order] = True
    gone = gone.view_as(weight)
    made = weight.clone()
    for j in range(len(moment)):
        for row in range(len(weight)):
            if gone[row, j]:
                made[row, j:] -= made[row, j] / inverse[j][0, 0] * inverse[j][0]
                made[row, j] = 0.0
    return made, gone


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_sparsegpt_is_optimal_brain_surgery_in_order(share):
    weight, x = layer(outputs=4, inputs=8)
    got = SparseGpt(share=share).thinned(weight, x.T @ x)
    expected, gone = naive_sparsegpt(weight, x, share, 0.01)
    torch.testing.assert_close(got, expected)
    assert ((got == 0) == gone).all()


def test_what_stays_makes_up_for_what_goes():
    """The first column gone everywhere: the others are the least squares solution, found by another way."""
    weight, x = layer(outputs=2, inputs=5)
    weight[:, 0] *= 1e-6  # so that it is what goes
    got = SparseGpt(share=0.2, damping=1e-12).thinned(weight, x.T @ x)
    expected = torch.linalg.lstsq(x[:, 1:], x @ weight.T).solution.T
    torch.testing.assert_close(got[:, 1:], expected, rtol=1e-6, atol=1e-9)
    assert (got[:, 0] == 0).all()


def test_sparsegpt_keeps_a_pattern_and_loses_less_than_wanda():
    weight, x = layer(outputs=6, inputs=16, tokens=200)
    for options in ({"pattern": "2:4"}, {"share": 0.5}):
        made = {name: build_conversion(name, **options).thinned(weight, x.T @ x) for name in ("sparsegpt", "wanda")}
        losses = {name: lost(weight, each, x) for name, each in made.items()}
        assert losses["sparsegpt"] < losses["wanda"]
        assert float((made["sparsegpt"] == 0).float().mean()) == 0.5
    assert ((made["wanda"] == 0).sum(1) == 8).all()
    by_pattern = SparseGpt(pattern="2:4").thinned(weight, x.T @ x)
    assert ((by_pattern == 0).unflatten(1, (-1, 4)).sum(2) == 2).all()


def test_blocks_are_calibrated_by_the_thinned_ones_before_them():
    model, data = small_model(), calibration()
    whole = build_conversion("wanda")(model, data).model
    first = build_conversion("wanda", layers="blocks.0.*")(model, data).model
    second = build_conversion("wanda", layers="blocks.1.*")(first, data).model
    assert torch.equal(second.blocks[1].mlp.up.weight, whole.blocks[1].mlp.up.weight)
    with pytest.raises(InputError, match="wanda: needs data to calibrate on; give a task or text"):
        build_conversion("wanda")(model)
