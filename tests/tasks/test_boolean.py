"""Boolean prompts: labels follow the functions, functions and inputs follow the classes, teaching singles out."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlab import TaskSpec, build_task
from contextlab.errors import InputError
from contextlab.tasks.boolean import APPLIES, FORMULAS, SPARSE, Function


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def value(function: str, weights: Any, threshold: float, x: list[int]) -> int:
    """The label by the definition of the class, in plain Python."""
    if function in FORMULAS:
        literals = [[(v, s) for v, s in enumerate(term) if s] for term in weights]
        met = [[x[v] == s for v, s in term] for term in literals]
        terms = [any(each) if function in ("disjunction", "sparse_disjunction", "cnf") else all(each) for each in met]
        return 1 if (all(terms) if function == "cnf" else any(terms)) else -1
    if "parity" in function:
        return 1 if sum(x[v] == 1 for v, w in enumerate(weights) if w) % 2 else -1
    return 1 if sum(a * b for a, b in zip(weights, x, strict=True)) > threshold else -1


@pytest.mark.parametrize("function", [name for name in get_args(Function) if name != "nearest_neighbour"])
def test_labels_follow_the_function(function: str) -> None:
    for options in ({}, {"teaching": True} if function in APPLIES["teaching"] else {"layout": "interleaved"}):
        prompt = build_task("boolean_function", function=function, dimensions=9, examples=12, **options).sample(
            20, generator()
        )
        assert set(prompt.xs.unique().tolist()) == {-1, 1}
        for b in range(20):
            weights = prompt.hidden["weights"][b].int().tolist()
            threshold = prompt.hidden["threshold"][b].item() if "threshold" in prompt.hidden else 0.0
            for x, y in zip(prompt.xs[b].int().tolist(), prompt.ys[b].flatten().tolist(), strict=True):
                assert y == value(function, weights, threshold, x)


def test_weights_follow_the_class() -> None:
    """Chances of each weight as in the paper's code, within five standard errors."""
    count, d = 4000, 10
    expected = {
        "conjunction": {0: 0.7, 1: 0.15, -1: 0.15},
        "disjunction": {0: 0.7, 1: 0.15, -1: 0.15},
        "cnf": {0: 0.8, 1: 0.1, -1: 0.1},
        "dnf": {0: 0.8, 1: 0.1, -1: 0.1},
        "majority": {0: 0.7, 1: 0.3},
        "parity": {0: 0.5, 1: 0.5},
        "integer_halfspace": dict.fromkeys(range(-3, 4), 1 / 7),
        "sparse_threshold": {0: 0.7, 1: 0.15, -1: 0.15},
    }
    for function, chances in expected.items():
        task = build_task("boolean_function", function=function, dimensions=d, examples=1)
        hidden = task.sample(count, generator(1)).hidden
        weights = hidden["weights"].flatten()
        seen = Counter(weights.int().tolist())
        assert set(seen) == set(chances)
        for w, chance in chances.items():
            assert abs(seen[w] / len(weights) - chance) < 5 * math.sqrt(chance * (1 - chance) / len(weights))
        if function == "sparse_threshold":
            assert set(hidden["threshold"].unique().tolist()) == {-2.5, -1.5, -0.5, 0.5, 1.5, 2.5}
        elif "threshold" in hidden:
            assert hidden["threshold"].unique().tolist() == [0.5]
    plain = build_task("boolean_function", function="dnf", dimensions=d, examples=1, negations=False)
    weights = plain.sample(count, generator(2)).hidden["weights"]
    assert set(weights.unique().tolist()) == {0, 1}
    assert abs(weights.mean().item() - 0.2) < 5 * math.sqrt(0.16 / weights.numel())


def test_sparse_functions_are_chosen_evenly() -> None:
    scipy = pytest.importorskip("scipy.stats")
    for function, relevant in SPARSE.items():
        task = build_task("boolean_function", function=function, dimensions=6, examples=1)
        weights = task.sample(6000, generator(3)).hidden["weights"].reshape(-1, 6).int()
        assert (weights.sum(1) == relevant).all()
        counts = Counter(map(tuple, weights.tolist()))
        assert len(counts) == math.comb(6, relevant)
        assert scipy.chisquare(list(counts.values())).pvalue > 1e-4


def test_planted_inputs_balance_the_labels() -> None:
    """The share of true labels, from the chance that an even input has one (any input, as literals are even)."""
    d, count = 12, 4000
    for function, options in itertools.product(("conjunction", "disjunction", "cnf", "dnf"), ({}, {"planted": 0.0})):
        task = build_task("boolean_function", function=function, dimensions=d, examples=4, **options)
        terms = 3 if function in ("cnf", "dnf") else 1
        by_chance = 1 - (1 - (1 - task.literal / 2) ** d) ** terms  # that a conjunction, or one of three, is satisfied
        planted = 0.0 if options else 0.35 if function == "dnf" else 0.3
        rare = planted + (1 - planted) * by_chance
        expected = 1 - rare if task.dual else rare
        true = (task.sample(count, generator(4)).ys > 0).double().mean(1)
        assert abs(true.mean().item() - expected) < 5 * true.std().item() / math.sqrt(count)


def test_planted_inputs_satisfy_one_term_and_are_even_elsewhere() -> None:
    task = build_task("boolean_function", function="dnf", dimensions=8, examples=400, planted=0.999)
    prompt = task.sample(5, generator(5))
    for xs, terms in zip(prompt.xs, prompt.hidden["weights"], strict=True):
        met = ((xs @ terms.mT) == terms.abs().sum(1)).double().mean(0)
        assert met.max() > 0.98, "one and the same term in the whole prompt"
        alike = xs.mean(0).abs() > 0.98
        assert any(torch.equal(alike, term != 0) for term in terms), "all its literals and nothing else"
        assert (xs[:, ~alike].mean(0).abs() < 5 / math.sqrt(400)).all()


def taught(term: list[int], negations: bool, sign: int) -> list[list[int]]:
    """The sequence of one term, of a conjunction, in plain Python."""
    heads = [[w or -sign for w in term]] + ([[w or sign for w in term]] if negations else [])
    flips = [[-a if v == turned else a for v, a in enumerate(heads[0])] for turned, w in enumerate(term) if w]
    return heads + flips


@pytest.mark.parametrize("negations", [True, False])
@pytest.mark.parametrize("function", ["conjunction", "disjunction", "sparse_disjunction", "cnf", "dnf"])
def test_teaching_sequences_come_first(function: str, negations: bool) -> None:
    options = {} if function == "sparse_disjunction" else {"negations": negations}
    task = build_task("boolean_function", function=function, dimensions=9, examples=14, teaching=True, **options)
    prompt = task.sample(40, generator(6))
    sign = -1 if task.dual else 1
    for xs, terms in zip(prompt.xs.int().tolist(), prompt.hidden["weights"].int().tolist(), strict=True):
        sequence = [x for term in terms for x in taught([sign * w for w in term], task.signed, sign)]
        assert xs[: len(sequence)] == sequence[:14]


def test_a_teaching_sequence_singles_the_function_out() -> None:
    d = 4
    inputs = list(itertools.product((-1, 1), repeat=d))
    for function, negations in itertools.product(("conjunction", "disjunction"), (True, False)):
        task = build_task(
            "boolean_function", function=function, dimensions=d, examples=d + 2, teaching=True, negations=negations
        )
        prompt = task.sample(60, generator(7))
        literals = list(itertools.product((0, 1, -1) if negations else (0, 1), repeat=d))
        for b in range(60):
            (term,) = prompt.hidden["weights"][b].int().tolist()
            length = sum(map(abs, term)) + (2 if negations else 1)
            shown = list(zip(prompt.xs[b].int().tolist(), prompt.ys[b].flatten().tolist(), strict=True))[:length]
            fit = [w for w in literals if all(value(function, [w], 0, x) == y for x, y in shown)]
            tables = {tuple(value(function, [w], 0, list(x)) for x in inputs) for w in fit}
            assert tables == {tuple(value(function, [term], 0, list(x)) for x in inputs)}


@pytest.mark.parametrize(("d", "relevant"), [(5, None), (1, None), (6, 1), (6, 2), (6, 3), (5, 4), (4, 4)])
def test_a_teaching_sequence_singles_a_parity_out(d: int, relevant: int | None) -> None:
    """Of all parities of so many variables, tried one by one: none sooner than the sequence says, where that is all."""
    kind = {"function": "parity"} if relevant is None else {"function": "sparse_parity", "relevant": relevant}
    task = build_task("boolean_function", dimensions=d, examples=d + 6, teaching=True, **kind)
    prompt = task.sample(60, generator(7))
    parities = [w for w in itertools.product((0, 1), repeat=d) if relevant in (None, sum(w))]
    for b in range(60):
        weights = prompt.hidden["weights"][b].int().tolist()
        used = [v for v in range(d) if relevant is None or weights[v]]
        xs, ys = prompt.xs[b].int().tolist(), prompt.ys[b].flatten().tolist()
        assert xs[: len(used)] == [[1 if v == turned else -1 for v in range(d)] for turned in used]
        shown = list(zip(xs, ys, strict=True))
        left = [
            [w for w in parities if all(value(task.function, w, 0, x) == y for x, y in shown[:i])] for i in range(d + 1)
        ]
        assert left[len(used)] == [tuple(weights)]
        if relevant is None:
            assert [len(each) for each in left] == [2 ** (d - i) for i in range(d + 1)]


def test_a_teaching_sequence_of_terms_singles_out_where_the_docstring_says_so() -> None:
    """All formulas of two plain terms: one function fits after the sequence if no term implies the other."""
    d = 4
    inputs = list(itertools.product((-1, 1), repeat=d))
    terms = list(itertools.product((0, 1), repeat=d))
    for function in ("dnf", "cnf"):
        task = build_task(
            "boolean_function", function=function, dimensions=d, examples=10, terms=2, teaching=True, negations=False
        )
        tables = {
            tuple(value(function, pair, 0, list(x)) for x in inputs)
            for pair in itertools.combinations_with_replacement(terms, 2)
        }
        prompt = task.sample(60, generator(7))
        apart = 0
        for b in range(60):
            one, two = prompt.hidden["weights"][b].int().tolist()
            if all(u <= v for u, v in zip(one, two, strict=True)) or all(u >= v for u, v in zip(one, two, strict=True)):
                continue
            apart += 1
            length = sum(one) + sum(two) + 2
            shown = zip(map(tuple, prompt.xs[b].int().tolist()), prompt.ys[b].flatten().tolist(), strict=True)
            told = [(inputs.index(x), y) for x, y in shown][:length]
            fit = [table for table in tables if all(table[i] == y for i, y in told)]
            assert fit == [tuple(value(function, [one, two], 0, list(x)) for x in inputs)]
        assert apart > 10


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_who_was_taught_a_parity_knows_it(noise: float) -> None:
    task = build_task("boolean_function", function="parity", dimensions=9, examples=20, teaching=True, noise=noise)
    prompt = task.sample(300, generator(8))
    if noise:
        assert next(iter(task.learners())) == "version_space"
    else:
        for name in ("gf2_elimination", "version_space", "halving"):
            right = task.errors(task.learners()[name](prompt), prompt)["accuracy"]
            assert right[:, 9:].min() == 1, name
        assert next(iter(task.learners())) == "gf2_elimination"
    for relevant in (1, 3):
        task = build_task(
            "boolean_function", function="sparse_parity", relevant=relevant, examples=20, teaching=True, noise=noise
        )
        prompt = task.sample(300, generator(8))
        truth = (prompt.xs > 0).float() @ prompt.hidden["weights"].unsqueeze(2) % 2 * 2 - 1
        name, best = next(iter(task.learners().items()))
        assert name == "taught_parity"
        answer = best(prompt)
        assert torch.equal(answer.sign(), truth)
        assert task.errors(answer, prompt)["accuracy"].mean().item() == pytest.approx(1 - noise, abs=0.02)
        stated = math.log((1 - noise) / noise) if noise else math.log((1 - 1e-6) / 1e-6)
        assert answer.abs().unique().tolist() == [pytest.approx(stated, rel=1e-4)]


def test_who_reads_the_teaching_sequence_makes_no_error() -> None:
    for function, negations in itertools.product(("conjunction", "disjunction"), (True, False)):
        task = build_task("boolean_function", function=function, examples=30, teaching=True, negations=negations)
        prompt = task.sample(100, generator(8))
        name, best = next(iter(task.learners().items()))
        assert name == "taught"
        assert task.errors(best(prompt), prompt)["accuracy"].min() == 1
    task = build_task("boolean_function", function="dnf", examples=70, teaching=True)
    prompt = task.sample(100, generator(8))
    known = (prompt.hidden["weights"].abs().sum(2) + 2).sum(1).int()  # the length of the sequence
    right = task.errors(task.learners()["taught"](prompt), prompt)["accuracy"]
    assert all(row[start:].min() == 1 for row, start in zip(right, known.tolist(), strict=True) if start < 70)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000), st.integers(2, 5), st.integers(1, 9))
def test_neighbours_labels_are_copied(seed: int, d: int, start: int) -> None:
    task = build_task("boolean_function", function="nearest_neighbour", dimensions=d, examples=12, start=start)
    prompt = task.sample(3, generator(seed))
    assert (prompt.scored.sum(1) == 12 - start).all()
    for xs, ys in zip(prompt.xs.tolist(), prompt.ys.flatten(1).tolist(), strict=True):
        for i in range(1, 12):
            far = [sum(a != b for a, b in zip(x, xs[i], strict=True)) for x in xs[:i]]
            if i >= start or min(far) == 0:
                assert ys[i] == ys[far.index(min(far))]
    best = task.learners()["earliest_neighbour"](prompt)
    assert task.errors(best, prompt)["accuracy"][prompt.scored].min() == 1
    free = build_task("boolean_function", function="nearest_neighbour", dimensions=20, examples=9, start=8)
    assert abs(free.sample(2000, generator(seed)).ys[:, :8].mean().item()) < 5 / math.sqrt(16000)


@pytest.mark.parametrize("function", SPARSE)
def test_functions_held_out_are_never_drawn_in_training(function: str) -> None:
    task = build_task("boolean_function", function=function, dimensions=7, examples=2, held_out=0.4)
    splits = task.splits()
    seen = {name: _functions(splits[name]) for name in ("train", "unseen", "noise=0.1", "examples=4")}
    assert seen["train"] == seen["noise=0.1"] == seen["examples=4"]
    assert not seen["train"] & seen["unseen"]
    total = math.comb(7, task.size)
    assert len(seen["train"] | seen["unseen"]) == total
    assert len(seen["unseen"]) == round(0.4 * total)
    assert _functions(task.replace(pool_seed=1)) != seen["train"]


def _functions(task: Any) -> set[tuple[int, ...]]:
    weights = task.sample(3000, generator(9)).hidden["weights"].reshape(-1, task.dimensions)
    return set(map(tuple, weights.int().tolist()))


@pytest.mark.parametrize(
    "options",
    [
        {"function": "conjunction"},
        {"function": "conjunction", "planted": 0.0, "noise": 0.1},
        {"function": "disjunction", "negations": False},
        {"function": "sparse_disjunction", "relevant": 1},
        {"function": "majority"},
        {"function": "integer_halfspace"},
        {"function": "sparse_threshold"},
        {"function": "parity"},
        {"function": "parity", "teaching": True},
        {"function": "parity", "teaching": True, "noise": 0.2},
        {"function": "sparse_parity", "relevant": 1, "noise": 0.2},
        {"function": "sparse_parity", "relevant": 1, "noise": 0.2, "teaching": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_the_stated_optimum_is_the_frequency_among_equal_prompts(options: dict[str, Any]) -> None:
    """200,000 prompts of two variables and three examples: who saw the same should see +1 as often as stated."""
    task = build_task("boolean_function", dimensions=2, examples=3, **options)
    prompt = task.sample(200_000, generator(10))
    name, best = next(iter(task.learners().items()))
    assert name in ("version_space", "gf2_elimination", "taught_parity")
    bits = torch.cat([prompt.xs, prompt.ys], 2) > 0
    for i in range(3):
        past = bits.flatten(1)[:, : 3 * i + 2].long()  # all before, and this input
        code = (past * 2 ** torch.arange(past.shape[1])).sum(1)
        kinds, kind, count = code.unique(return_inverse=True, return_counts=True)
        one = torch.zeros(len(kinds), dtype=torch.int64).scatter_(0, kind, torch.arange(len(code)))
        stated = best(prompt.rows(0, len(code)))[one, i, 0].double().sigmoid()
        seen = torch.zeros(len(kinds), dtype=torch.float64).index_add_(0, kind, bits[:, i, 2].double()) / count
        error = (stated * (1 - stated) / count).sqrt()
        assert ((seen - stated).abs() < 5 * error + 1e-5).all()
        assert len(kinds) >= 4 or (task.teaching and i < 2)


def test_splits_name_the_shifts() -> None:
    def names(**options: Any) -> list[str]:
        return list(build_task("boolean_function", examples=10, **options).splits())

    assert names() == ["train", "even", "taught", "noise=0.1", "examples=20"]
    assert names(teaching=True) == ["train", "even", "untaught", "noise=0.1", "examples=20"]
    assert names(function="sparse_parity", noise=0.2) == ["train", "taught", "relevant=3", "examples=20"]
    assert names(function="nearest_neighbour", start=5) == ["train", "examples=20"]
    for function in get_args(Function):
        for name, split in build_task("boolean_function", function=function, examples=24).splits().items():
            assert split.sample(2, generator()).batch == 2, name
    even = build_task("boolean_function", dimensions=12).splits()["even"]
    assert (even.sample(200, generator()).ys > 0).double().mean() < 0.25


def test_words_show_the_function() -> None:
    task = build_task("boolean_function", function="cnf", dimensions=5, examples=3, terms=2)
    prompt = task.sample(1, generator())
    prompt.hidden["weights"][0] = torch.tensor([[1.0, 0, -1, 0, 0], [0, 0, 0, 0, 0]])
    lines = task.words(prompt).splitlines()
    assert lines[0] == "(x1 or not x3) and (false)"
    assert len(lines) == 4
    assert set(lines[1]) <= set("+-> ")
    neighbours = build_task("boolean_function", function="nearest_neighbour", dimensions=5, examples=3, start=2)
    shown = neighbours.words(neighbours.sample(1, generator())).splitlines()
    assert [line.startswith("(") for line in shown] == [True, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"function": "sparse_parity", "relevant": 9, "dimensions": 8}, "relevant 9 is more than dimensions 8"),
        ({"function": "sparse_disjunction", "dimensions": 3}, "relevant 4 is more than dimensions 3"),
        ({"function": "nearest_neighbour", "start": 40}, "at most 39"),
        ({"function": "nearest_neighbour", "noise": 0.1}, "use noise 0"),
        ({"function": "sparse_parity", "held_out": 0.001}, "leaves none to draw"),
        ({"function": "sparse_parity", "unseen": True}, "leaves none to draw"),
        ({"function": "sparse_disjunction", "dimensions": 60, "held_out": 0.5}, "at most 100000"),
        ({"function": "majorty"}, "did you mean 'majority'"),
        ({"noise": 0.5}, "less than 0.5"),
        *(
            ({"function": "majority", name: changed}, f"{name} is an option of")
            for name, changed in {
                "relevant": 2,
                "held_out": 0.5,
                "terms": 2,
                "negations": False,
                "planted": 0.1,
                "teaching": True,
                "start": 5,
            }.items()
        ),
        *(
            (
                {"function": name, "teaching": True},
                "teaching is an option of conjunction, disjunction, sparse_disjunction, cnf, dnf, parity, "
                f"sparse_parity; leave it out for {name}",
            )
            for name in ("sparse_majority", "sparse_threshold", "integer_halfspace", "nearest_neighbour")
        ),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_task("boolean_function", **options)
    with pytest.raises(InputError, match=message):
        TaskSpec.parse({"name": "boolean_function", "options": options})


def test_every_limited_option_names_functions() -> None:
    assert all(set(owners) < set(get_args(Function)) for owners in APPLIES.values())
