"""Tables of results drawn by a seeded generator, from known means: hundreds of tasks of all kinds in one table."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from contextlab.evaluation.intervals import share_bounds, t95
from contextlab.evaluation.results import BY_PROMPT_COLUMNS, table

KINDS = ("spread", "ties", "noise", "chance", "perfect", "zero", "one model", "one shift", "no shift", "near chance")
NAMES = ("transformer", "mamba2", "mamba", "gla", "s4d", "delta_net", "rwkv7", "hyena", "retnet", "ttt")
SHIFTS = ("other noise", "pairs=8", "pairs=16", "length=192", "scaled inputs")
PROMPTS = 64
CHANCE = {"accuracy": 0.1, "squared_error": 4.0}


def draw(count: int, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, dict[str, Any]]]:
    """Results and values by prompt of `count` tasks, and of each task its kind, metric and true means."""
    rng, rows, values, truth = np.random.default_rng(seed), [], [], {}
    for number in range(count):
        kind, task = KINDS[number % len(KINDS)], f"t{number}"
        metric = ("accuracy", "squared_error")[number // len(KINDS) % 2]
        truth[task] = {"kind": kind, "metric": metric, **_draw_task(rng, kind, metric, task, rows, values)}
    return table(rows), table(values, BY_PROMPT_COLUMNS), truth


def _draw_task(rng: Any, kind: str, metric: str, task: str, rows: list[Any], values: list[Any]) -> dict[str, Any]:
    share = metric == "accuracy"
    models = list(rng.permutation(NAMES)[: 1 if kind == "one model" else rng.integers(2, 10)])
    seeds = int(rng.choice([1, 1, 2, 3]))
    shifts = list(SHIFTS[: {"one shift": 1, "no shift": 0}.get(kind, int(rng.integers(0, 6)))])
    floor = 1.0 if share else 0.0 if kind in ("perfect", "zero") else 0.5  # the best learner's own
    means = {name: float(rng.uniform(0.2, 1.0) if share else rng.uniform(0.5, 3.0)) for name in models}
    if kind == "ties":
        means = dict.fromkeys(models, 0.7 if share else 1.0)
    if kind in ("chance", "near chance"):
        means = {
            name: CHANCE[metric] if kind == "chance" or rng.random() < 0.5 else mean for name, mean in means.items()
        }
    if kind in ("perfect", "zero"):
        means = dict.fromkeys(models, float(share) if kind == "perfect" or not share else 0.0)
    own = 0.0 if kind in ("ties", "perfect", "zero", "chance") else 0.05
    harm = {split: float(rng.choice([0.0, 0.1, 0.1, 0.3])) for split in shifts}
    for split in ("train", *shifts):
        hard = rng.normal(size=PROMPTS)
        best = np.full(PROMPTS, floor) if share or not floor else floor * np.exp(0.3 * hard - 0.045)
        for name in models:
            for s in range(seeds):
                mean = means[name] + own * rng.normal() * (kind != "noise")
                if kind not in ("perfect", "zero", "chance"):
                    mean += (-1 if share else 1) * harm.get(split, 0.0)
                each = _values(rng, mean, hard, share, best)
                who = {"run": "r", "model": name, "kind": "model", "seed": s, "task": task, "split": split}
                _add(rows, values, who, metric, each, best, share)
        for i, name in enumerate(("ridge", "knn")[: 1 + len(models) % 2]):
            each = best if i == 0 else best + (0 if share else 1.0)
            who = {"run": "r", "model": name, "kind": "learner", "seed": 0, "task": task, "split": split}
            _add(rows, values, who, metric, each, best, share)
    for i, name in enumerate(models):
        who = {"run": "r", "model": name, "kind": "model", "seed": 0, "task": task, "split": "cost"}
        rows.append({**who, "metric": "state_bytes", "value": 1024.0 * (1 + i % 3), "n": 1})
    return {"means": means, "seeds": seeds, "harm": harm}


def _values(rng: Any, mean: float, hard: np.ndarray, share: bool, best: np.ndarray) -> np.ndarray:
    if share:  # eight answers a prompt, some prompts harder than others
        easy = (
            np.clip(mean + 0.1 * hard * min(mean, 1 - mean), 0, 1) if 0 < mean < 1 else np.full(PROMPTS, max(0, mean))
        )
        return rng.binomial(8, np.clip(easy, 0, 1)) / 8
    if mean <= 0:
        return best.copy()
    return best + mean * rng.exponential(size=PROMPTS) if best.any() else mean * rng.exponential(size=PROMPTS)


def _add(rows: list[Any], values: list[Any], who: Any, metric: str, each: np.ndarray, best: np.ndarray, share: bool):
    for name, vector in ((metric, each), (f"excess_{metric}", (best - each) if share else (each - best))):
        mean, half = vector.mean(), t95(len(vector) - 1) * vector.std(ddof=1) / math.sqrt(len(vector))
        low, high = mean - half, mean + half
        if name == "accuracy":
            low, high = (float(end[0]) for end in share_bounds(*(np.array([x]) for x in (mean, half, len(vector)))))
        bounds = {"value": mean, "ci_low": low, "ci_high": high, "n": len(vector), "length": 32}
        rows.append({**who, "metric": name, **bounds})
        chance = CHANCE.get(name, math.nan)
        values.append(
            {**who, "metric": name, "prompts": who["task"] + who["split"], "chance": chance, "values": vector}
        )
