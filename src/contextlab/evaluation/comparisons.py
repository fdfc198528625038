"""How alike two predictors are at each prediction: errors, predictions, and the weights that their answers induce."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.evaluation.evaluate import _prompts, predict
from contextlab.evaluation.intervals import Z95
from contextlab.evaluation.spec import EvaluateSpec
from contextlab.prompt import Learner, Predictor, Prompt, Task
from contextlab.tasks.base import Drawn, LabelTask, lay_out

ROUNDING = 1e-5
"""Errors below this part of the targets' root mean square count as none: their direction is that of rounding."""
MOST_PREFIXES = 8
"""Prefixes at which induced weights are measured, spread evenly over the prompt."""


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

    def take(self, index: Tensor) -> None:
        """Keep these prompts alone."""
        for sums in (self.products, self.first, self.second, self.differences):
            sums[:] = [torch.cat(sums)[index]] if sums else []

    def within(self) -> Tensor:
        """The cosine of the error vectors within each prompt, over all shots from 1 on, [prompts]."""
        later = slice(1 if self.shots > 1 else 0, None)
        return _cosine(*(torch.cat(sums)[:, later].sum(1) for sums in (self.products, self.first, self.second)))

    def cosines(self, counts: Tensor) -> list[dict[str, Any]]:
        """counts: predictions of each prompt and shot, [prompts, S]."""
        a, b, c = (torch.cat(sums) for sums in (self.products, self.first, self.second))
        rows = [_mean(self.within(), most=1.0)]
        for shot in range(self.shots):
            has = counts[:, shot] > 0
            if not (n := int(has.sum())):
                continue
            sums = [each[has, shot] for each in (a, b, c)]
            value = _cosine(*(each.sum() for each in sums))
            left_out = _cosine(*(each.sum() - each for each in sums))
            half = Z95 * math.sqrt((n - 1) / n * (left_out - left_out.mean()).square().sum().item())
            low, high = max(value.item() - half, -1.0), min(value.item() + half, 1.0)
            low, high = (low, high) if n > 1 else (math.nan, math.nan)
            rows.append({"shot": shot, "value": value.item(), "ci_low": low, "ci_high": high, "n": n})
        return rows


def _sharpest(pairs: Mapping[str, _Pair], others: Mapping[tuple[str, str], _Pair], keep: int) -> Tensor:
    """The prompts on which the candidates differ most, [keep].

    Candidates are the learner that the predictor is most like and those that are not told apart from it, or the next
    one where all are; each two of them count alike. What the predictor answers does not choose among prompts.
    """
    alike = {name: pair.within() for name, pair in pairs.items()}
    order = sorted(alike, key=lambda name: -alike[name].mean().item())
    candidates = [name for name in order if _mean(alike[order[0]] - alike[name])["ci_low"] <= 0]
    chosen = set(candidates if len(candidates) > 1 else order[:2])
    score = torch.zeros(len(alike[order[0]]), dtype=torch.float64)
    for both, pair in others.items():
        if chosen.issuperset(both):
            apart = torch.cat(pair.differences).sum(1).double()
            score += apart / apart.mean().clamp_min(torch.finfo(torch.float64).tiny)
    return score.topk(keep).indices.sort().values


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
    """Mean over prompts and its interval, which one prompt does not have."""
    n, value = len(values), values.mean().item()
    half = Z95 * values.std().item() / math.sqrt(n) if n > 1 else math.nan
    return {"shot": shot, "value": value, "ci_low": value - half, "ci_high": min(value + half, most), "n": n}


def compare_predictions(
    predictions: Iterable[Tensor],
    named: Mapping[str, Learner],
    task: Task,
    prompts: Sequence[Prompt],
    between: bool = True,
    keep: int | None = None,
) -> list[dict[str, Any]]:
    """Rows of `similarity` but for the split: errors, behind, spd and separation (behind and the last where `between`).

    predictions: [B, T, k] for each of the prompts. named: learners by name, which answer the prompts here.
    keep: of the prompts those on which the candidates differ most, so many; None for all.

    Raises InputError where several learners are compared and none of them errs: the prompts cannot tell them apart.
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

    if between and len(pairs) > 1 and not any(torch.cat(pair.second).any() for pair in pairs.values()):
        raise InputError("every learner is perfect on these prompts, which cannot tell one from another")
    if keep is not None and keep < len(counts) and len(pairs) > 1:
        wanted = _sharpest(pairs, others, keep)
        counts = counts[wanted]
        for pair in (*pairs.values(), *others.values()):
            pair.take(wanted)
    alike = {name: pair.within() for name, pair in pairs.items()}
    nearest_of_all = max(alike.values(), key=lambda each: each.mean().item())

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
        if between and len(pairs) > 1:
            rows.append({"measure": "behind", **_mean(nearest_of_all - alike[name])})
        rows += differences("spd", pair)
        mine = [other for both, other in others.items() if name in both]
        if mine:
            nearest = min(mine, key=lambda other: torch.cat(other.differences).sum().item())
            rows += differences("separation", nearest)
        found += [{"learner": name, **row} for row in rows]
    return found


@dataclass
class Probe:
    """Prompts that ask many queries at each of some prefixes."""

    prompt: Prompt
    layout: Any
    queries: Tensor
    shots: list[int]
    batch: int

    @staticmethod
    def of(
        task: Task, spec: EvaluateSpec, index: int, device: torch.device | str, prompts: int, queries: int | None
    ) -> Probe | None:
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
        return Probe(prompt, layout, drawn[torch.arange(asked), torch.arange(asked) % n], shots, spec.batch)

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


def compare_weights(predictor: Predictor, named: Mapping[str, Learner], probe: Probe) -> list[dict[str, Any]]:
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
