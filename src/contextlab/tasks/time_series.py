"""Series to be forecast in context: autoregressions, dynamical systems, sums of waves; sliding windows of inputs."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.bayes import BasisPosterior, BayesMixture, MemberOracle
from contextlab.learners.regression import LeastSquares, NearestNeighbours, Ridge
from contextlab.learners.time_series import ARLeastSquares, ARPosterior, LastValue, lags, normal_points, stable
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.averages import mean_of, strides
from contextlab.tasks.base import Drawn, ExamplesTask, check_options
from contextlab.tasks.regression import NOISELESS

MOST_SIMULATED = 512
"""States of a system that are simulated to find the mean square of many more."""

LEAST_STABLE = 0.05
"""Share of coefficient vectors that must be stable: drawing stable ones tries about 1 / LEAST_STABLE of them each."""

MOST_MEMBERS = 512
"""Sets of frequencies that the exact posterior of `waves` weighs at most; its time grows with their number."""


@dataclass(frozen=True)
class ForecastTask(Task):
    """Base: a series whose next value is to be predicted at every time; squared error, summed over coordinates.

    Subclasses define `series`. At time t the model reads the values before t (zero before the start) and predicts
    value t. Learners find value t in `Prompt.ys`, and what it may depend on in `Prompt.xs`.

    length: values in a series.
    noise: standard deviation of the noise on each coordinate.
    window: values that a token shows, the latest first: 1 for the plain series, more for sliding windows.
    """

    metric: ClassVar[str] = "squared_error"

    length: PositiveInt = 64
    noise: NonNegativeFloat = 1.0
    window: PositiveInt = 1

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def input_size(self) -> int:
        return self.window * self.output_size

    @property
    def output_size(self) -> int:
        return 1

    @property
    def first(self) -> int:
        """The first time that is scored; `shot` counts the values from here."""
        return 0

    @abstractmethod
    def series(
        self, batch: int, generator: torch.Generator, device: torch.device | str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Values [batch, length, k], and what drew them."""

    def regressors(self, values: Tensor) -> Tensor:
        """`Prompt.xs`: what value t may depend on, [B, T, d]; the value before, unless a task says otherwise."""
        return lags(values, 1)

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts, float32, T = length."""
        values, hidden = self.series(batch, generator, device)
        at = torch.arange(self.length, device=values.device)
        return Prompt(
            lags(values, self.window),
            values,
            (at >= self.first).expand(batch, -1),
            (at - self.first).clamp_min(0).expand(batch, -1),
            self.regressors(values),
            values,
            at,
            hidden,
        )

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        """Mean squared error over the scored positions, summed over coordinates. prediction: [B, T, k]."""
        square = (prediction.float() - prompt.targets).square().sum(-1)
        return (square * prompt.scored).sum() / prompt.scored.sum()

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """squared_error [B, T], summed over coordinates (so at least noise^2 for each on average)."""
        return {"squared_error": (prediction.float() - prompt.targets).square().sum(-1)}

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """The series, a value a line, `[..]` where it is to be predicted."""
        lines = []
        for t, (value, scored) in enumerate(
            zip(prompt.targets[row].tolist(), prompt.scored[row].tolist(), strict=True)
        ):
            shown = " ".join(f"{number: .2f}" for number in value[:8]) + (" ..." if len(value) > 8 else "")
            lines.append(f"t={t:<3} " + (f"[{shown}]" if scored else f" {shown}"))
        return "\n".join(lines)

    def splits(self) -> dict[str, Task]:
        """'train', other noise, twice the length."""
        return {
            "train": self,
            "other noise": self.replace(noise=3 * self.noise if self.noise else 0.1),
            "longer": self.replace(length=2 * self.length),
        }


@register(
    "task",
    "autoregression",
    family="functions",
    papers=("2510.09776",),
    cases=({"length": 24}, {"order": 1, "length": 16, "noise": 0.3}, {"order": 4, "length": 24, "window": 4}),
)
@dataclass(frozen=True)
class Autoregression(ForecastTask):
    """AR(p) series: x_t = sum_j c_j x_{t-j} + noise, new stationary coefficients for each prompt.

    The coefficients are N(0, scale^2 / p), drawn again until they are stable, and the first p values are noise. (The
    data of 2510.09776 have coefficients uniform in [-0.9, 0.9], drawn until stable, and first values of the stationary
    variance, all prompts windows of one series. A Gaussian prior has an exact predictor.) A token that shows `order`
    values is a column of the Hankel matrix that the paper's linear attention reads. Least squares needs about 2 p
    values; the posterior knows the prior, too.

    order: p, the values before that the next one depends on.
    scale: root of the coefficients' sum of squares, on average before the restriction to stable ones.
    length: values in a series.
    noise: standard deviation of the noise.
    window: values that a token shows, the latest first.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"order": 1, "length": 32},
        "hard": {"order": 6, "length": 96},
    }

    noise: PositiveFloat = 1.0
    order: PositiveInt = 3
    scale: PositiveFloat = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length <= self.order:
            raise InputError(
                f"length {self.length} leaves nothing to predict from order {self.order}; at least {self.order + 1}"
            )
        if (share := _stable_share(self.order, self.deviation)) < LEAST_STABLE:
            raise InputError(
                f"scale {self.scale:g} makes {share:.1%} of the coefficients of order {self.order} stable; at least "
                f"{LEAST_STABLE:.0%} must be, as for a scale of 0.5 or less"
            )

    @property
    def deviation(self) -> float:
        """Standard deviation of a coefficient before the restriction."""
        return self.scale / math.sqrt(self.order)

    @property
    def first(self) -> int:
        return self.order

    def regressors(self, values: Tensor) -> Tensor:
        return lags(values, self.order)

    def coefficients(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """Stable ones, the latest value's first, [batch, order]."""
        found = self.deviation * torch.randn(batch, self.order, generator=generator, device=device)
        while (outside := (~stable(found)).nonzero().squeeze(1)).numel():
            again = torch.randn(len(outside), self.order, generator=generator, device=device)
            found[outside] = self.deviation * again
        return found

    def series(
        self, batch: int, generator: torch.Generator, device: torch.device | str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        coefficients = self.coefficients(batch, generator, device)
        values = self.noise * torch.randn(batch, self.length, generator=generator, device=device)
        earliest_first = coefficients.flip(1)
        for t in range(self.order, self.length):
            values[:, t] += (earliest_first * values[:, t - self.order : t]).sum(1)
        return values.unsqueeze(-1), {"coefficients": coefficients}

    def learners(self) -> dict[str, Learner]:
        """`bayes` knows the prior and the restriction to stable coefficients; `ridge` knows the prior alone."""
        return {
            "bayes": ARPosterior(self.order, self.noise, self.deviation),
            "ridge": ARLeastSquares(self.order, (self.noise / self.deviation) ** 2),
            "least_squares": ARLeastSquares(self.order),
            "least_squares, order 1": ARLeastSquares(1),
            "last_value": LastValue(),
            "knn": NearestNeighbours(),
        }

    def splits(self) -> dict[str, Task]:
        """Those of every series, weaker dependence, and twice the order."""
        found = super().splits() | {"weaker": self.replace(scale=self.scale / 2)}
        share = _stable_share(2 * self.order, self.scale / math.sqrt(2 * self.order))
        if self.length > 2 * self.order and share >= LEAST_STABLE:
            found["twice the order"] = self.replace(order=2 * self.order)
        return found

    def chance(self) -> Mapping[str, float]:
        """The expected squared error of predicting zero, from 2^14 quasi-random processes (within about 1%)."""
        return {"squared_error": self.noise**2 * _mean_square(self.order, self.deviation, self.length)}


@lru_cache(maxsize=64)
def _stable_share(order: int, deviation: float) -> float:
    return stable(normal_points(2**12, order) * deviation).double().mean().item()


@lru_cache(maxsize=64)
def _mean_square(order: int, deviation: float, length: int) -> float:
    """The mean of E x_t^2 over t >= order, for noise of variance 1."""
    coefficients = normal_points(2**14, order) * deviation
    coefficients = coefficients[stable(coefficients)]
    # Covariance of the last `order` values, the latest first, and its step to the next time.
    covariance = torch.eye(order, dtype=torch.float64).expand(len(coefficients), -1, -1)
    companion = torch.eye(order, dtype=torch.float64)[:-1]  # each value moves down
    step = torch.cat([coefficients.unsqueeze(1), companion.expand(len(coefficients), -1, -1)], 1)
    shock = torch.zeros(order, order, dtype=torch.float64)
    shock[0, 0] = 1
    powers = [(step, shock)]  # of two: (step^s, what the shocks of s times add)

    def after(s: int) -> None:
        nonlocal covariance
        while len(powers) < s.bit_length():
            one, added = powers[-1]
            powers.append((one @ one, one @ added @ one.mT + added))
        one, added = powers[s.bit_length() - 1]
        covariance = one @ covariance @ one.mT + added

    after(1)
    squares = {0: covariance[:, 0, 0].mean().item()}
    at = 0
    for stride in strides(length - order):
        after(stride)
        at += stride
        squares[at] = covariance[:, 0, 0].mean().item()
    return mean_of(squares.__getitem__, length - order)


@register(
    "task",
    "dynamical_system",
    family="functions",
    papers=("2312.12655",),
    cases=({"dimensions": 3, "length": 24}, {"dimensions": 2, "length": 16, "gain": 1.0, "noise": 0.5, "window": 2}),
)
@dataclass(frozen=True)
class DynamicalSystem(ForecastTask):
    """Random networks as dynamical systems: x_t = W tanh(x_{t-1}) + noise, a new W for each prompt.

    W has entries N(0, gain^2 / d) and x_0 is N(0, I), so that values stay bounded, and without noise large systems are
    chaotic for gains well above 1. In tanh(x_{t-1}) the system is linear: Bayesian regression on it is exact. (The
    idea of learning sequential functions in context is that of 2312.12655; the systems are ours.)

    dimensions: d, coordinates of a state.
    gain: spread of W's entries, times sqrt(d).
    length: states in a series.
    noise: standard deviation of the noise on each coordinate.
    window: states that a token shows, the latest first.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"dimensions": 2, "length": 32},
        "hard": {"dimensions": 10, "length": 96, "gain": 3.0, "noise": 0.3},
    }

    noise: NonNegativeFloat = 0.1
    dimensions: PositiveInt = 5
    gain: PositiveFloat = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 2:
            raise InputError(f"length {self.length} leaves nothing to predict from the first state; at least 2")

    @property
    def output_size(self) -> int:
        return self.dimensions

    @property
    def first(self) -> int:
        return 1

    def series(
        self, batch: int, generator: torch.Generator, device: torch.device | str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        weights = self.gain / math.sqrt(self.dimensions) * normal(batch, self.dimensions, self.dimensions)
        states = [normal(batch, self.dimensions, 1)]
        for _ in range(1, self.length):
            states.append(weights @ states[-1].tanh() + self.noise * normal(batch, self.dimensions, 1))
        return torch.stack(states, 1).squeeze(-1), {"weights": weights}

    def learners(self) -> dict[str, Learner]:
        """`bayes` is exact; `linear` takes the system for a linear one."""
        strength = self.dimensions * (self.noise / self.gain) ** 2
        return {
            "bayes": ARLeastSquares(1, strength, "tanh"),
            "least_squares on tanh": ARLeastSquares(1, 0.0, "tanh"),
            "linear": ARLeastSquares(1, max(strength, 1e-3)),
            "knn": NearestNeighbours(1),
            "last_value": LastValue(),
        }

    def splits(self) -> dict[str, Task]:
        """Those of every series, half and twice the gain."""
        gains = {f"gain={gain:g}": self.replace(gain=gain) for gain in (self.gain / 2, 2 * self.gain)}
        return super().splits() | gains

    def chance(self) -> Mapping[str, float]:
        """The expected squared error of predicting zero, from systems drawn once (within about 1%)."""
        return {"squared_error": _simulated_square(self.replace(window=1))}


@lru_cache(maxsize=32)
def _simulated_square(task: DynamicalSystem) -> float:
    short = task.replace(length=min(task.length, MOST_SIMULATED))
    values, _ = short.series(max(2**8, 2**16 // task.dimensions), torch.Generator().manual_seed(0), "cpu")
    squares = values[:, task.first :].double().square().sum(2)
    later = task.length - short.length  # by then a system has forgotten how it began
    rest = later * squares[:, squares.shape[1] // 2 :].mean().item() if later else 0.0
    return (squares.mean().item() * squares.shape[1] + rest) / (squares.shape[1] + later)


@dataclass(frozen=True)
class Waves:
    """cos(w t), sin(w t) for each frequency w; or exp(-w t) for each rate w: [..., 1] -> [..., p]."""

    rates: tuple[float, ...]
    kind: Literal["sinusoids", "exponentials"]

    def __call__(self, times: Tensor) -> Tensor:
        angle = times * torch.tensor(self.rates, dtype=times.dtype, device=times.device)
        if self.kind == "exponentials":
            return (-angle).exp()
        return torch.stack([angle.cos(), angle.sin()], -1).flatten(-2)


@register(
    "task",
    "waves",
    family="functions",
    cases=(
        {"length": 16, "grid": 6, "terms": 1},
        {"length": 16, "grid": 5, "noise": 0.0},
        {"length": 16, "grid": 5, "kind": "exponentials"},
    ),
)
@dataclass(frozen=True)
class WaveSeries(ForecastTask):
    """Sums of a few sinusoids, or of a few decaying exponentials, of unknown frequencies or rates: forecast them.

    Each prompt takes `terms` of the `grid` frequencies or rates, and amplitudes N(0, 1 / terms), for a sinusoid one of
    the cosine and one of the sine. Frequencies are evenly spaced in (0, pi) a step, time constants of the exponentials
    by equal ratios from 2 to 64 steps. Without noise the series obeys a linear recurrence of order 2 terms (terms for
    exponentials), so that autoregression solves it, too. The split "between the grid" has the frequencies half way
    between those of training.

    kind: "sinusoids" or "exponentials".
    terms: in each sum.
    grid: frequencies or rates to choose from.
    between: choose from those half way between instead.
    length: values in a series.
    noise: standard deviation of the noise.
    window: values that a token shows, the latest first.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"terms": 1, "grid": 8, "length": 24},
        "hard": {"grid": 24, "length": 64, "noise": 0.3},
    }

    length: PositiveInt = 32
    noise: NonNegativeFloat = 0.1
    kind: Literal["sinusoids", "exponentials"] = "sinusoids"
    terms: PositiveInt = 2
    grid: PositiveInt = 10
    between: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = math.comb(self.grid, self.terms)
        if not 1 <= choices <= MOST_MEMBERS:
            raise InputError(
                f"terms {self.terms} of a grid of {self.grid} are {choices} sets; the exact posterior weighs 1 to "
                f"{MOST_MEMBERS}, such as those of terms 2 of a grid of 10"
            )

    def rates(self) -> tuple[float, ...]:
        """Frequencies, or inverse time constants, in radians or 1 a step."""
        places = [(i + (0.5 if self.between else 0.0)) / (self.grid + 1) for i in range(1, self.grid + 1)]
        if self.kind == "sinusoids":
            return tuple(math.pi * place for place in places)
        return tuple(2.0 ** -(1 + 5 * place) for place in places)

    def members(self) -> tuple[Waves, ...]:
        """Every set of rates that a prompt may have."""
        return tuple(Waves(chosen, self.kind) for chosen in itertools.combinations(self.rates(), self.terms))

    def regressors(self, values: Tensor) -> Tensor:
        """The time of each value."""
        times = torch.arange(self.length, dtype=values.dtype, device=values.device)
        return times.unsqueeze(1).expand(len(values), -1, -1)

    def series(
        self, batch: int, generator: torch.Generator, device: torch.device | str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        times = torch.arange(self.length, dtype=torch.float32, device=device).unsqueeze(1)
        functions = torch.stack([member(times) for member in self.members()])  # [M, T, p]
        member = torch.randint(len(functions), (batch,), generator=generator, device=device)
        weights = torch.randn(batch, functions.shape[2], 1, generator=generator, device=device) / math.sqrt(self.terms)
        values = functions[member] @ weights
        if self.noise:
            values = values + self.noise * torch.randn(values.shape, generator=generator, device=device)
        return values, {"member": member}

    def learners(self) -> dict[str, Learner]:
        """`bayes` weighs every set of frequencies and is exact; `set_oracle` is told."""
        noise, order = max(self.noise, NOISELESS), (2 if self.kind == "sinusoids" else 1) * self.terms
        scale = 1 / math.sqrt(self.terms)
        members = tuple(BasisPosterior(member, noise, scale) for member in self.members())
        return {
            "bayes": BayesMixture(members),
            "all_rates": BasisPosterior(
                Waves(self.rates(), self.kind), noise, scale * math.sqrt(self.terms / self.grid)
            ),
            "autoregression": ARLeastSquares(order, max(self.noise**2, 1e-6)),
            "last_value": LastValue(),
            "set_oracle": MemberOracle(members),
        }

    def splits(self) -> dict[str, Task]:
        """Those of every series, frequencies between the grid's, and one term."""
        found = super().splits() | {"between the grid": self.replace(between=not self.between)}
        if self.terms > 1:
            found["one term"] = self.replace(terms=1)
        return found

    def chance(self) -> Mapping[str, float]:
        """The expected squared error of predicting zero."""
        times = torch.arange(self.length, dtype=torch.float64).unsqueeze(1)
        square = Waves(self.rates(), self.kind)(times).square().sum(1).mean().item() / self.grid
        return {"squared_error": square + self.noise**2}


@dataclass(frozen=True)
class Windows:
    """Each input with those before it, `width` in all: [B, n, d] -> [B, n, width * d]; zero before the first."""

    width: int

    def __call__(self, xs: Tensor) -> Tensor:
        return torch.cat([xs, lags(xs, self.width - 1)], -1) if self.width > 1 else xs


@register(
    "task",
    "sliding_window",
    family="functions",
    papers=("2312.12655",),
    cases=({"dimensions": 2, "examples": 24}, {"width": 2, "examples": 16, "noise": 0.5, "layout": "interleaved"}),
)
@dataclass(frozen=True)
class SlidingWindow(ExamplesTask):
    """Sequential functions: y_i depends on the last few inputs, y_i = sum_j w_j . x_{i-j} + noise, j < width.

    The inputs are N(0, I), zero before the first, and the weights N(0, 1 / width), new for each prompt. To predict well
    is to know the order of the examples: regression on x_i alone explains 1 / width of y. (After the sliding windows of
    2312.12655, of which we know the summary only; sizes and distributions are ours.)

    width: inputs that y depends on, x_i among them.
    noise: standard deviation of the noise on y.
    order: "sequential"; "shuffled" shows the same examples in a random order, which hides the windows.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"dimensions": 1, "width": 2, "examples": 16},
        "hard": {"dimensions": 5, "width": 5, "examples": 80, "noise": 0.5},
    }

    dimensions: PositiveInt = 3
    width: PositiveInt = 3
    noise: NonNegativeFloat = 0.0
    order: Literal["sequential", "shuffled"] = "sequential"

    def draw(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Drawn:
        xs = torch.randn(batch, self.examples, self.dimensions, generator=generator, device=device)
        shape = (batch, self.width * self.dimensions, 1)
        weights = torch.randn(shape, generator=generator, device=device) / math.sqrt(self.width)
        ys = Windows(self.width)(xs) @ weights
        if self.noise:
            ys = ys + self.noise * torch.randn(ys.shape, generator=generator, device=device)
        if self.order == "shuffled":
            places = torch.rand(batch, self.examples, 1, generator=generator, device=device).argsort(1)
            xs, ys = xs.gather(1, places.expand_as(xs)), ys.gather(1, places)
        return Drawn(xs, ys, hidden={"weights": weights})

    def learners(self) -> dict[str, Learner]:
        """In sequence `bayes` is exact; of shuffled examples x alone tells something, all else is noise."""
        noise = max(self.noise, NOISELESS)
        scale = 1 / math.sqrt(self.width)
        window = BasisPosterior(Windows(self.width), noise, scale)
        hidden = (self.width - 1) / self.width * self.dimensions  # variance of y that x_i does not explain
        alone = Ridge(self.width * (noise**2 + hidden))
        rest: dict[str, Learner] = {"ols": LeastSquares(), "knn": NearestNeighbours()}
        if self.order == "shuffled":
            return {"current_input": alone, "window": window, **rest}
        return {"bayes": window, "current_input": alone, **rest}

    def splits(self) -> dict[str, Task]:
        """'train', other noise, more examples, another width, and the same examples out of order (or in it)."""
        return {
            "train": self,
            "other noise": self.replace(noise=4 * self.noise if self.noise else 0.5),
            "more examples": self.replace(examples=2 * self.examples),
            f"width={self.width + 1}": self.replace(width=self.width + 1),
            "other order": self.replace(order="sequential" if self.order == "shuffled" else "shuffled"),
        }

    def chance(self) -> Mapping[str, float]:
        """The expected squared error of predicting zero; the first windows are short."""
        filled = sum(min(i, self.width) for i in range(1, self.examples + 1)) / self.examples
        return {"squared_error": self.dimensions * filled / self.width + self.noise**2}
