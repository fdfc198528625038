"""Which algorithm is it? How alike a predictor and each learner are: their errors, predictions and induced weights."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.errors import InputError, unknown
from contextlab.evaluation.evaluate import Z95, _evaluating, _kept_prompts, _prompts, _spec, _splits, predict
from contextlab.evaluation.spec import EvaluateSpec
from contextlab.models import Model
from contextlab.prompt import Learner, Predictor, Prompt, Task
from contextlab.tasks.base import Drawn, LabelTask, lay_out

COLUMNS = ("split", "learner", "measure", "shot", "value", "ci_low", "ci_high", "n")
ROUNDING = 1e-5
"""Errors below this part of the targets' root mean square count as none: their direction is that of rounding."""
MOST_PREFIXES = 8
"""Prefixes at which induced weights are measured, spread evenly over the prompt."""


def similarity(
    predictor: Predictor,
    task: Task,
    learners: Mapping[str, Learner] | Iterable[str] | None = None,
    spec: EvaluateSpec | Mapping[str, Any] | None = None,
    *,
    weights: bool = True,
    weight_prompts: int = 32,
    queries: int | None = None,
    device: torch.device | str | None = None,
    **changes: Any,
) -> pd.DataFrame:
    """Compare a predictor with learners, by shot and over all shots, on each split of a task.

    predictor: a model (called with `prompt.inputs`), a learner, or any function of the prompt's inputs.
    task: where the predictor was trained. Its learners, tuned to it, answer the prompts of all its splits.
    learners: by name, or names of the task's; None for all of them.
    spec: an EvaluateSpec or its keys (prompts, batch, seed, splits); `changes` replace its own. Prompts are the same as
        those of `evaluate`.
    weights: measure induced weights, too, of tasks with (x, y) examples in a layout.
    weight_prompts: prompts for that, each asked at some prefixes with all queries.
    queries: inputs asked at each prefix; None for four times their size.

    Returns a tidy table (`COLUMNS`), a row a split, learner, measure and shot; a missing shot stands for all. Measures:

    errors: cosine of the two error vectors: of a shot, over the prompts; of all shots from 1 on, within each prompt,
        averaged (similarity of errors, 2310.17086). 1 where neither errs, 0 where only one does.
    spd: mean squared difference of the predictions (squared prediction difference, 2211.15661).
    separation: the same between this learner and the other that is nearest to it: where the separation is not well
        above the predictor's spd, the split cannot tell these two apart.
    weights: cosine of the weights induced by least squares from the answers to the queries at one prefix
        (2310.17086), averaged over prompts.
    ilwd: squared difference of these weights (implicit linear weight difference, 2211.15661).

    Tasks of labels or tokens are compared by probabilities. Intervals are 95% over prompts: jackknife for the cosines
    over prompts, else normal. A split that the predictor or a learner cannot answer is left out with a warning.
    """
    spec = _spec(spec, changes)
    named = _named(task, learners)
    if device is None:
        first = next(predictor.parameters(), None) if isinstance(predictor, nn.Module) else None
        device = first.device if first is not None else "cpu"
    rows: list[dict[str, Any]] = []
    for split, index, shifted in _splits(task, spec):
        try:
            with _evaluating(predictor):
                prompts = _kept_prompts(shifted, spec, index, device)
                found = compare_predictions((predict(predictor, prompt) for prompt in prompts), named, shifted, prompts)
                if weights and (probe := _Probe.of(shifted, spec, index, device, weight_prompts, queries)) is not None:
                    found += _compare_weights(predictor, named, probe)
        except InputError as error:
            warnings.warn(f"split {split!r} is left out: {error}", stacklevel=2)
            continue
        rows += [{"split": split, **row} for row in found]
    return _table(rows, COLUMNS)


def matching_steps(
    predictor: Predictor,
    task: Task,
    learner: Learner | str,
    steps: Sequence[int] = tuple(range(1, 33)),
    spec: EvaluateSpec | Mapping[str, Any] | None = None,
    *,
    split: str = "train",
    device: torch.device | str = "cpu",
    **changes: Any,
) -> pd.DataFrame:
    """The number of steps at which an iterative learner is most like a predictor (best-matching steps, 2310.17086).

    predictor: as for `similarity`; to follow a model through its depth, each of its `layer_read_outs`.
    learner: one with a number of steps, such as gradient_descent and newton, or the name of one of the task's.
    steps: to try.

    Returns a row a shot and number of steps: `learner`, `shot` (missing for all), `steps`, the similarity of errors in
    `value` with its interval, `n`, and `best`, true at the fewest steps that reach the largest similarity.
    """
    spec = _spec(spec, {**changes, "splits": [split]})
    chosen = next(iter(_named(task, [learner]).values())) if isinstance(learner, str) else learner
    if not dataclasses.is_dataclass(chosen) or not hasattr(chosen, "steps"):
        raise InputError(f"learner: {type(chosen).__name__} has no number of steps; take gradient_descent or newton")
    if not steps:
        raise InputError("steps: give at least one number of steps")
    named = {str(count): dataclasses.replace(chosen, steps=count) for count in steps}
    ((_, index, shifted),) = _splits(task, spec)
    with _evaluating(predictor):
        prompts = _kept_prompts(shifted, spec, index, device)
        predictions = (predict(predictor, prompt) for prompt in prompts)
        found = compare_predictions(predictions, named, shifted, prompts, between=False)
    rows = [row for row in found if row["measure"] == "errors"]
    most: dict[Any, float] = {}
    for row in rows:
        most[row["shot"]] = max(most.get(row["shot"], -math.inf), row["value"])
    done = set()
    name = learner if isinstance(learner, str) else type(chosen).__name__
    rows.sort(key=lambda row: (-1 if row["shot"] is None else row["shot"], int(row["learner"])))
    for row in rows:
        row["steps"], row["learner"] = int(row["learner"]), name
        row["best"] = row["shot"] not in done and row["value"] >= most[row["shot"]] - 1e-9
        if row["best"]:
            done.add(row["shot"])
    return _table(rows, ("learner", "shot", "steps", "value", "ci_low", "ci_high", "n", "best"))


def layer_read_outs(
    model: Model,
    task: Task,
    *,
    prompts: int = 1024,
    batch: int = 256,
    seed: int = EvaluateSpec().seed + 1,
    ridge: float = 1e-6,
) -> dict[str, Predictor]:
    """What each layer of a model already knows of the answer: a linear read-out of it, fitted by least squares.

    The predictions of successive layers can be held against successive steps of an iterative learner with
    `matching_steps`, as 2310.17086 does.

    task: one with real targets. prompts, batch, seed: of the prompts that the read-outs are fitted to; other than those
        that `matching_steps` draws by default.
    ridge: strength of the fit, as a part of the mean square of the layer's features.

    Returns "layer 1", "layer 2", ... and "output" (the model itself) as predictors; a layer is a block, or one pass
    through it where blocks are looped. Raises InputError for tasks whose targets are labels or tokens.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(1_000_003 * seed)
    products: list[Tensor] = []
    wanted: list[Tensor] = []
    with _evaluating(model):
        for start in range(0, prompts, batch):
            prompt = task.sample(min(batch, prompts - start), generator, device)
            if not prompt.targets.is_floating_point() or isinstance(task, LabelTask):
                raise InputError(
                    f"layers are read out for real targets, such as those of linear_regression, not of "
                    f"{type(task).__name__}"
                )
            for i, features in enumerate(_features(model, prompt.inputs)):
                x, y = features[prompt.scored], prompt.targets[prompt.scored].double()
                if i == len(products):
                    products.append(torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype, device=device))
                    wanted.append(torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype, device=device))
                products[i] += x.mT @ x
                wanted[i] += x.mT @ y
    weights = []
    for product, target in zip(products, wanted, strict=True):
        strength = ridge * product.diagonal().mean()
        weights.append(torch.linalg.solve(product + strength * torch.eye(len(product)).to(product), target))

    def reading(index: int, weight: Tensor) -> Predictor:
        def read(inputs: Tensor) -> Tensor:
            with _evaluating(model):
                return _features(model, inputs)[index] @ weight

        return read

    layers = {f"layer {i + 1}": reading(i, weight) for i, weight in enumerate(weights)}
    return {**layers, "output": model}


def _features(model: Model, inputs: Tensor) -> list[Tensor]:
    """What each block leaves, and a one for the constant: [B, T, width + 1] float64, block after block."""
    found: list[Tensor] = []

    def keep(module: nn.Module, given: Any, result: Any) -> None:
        found.append(F.pad(result[0].double(), (0, 1), value=1.0))

    hooks = [block.register_forward_hook(keep) for block in model.blocks]
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _named(task: Task, learners: Mapping[str, Learner] | Iterable[str] | None) -> dict[str, Learner]:
    if isinstance(learners, Mapping):
        return dict(learners)
    known = task.learners()
    for name in learners or ():
        if name not in known:
            raise InputError(f"learners: {unknown(f'learner of {type(task).__name__}', name, known)}")
    return known if learners is None else {name: known[name] for name in learners}


def _table(rows: list[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(columns)).astype({"shot": "Int64", "n": "Int64"})


def _answers(task: Task, prediction: Tensor, prompt: Prompt) -> Tensor:
    """A prediction as values whose differences mean something: expected y, or probabilities. [B, T, k], float64."""
    if not prompt.targets.is_floating_point():
        return prediction.double().softmax(-1)
    return (prediction.double() / 2).tanh() if isinstance(task, LabelTask) else prediction.double()


def _wanted(prompt: Prompt, size: int) -> Tensor:
    """The targets in the form of `_answers`; zero where nothing is scored, as a target there may be none."""
    if prompt.targets.is_floating_point():
        return prompt.targets.double()
    return F.one_hot(torch.where(prompt.scored, prompt.targets, 0), size).double()


@dataclass
class _Pair:
    """Sums, of each prompt and shot, that the comparison of two predictors needs; [batches of [B, S]]."""

    shots: int
    products: list[Tensor] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)
    differences: list[Tensor] = field(default_factory=list)

    def add(self, one: Tensor, two: Tensor, prompt: Prompt) -> None:
        """one, two: errors [B, T, k]."""
        for sums, values in (
            (self.products, one * two),
            (self.first, one.square()),
            (self.second, two.square()),
        ):
            sums.append(_by_shot(values.sum(-1), prompt, self.shots))

    def differ(self, one: Tensor, two: Tensor, prompt: Prompt) -> None:
        """one, two: answers [B, T, k]."""
        self.differences.append(_by_shot((one - two).square().sum(-1), prompt, self.shots))

    def cosines(self, counts: Tensor) -> list[dict[str, Any]]:
        """counts: predictions of each prompt and shot, [prompts, S]."""
        a, b, c = (torch.cat(sums) for sums in (self.products, self.first, self.second))
        later = slice(1 if self.shots > 1 else 0, None)
        rows = [_mean(_cosine(a[:, later].sum(1), b[:, later].sum(1), c[:, later].sum(1)), most=1.0)]
        for shot in range(self.shots):
            has = counts[:, shot] > 0
            if not (n := int(has.sum())):
                continue
            sums = [each[has, shot] for each in (a, b, c)]
            value = _cosine(*(each.sum() for each in sums))
            left_out = _cosine(*(each.sum() - each for each in sums))
            half = Z95 * math.sqrt((n - 1) / n * (left_out - left_out.mean()).square().sum().item())
            low, high = max(value.item() - half, -1.0), min(value.item() + half, 1.0)
            rows.append({"shot": shot, "value": value.item(), "ci_low": low, "ci_high": high, "n": n})
        return rows


def _by_shot(values: Tensor, prompt: Prompt, shots: int) -> Tensor:
    """Sums over the scored positions of each shot, [B, shots]."""
    found = torch.zeros(prompt.batch, shots, dtype=values.dtype, device=values.device)
    return found.scatter_add_(1, prompt.shot, torch.where(prompt.scored, values, 0.0)).cpu()


def _cosine(product: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """1 where both vectors are zero (of equal errors, none), 0 where one is."""
    tiny = torch.finfo(product.dtype).tiny
    both = (first <= tiny) & (second <= tiny)
    # a leave-one-out sum may end below zero by rounding
    return torch.where(both, 1.0, product / (first.clamp_min(0) * second.clamp_min(0)).sqrt().clamp_min(tiny))


def _mean(values: Tensor, shot: int | None = None, most: float = math.inf) -> dict[str, Any]:
    """Mean over prompts and its interval."""
    n, value = len(values), values.mean().item()
    half = Z95 * values.std(correction=min(1, n - 1)).item() / math.sqrt(n)
    return {"shot": shot, "value": value, "ci_low": value - half, "ci_high": min(value + half, most), "n": n}


def compare_predictions(
    predictions: Iterable[Tensor],
    named: Mapping[str, Learner],
    task: Task,
    prompts: Sequence[Prompt],
    between: bool = True,
) -> list[dict[str, Any]]:
    """Rows of `similarity` but for the split: errors, spd and separation (the last only where `between`).

    predictions: [B, T, k] for each of the prompts. named: learners by name, which answer the prompts here.
    """
    shots = 1 + max(int(prompt.shot.max()) for prompt in prompts)
    pairs = {name: _Pair(shots) for name in named}
    others = {(one, two): _Pair(shots) for one in named for two in named if between and one < two}
    counts = torch.cat([_by_shot(prompt.scored.double(), prompt, shots) for prompt in prompts])
    for prompt, prediction in zip(prompts, predictions, strict=True):
        own = _answers(task, prediction, prompt)
        wanted = _wanted(prompt, own.shape[-1])
        floor = ROUNDING * wanted[prompt.scored].square().mean().sqrt()

        def error(answer: Tensor, wanted: Tensor = wanted, floor: Tensor = floor) -> Tensor:
            return torch.where((answer - wanted).abs() > floor, answer - wanted, 0.0)

        answers = {}
        for name, learner in named.items():
            answer = _answers(task, learner(prompt), prompt)
            pairs[name].add(error(own), error(answer), prompt)
            pairs[name].differ(own, answer, prompt)
            if between:
                answers[name] = answer
        for (one, two), pair in others.items():
            pair.differ(answers[one], answers[two], prompt)

    def differences(measure: str, pair: _Pair) -> list[dict[str, Any]]:
        sums = torch.cat(pair.differences)
        rows = [_mean(sums.sum(1) / counts.sum(1))]
        for shot in range(shots):
            if (has := counts[:, shot] > 0).any():  # shots that no prompt scores tell nothing
                rows.append(_mean(sums[has, shot] / counts[has, shot], shot))
        return [{"measure": measure, **row} for row in rows]

    found = []
    for name, pair in pairs.items():
        rows = [{"measure": "errors", **row} for row in pair.cosines(counts)]
        rows += differences("spd", pair)
        mine = [other for both, other in others.items() if name in both]
        if mine:
            nearest = min(mine, key=lambda other: torch.cat(other.differences).sum().item())
            rows += differences("separation", nearest)
        found += [{"learner": name, **row} for row in rows]
    return found


@dataclass
class _Probe:
    """Prompts that ask many queries at each of some prefixes."""

    prompt: Prompt
    layout: Any
    queries: Tensor
    shots: list[int]
    batch: int

    @staticmethod
    def of(
        task: Task, spec: EvaluateSpec, index: int, device: torch.device | str, prompts: int, queries: int | None
    ) -> _Probe | None:
        """None for tasks without real (x, y) examples in a layout."""
        few = spec.model_copy(update={"prompts": min(prompts, spec.prompts), "batch": min(prompts, spec.prompts)})
        (prompt,) = _prompts(task, few, index, device)
        layout = getattr(task, "layout", None)
        real = prompt.targets.is_floating_point() and not isinstance(task, LabelTask)
        if layout is None or prompt.xs is None or prompt.ys is None or not real:
            return None
        size, n = prompt.xs.shape[-1], prompt.xs.shape[1]
        asked = 4 * size if queries is None else queries
        if asked < size:
            raise InputError(f"queries {asked} are too few for the weights of {size} dimensions; use at least {size}")
        generator = torch.Generator(device).manual_seed(1_000_003 * spec.seed + index + 500_000)
        drawn = task.sample(asked, generator, device).xs
        assert drawn is not None
        shots = sorted({round(1 + i * (n - 2) / (MOST_PREFIXES - 1)) for i in range(MOST_PREFIXES)} & set(range(1, n)))
        # one x of each of as many prompts, so that the queries are independent
        return _Probe(prompt, layout, drawn[torch.arange(asked), torch.arange(asked) % n], shots, spec.batch)

    def weights(self, predictor: Predictor) -> Tensor:
        """Induced at each prefix, [B, prefixes, d, k], float64."""
        inverse = torch.linalg.pinv(self.queries.double())
        return torch.stack([inverse @ self._ask(predictor, shot).double() for shot in self.shots], 1)

    def _ask(self, predictor: Predictor, shot: int) -> Tensor:
        """The answers to all queries after `shot` examples, [B, Q, k]."""
        xs, ys = self.prompt.xs, self.prompt.ys
        assert xs is not None
        assert ys is not None
        count, rows = len(self.queries), max(1, 8 * self.batch // len(self.queries))
        parts = []
        for start in range(0, len(xs), rows):
            x, y = (each[start : start + rows, : shot + 1] for each in (xs, ys))
            x, y = (each.repeat_interleave(count, 0) for each in (x, y))
            x[:, shot] = self.queries.repeat(len(x) // count, 1)
            y[:, shot] = 0  # what is asked
            hidden = self.prompt.rows(start, start + rows).hidden
            if hidden is not None:
                hidden = {name: value.repeat_interleave(count, 0) for name, value in hidden.items()}
            asked = lay_out(Drawn(x, y, hidden=hidden), self.layout)
            place = asked.at
            assert place is not None
            parts.append(predict(predictor, asked)[:, place[shot]].unflatten(0, (-1, count)))
        return torch.cat(parts)


def _compare_weights(predictor: Predictor, named: Mapping[str, Learner], probe: _Probe) -> list[dict[str, Any]]:
    """Rows of weights and ilwd."""
    if not probe.shots:
        return []
    own = probe.weights(predictor).flatten(2).cpu()
    found = []
    for name, learner in named.items():
        other = probe.weights(learner).flatten(2).cpu()
        cosines = _cosine((own * other).sum(2), own.square().sum(2), other.square().sum(2))
        distances = (own - other).square().sum(2)
        for measure, values, most in (("weights", cosines, 1.0), ("ilwd", distances, math.inf)):
            rows = [_mean(values.mean(1), most=most)]
            rows += [_mean(values[:, i], shot, most) for i, shot in enumerate(probe.shots)]
            found += [{"learner": name, "measure": measure, **row} for row in rows]
    return found
