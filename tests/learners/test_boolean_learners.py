"""Learners of Boolean functions against enumeration, plain loops and scikit-learn."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contextlab import build_task, registry
from contextlab.errors import InputError
from contextlab.learners import (
    EarliestNeighbour,
    Elimination,
    HalfspaceMessages,
    HalfspacePosterior,
    Halving,
    LabelFrequency,
    LiteralPosterior,
    ParityElimination,
    Perceptron,
    RegressionLearner,
    SampledFormulas,
    Taught,
    TaughtParity,
    VersionSpace,
    Winnow,
    boolean,
)
from contextlab.learners.gf2 import eliminate

few = settings(deadline=None, max_examples=15)
seeds = given(st.integers(0, 10_000))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(seed: int, dimensions: int = 4, examples: int = 8, batch: int = 3) -> tuple[Tensor, Tensor]:
    """Signs without a rule: all learners must answer these, too."""
    g = generator(seed)
    xs = torch.randint(0, 2, (batch, examples, dimensions), generator=g).double() * 2 - 1
    ys = torch.randint(0, 2, (batch, examples, 1), generator=g).double() * 2 - 1
    return xs, ys


def by_prefix(answer: Callable[[list, list, list], float], xs: Tensor, ys: Tensor) -> Tensor:
    """answer(X, y, x) over plain lists, for every prefix."""
    rows = []
    for x, y in zip(xs.int().tolist(), ys.squeeze(2).int().tolist(), strict=True):
        rows.append([answer(x[:i], y[:i], x[i]) for i in range(len(x))])
    return torch.tensor(rows, dtype=torch.float64).unsqueeze(2)


@few
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 8))
def test_elimination_over_gf2_finds_what_enumeration_finds(seed: int, d: int, count: int) -> None:
    rows = torch.rand(3, count, d, generator=generator(seed)) < 0.4
    answers = torch.rand(3, count, 2, generator=generator(seed + 1)) < 0.5
    found = eliminate(rows, answers)
    for b in range(3):
        sums = {(0,) * (d + 2)}  # of the rows so far, with their answers
        fine = True
        for i in range(count):
            row = (*rows[b, i].int().tolist(), *answers[b, i].int().tolist())
            reached = [total[d:] for total in sums if total[:d] == row[:d]]
            assert found.spanned[b, i] == bool(reached)
            if reached and fine:
                assert found.values[b, i].int().tolist() == list(reached[0])
            fine = fine and (not reached or reached[0] == row[d:])
            sums |= {tuple(x ^ y for x, y in zip(total, row, strict=True)) for total in sums}
        assert found.consistent[b] == fine
        assert 2 ** found.rank[b].item() == len({total[:d] for total in sums})
        if fine:
            assert torch.equal((rows[b].int() @ found.solution[b].int()) % 2 == 1, answers[b])
    assert torch.equal(eliminate(rows).spanned, found.spanned)


def parities(d: int) -> list[tuple[int, ...]]:
    return list(itertools.product([0, 1], repeat=d))


@few
@seeds
def test_parity_elimination_says_what_all_parities_that_fit_say(seed: int) -> None:
    xs, _ = draw(seed)
    weights = torch.randint(0, 2, (len(xs), 4, 1), generator=generator(seed)).double()
    ys = (xs > 0).double() @ weights % 2 * 2 - 1

    def value(w: tuple[int, ...], x: list[int]) -> int:
        return 1 if sum(a for a, b in zip(w, x, strict=True) if b == 1) % 2 else -1

    def vote(X: list, y: list, x: list) -> float:
        said = {value(w, x) for w in parities(4) if all(value(w, a) == b for a, b in zip(X, y, strict=True))}
        return said.pop() if len(said) == 1 else 0

    assert torch.equal(ParityElimination().predict(xs, ys).sign(), by_prefix(vote, xs, ys))


@few
@seeds
def test_a_taught_parity_is_of_the_variables_that_were_on(seed: int) -> None:
    xs, ys = draw(seed)

    def odd(X: list, y: list, x: list) -> float:
        on = {v for each in [*X, x][:2] for v, bit in enumerate(each) if bit == 1}
        return 1 if sum(x[v] == 1 for v in on) % 2 else -1

    found = TaughtParity(2, 0.1).predict(xs, ys)
    assert torch.equal(found.sign(), by_prefix(odd, xs, ys))
    assert (found.abs() - math.log(9)).abs().max() < 1e-12


CLASSES: dict[str, Callable[[tuple[int, ...], float, list[int]], bool]] = {
    "conjunction": lambda w, t, x: all(a == b for a, b in zip(w, x, strict=True) if a),
    "disjunction": lambda w, t, x: any(a == b for a, b in zip(w, x, strict=True) if a),
    "halfspace": lambda w, t, x: sum(a * b for a, b in zip(w, x, strict=True)) > t,
    "parity": lambda w, t, x: sum(b == 1 for a, b in zip(w, x, strict=True) if a) % 2 == 1,
}


def members(space: VersionSpace, d: int) -> list[tuple[tuple[int, ...], float, float]]:
    """(weights, threshold, chance) of each function, from the docstring."""
    values, chances = space.drawn_alone()
    chance = dict(zip(values, chances, strict=True))
    found = []
    thresholds = space.thresholds if space.function == "halfspace" else (0.0,)
    for w in itertools.product(values, repeat=d):
        for t in thresholds:
            if space.relevant is None:
                found.append((w, t, math.prod(chance[a] for a in w)))
            elif all(a in (0, 1) for a in w) and sum(w) == space.relevant:
                found.append((w, t, 1.0))
    return found


@pytest.mark.parametrize(
    "space",
    [
        VersionSpace("conjunction", planted=0.3),
        VersionSpace("disjunction", planted=0.2, noise=0.1),
        VersionSpace("disjunction", relevant=2, planted=0.3),
        VersionSpace("conjunction", values=(0, 1), chances=(0.6, 0.4), noise=0.2),
        VersionSpace("halfspace"),
        VersionSpace("halfspace", values=(-1, 0, 1), thresholds=(-0.5, 1.5)),
        VersionSpace("parity", relevant=2, noise=0.1),
        VersionSpace("parity"),
    ],
    ids=lambda space: f"{space.function}-{space.relevant}-{space.planted}-{space.noise}",
)
def test_version_space_is_bayes_rule_over_the_class(space: VersionSpace) -> None:
    xs, _ = draw(5, dimensions=3, examples=9)
    ys = torch.tensor([[1 if CLASSES[space.function]((1, 0, 1), 0.5, x) else -1 for x in row] for row in xs.tolist()])
    ys = ys.double().unsqueeze(2)
    functions = members(space, 3)
    assert len(functions) == space.size(3)

    def like(w: tuple[int, ...], t: float, x: list[int], y: int) -> float:
        true = CLASSES[space.function](w, t, x)
        rare = true == (space.function == "conjunction")
        chance = (1 - space.planted) / 8 + (space.planted * 2 ** sum(map(abs, w)) / 8 if rare else 0)
        return chance * (1 - space.noise if true == (y > 0) else space.noise)

    def logit(X: list, y: list, x: list) -> float:
        mass = {
            label: sum(
                chance * math.prod(like(w, t, a, b) for a, b in zip([*X, x], [*y, label], strict=True))
                for w, t, chance in functions
            )
            for label in (1, -1)
        }
        if not mass[1] + mass[-1]:
            return 0.0
        share = mass[1] / (mass[1] + mass[-1])
        return float(torch.logit(torch.tensor(share).double().clamp(boolean.SMOOTHING, 1 - boolean.SMOOTHING)))

    torch.testing.assert_close(space.predict(xs, ys), by_prefix(logit, xs, ys), atol=1e-4, rtol=1e-4)


@few
@seeds
def test_halving_follows_the_majority_of_what_fits(seed: int) -> None:
    xs, ys = draw(seed, dimensions=3)
    for function in CLASSES:
        learner = Halving(function)
        functions = members(VersionSpace(function), 3)

        def vote(X: list, y: list, x: list, function: str = function, functions: list = functions) -> float:
            says = CLASSES[function]
            fit = [w for w, _, _ in functions if all(says(w, 0.5, a) == (b > 0) for a, b in zip(X, y, strict=True))]
            return float(np.sign(sum(1 if says(w, 0.5, x) else -1 for w in fit)))

        assert torch.equal(learner.decide(xs, ys), by_prefix(vote, xs, ys))


def test_halving_makes_at_most_log2_mistakes() -> None:
    task = build_task("boolean_function", function="sparse_parity", dimensions=12, examples=40)
    prompt = task.sample(50, generator())
    labels = Halving("parity", relevant=2).decide(prompt.xs.double(), prompt.ys.double())
    assert (labels * prompt.ys < 0).sum(1).max() <= math.log2(math.comb(12, 2))


@few
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_elimination_keeps_what_was_never_contradicted(seed: int, disjunction: bool, negations: bool) -> None:
    xs, ys = draw(seed)
    literals = [(v, s) for v in range(4) for s in ((1, -1) if negations else (1,))]

    def answer(X: list, y: list, x: list) -> float:
        if disjunction:
            kept = [(v, s) for v, s in literals if not any(b == -1 and a[v] == s for a, b in zip(X, y, strict=True))]
            return 1 if any(x[v] == s for v, s in kept) else -1
        kept = [(v, s) for v, s in literals if all(b == -1 or a[v] == s for a, b in zip(X, y, strict=True))]
        return 1 if all(x[v] == s for v, s in kept) else -1

    found = Elimination(disjunction, negations).decide(xs, ys)
    assert torch.equal(found, by_prefix(answer, xs, ys))


@few
@seeds
def test_perceptron_as_in_scikit_learn(seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    xs, ys = draw(seed, examples=15)
    found = Perceptron().decide(xs, ys)
    for b in range(len(xs)):
        model = sklearn.Perceptron(shuffle=False)
        for i in range(1, xs.shape[1]):
            model.partial_fit(xs[b, i - 1 : i].numpy(), ys[b, i - 1].numpy(), classes=np.array([-1.0, 1.0]))
            score = model.decision_function(xs[b, i : i + 1].numpy())[0]
            assert found[b, i].item() == np.sign(score)


@few
@given(st.integers(0, 10_000), st.booleans())
def test_winnow_step_by_step(seed: int, negations: bool) -> None:
    xs, ys = draw(seed, examples=12)
    found = Winnow(factor=2.0, negations=negations).decide(xs, ys)
    for b in range(len(xs)):
        size = 8 if negations else 4
        weights = [1.0] * size
        for i in range(xs.shape[1]):
            x = [v > 0 for v in xs[b, i].tolist()]
            x = x + [not v for v in x] if negations else x
            label = 1 if sum(w for w, v in zip(weights, x, strict=True) if v) >= size else -1
            assert found[b, i].item() == label
            y = int(ys[b, i].item())
            if label != y:
                weights = [w * 2.0**y if v else w for w, v in zip(weights, x, strict=True)]


@few
@seeds
def test_earliest_neighbour_and_its_certainty(seed: int) -> None:
    xs, ys = draw(seed, dimensions=3)

    def answer(X: list, y: list, x: list) -> float:
        if not X:
            return 0
        far = [sum(a != b for a, b in zip(other, x, strict=True)) for other in X]
        return y[far.index(min(far))]

    expected = by_prefix(answer, xs, ys)
    assert torch.equal(EarliestNeighbour().decide(xs, ys), expected)
    sure = EarliestNeighbour(certain_from=3).predict(xs, ys)
    assert torch.equal(sure[:, 3:].sign(), expected[:, 3:])
    assert sure[:, 3:].abs().min() > 10 > sure[:, :3].abs().max()


def test_the_confidence_in_a_label_is_the_record_so_far() -> None:
    xs, ys = torch.ones(1, 5, 1).double(), torch.tensor([1.0, 1, -1, 1, 1]).double().view(1, 5, 1)
    logits = EarliestNeighbour().predict(xs, ys).flatten()  # names +1 from the second on; it is wrong at the third
    expected = [0.0, boolean.LEAST_LOGIT, math.log(1.5 / 0.5), boolean.LEAST_LOGIT, math.log(2.5 / 1.5)]
    torch.testing.assert_close(logits, torch.tensor(expected).double())
    odds = LabelFrequency().predict(xs, ys).flatten().exp()
    torch.testing.assert_close(odds, torch.tensor([1.0, 3, 5, 2.5 / 1.5, 3.5 / 1.5]).double())


def test_literals_alone_are_exact_where_nothing_makes_them_dependent() -> None:
    """Before any example; and after positive examples that none was planted among."""
    xs, _ = draw(2, dimensions=4, examples=5)
    ys = torch.ones(3, 5, 1).double()
    alone = LiteralPosterior(planted=0.3).predict(xs, ys)
    exact = VersionSpace("conjunction", planted=0.3).predict(xs, ys)
    torch.testing.assert_close(alone[:, :1], exact[:, :1], atol=1e-4, rtol=1e-4)
    alone = LiteralPosterior(planted=0.0).predict(xs, ys)
    exact = VersionSpace("conjunction").predict(xs, ys)
    torch.testing.assert_close(alone, exact, atol=1e-4, rtol=1e-4)
    mirrored = LiteralPosterior(planted=0.3, disjunction=True).predict(-xs, -ys)
    torch.testing.assert_close(mirrored, -LiteralPosterior(planted=0.3).predict(xs, ys))


@pytest.mark.parametrize("label", [-1, 1])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_an_example_changes_each_literal_as_bayes_rule_does(label: int, noise: float) -> None:
    """The chances of each variable after one example, by enumeration of all conjunctions of three variables."""
    learner = LiteralPosterior(positive=0.2, negative=0.1, planted=0.3, noise=noise, slip=0.2)
    prior = {0: 0.7, 1: 0.2, -1: 0.1}
    x = [1, -1, 1]
    mass = {}
    for w in itertools.product(prior, repeat=3):
        true = CLASSES["conjunction"](w, 0.0, x)
        slipped = 0.2 * (1 - noise) + 0.8 * noise
        positive = 1 - noise if true else slipped
        here = 0.7 / 8 + (0.3 / 8 * 2 ** sum(map(abs, w)) if true else 0)
        mass[w] = math.prod(prior[a] for a in w) * here * (positive if label > 0 else 1 - positive)
    expected = torch.tensor(
        [[sum(m for w, m in mass.items() if w[v] == a) / sum(mass.values()) for a in (0, 1, -1)] for v in range(3)]
    )
    q = torch.tensor([0.7, 0.2, 0.1]).double().expand(1, 3, 3)
    _, found = learner.meet(q, torch.tensor([x]).double(), torch.tensor([[label]]).double())
    torch.testing.assert_close(found[0], expected.double(), atol=1e-6, rtol=1e-6)


def test_filters_come_close_to_the_exact_posterior() -> None:
    """In cross-entropy to the optimum (Gaussian weights do not know that weights are whole), and to a rival."""
    for options, name, gap, rival in (
        ({"function": "conjunction", "dimensions": 8}, "literal_posterior", 0.04, "elimination"),
        ({"function": "disjunction", "dimensions": 8, "noise": 0.1}, "literal_posterior", 0.04, "elimination"),
        ({"function": "majority", "dimensions": 12}, "halfspace_messages", 0.08, "halfspace_posterior"),
        ({"function": "majority", "dimensions": 12}, "halfspace_posterior", 0.12, "perceptron"),
        ({"function": "sparse_threshold", "dimensions": 7, "noise": 0.05}, "halfspace_messages", 0.03, "perceptron"),
    ):
        task = build_task("boolean_function", examples=20, **options)
        prompt, learners = task.sample(400, generator()), task.learners()
        assert next(iter(learners)) == "version_space"
        loss = {each: task.loss(learners[each](prompt), prompt).item() for each in ("version_space", name, rival)}
        assert loss["version_space"] < loss[name] < loss["version_space"] + gap
        assert loss[name] < loss[rival] - 0.02


def test_the_probit_holds_far_out() -> None:
    scipy = pytest.importorskip("scipy.stats")
    z = torch.linspace(-30, 8, 77, dtype=torch.float64)
    chance, slope, _ = boolean._probit(z, 0.0)
    torch.testing.assert_close(chance.log(), torch.from_numpy(scipy.norm.logcdf(z.numpy())))
    expected = np.exp(scipy.norm.logpdf(z.numpy()) - scipy.norm.logcdf(z.numpy()))
    torch.testing.assert_close(slope, torch.from_numpy(expected))
    for noise in (0.0, 0.1):
        for x in (-29.0, -12.0, -1.0, 2.0, 6.0):
            at = torch.tensor([x - 1e-4, x, x + 1e-4], dtype=torch.float64)
            _, slope, bend = boolean._probit(at, noise)
            assert bend[1].item() == pytest.approx((slope[0] - slope[2]).item() / 2e-4, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_messages_step_by_step(noise: float) -> None:
    """The algorithm for one prefix at a time, in loops, with SciPy's normal distribution."""
    scipy = pytest.importorskip("scipy.stats")
    values, chances, thresholds = (-1, 0, 2), (0.2, 0.5, 0.3), (-0.5, 1.5)
    learner = HalfspaceMessages(values, chances, thresholds, noise, steps=5, inertia=0.3)
    xs, _ = draw(3, dimensions=3, examples=6)
    ys = torch.tensor([[1.0 if x[0] + 2 * x[2] > 0.5 else -1.0 for x in row] for row in xs.tolist()]).double()[
        ..., None
    ]
    prior = [(values, np.log(chances))] * 3 + [(thresholds, np.zeros(2))]

    def moments(v: int, centre: float, precision: float) -> tuple[float, float]:
        numbers, weights = np.array(prior[v][0]), np.array(prior[v][1])
        share = np.exp(weights - precision * (numbers - centre) ** 2 / 2)
        share /= share.sum()
        mean = (share * numbers).sum()
        return mean, (share * (numbers - mean) ** 2).sum()

    def chance(z: float) -> float:
        return noise + (1 - 2 * noise) * scipy.norm.cdf(z)

    def answer(X: list, y: list, x: list) -> float:
        rows = [[*row, -1] for row in X]
        mean, spread = (list(each) for each in zip(*(moments(v, 0, 0) for v in range(4)), strict=True))
        pulls = [0.0] * len(rows)
        for _ in range(5):
            variance = sum(spread)
            slopes, bends = [], []
            for row, label, old in zip(rows, y, pulls, strict=True):
                z = label * (np.dot(row, mean) - variance * old) / math.sqrt(variance)
                slope = (1 - 2 * noise) * scipy.norm.pdf(z) / chance(z)
                slopes.append(0.3 * old + 0.7 * label * slope / math.sqrt(variance))
                bends.append(slope * (slope + z) / variance)
            pulls = slopes
            precision = max(sum(bends), 1e-9)
            for v in range(4):
                centre = mean[v] + sum(row[v] * pull for row, pull in zip(rows, pulls, strict=True)) / precision
                new = moments(v, centre, precision)
                mean[v], spread[v] = (0.3 * old + 0.7 * n for old, n in zip((mean[v], spread[v]), new, strict=True))
        margin = np.dot([*x, -1], mean) / math.sqrt(sum(spread))
        return math.log(chance(margin) / chance(-margin))

    torch.testing.assert_close(learner.predict(xs, ys), by_prefix(answer, xs, ys), atol=1e-5, rtol=1e-5)


def test_one_weight_is_a_truncated_gaussian_after_one_example() -> None:
    scipy = pytest.importorskip("scipy.stats")
    for x, y in itertools.product((-1.0, 1.0), repeat=2):
        xs, ys = torch.tensor([[[x], [1.0]]]).double(), torch.tensor([[[y], [1.0]]]).double()
        learner = HalfspacePosterior(mean=0.3, variance=0.8, threshold=0.4)
        low, high = (0.4 / x, np.inf) if x * y > 0 else (-np.inf, 0.4 / x)
        sd = math.sqrt(0.8)
        left = scipy.truncnorm((low - 0.3) / sd, (high - 0.3) / sd, loc=0.3, scale=sd)
        first = scipy.norm.cdf((0.3 * x - 0.4) / sd)
        second = scipy.norm.cdf((left.mean() - 0.4) / left.std())
        expected = torch.logit(torch.tensor([first, second]))
        torch.testing.assert_close(learner.predict(xs, ys).flatten(), expected, atol=1e-6, rtol=1e-6)


ALL = [
    EarliestNeighbour(),
    EarliestNeighbour(2),
    Elimination(),
    Elimination(True, False),
    HalfspaceMessages(),
    HalfspaceMessages((-1, 0, 1), (0.2, 0.5, 0.3), (-0.5, 0.5), 0.1),
    HalfspacePosterior(),
    HalfspacePosterior(noise=0.1, threshold_variance=1.0),
    Halving("halfspace"),
    LabelFrequency(),
    LiteralPosterior(),
    LiteralPosterior(slip=0.1, noise=0.1),
    ParityElimination(),
    Perceptron(),
    SampledFormulas(4, draws=64),
    SampledFormulas(4, terms=2, negative=0.0, noise=0.1, disjunction=True, draws=64),
    Taught(),
    Taught(2, True, True),
    TaughtParity(),
    TaughtParity(3, 0.1),
    VersionSpace(planted=0.3),
    VersionSpace("parity", 2, noise=0.1),
    Winnow(),
]


@pytest.mark.parametrize("learner", ALL, ids=lambda learner: type(learner).__name__)
def test_no_learner_looks_ahead_or_mixes_prompts(learner: RegressionLearner) -> None:
    xs, ys = draw(1)
    found = learner.predict(xs, ys)
    assert found.isfinite().all()
    for i in range(xs.shape[1]):
        later, label = xs.clone(), ys.clone()
        later[:, i + 1 :] *= -1
        label[:, i:] *= -1
        torch.testing.assert_close(learner.predict(later, label)[:, : i + 1], found[:, : i + 1])
    torch.testing.assert_close(learner.predict(xs[1:2], ys[1:2]), found[1:2])


def test_every_learner_here_is_held_to_it() -> None:
    names = {type(learner) for learner in ALL}
    assert {e.factory for e in registry.entries("learner") if e.factory.__module__ == boolean.__name__} == names


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VersionSpace("parity").functions(16), "has 65536 functions"),
        (lambda: VersionSpace("parity", relevant=5).functions(4), "has 0 functions"),
        (lambda: VersionSpace(values=(0, 1), chances=(0.2, 0.3, 0.5)), "3 chances for 2 values"),
        (lambda: VersionSpace("parity", planted=0.1), "use 0"),
        (lambda: LiteralPosterior(0.7, 0.4), "at most 0.3"),
        (lambda: HalfspaceMessages((0, 1, 2)), "2 chances for 3 values"),
    ],
)
def test_impossible_learners_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(("function", "noise"), [("dnf", 0.0), ("cnf", 0.1)])
def test_drawn_formulas_come_to_the_exact_posterior(function: str, noise: float) -> None:
    """Against a sum over all 729 formulas of two terms of three bits, by the definition of the task."""
    task = build_task("boolean_function", function=function, dimensions=3, terms=2, examples=10, noise=noise)
    drawn = task.draw(8, generator(), "cpu")
    learner = dataclasses.replace(task.learners()["sampled_formulas"], draws=2**15, slip=0.0 if noise else 1e-9)
    got = torch.sigmoid(learner.predict(drawn.xs, drawn.ys))[..., 0]
    sign = 1 if function == "dnf" else -1
    chance = {0: 1 - task.literal, 1: task.literal / 2, -1: task.literal / 2}
    hypotheses = []
    for literals in itertools.product((0, 1, -1), repeat=6):
        terms = [literals[:3], literals[3:]]
        hypotheses.append((terms, np.prod([chance[each] for each in literals])))

    def meets(x: list[float], term: tuple[int, ...]) -> bool:
        return all(w == 0 or sign * w == value for w, value in zip(term, x, strict=True))

    for row in range(8):
        xs, ys = drawn.xs[row].tolist(), drawn.ys[row, :, 0].tolist()
        weights = np.array([weight for _, weight in hypotheses])
        for t, x in enumerate(xs):
            inputs = [
                (1 - task.share) / 8 + task.share * meets(x, terms[0]) * 2.0 ** (sum(map(abs, terms[0])) - 3)
                for terms, _ in hypotheses
            ]
            true = np.array([sign if any(meets(x, term) for term in terms) else -sign for terms, _ in hypotheses])
            weights = weights * inputs
            share = weights[true > 0].sum() / weights.sum()
            assert got[row, t].item() == pytest.approx(share * (1 - noise) + (1 - share) * noise, abs=0.06)
            weights = weights * np.where(true == ys[t], 1 - noise, noise)


def test_drawn_formulas_are_the_best_of_small_dnfs() -> None:
    task = build_task("boolean_function", function="dnf", dimensions=8, examples=24)
    prompt, learners = task.sample(128, generator()), task.learners()
    assert next(iter(learners)) == "sampled_formulas"
    loss = {name: task.loss(learner(prompt), prompt).item() for name, learner in learners.items()}
    assert loss["sampled_formulas"] < min(value for name, value in loss.items() if name != "sampled_formulas") - 0.02
    with pytest.raises(InputError, match="is for 8 bits, the prompt has 3"):
        learners["sampled_formulas"].predict(torch.ones(1, 2, 3), torch.ones(1, 2, 1))
