"""Which algorithm is it? How alike a predictor and each learner are: their errors, predictions and induced weights."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.errors import InputError, unknown
from contextlab.evaluation.comparisons import Probe, compare_predictions, compare_weights
from contextlab.evaluation.evaluate import _evaluating, _kept_prompts, _spec, predict
from contextlab.evaluation.spec import EvaluateSpec
from contextlab.evaluation.splits import chosen_splits
from contextlab.models import Model
from contextlab.prompt import Learner, Predictor, Task
from contextlab.tasks.base import LabelTask

COLUMNS = ("split", "learner", "measure", "shot", "value", "ci_low", "ci_high", "n")


def similarity(
    predictor: Predictor,
    task: Task,
    learners: Mapping[str, Learner] | Iterable[str] | None = None,
    spec: EvaluateSpec | Mapping[str, Any] | None = None,
    *,
    weights: bool = True,
    weight_prompts: int = 32,
    queries: int | None = None,
    pool: int = 1,
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
    pool: prompts drawn for each one that is compared: of them those on which the candidates differ most, the learner
        that the predictor is most like, and those not told apart from it. Weights are measured on the first drawn.

    Returns a tidy table (`COLUMNS`), a row a split, learner, measure and shot; a missing shot stands for all. Measures:

    errors: cosine of the two error vectors: of a shot, over the prompts; of all shots from 1 on, within each prompt,
        averaged (similarity of errors, 2310.17086). 1 where neither errs, 0 where only one does.
    behind: how much less like the predictor's errors this learner's are than those of the learner that it is most like,
        paired by prompts; where the interval holds 0 the two are not told apart.
    spd: mean squared difference of the predictions (squared prediction difference, 2211.15661).
    separation: the same between this learner and the other that is nearest to it: where the separation is not well
        above the predictor's spd, the split cannot tell these two apart.
    weights: cosine of the weights induced by least squares from the answers to the queries at one prefix
        (2310.17086), averaged over prompts.
    ilwd: squared difference of these weights (implicit linear weight difference, 2211.15661).

    Tasks of labels or tokens are compared by probabilities. Intervals are 95% over prompts: jackknife for the cosines
    over prompts, else normal. A split that the predictor or a learner cannot answer, or on which every learner is
    perfect, is left out with a warning.
    """
    spec = _spec(spec, changes)
    if pool < 1:
        raise InputError(f"pool: expected at least 1 prompt drawn for each one compared, got {pool}")
    named = _named(task, learners)
    if device is None:
        first = next(predictor.parameters(), None) if isinstance(predictor, nn.Module) else None
        device = first.device if first is not None else "cpu"
    rows: list[dict[str, Any]] = []
    for split, index, shifted in chosen_splits(task, spec):
        try:
            with _evaluating(predictor):
                drawn = spec.model_copy(update={"prompts": pool * spec.prompts})
                prompts = _kept_prompts(shifted, drawn, index, device)
                answers = (predict(predictor, prompt) for prompt in prompts)
                found = compare_predictions(answers, named, shifted, prompts, keep=spec.prompts)
                if weights and (probe := Probe.of(shifted, spec, index, device, weight_prompts, queries)) is not None:
                    found += compare_weights(predictor, named, probe)
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
    ((_, index, shifted),) = chosen_splits(task, spec)
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

    if inputs.is_floating_point():
        inputs = inputs.to(next(model.parameters()).dtype)
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
