"""Regression prompts hold what they promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlab import build_task
from contextlab.errors import InputError
from contextlab.tasks import LinearRegression
from contextlab.tasks.base import Drawn, lay_out

few = settings(deadline=None, max_examples=15)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def tasks(draw: st.DrawFn) -> LinearRegression:
    dimensions = draw(st.integers(2, 6))
    return LinearRegression(
        dimensions=dimensions,
        examples=draw(st.integers(2, 9)),
        noise=draw(st.sampled_from([0.0, 0.5])),
        sparsity=draw(st.none() | st.integers(1, dimensions)),
        spectrum=draw(st.sampled_from(["isotropic", "skewed", 1.0])),
        pool=draw(st.none() | st.integers(1, 5)),
        layout=draw(st.sampled_from(["paired", "interleaved"])),
        active_dimensions=draw(st.none() | st.integers(2, dimensions)),
        query=draw(
            st.sampled_from(["same", "random", "orthogonal", "random_quadrants", "opposite_quadrants", "overlapping"])
        ),
        rank=draw(st.sampled_from([None, 2])),
        inputs=draw(st.sampled_from(["gaussian", "clustered"])),
        clusters=draw(st.integers(1, 3)),
    )


@few
@given(tasks())
def test_shapes_and_bookkeeping(task: LinearRegression) -> None:
    prompt = task.sample(4, generator())
    n = task.examples
    assert prompt.inputs.shape == (4, n if task.layout == "paired" else 2 * n, task.input_size)
    assert prompt.targets.shape == (4, prompt.length, task.output_size)
    assert prompt.xs is not None
    assert prompt.ys is not None
    assert prompt.at is not None
    assert prompt.xs.shape == (4, n, task.dimensions)
    assert torch.equal(prompt.targets[:, prompt.at], prompt.ys)
    assert torch.equal(prompt.shot[:, prompt.at], torch.arange(n).expand(4, n))
    assert (prompt.xs[..., task.active :] == 0).all()
    elsewhere = torch.ones(prompt.length, dtype=torch.bool)
    elsewhere[prompt.at] = False
    assert not prompt.scored[:, elsewhere].any()
    assert (prompt.scored.sum(1) == (n if task.query == "same" else 1)).all()
    again = task.sample(4, generator())
    assert torch.equal(prompt.inputs, again.inputs)
    assert not torch.equal(prompt.inputs, task.sample(4, generator(1)).inputs)
    assert torch.equal(prompt.inputs[..., : task.dimensions][:, prompt.at], prompt.xs)


@few
@given(tasks(), st.integers(0, 8))
def test_a_token_never_shows_the_output_it_predicts(task: LinearRegression, which: int) -> None:
    i = which % task.examples
    prompt = task.sample(2, generator())
    assert prompt.xs is not None
    assert prompt.ys is not None
    assert prompt.at is not None
    ys = prompt.ys.clone()
    ys[:, i:] += 1
    scored = prompt.scored[:, prompt.at]
    other = lay_out(Drawn(prompt.xs, ys, scored), task.layout)
    seen = int(prompt.at[i]) + 1
    assert torch.equal(prompt.inputs[:, :seen], other.inputs[:, :seen])
    if i + 1 < task.examples:  # and the next token does show it
        assert not torch.equal(prompt.inputs[:, seen], other.inputs[:, seen])
        assert torch.equal(prompt.inputs[:, seen, -1], prompt.ys[:, i, 0])


@few
@given(tasks())
def test_orthogonal_queries_are_orthogonal_and_keep_their_length(task: LinearRegression) -> None:
    task = task.replace(query="orthogonal")
    prompt = task.sample(16, generator())
    plain = task.replace(query="same")._draw_xs(16, _after_weights(task), "cpu")
    assert prompt.xs is not None
    assert prompt.at is not None
    for b, i in prompt.scored[:, prompt.at].nonzero().tolist():
        query = prompt.xs[b, i]
        assert 1 <= i < task.directions
        torch.testing.assert_close(query.norm(), plain[b, i].norm(), rtol=1e-4, atol=1e-4)
        assert (prompt.xs[b, :i] @ query).abs().max() < 1e-4 * query.norm() * prompt.xs[b, :i].norm()
        assert torch.equal(prompt.xs[b, :i], plain[b, :i])


def _after_weights(task: LinearRegression) -> torch.Generator:
    source = generator()
    task._draw_weights(16, source, "cpu")
    return source


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"noise": 0.7, "weight_scale": 2.0, "input_scale": 0.5},
        {"sparsity": 2},
        {"spectrum": "skewed", "sparsity": 3},
        {"active_dimensions": 3},
        {"pool": 3, "pool_seed": 4},
        {"query": "orthogonal"},
        {"query": "random_quadrants", "spectrum": "skewed"},
        {"query": "opposite_quadrants", "pool": 3},
        {"query": "overlapping", "inputs": "clustered"},
        {"rank": 2, "input_scale": 1.5},
        {"sparsity": 3, "active_dimensions": 4},
        {"sparsity": 3, "active_dimensions": 2},
        {"rank": 3, "spectrum": "skewed", "pool": 3, "inputs": "clustered"},
        {"inputs": "clustered", "clusters": 1, "active_dimensions": 4},
    ],
)
def test_chance_is_the_mean_square_of_y(options: dict[str, object]) -> None:
    task = build_task("linear_regression", dimensions=5, examples=8, **options)
    prompt = task.sample(20_000, generator())
    square = (prompt.targets.square().squeeze(-1) * prompt.scored).sum(1) / prompt.scored.sum(1)
    assert abs(square.mean().item() - task.chance()["squared_error"]) < 6 * square.std().item() / len(square) ** 0.5
    zero = torch.zeros_like(prompt.targets)
    torch.testing.assert_close(task.loss(zero, prompt), square.mean())
    torch.testing.assert_close(task.errors(zero, prompt)["squared_error"], prompt.targets.square().squeeze(-1))


def test_inputs_have_the_spectrum_in_a_random_basis() -> None:
    task = build_task("linear_regression", dimensions=4, examples=4000, spectrum="skewed", input_scale=2.0)
    expected = 1 / torch.arange(1.0, 5.0).square()
    expected *= 4 / expected.sum()
    torch.testing.assert_close(task.eigenvalues(), expected)
    xs = task.sample(8, generator()).xs
    values, vectors = torch.linalg.eigh(xs.mT @ xs / 4000)
    torch.testing.assert_close(values.flip(1), (4 * expected).expand(8, 4), rtol=0.15, atol=0)
    leading = vectors[..., -1]
    assert ((leading @ leading.T).abs() - torch.eye(8)).max() < 0.999  # no two prompts share their basis
    power = build_task("linear_regression", dimensions=4, spectrum=1.0).eigenvalues()
    torch.testing.assert_close(power[0] / power[3], torch.tensor(4.0))


def test_low_rank_inputs_span_a_random_subspace() -> None:
    task = build_task("linear_regression", dimensions=5, examples=3000, rank=2, input_scale=2.0)
    xs = task.sample(6, generator()).xs.double()
    values, vectors = torch.linalg.eigh(xs.mT @ xs / 3000)
    assert values[:, :3].abs().max() < 1e-9
    torch.testing.assert_close(values[:, 3:], torch.full((6, 2), 4 * 2.5, dtype=torch.float64), rtol=0.15, atol=0)
    planes = vectors[..., 3:] @ vectors[..., 3:].mT
    apart = (planes.unsqueeze(0) - planes.unsqueeze(1)).norm(dim=(2, 3))
    assert (apart + torch.eye(6)).min() > 0.1


def test_after_the_rank_is_seen_nothing_is_left_to_learn() -> None:
    task = build_task("linear_regression", dimensions=8, examples=12, rank=3)
    prompt = task.sample(200, generator(1))
    for name in ("ridge", "ols"):
        error = task.errors(task.learners()[name](prompt), prompt)["squared_error"].mean(0)
        assert error[2] > 0.5
        assert error[4:].max() < 1e-3


def test_clustered_inputs_have_their_centres_and_their_variance() -> None:
    task = build_task("linear_regression", dimensions=30, examples=24, inputs="clustered", clusters=2)
    xs = task.sample(3000, generator(2)).xs
    near = torch.cdist(xs[:4], xs[:4]) < 4  # within a cluster about sqrt(2 * 0.1 * 30), between sqrt(60)
    assert all(len({tuple(row) for row in each.tolist()}) == 2 for each in near)
    each = xs.double().square().mean((1, 2))
    assert abs(each.mean() - 1) < 5 * each.std() / len(each) ** 0.5


@pytest.mark.parametrize("inputs", [{}, {"rank": 2}, {"inputs": "clustered"}, {"spectrum": "skewed"}])
@pytest.mark.parametrize("sparsity", [None, 2])
def test_the_first_learner_is_the_bayes_predictor_for_all_inputs(inputs: dict, sparsity: int | None) -> None:
    """By Monte Carlo: the mean over weights drawn from the prior, weighed by how likely they make the examples."""
    task = build_task("linear_regression", dimensions=3, examples=3, noise=0.6, sparsity=sparsity, **inputs)
    prompt = task.sample(4, generator(3))
    name, best = next(iter(task.learners().items()))
    assert name == ("ridge" if sparsity is None else "sparse_posterior")
    weights = task._draw_weights(400_000, generator(4), "cpu").double()
    predicted = prompt.xs.double() @ weights.T  # [4, 3, draws]
    likely = -((prompt.ys.double() - predicted)[:, :2].square().sum(1) / (2 * 0.36))
    shares = likely.softmax(-1)
    expected = (shares * predicted[:, 2]).sum(-1)
    spread = (shares.square() * (predicted[:, 2] - expected.unsqueeze(1)).square()).sum(-1).sqrt()
    assert ((best(prompt)[:, 2, 0] - expected).abs() < 5 * spread + 1e-6).all()


def test_no_learner_beats_the_sparse_posterior() -> None:
    for options in ({"noise": 0.5}, {}, {"noise": 0.5, "rank": 4}, {"noise": 0.5, "inputs": "clustered"}):
        task = build_task("linear_regression", dimensions=8, examples=20, sparsity=2, weight_scale=1.5, **options)
        prompt = task.sample(400, generator(5))
        errors = {n: task.errors(a(prompt), prompt)["squared_error"].mean(1) for n, a in task.learners().items()}
        best = errors.pop("sparse_posterior")
        for rival, values in errors.items():
            assert (values - best).mean() > -3 * (values - best).std() / len(best) ** 0.5, rival


def test_the_sparse_posterior_is_left_out_where_supports_are_too_many() -> None:
    few_supports = build_task("linear_regression", dimensions=20, sparsity=3)
    many = build_task("linear_regression", dimensions=20, sparsity=6)
    assert list(few_supports.learners())[:2] == ["sparse_posterior", "lasso"]
    assert next(iter(many.learners())) == "lasso"
    assert next(iter(few_supports.replace(pool=4).learners())) == "pool_posterior"


def test_sparse_weights_pools_and_noise() -> None:
    sparse = build_task("linear_regression", dimensions=6, sparsity=2)
    weights = sparse._draw_weights(500, generator(), "cpu")
    assert ((weights != 0).sum(1) == 2).all()
    assert (weights != 0).any(0).all()
    task = build_task("linear_regression", dimensions=3, examples=9, pool=4)
    prompt = task.sample(64, generator())
    fitted = torch.linalg.lstsq(prompt.xs.double(), prompt.ys.double()).solution.squeeze(-1)
    nearest = torch.cdist(fitted, task.pool_weights().double()).min(1)
    assert nearest.values.max() < 1e-4
    assert len(set(nearest.indices.tolist())) == 4
    assert not torch.equal(task.pool_weights(), task.replace(pool_seed=1).pool_weights())
    with pytest.raises(InputError, match="pool"):
        sparse.pool_weights()


def test_splits_are_the_shifts() -> None:
    task = build_task("linear_regression", dimensions=5, examples=16, noise=0.5)
    splits = task.splits()
    assert list(splits) == [
        "train",
        "scaled inputs",
        "skewed covariance",
        "other noise",
        "more examples",
        "orthogonal query",
        "low-rank inputs",
        "clustered inputs",
        "inputs times 1/3",
        "inputs times 1/2",
        "inputs times 3",
        "outputs times 1/3",
        "outputs times 1/2",
        "outputs times 2",
        "outputs times 3",
        "random quadrants",
        "opposite quadrants",
        "overlapping query",
        "renormalised noise",
    ]
    assert splits["train"] == task
    assert splits["other noise"].noise == 2.0
    assert splits["more examples"].sample(2, generator()).length == 32
    assert "new weights" in task.replace(pool=4).splits()
    assert "orthogonal query" not in build_task("linear_regression", dimensions=1).splits()
    alone = build_task("linear_regression", examples=1).splits()
    assert not {"random quadrants", "opposite quadrants", "overlapping query", "orthogonal query"} & set(alone)
    assert "renormalised noise" not in task.replace(noise=1.0).splits()
    for name, split in splits.items():
        prompt = split.sample(4, generator())
        assert split.input_size == task.input_size, name
        for learner in split.learners().values():
            assert torch.isfinite(split.loss(learner(prompt), prompt))


def test_the_best_learner_predicts_zero_for_an_orthogonal_query() -> None:
    task = build_task("linear_regression", dimensions=5, noise=0.5, query="orthogonal")
    prompt = task.sample(8, generator())
    assert task.learners()["ridge"](prompt)[prompt.scored].abs().max() < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimensions": 0}, "dimensions"),
        ({"examples": -1}, "examples"),
        ({"noise": -0.1}, "noise"),
        ({"dimensions": 4, "sparsity": 5}, "sparsity 5 is more than dimensions 4; at most 4"),
        ({"active_dimensions": 21}, "at most 20"),
        ({"spectrum": "skwed"}, "spectrum"),
        ({"dimensions": 1, "query": "orthogonal"}, "rank 2 and 2 examples at least, got rank 1"),
        ({"rank": 1, "query": "orthogonal"}, "got rank 1 and 40 examples"),
        ({"examples": 1, "query": "overlapping"}, "query 'overlapping' needs 2 examples at least, got 1"),
        ({"query": "random_quadrant"}, "did you mean 'random_quadrants'"),
        ({"rank": 4, "active_dimensions": 3}, "rank 4 is more than 3 active dimensions; at most 3"),
        ({"inputs": "clusterd"}, "did you mean 'clustered'"),
        ({"dimension": 4}, "did you mean 'dimensions'"),
        ({"layout": "pared"}, "did you mean 'paired'"),
        ({"noise": float("nan")}, "noise"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_task("linear_regression", **options)


def test_unknown_task() -> None:
    with pytest.raises(InputError, match="did you mean 'linear_regression'"):
        build_task("linear_regresion")
