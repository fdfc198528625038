"""Longer reach by factors that are searched, and by CLEX's ODE."""

from __future__ import annotations

import pytest
import torch

from contextlab.convert import Calibration, build_conversion, convert
from contextlab.convert.kv.factor_search import PLAIN, ROOM, Candidate, search, starts
from contextlab.errors import InputError
from contextlab.ops.position import RopeScaling, rope_frequencies
from contextlab.tasks import build_task

from ..teachers import same, teacher, tokens

LONG = Calibration.of_tokens(tokens(40, batch=4, seed=5))
SEARCHED = {"factor": 4.0, "original_length": 10, "trials": 30}


def scaling_of(model):
    return model.blocks[0].mixer.rope_scaling


@pytest.fixture(scope="module")
def found():
    model = teacher(head_dim=16)
    return model, build_conversion("longrope", **SEARCHED)(model, LONG)


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn"])
def test_the_search_is_never_worse_than_what_it_starts_from(kind, found):
    model, converted = found
    options = {"kind": kind, "factor": 4.0, **({"original_length": 10} if kind == "yarn" else {})}
    start = build_conversion("rope_scaling", **options)(model).model
    assert LONG.loss(converted.model) <= LONG.loss(start) + 1e-12
    assert f"{kind} {LONG.loss(start):.4g}" in converted.lines[0].did


def test_factors_rise_within_their_room_and_the_spec_has_them(found):
    _, converted = found
    scaling = scaling_of(converted.model)
    factors = scaling.factors
    assert len(factors) == 8
    assert factors == tuple(sorted(factors))
    assert 1 <= factors[0] <= factors[-1] <= ROOM * 4
    assert RopeScaling.parse(converted.model.spec.pattern()[1].options["rope_scaling"], "") == scaling
    assert f"{LONG.loss(converted.model):.4g}" in converted.lines[0].did


def test_the_start_is_the_published_rules():
    """Factors of NTK-aware scaling and YaRN as their papers have them, naively, pair by pair."""
    linear, ntk, yarn = starts(8, 100.0, 4.0, 64)
    assert linear.factors == pytest.approx([4.0] * 4)
    assert ntk.factors == pytest.approx([4.0 ** (2 * j / 6) for j in range(4)])
    plain = [100.0 ** (-2 * j / 8) for j in range(4)]
    scaled = rope_frequencies(8, 100.0, RopeScaling(kind="yarn", factor=4.0, original_length=64))
    assert yarn.factors == pytest.approx([a / float(b) for a, b in zip(plain, scaled[0], strict=True)])
    assert yarn.sharpen == scaled[1]


def test_a_search_comes_near_the_best_factors():
    """Of a loss with one known minimum, to within a third of what the best start is away from it."""
    best = torch.tensor([1.0, 1.5, 2.0, 4.5], dtype=torch.float64)
    measured = []

    def loss(candidate: Candidate) -> float:
        measured.append(candidate)
        return float((torch.tensor(candidate.factors) - best).square().sum()) + (candidate.sharpen != 1.0)

    made = search(loss, 8, 100.0, 4.0, 64, 100, torch.Generator().manual_seed(0))
    assert (made.trials, len(measured), len(set(measured))) == (100, 100, 100)
    assert all(each.factors == tuple(sorted(each.factors)) for each in measured)
    assert made.losses["found"] == min(map(loss, measured[:100])) < 0.34 * min(list(made.losses.values())[:3])
    assert made.best.sharpen == 1.0


def test_a_factor_of_one_is_exact_and_trials_are_a_budget():
    model = teacher()
    same(model, build_conversion("longrope", factor=1.0, original_length=10)(model, LONG).model, 1e-12)
    few = build_conversion("longrope", factor=4.0, original_length=10, trials=1)(model, LONG)
    linear = build_conversion("rope_scaling", factor=4.0)(model).model
    assert LONG.loss(few.model) == pytest.approx(LONG.loss(linear), rel=1e-12)


@torch.no_grad()
def test_first_tokens_keep_their_plain_angles():
    """As many as are told, or as the search finds; of a loss that wants a number of them, that number."""
    model = teacher(depth=1)
    made = build_conversion("longrope", factor=4.0, original_length=10, trials=5, plain_tokens=4)(model, LONG)
    scaling = scaling_of(made.model)
    assert scaling.plain_tokens == 4
    assert "but of the first 4 tokens; loss of linear" in made.lines[0].did
    assert made.model.spec.pattern()[0].options["rope_scaling"]["plain_tokens"] == 4
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    old, new = (each.blocks[0].mixer(x)[0] for each in (model, made.model))
    torch.testing.assert_close(new[:, :4], old[:, :4], rtol=0, atol=1e-12)
    assert not torch.allclose(new[:, 4:], old[:, 4:])

    found = search(
        lambda each: abs(each.plain - 8) + 1e-3 * sum(each.factors), 8, 100.0, 4.0, 64, 60,
        torch.Generator().manual_seed(0), tuple(each for each in PLAIN if each < 64),
    )  # fmt: skip
    assert found.best.plain == 8
    searched = build_conversion("longrope", **SEARCHED | {"trials": 12, "plain_tokens": "search"})(model, LONG)
    assert LONG.loss(searched.model) <= LONG.loss(build_conversion("rope_scaling", factor=4.0)(model).model) + 1e-12


@torch.no_grad()
def test_clex_answers_as_before_within_the_old_length_and_by_ntk_beyond():
    model = teacher(kv_heads=2, qk_norm=True)
    made = build_conversion("clex", original_length=20, factor=2)(model).model
    same(model, made, 1e-9)
    longer = build_conversion("rope_scaling", kind="ntk", factor=3.0)(model).model  # 2 t - 1 at t = 2
    x = torch.randn(1, 30, 16, dtype=torch.float64)
    got, expected = (each.blocks[0].mixer(x)[0][:, 20:] for each in (made, longer))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_clex_learns_the_frequencies():
    task = build_task("associative_recall", vocabulary=12, pairs=3, length=16)
    found = convert(
        teacher().float(), "clex:original_length=16,factor=2", task, budget=3, prompts=4, train={"batch": 2}
    )
    assert [stage.name for stage in found.stages] == ["task"]
    assert all(float(block.mixer.ode_down.detach().abs().max()) > 0 for block in found.model.blocks)


@pytest.mark.parametrize(
    ("name", "given", "options", "message"),
    [
        ("longrope", {}, {}, "original_length: longrope needs the tokens of the training"),
        ("longrope", {}, {"original_length": 40}, "no prompt of the data is longer than the 40 tokens of the training"),
        ("longrope", {"position": "alibi"}, {"original_length": 8}, "layer 0 has position 'alibi'; expected plain"),
        ("longrope", {}, {"original_length": 8, "factor": 0.5}, "factor: 0.5 makes contexts shorter"),
        ("longrope", {}, {"original_length": 8, "plain_tokens": 8}, "plain_tokens: 8 are all 8 of the training; expec"),
        ("longrope", {}, {"original_length": 8, "plain_tokens": "some"}, "plain_tokens"),
        ("clex", {}, {}, "original_length: clex needs the tokens of the training"),
        ("clex", {"mixer": "sliding_window"}, {"original_length": 8}, "layer 0 has a window"),
    ],
)
def test_what_cannot_reach_further_is_told_in_one_line(name, given, options, message):
    with pytest.raises(InputError) as error:
        build_conversion(name, **options)(teacher(**given), LONG)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
