"""`evaluate`: put a predictor, trained or not, through a task's splits; every predictor answers the same prompts."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.errors import InputError, unknown
from contextlab.evaluation.intervals import TELLS, alike_half, bounds_of, share_bounds, t95, usual
from contextlab.evaluation.results import Results, table
from contextlab.evaluation.spec import EvaluateSpec
from contextlab.evaluation.splits import chosen_splits
from contextlab.memory import require_room
from contextlab.models.answer import answer
from contextlab.prompt import HIGHER_IS_BETTER, Learner, Predictor, Prompt, Task
from contextlab.training.examples import fingerprints

Watch = Callable[[str, str, Task, Prompt, Tensor, dict[str, Tensor]], None]
"""Told of each batch: the predictor's name, the split and its task, the prompts, the predictions, their errors."""


def predict(predictor: Predictor, prompt: Prompt) -> Tensor:
    """The predictions [B, T, k] for a prompt: a learner gets the prompt, a model its inputs (see `answer`)."""
    if isinstance(predictor, Learner):
        return predictor(prompt)
    return answer(predictor, prompt)


def evaluate(
    predictor: Predictor,
    task: Task,
    spec: EvaluateSpec | Mapping[str, Any] | None = None,
    *,
    name: str = "model",
    kind: str | None = None,
    run: str = "",
    seed: int = 0,
    task_name: str | None = None,
    device: torch.device | str | None = None,
    watch: Watch | None = None,
    apart: Callable[[Prompt], Prompt] | None = None,
    by_prompt: list[dict[str, Any]] | None = None,
    **changes: Any,
) -> pd.DataFrame:
    """Measure a predictor on the splits of a task.

    predictor: a model (called with `prompt.inputs`), a learner, or any function of the prompt's inputs.
    task: whose splits are drawn; the prompts depend on the task and on `spec.seed` only.
    spec: an EvaluateSpec or its keys; `changes` are keys that replace its own, for example `prompts=100`.
    name, kind, run, seed, task_name: written into the table; kind is "learner" or "model" by the predictor's type.
    device: where prompts are drawn; None takes the model's.
    watch: told of each batch of predictions, to measure more of them.
    apart: leaves out of a batch the prompts that this predictor shall not be measured on, as it was trained on them.
    by_prompt: where given, rows of the values of each prompt are added to it (see `results.BY_PROMPT_COLUMNS`).

    Returns a tidy table (see `results.COLUMNS`). For each split and metric there is a row a shot, and one with a
    missing shot for the mean over all that is scored; `excess_<metric>` is the difference to the split's best
    known learner on the same prompts, positive where the predictor is worse. Intervals are 95% intervals over
    prompts: Student's t, and Wilson's of shares such as accuracy; one prompt has none, and the ends are missing. Where
    all prompts are alike, only shares and their excesses have an interval (see `intervals.unseen`). A split that the
    predictor cannot answer (too long for its positions, say) has one row whose value is missing and n 0, and a warning
    tells why.
    """
    spec = _spec(spec, changes)
    if device is None:
        first = next(predictor.parameters(), None) if isinstance(predictor, nn.Module) else None
        device = first.device if first is not None else "cpu"
    who = {
        "run": run,
        "model": name,
        "kind": kind or ("learner" if isinstance(predictor, Learner) else "model"),
        "seed": seed,
        "task": task_name or type(task).__name__,
    }
    rows: list[dict[str, Any]] = []
    for split, index, shifted in chosen_splits(task, spec):
        tally = _Tally(shifted, spec.prompts)
        best = next(iter(shifted.learners().values()))
        try:
            with _evaluating(predictor):
                for drawn in _prompts(shifted, spec, index, device):
                    prompt = drawn if apart is None else apart(drawn)
                    tally.draws(drawn, prompt)
                    if not prompt.batch:
                        continue
                    prediction = predict(predictor, prompt)
                    errors = shifted.errors(prediction, prompt)
                    tally.add(errors, shifted.errors(best(prompt), prompt), prompt)
                    if watch is not None:
                        watch(name, split, shifted, prompt, prediction, errors)
            if not tally.values:
                raise InputError("it was trained on all of the prompts")
        except InputError as error:
            warnings.warn(f"{name} cannot answer split {split!r}: {error}", stacklevel=2)
            rows.append({**who, "split": split, "metric": shifted.metric, "value": math.nan, "n": 0})
            continue
        rows += [{**who, "split": split, **row} for row in tally.rows()]
        if by_prompt is not None:
            by_prompt += [{**who, "split": split, **row} for row in tally.by_prompt()]
    return Results(table(rows))


def evaluate_learners(
    task: Task,
    spec: EvaluateSpec | Mapping[str, Any] | None = None,
    *,
    run: str = "",
    task_name: str | None = None,
    device: torch.device | str = "cpu",
    watch: Watch | None = None,
    by_prompt: list[dict[str, Any]] | None = None,
    **changes: Any,
) -> pd.DataFrame:
    """Measure the task's learners; on each split those that the split's own task names. See `evaluate`."""
    spec = _spec(spec, changes)
    known = {name for shifted in task.splits().values() for name in shifted.learners()}
    for name in spec.learners or ():
        if name not in known:
            raise InputError(f"evaluate.learners: {unknown('learner of this task', name, known)}")
    rows: list[dict[str, Any]] = []
    for split, index, shifted in chosen_splits(task, spec):
        learners = shifted.learners()
        wanted = [name for name in learners if spec.learners is None or name in spec.learners]
        chosen = {name: _Tally(shifted, spec.prompts) for name in wanted}
        best = next(iter(learners))
        for prompt in _prompts(shifted, spec, index, device):
            foremost = learners[best](prompt)
            reference = shifted.errors(foremost, prompt)
            for name, tally in chosen.items():
                prediction = foremost if name == best else learners[name](prompt)
                own = reference if name == best else shifted.errors(prediction, prompt)
                tally.draws(prompt, prompt)
                tally.add(own, reference, prompt)
                if watch is not None:
                    watch(name, split, shifted, prompt, prediction, own)
        who = {"run": run, "kind": "learner", "seed": 0, "task": task_name or type(task).__name__, "split": split}
        for name, tally in chosen.items():
            rows += [{**who, "model": name, **row} for row in tally.rows()]
            if by_prompt is not None:
                by_prompt += [{**who, "model": name, **row} for row in tally.by_prompt()]
    return Results(table(rows))


def _spec(spec: EvaluateSpec | Mapping[str, Any] | None, changes: Mapping[str, Any]) -> EvaluateSpec:
    given = spec.model_dump(exclude_unset=True) if isinstance(spec, EvaluateSpec) else dict(spec or {})
    return EvaluateSpec.parse({**given, **changes}, "evaluate")


def _prompts(task: Task, spec: EvaluateSpec, index: int, device: torch.device | str) -> Iterator[Prompt]:
    """The split's prompts: a stream of its own for each split, the same for every predictor."""
    generator = torch.Generator(device).manual_seed(1_000_003 * spec.seed + index)
    for start in range(0, spec.prompts, spec.batch):
        yield task.sample(min(spec.batch, spec.prompts - start), generator, device)


def _kept_prompts(task: Task, spec: EvaluateSpec, index: int, device: torch.device | str) -> list[Prompt]:
    """All of them at once. Raises ResourceError, when the first batch is drawn, if they are more than fit."""
    drawn: list[Prompt] = []
    for prompt in _prompts(task, spec, index, device):
        if not drawn:
            require_room("prompts", spec.prompts, prompt.nbytes / prompt.batch)
        drawn.append(prompt)
    return drawn


class _evaluating:
    """No gradients, and a module in evaluation mode, as it was before afterwards."""

    def __init__(self, predictor: Predictor) -> None:
        self.module = predictor if isinstance(predictor, nn.Module) else None

    def __enter__(self) -> None:
        self.gradients = torch.no_grad()
        self.gradients.__enter__()
        if self.module is not None:
            self.training = self.module.training
            self.module.eval()

    def __exit__(self, *error: Any) -> None:
        if self.module is not None:
            self.module.train(self.training)
        self.gradients.__exit__(*error)


@dataclass
class _Tally:
    """Per-prompt means by shot, of each metric and of its excess over the reference."""

    task: Task
    prompts: int
    values: dict[str, list[Tensor]] = field(default_factory=dict)
    known: list[Tensor] = field(default_factory=list)
    length: int = 0
    kept: list[np.ndarray] = field(default_factory=list)
    drawn: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=8))

    def draws(self, drawn: Prompt, answered: Prompt) -> None:
        """Told of each batch before it is added: the prompts that were drawn, and those of them that are answered."""
        for each in (drawn.inputs, drawn.targets, drawn.scored):
            self.drawn.update(each.contiguous().cpu().numpy().tobytes())
        kept = torch.ones(drawn.batch, dtype=torch.bool)
        if answered.batch < drawn.batch:
            kept = torch.isin(fingerprints(drawn.inputs), fingerprints(answered.inputs)).cpu()
        self.kept.append(kept.numpy())

    def add(self, errors: dict[str, Tensor], reference: dict[str, Tensor], prompt: Prompt) -> None:
        """Add a batch. errors, reference: metric -> [B, T]."""
        self.length = prompt.length
        shots = int(prompt.shot.max()) + 1
        if not self.values:
            require_room("prompts", self.prompts, 2 * 8 * (1 + shots) * len(errors))
        count = torch.zeros(prompt.batch, shots, dtype=torch.float64, device=prompt.shot.device)
        count.scatter_add_(1, prompt.shot, prompt.scored.double())
        self.known.append(torch.cat([prompt.scored.any(1, keepdim=True), count > 0], 1).cpu())
        for metric, error in errors.items():
            sign = -1.0 if metric in HIGHER_IS_BETTER else 1.0
            excess = sign * (error.double() - reference[metric].double())
            for label, each in ((metric, error.double()), (f"excess_{metric}", excess)):
                each = torch.where(prompt.scored, each, 0.0)
                by_shot = torch.zeros_like(count).scatter_add_(1, prompt.shot, each) / count  # nan where none
                whole = each.sum(1, keepdim=True) / prompt.scored.sum(1, keepdim=True)
                self.values.setdefault(label, []).append(torch.cat([whole, by_shot], 1).cpu())

    def rows(self) -> Iterator[dict[str, Any]]:
        widest = max(part.shape[1] for part in self.known)  # batches can differ in their largest shot
        # Asked, not answered with a number: prompts whose answer is nan are not left out of a mean.
        known = torch.cat([F.pad(part, (0, widest - part.shape[1])) for part in self.known])
        n = known.sum(0)
        for metric, parts in self.values.items():
            values = torch.cat([F.pad(part, (0, widest - part.shape[1]), value=math.nan) for part in parts])
            mean = torch.where(known, values, 0).sum(0) / n
            spread = torch.where(known, values - mean, 0).square().sum(0) / (n - 1).clamp_min(1)
            scale = torch.tensor([t95(count - 1) for count in n.tolist()], dtype=torch.float64)
            half = scale * (spread / n).sqrt()
            if (bounds := bounds_of(metric)) is not None:
                middle, other = usual(torch.where(known, values, math.nan).numpy())
            if bounds is not None and metric not in HIGHER_IS_BETTER:
                ends = [alike_half(*each, bounds) for each in zip(middle.tolist(), n.tolist(), strict=True)]
                least = torch.tensor(ends, dtype=half.dtype)
                half = torch.where(torch.from_numpy(other < TELLS), torch.maximum(half, least), half)
            low, high = mean - half, mean + half
            if metric in HIGHER_IS_BETTER:
                low, high = map(torch.from_numpy, share_bounds(mean.numpy(), half.numpy(), n.numpy(), other))
            low, high = (torch.where(n > 1, end, math.nan) for end in (low, high))
            for i, count in enumerate(n.tolist()):
                if count:
                    yield {
                        "metric": metric,
                        "shot": None if i == 0 else i - 1,
                        "length": self.length,
                        "value": mean[i].item(),
                        "ci_low": low[i].item(),
                        "ci_high": high[i].item(),
                        "n": count,
                    }

    def by_prompt(self) -> Iterator[dict[str, Any]]:
        """The means of each prompt, [prompts] float32, nan where it was left out, of each metric and its excess."""
        kept, chance = np.concatenate(self.kept), self.task.chance()
        for metric, parts in self.values.items():
            values = np.full(len(kept), np.nan, dtype=np.float32)
            values[kept] = torch.cat([part[:, 0] for part in parts]).numpy()
            named = {"metric": metric, "prompts": self.drawn.hexdigest(), "chance": chance.get(metric, math.nan)}
            yield {**named, "values": values}
