"""Learners of Boolean functions against enumeration, plain loops and scikit-learn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contextlab import registry
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
    boolean_posterior,
    version_space,
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


HERE = {module.__name__ for module in (boolean, boolean_posterior, version_space)}
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
    assert {e.factory for e in registry.entries("learner") if e.factory.__module__ in HERE} == names


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
