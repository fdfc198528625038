"""Regression learners, batched over prompts and over all prefixes of each prompt at once.

Prediction i is what the algorithm says when it is given the examples before i only. None of them loops over
examples: what a prefix needs is a running sum (Gram matrices, one batched factorisation) or a row of one
triangular matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.base import RegressionLearner, apply, before, gram, moment
from contextlab.registry import register


@register("learner", "averaging", family="functions", papers=("2208.01066",))
@dataclass(frozen=True)
class Averaging(RegressionLearner):
    """The mean of y x over the examples as the weight vector (2208.01066, section 3.1)."""

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        # w_i . x_i = (1 / i) sum over j < i of y_j (x_j . x_i): the strict lower triangle of X X^T, times y
        return (xs @ xs.mT).tril(-1) @ ys / _counts(xs)[:, None]


@register("learner", "knn", family="functions", papers=("2208.01066",), cases=({}, {"neighbours": 1}))
@dataclass(frozen=True)
class NearestNeighbours(RegressionLearner):
    """The mean output of the nearest examples (Euclidean); of all examples while there are fewer.

    neighbours: examples averaged.
    """

    neighbours: PositiveInt = 3

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        product = xs @ xs.mT
        square = product.diagonal(dim1=1, dim2=2)
        distance = square[:, None, :] - 2 * product  # + |x_i|^2, which is the same for all j
        future = torch.ones_like(distance[0], dtype=torch.bool).triu()
        near = distance.masked_fill(future, torch.inf).topk(min(self.neighbours, xs.shape[1]), dim=2, largest=False)
        weight = torch.zeros_like(distance).scatter_(2, near.indices, near.values.isfinite().to(xs.dtype))
        return weight @ ys / _counts(xs).clamp(max=self.neighbours)[:, None]


@register("learner", "ols", family="functions", papers=("2208.01066",))
@dataclass(frozen=True)
class LeastSquares(RegressionLearner):
    """Ordinary least squares; the solution of least norm while there are fewer examples than dimensions.

    Up to d examples it is ridge regression at strength 0, with the same factorisation for all prefixes; beyond,
    X^T X is factorised. Prompts whose inputs are close to linear dependence take the eigenvalues of X^T X.
    """

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        d, tiny = xs.shape[-1], torch.finfo(xs.dtype).eps ** 0.5
        head, z = xs[:, :d], ys[:, :d]
        kernel = head @ head.mT
        factor, failed = torch.linalg.cholesky_ex(kernel)
        fine = (failed == 0) & _well_pivoted(factor, tiny)
        answer = factor.tril(-1) @ torch.linalg.solve_triangular(factor, z, upper=False)
        if xs.shape[1] > d:
            factor, failed = torch.linalg.cholesky_ex(gram(xs)[:, d:])
            fine = fine & ((failed == 0) & _well_pivoted(factor, tiny)).all(1)
            weights = torch.cholesky_solve(moment(xs, ys)[:, d:], factor)
            answer = torch.cat((answer, apply(xs[:, d:], weights)), 1)
        if not fine.all():
            answer[~fine] = _filtered(xs[~fine], ys[~fine], lambda s: 1 / s)
        return answer


@register("learner", "ridge", family="functions", papers=("2208.01066", "2211.15661"), cases=({}, {"strength": 0.0}))
@dataclass(frozen=True)
class Ridge(RegressionLearner):
    """Ridge regression: least |y - X w|^2 + strength |w|^2.

    With strength = noise variance / weight variance it is the posterior mean of Gaussian weights under
    Gaussian noise, whatever the inputs: no predictor has a smaller expected squared error.

    One factorisation serves all prefixes. Let K = X X^T + strength I over all n examples, K = L L^T, z =
    L^-1 y. The leading blocks of L and z are those of the prefix (Cholesky and forward substitution never
    look ahead), and row i of K left of the diagonal is X_i x_i = L_i L[i, :i]^T. So the prediction at i from
    the first i examples, (X_i x_i)^T K_i^-1 y_i, is L[i, :i] . z[:i].

    strength: weight of |w|^2; 0 is the limit, ordinary least squares.
    """

    strength: NonNegativeFloat = 1.0

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        if self.strength == 0:
            return LeastSquares().predict(xs, ys)
        kernel = xs @ xs.mT
        kernel.diagonal(dim1=1, dim2=2).add_(self.strength)
        factor, failed = torch.linalg.cholesky_ex(kernel)
        if failed.any():  # strength is lost in the rounding of X X^T: the d x d form stays accurate
            return _filtered(xs, ys, lambda s: 1 / (s + self.strength))
        return factor.tril(-1) @ torch.linalg.solve_triangular(factor, ys, upper=False)


@register(
    "learner",
    "gradient_descent",
    family="functions",
    papers=("2211.15661", "2212.07677"),
    cases=({}, {"steps": 3, "step_size": 0.02}),
)
@dataclass(frozen=True)
class GradientDescent(RegressionLearner):
    """Steps of full-batch gradient descent from w = 0 on the mean of (y - w . x)^2 / 2 over the examples.

    steps: gradient steps.
    step_size: None for 1 / the largest absolute row sum of X^T X / i, a bound on its largest eigenvalue, so
        that the descent never diverges.
    """

    steps: PositiveInt = 10
    step_size: PositiveFloat | None = None

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        count = _counts(xs)[:, None, None]
        curvature, pull = gram(xs) / count, moment(xs, ys) / count
        if self.step_size is None:
            largest = curvature.abs().sum(-1).amax(-1)[..., None, None]
            size = torch.where(largest > 0, 1 / largest, 0)
        else:
            size = torch.full_like(count, self.step_size)
        weights = size * pull
        for _ in range(self.steps - 1):
            weights = weights + size * (pull - curvature @ weights)
        return apply(xs, weights)


@register("learner", "newton", family="functions", papers=("2310.17086",), cases=({}, {"steps": 3}, {"start": 0.001}))
@dataclass(frozen=True)
class Newton(RegressionLearner):
    """Steps of Newton's iteration for the inverse of S = X^T X: M <- 2 M - M S M, w = M X^T y (2310.17086).

    It starts at M = a S with a = 1 / (largest eigenvalue of S)^2, half of the bound up to which it
    converges. The error I - M S is squared by each step; M has the eigenvectors of S at every step, so the
    iterate is computed on the eigenvalues, which keeps null directions exactly null.

    steps: Newton steps.
    start: a, for S / i, the mean of x x^T over the i examples, in the place of S: fixed, as a model's weights are; it
        may then diverge. None for that above.
    """

    steps: NonNegativeInt = 10
    start: PositiveFloat | None = None

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        def inverse(s: Tensor) -> Tensor:
            if self.start is None:
                estimate = s / s.amax(-1, keepdim=True).square()
            else:  # M of the mean is i times that of the sum
                estimate = s * self.start / _counts(xs)[:, None].square()
            for _ in range(self.steps):
                estimate = estimate * (2 - estimate * s)
            return estimate

        return _filtered(xs, ys, inverse)


@register("learner", "lasso", family="functions", papers=("2208.01066",), cases=({}, {"strength": 0.01}))
@dataclass(frozen=True)
class Lasso(RegressionLearner):
    """Lasso: least |y - X w|^2 / (2 i) + strength |w|_1 over the i examples, as in scikit-learn.

    The path of solutions is followed from the strength at which all weights are zero down to `strength`. It is
    linear between knots, at which one weight joins or leaves, so the answer is exact (LARS with the lasso's
    change, Efron et al., 2004, section 3.1). All prefixes take their next knot at once.

    strength: weight of |w|_1.
    knots: most knots of a path; a longer one ends at its last knot.
    """

    strength: PositiveFloat = 0.1
    knots: PositiveInt = 1000

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        count = _counts(xs)[:, None, None]
        curvature, pull = gram(xs) / count, moment(xs, ys) / count
        outputs = ys.shape[-1]
        curvature = curvature.unsqueeze(2).expand(-1, -1, outputs, -1, -1).flatten(0, 2)
        weights = self._solve(curvature, pull.mT.flatten(0, 2))
        return apply(xs, weights.unflatten(0, (*ys.shape[:2], outputs)).mT)

    def _solve(self, g: Tensor, b: Tensor) -> Tensor:
        """Minimise w'Gw / 2 - b'w + strength |w|_1 for every G [P, d, d] and b [P, d] at once; [P, d]."""
        answer, eye = torch.zeros_like(b), torch.eye(b.shape[1], dtype=b.dtype, device=b.device)
        level = b.abs().amax(1, keepdim=True)
        todo = (level.squeeze(1) > self.strength).nonzero().squeeze(1)  # elsewhere w = 0 is the solution
        g, b, level = g[todo], b[todo], level[todo]
        w, first = torch.zeros_like(b), b.abs().argmax(1, keepdim=True)
        sign = torch.zeros_like(b).scatter_(1, first, b.gather(1, first).sign())  # of the weights in use, else 0
        left = torch.zeros_like(b)  # the sign of the weight that left at the last knot
        for _ in range(self.knots):
            if not todo.numel():
                break
            used = sign != 0
            block = torch.where(used.unsqueeze(1) & used.unsqueeze(2), g, eye)
            factor = torch.linalg.cholesky_ex(block).L
            step = torch.cholesky_solve(sign.unsqueeze(-1), factor)  # of w, while the level falls by 1
            fall = (g @ step).squeeze(-1)  # of the slopes b - G w; `sign` for the weights in use
            step, slope = step.squeeze(-1), b - (g @ w.unsqueeze(-1)).squeeze(-1)
            # How far the level falls until an unused slope meets it from below or above, or a weight gets to 0.
            above = _ratio(level - slope, 1 - fall, ~used & (left <= 0))
            below = _ratio(level + slope, 1 + fall, ~used & (left >= 0))
            zero = _ratio(w.abs(), step.abs(), used & (w * step < 0))
            events = torch.cat([above, below, zero, level - self.strength], 1)
            distance, event = events.min(1, keepdim=True)
            w, level = w + distance * step, level - distance
            chosen = torch.zeros_like(events).scatter_(1, event, 1)
            up, down, leaves, end = chosen.split([b.shape[1]] * 3 + [1], dim=1)
            left = sign * leaves
            w, sign = w * (1 - leaves), sign - left + up - down
            done = end.squeeze(1) > 0
            answer[todo[done]] = w[done]
            todo, g, b, w, level, sign, left = (t[~done] for t in (todo, g, b, w, level, sign, left))
        answer[todo] = w
        return answer


def _ratio(distance: Tensor, speed: Tensor, where: Tensor) -> Tensor:
    """When something so far away, coming nearer so fast, arrives; infinite where it does not or is not asked."""
    return torch.where(where & (speed > 1e-10), distance / speed, torch.inf).clamp(min=0)


@register("learner", "pool_posterior", family="functions", papers=("2306.15063",), cases=())
@dataclass(frozen=True, eq=False)
class PoolPosterior(RegressionLearner):
    """The posterior mean over a finite pool of weight vectors, all equally likely a priori (2306.15063).

    Bayes-optimal when the prompts' weights come from the pool.

    weights: the pool, [M, d] float.
    noise: standard deviation of the Gaussian noise on y.
    """

    weights: Tensor
    noise: PositiveFloat

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        if xs.shape[-1] != self.weights.shape[-1]:
            raise InputError(f"the pool has {self.weights.shape[-1]} dimensions, the prompt {xs.shape[-1]}")
        answers = xs @ self.weights.to(xs).T  # [B, n, M]: what each member of the pool says
        # One posterior for each output, which are separate problems: [B, n, M, k].
        miss = (ys.unsqueeze(2) - answers.unsqueeze(3)).square()
        posterior = (before(miss) / (-2 * self.noise**2)).softmax(dim=2)
        return (posterior * answers.unsqueeze(3)).sum(2)


def _counts(xs: Tensor) -> Tensor:
    """Examples before each i, [n], at least 1 so that the empty prefix can be divided by it."""
    return torch.arange(xs.shape[1], device=xs.device, dtype=xs.dtype).clamp(min=1)


def _well_pivoted(factor: Tensor, tiny: float) -> Tensor:
    """Whether no pivot of a Cholesky factor [..., n, n] is lost beside the largest; [...] bool."""
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    return pivots.amin(-1) > tiny * pivots.amax(-1)


def _filtered(xs: Tensor, ys: Tensor, inverse: Callable[[Tensor], Tensor]) -> Tensor:
    """Predictions with w = V inverse(s) V^T X^T y, where X^T X = V s V^T; null directions get 0.

    inverse: eigenvalues [B, n, d] -> filter [B, n, d], for eigenvalues above the rounding error.
    """
    s, v = torch.linalg.eigh(gram(xs))
    largest = torch.where(s[..., -1:] > 0, s[..., -1:], 1)
    real = s > largest * (xs.shape[-1] * torch.finfo(s.dtype).eps)
    factor = torch.where(real, inverse(torch.where(real, s, largest)), 0)
    return apply(xs, v @ (factor.unsqueeze(-1) * (v.mT @ moment(xs, ys))))
