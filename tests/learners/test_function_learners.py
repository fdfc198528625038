"""Learners of functions beyond linear ones, against scikit-learn, SciPy and their definitions prefix by prefix."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contextlab import build_learner
from contextlab.errors import InputError
from contextlab.learners import (
    BasisPosterior,
    BayesMixture,
    BoostedTrees,
    DecisionTree,
    ExponentialWeights,
    GaussianProcess,
    GradientDescent,
    KernelRidge,
    KernelSmoother,
    OrthogonalMatchingPursuit,
    PreconditionedGradientDescent,
    RegressionLearner,
    Ridge,
    SparsePosterior,
    TwoLayerNetwork,
)
from contextlab.learners.kernels import gram_matrix
from tests.learners.test_regression_learners import by_prefix, draw

few = settings(deadline=None, max_examples=8)
seeds = given(st.integers(0, 10_000))


def cubes(xs: Tensor) -> Tensor:
    return torch.cat([xs, xs.pow(3)], -1)


LINEAR = BasisPosterior(lambda xs: xs, 0.3)
CUBIC = BasisPosterior(cubes, 0.3, scale=torch.tensor([1.0] * 4 + [0.3] * 4), mean=torch.arange(8.0) / 8)
LEARNERS: dict[str, RegressionLearner] = {
    "omp": OrthogonalMatchingPursuit(2),
    "preconditioned_gd": PreconditionedGradientDescent(3, torch.diag(torch.arange(1.0, 5.0)), 0.1),
    "kernel_smoother": KernelSmoother(),
    "kernel_ridge": KernelRidge("arc_cosine", 0.1),
    "gaussian_process": GaussianProcess(),
    "basis_posterior": CUBIC,
    "bayes_mixture": BayesMixture((LINEAR, CUBIC, GaussianProcess()), (0.5, 0.25, 0.25)),
    "exponential_weights": ExponentialWeights((GradientDescent(2, 0.1), KernelSmoother()), 0.5),
    "sparse_posterior": SparsePosterior(2, 0.3),
    "tree": DecisionTree(every=3),
    "boosted_trees": BoostedTrees(every=3, trees=5),
    "network": TwoLayerNetwork(8, steps=10, every=3),
}


@pytest.mark.parametrize("name", LEARNERS)
@settings(deadline=None, max_examples=4)
@given(st.integers(0, 10_000), st.integers(0, 8))
def test_predictions_use_earlier_examples_and_the_query_only(name: str, seed: int, i: int) -> None:
    xs, ys = draw(seed)
    other_xs, other_ys = draw(seed + 1)
    before = LEARNERS[name].predict(xs, ys)
    assert before.isfinite().all()
    xs[:, i + 1 :], ys[:, i:] = other_xs[:, i + 1 :], other_ys[:, i:]
    torch.testing.assert_close(LEARNERS[name].predict(xs, ys)[:, : i + 1], before[:, : i + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LEARNERS)
def test_prompts_and_outputs_do_not_mix(name: str) -> None:
    xs, ys = draw(11, batch=3, outputs=2)
    learner = LEARNERS[name]
    together = learner.predict(xs, ys)
    for b in range(3):
        alone = learner.predict(xs[b : b + 1], ys[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone, atol=1e-5, rtol=1e-5)
    if name not in ("network", "exponential_weights"):  # whose hidden units, or weights of members, serve all outputs
        first = learner.predict(xs, ys[..., :1])
        torch.testing.assert_close(together[..., :1], first, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["omp", "kernel_smoother", "kernel_ridge", "gaussian_process", "network", "tree"])
def test_learners_are_built_by_name(name: str) -> None:
    xs, ys = draw(2)
    learner = build_learner(name)
    assert isinstance(learner, RegressionLearner)
    assert learner.predict(xs, ys).shape == ys.shape


@few
@seeds
def test_matching_pursuit_as_in_scikit_learn(seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    xs, ys = draw(seed, examples=12)

    def fit(X: Tensor, Y: Tensor, x: Tensor) -> Tensor:
        if len(X) < 3:  # scikit-learn takes no more inputs than examples, and stops elsewhere when they fit exactly
            return torch.full((1,), torch.nan, dtype=X.dtype)
        norms = X.norm(dim=0)  # it does not normalise the inputs itself
        model = sklearn.OrthogonalMatchingPursuit(n_nonzero_coefs=2, fit_intercept=False)
        model.fit((X / norms).numpy(), Y[:, 0].numpy())
        return (x / norms)[None] @ torch.from_numpy(np.atleast_1d(model.coef_))

    expected = by_prefix(fit, xs, ys)
    found = OrthogonalMatchingPursuit(2).predict(xs, ys)
    torch.testing.assert_close(found[:, 3:], expected[:, 3:], atol=1e-8, rtol=1e-8)


def test_matching_pursuit_finds_sparse_weights_and_skips_useless_inputs() -> None:
    xs, _ = draw(3, examples=20)
    xs[..., 1] = 0
    ys = 2 * xs[..., 2:3]
    torch.testing.assert_close(OrthogonalMatchingPursuit(3).predict(xs, ys)[:, 8:], ys[:, 8:])


@few
@seeds
def test_one_preconditioned_step_is_its_definition(seed: int) -> None:
    xs, ys = draw(seed)
    covariance = torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.1], dtype=torch.float64))

    def fit(X: Tensor, Y: Tensor, x: Tensor) -> Tensor:
        i, w = len(X), torch.zeros(4, 1, dtype=X.dtype)
        eigen = covariance.diagonal()
        A = torch.diag(eigen / ((i + 1) / i * eigen**2 + (eigen.sum() + 0.2) * eigen / i))
        for _ in range(2):
            w = w + A @ X.T @ (Y - X @ w) / i
        return x @ w

    expected = by_prefix(fit, xs, ys)
    torch.testing.assert_close(PreconditionedGradientDescent(2, covariance, 0.2).predict(xs, ys), expected)


def test_no_other_preconditioner_does_better_in_one_step() -> None:
    """Against 200 others near it, on 20,000 prompts: the optimum is stationary, so each must lose or draw."""
    generator = torch.Generator().manual_seed(0)
    eigen = torch.tensor([2.0, 1.0, 0.2], dtype=torch.float64)
    xs = torch.randn(20_000, 7, 3, generator=generator, dtype=torch.float64) * eigen.sqrt()
    w = torch.randn(20_000, 3, 1, generator=generator, dtype=torch.float64)
    ys = xs @ w + 0.5 * torch.randn(20_000, 7, 1, generator=generator, dtype=torch.float64)
    found = PreconditionedGradientDescent(1, torch.diag(eigen), 0.25).predict(xs, ys)[:, 6]
    pull = (xs[:, :6].mT @ ys[:, :6]) / 6
    A = torch.diag(eigen / (7 / 6 * eigen**2 + (eigen.sum() + 0.25) * eigen / 6))
    torch.testing.assert_close(found, (xs[:, 6:] @ A @ pull)[:, 0])
    target = (xs[:, 6:] @ w)[:, 0]
    best = (found - target).square().squeeze(1)
    for _ in range(200):
        other = A + 0.1 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
        excess = ((xs[:, 6:] @ other @ pull)[:, 0] - target).square().squeeze(1) - best
        assert excess.mean() > -4 * excess.std() / len(excess) ** 0.5


def test_the_smoother_is_softmax_attention() -> None:
    xs, ys = draw(5)
    found = KernelSmoother(2.0).predict(xs, ys)
    for i in range(1, xs.shape[1]):
        attended = torch.nn.functional.scaled_dot_product_attention(xs[:, i : i + 1], xs[:, :i], ys[:, :i], scale=0.5)
        torch.testing.assert_close(found[:, i : i + 1], attended)
    assert (found[:, 0] == 0).all()


SKLEARN_KERNELS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "linear": lambda a, b: a @ b.T,
    "polynomial": lambda a, b: (1 + a @ b.T) ** 2,
    "rbf": lambda a, b: np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / 2),
    "arc_cosine": lambda a, b: np.array([[arc_cosine(x, y) for y in b] for x in a]),
    "agreement": lambda a, b: ((np.sign(a)[:, None] == np.sign(b)[None]).mean(-1)) ** 2,
}


def arc_cosine(x: np.ndarray, y: np.ndarray) -> float:
    size = np.linalg.norm(x) * np.linalg.norm(y)
    angle = np.arccos(np.clip(x @ y / size, -1, 1))
    return size * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / np.pi


@pytest.mark.parametrize("kernel", SKLEARN_KERNELS)
def test_kernel_ridge_as_in_scikit_learn(kernel: str) -> None:
    sklearn = pytest.importorskip("sklearn.kernel_ridge")
    xs, ys = draw(6, outputs=2)

    def fit(X: Tensor, Y: Tensor, x: Tensor) -> Tensor:
        a, b, k = X.numpy() / 1.5, x.numpy()[None] / 1.5, SKLEARN_KERNELS[kernel]
        model = sklearn.KernelRidge(alpha=0.2, kernel="precomputed").fit(k(a, a), Y.numpy())
        return torch.from_numpy(model.predict(k(b, a))[0])

    found = KernelRidge(kernel, 0.2, 1.5).predict(xs, ys)  # type: ignore[arg-type]
    torch.testing.assert_close(found, by_prefix(fit, xs, ys), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("name", ["tree", "boosted_trees"])
def test_trees_answer_a_prompt_of_one_example(name: str) -> None:
    xs, ys = torch.randn(2, 1, 3).double(), torch.randn(2, 1, 1).double()
    assert LEARNERS[name].predict(xs, ys).eq(0).all()


def test_kernels_are_the_covariances_of_networks_and_trees() -> None:
    generator = torch.Generator().manual_seed(1)
    xs = torch.randn(1, 5, 3, generator=generator, dtype=torch.float64)
    w = torch.randn(3, 400_000, generator=generator, dtype=torch.float64)
    active = (xs[0] @ w).relu()
    torch.testing.assert_close(gram_matrix("arc_cosine", xs)[0], 2 * active @ active.T / 400_000, atol=0.05, rtol=0.02)
    same = (xs[0] > 0).unsqueeze(1) == (xs[0] > 0).unsqueeze(0)  # [5, 5, 3]
    asked = torch.randint(3, (20_000, 2), generator=generator)  # the path that both inputs take, while they do
    together = same[:, :, asked].all(-1).double().mean(-1)
    torch.testing.assert_close(gram_matrix("agreement", xs, degree=2)[0], together, atol=0.02, rtol=0)


def test_a_gaussian_process_as_in_scikit_learn() -> None:
    process = pytest.importorskip("sklearn.gaussian_process")
    kernels = pytest.importorskip("sklearn.gaussian_process.kernels")
    xs, ys = draw(7)
    scales = (0.7, 2.0)
    found, evidence = GaussianProcess("rbf", scales, noise=0.4, scale=1.3).condition(xs, ys)

    def members(X: Tensor, Y: Tensor, x: Tensor) -> tuple[list[float], list[float]]:
        means, logs = [], []
        for scale in scales:
            kernel = kernels.ConstantKernel(1.69, "fixed") * kernels.RBF(scale, "fixed")
            model = process.GaussianProcessRegressor(kernel, alpha=0.16, optimizer=None).fit(X.numpy(), Y.numpy()[:, 0])
            means.append(model.predict(x.numpy()[None])[0])
            logs.append(model.log_marginal_likelihood_value_)
        return means, logs

    def fit(X: Tensor, Y: Tensor, x: Tensor) -> Tensor:
        means, logs = members(X, Y, x)
        return torch.tensor([np.average(means, weights=np.exp(logs))])

    torch.testing.assert_close(found, by_prefix(fit, xs, ys), atol=1e-7, rtol=1e-7)
    logs = members(xs[0, :6], ys[0, :6], xs[0, 6])[1]
    assert evidence[0, 6, 0].item() == pytest.approx(np.logaddexp(*logs) - math.log(2))
    assert (evidence[:, 0].abs() < 1e-12).all()


def test_basis_posterior_is_the_gaussian_posterior() -> None:
    xs, ys = draw(8)
    scale, mean = CUBIC.scale.double(), CUBIC.mean.double()  # type: ignore[union-attr]

    def fit(X: Tensor, Y: Tensor, x: Tensor) -> Tensor:
        F = cubes(X)
        precision = torch.diag(scale**-2) + F.T @ F / 0.09
        w = torch.linalg.solve(precision, mean[:, None] / scale[:, None] ** 2 + F.T @ Y / 0.09)
        return cubes(x) @ w

    expected = by_prefix(fit, xs, ys)
    expected[:, 0, 0] = cubes(xs[:, 0]) @ mean
    found, evidence = CUBIC.condition(xs, ys)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    features = cubes(xs[0, :7]).numpy()
    covariance = features @ np.diag(scale.numpy() ** 2) @ features.T + 0.09 * np.eye(7)
    density = scipy.stats.multivariate_normal(features @ mean.numpy(), covariance).logpdf(ys[0, :7, 0].numpy())
    assert evidence[0, 7, 0].item() == pytest.approx(density)
    torch.testing.assert_close(LINEAR.predict(xs, ys), Ridge(0.09).predict(xs, ys))


def test_a_mixture_weighs_its_members_by_their_evidence() -> None:
    xs, ys = draw(9)
    (a, log_a), (b, log_b) = LINEAR.condition(xs, ys), CUBIC.condition(xs, ys)
    odds = 0.2 * log_a.exp() / (0.2 * log_a.exp() + 0.8 * log_b.exp())
    mixture = BayesMixture((LINEAR, CUBIC), (1, 4))
    found, evidence = mixture.condition(xs, ys)
    torch.testing.assert_close(found, odds * a + (1 - odds) * b)
    torch.testing.assert_close(evidence.exp(), 0.2 * log_a.exp() + 0.8 * log_b.exp())
    torch.testing.assert_close(BayesMixture((mixture, mixture)).predict(xs, ys), found)  # mixtures of mixtures


def test_the_sparse_posterior_is_the_mixture_over_supports() -> None:
    xs, ys = draw(10, outputs=2)

    def on(support: tuple[int, ...]) -> BasisPosterior:
        return BasisPosterior(lambda xs: xs[..., list(support)], 0.3, scale=1.5)

    mixture = BayesMixture(tuple(on(support) for support in itertools.combinations(range(4), 2)))
    found = SparsePosterior(2, 0.3, 1.5).condition(xs, ys)
    for ours, expected in zip(found, mixture.condition(xs, ys), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(SparsePosterior(4, 0.3).predict(xs, ys), Ridge(0.09).predict(xs, ys))


def test_the_sparse_posterior_is_the_best_on_sparse_weights() -> None:
    generator = torch.Generator().manual_seed(2)
    xs = torch.randn(400, 10, 8, generator=generator, dtype=torch.float64)
    w = torch.zeros(400, 8, 1, dtype=torch.float64)
    w.scatter_(1, torch.rand(400, 8, 1, generator=generator).topk(2, 1).indices, 1.0)
    w = w * torch.randn(400, 8, 1, generator=generator, dtype=torch.float64)
    ys = xs @ w + 0.1 * torch.randn(400, 10, 1, generator=generator, dtype=torch.float64)
    best = (SparsePosterior(2, 0.1).predict(xs, ys) - ys).square().mean((1, 2))
    for rival in (Ridge(0.01), OrthogonalMatchingPursuit(2), SparsePosterior(3, 0.1), SparsePosterior(2, 0.2)):
        excess = (rival.predict(xs, ys) - ys).square().mean((1, 2)) - best
        assert excess.mean() > -4 * excess.std() / 20, rival


@pytest.mark.parametrize(("learner", "depth"), [(DecisionTree(every=1), None), (DecisionTree(every=4, depth=2), 2)])
def test_trees_are_scikit_learns_on_the_last_fitted_prefix(learner: DecisionTree, depth: int | None) -> None:
    sklearn = pytest.importorskip("sklearn.tree")
    xs, ys = draw(12)
    found = learner.predict(xs, ys)
    for i in range(1, xs.shape[1]):
        start = max(1, i // learner.every * learner.every)
        model = sklearn.DecisionTreeRegressor(max_depth=depth, random_state=0).fit(xs[0, :start], ys[0, :start, 0])
        assert found[0, i, 0].item() == model.predict(xs[0, i : i + 1])[0]
    assert (found[:, 0] == 0).all()


def test_boosted_trees_are_scikit_learns_on_the_last_fitted_prefix() -> None:
    sklearn = pytest.importorskip("sklearn.ensemble")
    xs, ys = draw(17, examples=24)
    found = BoostedTrees(every=7, trees=12, depth=2, rate=0.3, seed=5).predict(xs, ys)
    options = {"n_estimators": 12, "max_depth": 2, "learning_rate": 0.3, "random_state": 5}
    if getattr(sklearn.GradientBoostingRegressor(), "criterion", "deprecated") != "deprecated":
        options["criterion"] = "squared_error"  # before 1.9 another one is the default
    for i in range(1, 24):
        start = max(1, i // 7 * 7)
        model = sklearn.GradientBoostingRegressor(**options)
        expected = model.fit(xs[0, :start], ys[0, :start, 0]).predict(xs[0, i : i + 1])[0]
        assert abs(found[0, i, 0].item() - expected) < 1e-9


def test_signs_are_all_that_a_tree_of_signs_sees() -> None:
    xs, ys = draw(13, examples=20)
    size = 1 + torch.rand(xs.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    learner = BoostedTrees(every=5, signs=True)
    assert torch.equal(learner.predict(xs, ys), learner.predict(xs * size, ys))
    assert not torch.equal(learner.predict(xs, ys), BoostedTrees(every=5).predict(xs, ys))


def test_the_network_is_adam_on_each_prefix() -> None:
    xs, ys = draw(14, outputs=2)
    found = TwoLayerNetwork(6, steps=25, every=4, decay=0.01).predict(xs, ys)
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(4, 6, generator=generator, dtype=torch.float64) / 2
    second = torch.randn(6, 2, generator=generator, dtype=torch.float64) / 6**0.5
    start = [first, torch.zeros(1, 6, dtype=torch.float64), second, torch.zeros(1, 2, dtype=torch.float64)]
    for count, stop in ((1, 4), (4, 8), (8, 9)):
        weights = [w.clone().requires_grad_() for w in start]
        adam = torch.optim.Adam(weights, lr=0.01)

        def forward(x: Tensor, weights: list[Tensor] = weights) -> Tensor:
            return (x @ weights[0] + weights[1]).relu() @ weights[2] + weights[3]

        for _ in range(25):
            adam.zero_grad()
            miss = (forward(xs[1, :count]) - ys[1, :count]).square().sum(1).mean()
            (miss + 0.01 * sum(w.square().sum() for w in weights)).backward()
            adam.step()
        torch.testing.assert_close(found[1, count:stop], forward(xs[1, count:stop]).detach(), atol=1e-3, rtol=1e-3)


def test_all_prefixes_at_once_are_much_faster_than_one_after_another() -> None:
    xs, ys = draw(15, batch=16, examples=32, dimensions=8)
    for learner in (OrthogonalMatchingPursuit(3), GaussianProcess(), KernelRidge(), SparsePosterior(2, 0.1)):
        learner.predict(xs, ys)
        start = time.process_time()
        for _ in range(3):
            learner.predict(xs, ys)
        together = (time.process_time() - start) / 3
        start = time.process_time()
        for b in range(2):
            for i in range(1, 32):
                learner.predict(xs[b : b + 1, : i + 1], ys[b : b + 1, : i + 1])
        alone = (time.process_time() - start) * 8
        assert together * 20 < alone, learner


def test_bad_input_is_refused() -> None:
    xs, ys = draw(0)
    with pytest.raises(InputError, match="sparsity 5 of 4 dimensions has 0 supports"):
        SparsePosterior(5).predict(xs, ys)
    with pytest.raises(InputError, match="at least one learner"):
        BayesMixture((Ridge(),))
    with pytest.raises(InputError, match="2 probabilities for 1 members"):
        BayesMixture((LINEAR,), (0.5, 0.5))
    with pytest.raises(InputError, match=r"covariance is \[3, 3\], the prompt's inputs have 4 dimensions"):
        PreconditionedGradientDescent(1, torch.eye(3)).predict(xs, ys)
    with pytest.raises(InputError, match="smaller than the rounding"):
        BasisPosterior(lambda xs: xs, 1e-12).predict(xs.repeat(1, 2, 1), ys.repeat(1, 2, 1))
    with pytest.raises(InputError):
        build_learner("kernel_ridge", kernel="cosine")
