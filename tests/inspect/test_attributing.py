"""Attribution of answers to tokens: against captum, against what can be counted out, and sums that must hold."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from contextlab import ModelSpec, build_model
from contextlab.errors import InputError
from contextlab.inspect.attributing import METHODS, Curves, ask, attributions
from contextlab.models.within import Within

NAMES = ("attention", "gated_delta_net", "mamba2", "lstm")


def model_of(name):
    spec = ModelSpec(width=8, depth=2, heads=2, layers=[name], read_in="token", input_size=5, output_size=5)
    return build_model(spec).double().eval()


def tokens_of(batch=3, length=6):
    return torch.randint(0, 5, (batch, length), generator=torch.Generator().manual_seed(1))


PLACES = torch.tensor([5, 3, 4])


def answered(model, tokens, vectors, places=PLACES):
    """The logit of what the model finds likeliest, less the mean, by another way into the model."""
    at = torch.arange(len(tokens))
    with torch.no_grad():
        best = model(tokens)[at, places].argmax(-1)
    logits = model(tokens, within=Within(embedded=vectors))[at, places]
    return logits[at, best] - logits.mean(-1)


@pytest.mark.parametrize("name", NAMES)
def test_integrated_gradients_are_captums_and_sum_to_what_the_text_adds(name):
    model, tokens = model_of(name), tokens_of()
    asked = ask(model, tokens, PLACES)
    found = attributions(model, asked, "integrated", steps=40)
    whole = answered(model, tokens, asked.embedded) - answered(model, tokens, asked.nothing.expand(3, 6, -1))
    fine = found if name != "gated_delta_net" else attributions(model, asked, "integrated", steps=1280)  # keys turn
    torch.testing.assert_close(fine.sum(-1), whole, rtol=1e-4, atol=1e-5)
    attr = pytest.importorskip("captum.attr")
    ours = attr.IntegratedGradients(
        lambda v: answered(model, tokens.repeat(len(v) // 3, 1), v, PLACES.repeat(len(v) // 3))
    )
    theirs = ours.attribute(
        asked.embedded, asked.nothing.expand_as(asked.embedded), method="gausslegendre", n_steps=40
    ).sum(-1)
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_slopes_and_tokens_are_left_out_one_by_one(name):
    model, tokens = model_of(name), tokens_of()
    asked = ask(model, tokens, PLACES)
    way = asked.embedded - asked.nothing
    slopes, left_out = attributions(model, asked, "gradient"), attributions(model, asked, "left_out")
    with torch.no_grad():
        whole = answered(model, tokens, asked.embedded)
        for j in range(6):
            only = (torch.arange(6) == j)[:, None] * way
            near = (
                answered(model, tokens, asked.embedded + 1e-5 * only),
                answered(model, tokens, asked.embedded - 1e-5 * only),
            )
            torch.testing.assert_close(slopes[:, j], (near[0] - near[1]) / 2e-5, rtol=1e-5, atol=1e-8)
            lost = whole - answered(model, tokens, asked.embedded - only)
            torch.testing.assert_close(left_out[:, j], lost, rtol=1e-9, atol=1e-9)
    behind = torch.arange(6) > PLACES[:, None]
    assert (left_out[behind].abs() < 1e-12).all()


def test_of_a_linear_model_all_methods_agree():
    spec = ModelSpec(
        width=6, depth=2, heads=2, layers=["token_shift"], mlp="none", norm="none", input_size=3, output_size=2
    )
    model = build_model(spec).double()
    asked = ask(model, torch.randn(2, 7, 3, dtype=torch.float64), torch.tensor([6, 4]))
    found = [attributions(model, asked, method) for method in METHODS]
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-9, atol=1e-9)


def test_areas_are_those_of_curves_that_are_read_point_by_point():
    model, tokens = model_of("attention"), tokens_of()
    asked = ask(model, tokens, PLACES)
    may = torch.arange(6) <= PLACES[:, None]
    order = torch.rand(3, 6, dtype=torch.float64)
    taken, put = Curves(asked, may, points=4).areas(order)
    with torch.no_grad():
        for row in range(3):
            first = sorted(range(int(PLACES[row]) + 1), key=lambda j: -order[row, j].item())
            scores = [[], []]
            for step in range(5):
                moved = first[: round(step / 4 * len(first))]
                for which, inside in enumerate(([j for j in first if j not in moved], moved)):
                    vectors = asked.nothing.expand(3, 6, -1).clone()
                    vectors[row, inside] = asked.embedded[row, inside]
                    vectors[row, first[0] * 0 + int(PLACES[row]) + 1 :] = asked.embedded[row, int(PLACES[row]) + 1 :]
                    scores[which].append(answered(model, tokens, vectors)[row].item())
            for area, curve in zip((taken, put), scores, strict=True):
                nothing = scores[1][0]
                wanted = sum((a + b) / 2 - nothing for a, b in pairwise(curve)) / 4
                assert area[row].item() == pytest.approx(wanted)


def test_bad_questions():
    model = model_of("attention")
    with pytest.raises(InputError, match="places: expected one from 0 to 5 for each of the 3 texts"):
        ask(model, tokens_of(), torch.tensor([5, 3, 6]))
    with pytest.raises(InputError, match="left_out"):
        attributions(model, ask(model, tokens_of(), PLACES), "leftout")
