"""Classification tasks and their learners: labels as they say, fits as in scikit-learn, and who is best."""

from __future__ import annotations

import math
import time

import pytest
import scipy.stats
import torch
from torch import Tensor

from contextlab import build_task
from contextlab.learners import LogisticRegression, SoftmaxRegression
from contextlab.learners.classification import curvature, fit_logits


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(name: str, batch: int = 3, **options) -> tuple[Tensor, Tensor]:
    prompt = build_task(name, **{"dimensions": 4, "examples": 14, **options}).sample(batch, generator(1))
    return prompt.xs.double(), prompt.ys.double()  # type: ignore[union-attr]


@pytest.mark.parametrize("strength", [0.001, 0.3])
def test_logistic_regression_as_in_scikit_learn(strength: float) -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    xs, ys = draw("logistic_regression")
    found = LogisticRegression(strength, averaged=False).predict(xs, ys)
    assert (found[:, 0] == 0).all()
    compared = 0
    for b in range(3):
        for i in range(2, 14):
            if len(set(ys[b, :i, 0].tolist())) == 2:  # scikit-learn wants both labels
                model = sklearn.LogisticRegression(C=1 / strength, fit_intercept=False, tol=1e-10, max_iter=10_000)
                model.fit(xs[b, :i].numpy(), ys[b, :i, 0].numpy())
                expected = model.decision_function(xs[b, i : i + 1].numpy())[0]
                assert found[b, i, 0].item() == pytest.approx(expected, rel=1e-3, abs=1e-3)
                compared += 1
    assert compared > 20


def test_softmax_regression_as_in_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    xs, ys = draw("softmax_regression", classes=3)
    found = SoftmaxRegression(0.2, averaged=False).predict(xs, ys).log_softmax(-1)
    compared = 0
    for b in range(3):
        for i in range(3, 14):
            labels = ys[b, :i].argmax(-1)
            if len(labels.unique()) == 3:
                model = sklearn.LogisticRegression(C=5, fit_intercept=False, tol=1e-10, max_iter=10_000)
                model.fit(xs[b, :i].numpy(), labels.numpy())
                expected = torch.from_numpy(model.predict_log_proba(xs[b, i : i + 1].numpy())[0])
                torch.testing.assert_close(found[b, i], expected, atol=1e-3, rtol=1e-3)
                compared += 1
    assert compared > 10


@pytest.mark.parametrize("strength", [1e-4, 0.5])
def test_fits_are_minima_and_curvature_is_the_second_derivative(strength: float) -> None:
    """Against autograd, on labels that are separable too, where Newton's plain steps overshoot."""
    xs, ys = draw("softmax_regression", classes=3, labels="likeliest")
    weights, p = fit_logits(xs, ys, strength, 50, False)
    hessian = curvature(xs, p, strength)

    def loss(w: Tensor) -> Tensor:
        logits = xs[1, :9] @ w.view(3, 4).T
        return -(logits.log_softmax(-1) * ys[1, :9]).sum() + strength / 2 * w.square().sum()

    w = weights[1, 9].flatten()
    slope = torch.func.grad(loss)(w)
    assert slope.abs().max() < 1e-6 * max(1, strength)
    torch.testing.assert_close(hessian[1, 9], torch.func.hessian(loss)(w), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    "learner", [LogisticRegression(0.5), LogisticRegression(0.01, averaged=False), SoftmaxRegression(0.5)]
)
def test_predictions_use_earlier_examples_and_the_query_only(learner: LogisticRegression) -> None:
    name = "softmax_regression" if isinstance(learner, SoftmaxRegression) else "logistic_regression"
    xs, ys = draw(name)
    before = learner.predict(xs, ys)
    torch.testing.assert_close(learner.predict(xs[1:2], ys[1:2]), before[1:2], atol=1e-7, rtol=1e-7)
    for i in (0, 3, 10):
        changed_xs, changed_ys = xs.clone(), ys.clone()
        changed_xs[:, i + 1 :], changed_ys[:, i:] = -xs[:, i + 1 :], ys[:, i:].flip(1)
        found = learner.predict(changed_xs, changed_ys)
        torch.testing.assert_close(found[:, : i + 1], before[:, : i + 1], atol=1e-7, rtol=1e-7)


def test_many_prompts_are_split_without_a_trace() -> None:
    xs, ys = draw("softmax_regression", batch=400, classes=3)
    whole = SoftmaxRegression(0.5).predict(xs, ys)
    torch.testing.assert_close(SoftmaxRegression(0.5).predict(xs[-2:], ys[-2:]), whole[-2:], atol=1e-7, rtol=1e-7)


def test_labels_follow_their_probabilities() -> None:
    prompt = build_task("logistic_regression", dimensions=3, examples=40).sample(500, generator(2))
    p = (prompt.xs @ prompt.hidden["weights"]).sigmoid().flatten()
    up = (prompt.ys.flatten() > 0).float()
    for low, high in ((0, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1)):
        rows = (p >= low) & (p < high)
        gap = (up - p)[rows].double()
        assert abs(gap.mean()) < 4 * gap.std() / rows.sum() ** 0.5
    prompt = build_task("softmax_regression", classes=3, examples=40).sample(500, generator(3))
    odds = (prompt.xs @ prompt.hidden["weights"]).softmax(-1).double()
    gap = prompt.ys - odds
    spread = (odds * (1 - odds)).sum((0, 1)).sqrt()
    assert (gap.sum((0, 1)).abs() < 4 * spread).all()
    assert ((gap * odds).sum((0, 1)).abs() < 4 * spread).all()
    assert scipy.stats.kstest(prompt.hidden["weights"].flatten().numpy(), "norm").pvalue > 1e-3


def test_likeliest_labels_are_certain() -> None:
    prompt = build_task("logistic_regression", labels="likeliest").sample(50, generator(4))
    assert torch.equal((prompt.xs @ prompt.hidden["weights"]).sign(), prompt.ys)
    prompt = build_task("softmax_regression", labels="likeliest").sample(50, generator(4))
    assert torch.equal((prompt.xs @ prompt.hidden["weights"]).argmax(-1), prompt.ys.argmax(-1))


def test_scores_of_several_classes() -> None:
    task = build_task("softmax_regression", classes=4)
    prompt = task.sample(6, generator(5))
    nothing = torch.zeros_like(prompt.targets)
    for metric, value in task.chance().items():
        assert task.errors(nothing, prompt)[metric].mean().item() == pytest.approx(value)
    assert task.loss(nothing, prompt).item() == pytest.approx(math.log(4))
    assert task.errors(9 * prompt.targets, prompt)["accuracy"].min() == 1
    assert task.errors(-9 * prompt.targets, prompt)["accuracy"].max() == 0
    assert task.words(prompt).splitlines()[0].endswith(f"class {int(prompt.ys[0, 0].argmax())}")


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_stated_best_is_near_the_exact_posterior(scale: float) -> None:
    """The exact one by importance sampling from the prior, in two dimensions: it beats all, and ours by little."""
    task = build_task("logistic_regression", dimensions=2, examples=8, weight_scale=scale)
    prompt = task.sample(600, generator(6))
    w = scale * torch.randn(2000, 2, generator=generator(7), dtype=torch.float64)
    logits = prompt.xs.double() @ w.T  # [B, n, samples]
    seen = torch.nn.functional.logsigmoid(logits * prompt.ys.double()).cumsum(1)
    posterior = torch.nn.functional.pad(seen, (0, 0, 1, 0))[:, :-1].softmax(-1)
    exact = (posterior * logits.sigmoid()).sum(-1, keepdim=True).logit().float()
    best = task.errors(exact, prompt)["cross_entropy"].mean(1)
    excess = {n: task.errors(a(prompt), prompt)["cross_entropy"].mean(1) - best for n, a in task.learners().items()}
    for name, values in excess.items():
        assert values.mean() > -4 * values.std() / len(values) ** 0.5, name
    assert excess["logistic"].mean() < 0.015
    assert excess["logistic"].mean() < 0.3 * excess["ridge"].mean()


@pytest.mark.parametrize("name", ["logistic_regression", "softmax_regression"])
def test_the_averaged_logit_is_the_better_one_in_more_dimensions(name: str) -> None:
    task = build_task(name, weight_scale=1.5, examples=25)
    prompt = task.sample(300, generator(8))
    cost = {n: task.errors(a(prompt), prompt)["cross_entropy"].mean().item() for n, a in task.learners().items()}
    assert min(cost, key=cost.__getitem__) == next(iter(cost))


def test_averaging_shrinks_by_the_variance_of_each_logit() -> None:
    xs, ys = draw("softmax_regression", classes=3)
    weights, p = fit_logits(xs, ys, 0.4, 50, False)
    inverse = torch.linalg.inv(curvature(xs, p, 0.4)[1, 9]).view(3, 4, 3, 4)
    for c in range(3):
        variance = xs[1, 9] @ inverse[c, :, c] @ xs[1, 9]
        expected = weights[1, 9, c] @ xs[1, 9] / (1 + math.pi * variance / 8).sqrt()
        torch.testing.assert_close(SoftmaxRegression(0.4).predict(xs, ys)[1, 9, c], expected)
    # two classes whose weights are w and -w are one logit of twice the strength: the fits must agree
    xs, ys = draw("logistic_regression")
    both = torch.cat([ys > 0, ys < 0], -1).double()
    pair = SoftmaxRegression(1.0, averaged=False).predict(xs, both)
    single = LogisticRegression(0.5, averaged=False).predict(xs, ys)
    torch.testing.assert_close(pair[..., :1] - pair[..., 1:], single)


def test_all_prefixes_at_once_are_much_faster_than_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    xs, ys = draw("logistic_regression", batch=64, dimensions=5, examples=40)
    start = time.process_time()
    LogisticRegression(1.0).predict(xs, ys)
    ours = (time.process_time() - start) / (64 * 39)
    start = time.process_time()
    for b in range(20):
        sklearn.LogisticRegression(fit_intercept=False).fit(xs[b].numpy(), ys[b, :, 0].numpy())
    assert 20 * ours < (time.process_time() - start) / 20


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e8])
def test_inputs_of_any_size_are_fitted_in_float32(scale: float) -> None:
    """Weights are hardly held back then, and a class that is all but certain has a chance of 1 but for rounding."""
    xs = torch.randn(2, 24, 2, generator=generator())
    ys = torch.nn.functional.one_hot(torch.randint(0, 3, (2, 24), generator=generator()), 3).float()
    got = SoftmaxRegression(1.0).predict(scale * xs, ys)
    expected = SoftmaxRegression(scale**-2).predict(xs.double(), ys.double())  # the same fit
    assert got.isfinite().all()
    late = slice(12, None)  # before, classes that were not seen yet have no logit to speak of
    torch.testing.assert_close(got[:, late].softmax(-1).double(), expected[:, late].softmax(-1), rtol=0, atol=0.02)
