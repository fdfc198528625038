"""When each part of a mechanism formed in the training, and which came first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.inspect.layout import Plan
from contextlab.inspect.looks import places_of, shares
from contextlab.inspect.maps import mixing, telling_layers
from contextlab.inspect.means import metric_by_prompt, ratio_of
from contextlab.inspect.probe import Drawing, Probe, Row, Subject, by, probe_table, shown, some
from contextlab.inspect.probing import TARGET, features_at, fitted, places_at, readable, wanted_at
from contextlab.models import Model
from contextlab.models.answer import answer
from contextlab.prompt import Prompt, Task
from contextlab.registry import register

CURVE, HALF, STEEPEST, JUMP = "curve", "half-way", "steepest", "share in the steepest"
ANSWER = "answer"
KINDS = ("previous", "duplicate", "induction")
ABRUPT = 0.5
"""The share of its change that a curve makes between two checkpoints, from which on it is a phase change."""
FEWEST = 3
RESAMPLED = 400
HEAD_PROMPTS = 32


@register("probe", "formation", papers=("2209.11895", "2301.05217"), family="training",
          cases=({"prompts": 24, "fit": 24},))  # fmt: skip
@dataclass(frozen=True)
class Formation(Probe):
    """When the parts of a mechanism formed in the training, with dates, and which came first.

    At each checkpoint that was kept the same prompts are read, and measured: the answer, by the task's metric; what a
    linear map reads of what the prompt hides (or of the answer) off the stream after each layer, fitted at that
    checkpoint; and of models that read tokens what the head that ends as the best of its kind looks at (the token
    before, the same symbol, what followed it). Of each curve that changes, its interval over prompts told: `half-way`,
    the step at which it has come half of the way from the first to the last checkpoint (between two checkpoints by a
    straight line), `steepest`, the checkpoint at the end of its fastest change, and the share of the whole change
    that is made there. Intervals of dates are by resampling the prompts. The control are fresh weights.

    It needs three checkpoints at least: contextlab run RECIPE --set train.keep_checkpoints=true
    --set train.checkpoint_every=50. Of one seed: how dates differ between trainings, several seeds tell.

    prompts: to measure on.
    fit: to fit linear maps to.
    what: a name in the task's `Prompt.hidden`, or "target"; "" takes the first that is hidden, or the answer.
    """

    drawing: ClassVar[Drawing] = Drawing(
        "lines", "at", figures=("what", "measure"), measures=(CURVE,), note="By step of the training."
    )

    prompts: PositiveInt = 256
    fit: PositiveInt = 512
    what: str = ""

    def refusal(self, subject: Subject) -> str:
        if (count := len(subject.checkpoints)) < FEWEST:
            return (
                f"the training has {count} checkpoint{'s' * (count != 1)}, and {FEWEST} are needed; keep them: "
                "--set train.keep_checkpoints=true --set train.checkpoint_every=50"
            )
        return "" if self.prompts > 1 and self.fit >= 10 else "prompts and fit: expected at least 2 and 10"

    @torch.no_grad()
    def measure(self, subject: Subject) -> pd.DataFrame:
        looking = _Looking.at(subject, self.what, self.fit, self.prompts)
        steps = sorted(subject.checkpoints)
        models = (subject.checkpoints[step]().to(subject.device, subject.dtype).eval() for step in steps)
        curves = _joined(looking.curves(model) for model in models)
        fresh = _joined([looking.curves(subject.untrained())])
        best = {kind: _best([name for name in curves if name.startswith(f"{kind} ")], curves) for kind in KINDS}
        rows: list[Row] = []
        for name, (parts, wholes) in curves.items():
            kind = name.split(" ", 1)[0]
            if kind in KINDS and name != best[kind]:
                continue
            what, site = looking.named(name)
            at: dict[str, Any] = {"what": what, **({"site": site} if site else {})}
            control = ratio_of(*(each[0] for each in fresh[name]))["value"]
            for step, one, whole in zip(steps, parts, wholes, strict=True):
                rows.append({**at, "at": step, "measure": CURVE, **ratio_of(one, whole), "control": control})
            rows += [{**at, **row} for row in dates(steps, parts.cpu().numpy(), wholes.cpu().numpy())]
        return probe_table(rows)

    def words(self, rows: list[Row]) -> list[str]:
        formed: list[tuple[Row, str]] = []
        sentences, still, faded = [], [], []
        for (what, _), own in by(rows, "what", "site").items():
            curve = sorted((row for row in own if row["measure"] == CURVE), key=lambda row: row["at"])
            dated = {row["measure"]: row for row in own if row["measure"] != CURVE}
            name = what if curve[0]["layer"] is None or "head" in what else f"{what} after layer {curve[0]['layer']}"
            if HALF not in dated:
                still.append(name)
                continue
            if curve[-1]["value"] < curve[0]["value"] and not what.startswith(ANSWER):
                faded.append(name)
                continue
            formed.append((dated[HALF], name))
            jump, steepest = dated[JUMP], dated[STEEPEST]
            how = "a phase change" if jump["value"] >= ABRUPT else "gradual"
            sentences.append(
                f"{name[0].upper()}{name[1:]} goes from {curve[0]['value']:.2f} to {curve[-1]['value']:.2f}, half of "
                f"it by step {shown(dated[HALF], 0)}; {how}: {100 * jump['value']:.0f}% of it up to step "
                f"{shown(steepest, 0)}, between two checkpoints."
            )
        if not formed:
            return ["Nothing that is measured formed between the first and the last checkpoint."]
        formed.sort(key=lambda each: each[0]["value"])
        first, rest = formed[0], formed[1:]
        if rest:
            end = first[0]["ci_high"]
            alike = [name for row, name in rest if row["ci_low"] is None or end is None or row["ci_low"] <= end]
            more = f"; {some(alike)} cannot be told to be later" if alike else ""
            sentences.insert(0, f"First came {first[1]} (half-way by step {shown(first[0], 0)}){more}.")
        if faded:
            sentences.append(f"What was there at first faded in {some(faded)}.")
        if still:
            sentences.append(f"No change is told apart from chance in {some(still)}.")
        return sentences


Curves = dict[str, tuple[Tensor, Tensor]]
"""Name -> parts and wholes of each prompt, [prompts]: the value is the sum of parts over that of wholes."""


class _Looking(NamedTuple):
    """The prompts that every checkpoint reads."""

    task: Task
    prompt: Prompt
    drawn: Prompt
    what: str
    fit: int

    @staticmethod
    def at(subject: Subject, what: str, fit: int, prompts: int) -> _Looking:
        some = subject.prompts(2)
        what = what or next((name for name in some.hidden or {} if readable(some, name)), TARGET)
        return _Looking(subject.task, subject.prompts(prompts), subject.prompts(fit + prompts, 1), what, fit)

    def named(self, curve: str) -> tuple[str, str]:
        """What a curve is called in the table, and its site."""
        kind, _, rest = curve.partition(" ")
        if kind in KINDS:
            return f"'{kind}' of head {rest}", f"blocks.{rest.split('.')[0]}.mixer"
        return (f"reading of {self.what}", rest) if kind == "linear" else (curve, "")

    def curves(self, model: Model) -> Curves:
        said = metric_by_prompt(self.task, answer(model, self.prompt), self.prompt)
        found: Curves = {f"{ANSWER} ({self.task.metric})": (said, torch.ones_like(said))}
        if not model.spec.reads_whole:
            sites = [f"{layer.name}.output" for layer in Plan(model).layers]
            at = places_at(self.drawn, None)
            wanted = wanted_at(self.drawn, self.what, None, at)
            for site, features in features_at(model, self.drawn, sites, at).items():
                found[f"linear {site}"] = read_off(features, wanted, self.fit)
        if self.task.read_in == "token" and telling_layers(model):
            tokens = self.prompt.inputs[:HEAD_PROMPTS]
            places = places_of(tokens)
            for site, matrix in mixing(model, tokens).items():
                share = shares(matrix)
                for kind in KINDS:
                    if kind not in places:
                        continue
                    where = places[kind].double()
                    counts = places[kind].any(-1).sum(-1).double()
                    looked = torch.einsum("bhqt,bqt->bh", share, where)
                    for head in range(share.shape[1]):
                        found[f"{kind} {site.split('.')[1]}.{head}"] = (looked[:, head], counts)
        return found


def read_off(features: Tensor, wanted: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Parts and wholes of what a linear map tells of each prompt after the first `count`, to which it is fitted.

    features: [N, F] float64. wanted: numbers [N, k], of which it is the share of the variance, or classes [N] int64.
    """
    said, classes = fitted(features, wanted[:count])
    truth = wanted[count:]
    if classes is not None:
        right = (classes[said.argmax(-1)] == truth).double()
        return right, torch.ones_like(right)
    variance = (truth - truth.mean(0)).square().sum(-1)
    return variance - (said - truth).square().sum(-1), variance


def _joined(each: Iterable[Curves]) -> dict[str, tuple[Tensor, Tensor]]:
    """Curves of several models: parts and wholes [models, prompts] by name."""
    found = list(each)
    return {name: (torch.stack([c[name][0] for c in found]), torch.stack([c[name][1] for c in found]))
            for name in found[0]}  # fmt: skip


def _best(names: list[str], curves: Curves) -> str:
    """The one that ends highest."""
    return max(names, key=lambda name: (curves[name][0][-1].sum() / curves[name][1][-1].sum()).item(), default="")


def dates(steps: list[int], parts: np.ndarray, wholes: np.ndarray) -> list[Row]:
    """Rows of when a curve changed: half-way, steepest, and the share of the change there; [] where it did not.

    parts, wholes: [steps, prompts]; nan where a prompt has none.
    """
    known = ~(np.isnan(parts) | np.isnan(wholes)).any(0)
    parts, wholes = parts[:, known], wholes[:, known]
    n = parts.shape[1]
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLED).T  # [prompts, draws]
    whole = (parts.sum(1) / wholes.sum(1))[:, None]
    drawn = (parts @ weights) / (wholes @ weights)
    change = drawn[-1] - drawn[0]
    low, high = np.quantile(change, [0.025, 0.975])
    if not (low > 0 or high < 0):
        return []
    at = np.array(steps, dtype=float)
    rows = []
    for measure, of in ((HALF, _half_way), (STEEPEST, _steepest), (JUMP, _jump)):
        value, spread = float(of(at, whole)[0]), of(at, drawn)
        ends = np.quantile(spread, [0.025, 0.975])
        row = {"value": value, "ci_low": min(float(ends[0]), value), "ci_high": max(float(ends[1]), value), "n": n}
        rows.append({"measure": measure, **row})
    return rows


def _half_way(at: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """The first step at which curves [steps, draws] have come half of their way, [draws]."""
    way = (curves - curves[0]) / np.where(curves[-1] == curves[0], 1.0, curves[-1] - curves[0])
    first = np.maximum((way >= 0.5).argmax(0), 1)
    draw = np.arange(curves.shape[1])
    below, above = way[first - 1, draw], way[first, draw]
    part = np.clip((0.5 - below) / np.where(above == below, 1.0, above - below), 0, 1)
    found: np.ndarray = at[first - 1] + part * (at[first] - at[first - 1])
    return found


def _changes(at: np.ndarray, curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Changes between checkpoints towards the end, [steps - 1, draws], and which is fastest, [draws]."""
    towards = np.diff(curves, axis=0) * np.sign(curves[-1] - curves[0])
    return towards, (towards / np.diff(at)[:, None]).argmax(0)


def _steepest(at: np.ndarray, curves: np.ndarray) -> np.ndarray:
    found: np.ndarray = at[_changes(at, curves)[1] + 1]
    return found


def _jump(at: np.ndarray, curves: np.ndarray) -> np.ndarray:
    changes, fastest = _changes(at, curves)
    way = np.abs(curves[-1] - curves[0])
    found: np.ndarray = changes[fastest, np.arange(curves.shape[1])] / np.where(way == 0, 1.0, way)
    return found
