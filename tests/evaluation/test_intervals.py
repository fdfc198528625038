"""Intervals are those of a bootstrap over prompts, on ragged data; prompts are drawn once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from contextlab.evaluation import evaluate, summarise
from contextlab.evaluation.breakdown import FacetTally
from contextlab.evaluation.compress import build_prompts, compress, measure
from contextlab.evaluation.compress.reading import Reading
from contextlab.evaluation.compress.rows import Trials
from contextlab.evaluation.results import table
from contextlab.prompt import Learner, Prompt, Task
from tests.evaluation.test_compress import model

PROMPTS, LENGTH, BATCH = 301, 8, 16
Z95 = 1.959964


class Ragged(Task):
    """Prompts that score 1 to 8 positions, whose errors have a part that all positions of a prompt share."""

    input_size, output_size, metric = 2, 1, "error"

    def sample(self, batch: int, generator: torch.Generator, device: Any = "cpu") -> Prompt:
        count = torch.randint(1, LENGTH + 1, (batch, 1), generator=generator)
        own = (torch.randn(batch, 1, generator=generator) / 2).exp() * count**0.5  # larger where more is scored
        error = own + 0.3 * torch.randn(batch, LENGTH, generator=generator)
        at = torch.arange(LENGTH).expand(batch, -1)
        inputs = torch.stack((error, error), -1)
        return Prompt(inputs, error[..., None], at < count, at)

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        return prediction.mean()

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        return {"error": prediction.squeeze(-1)}

    def learners(self) -> dict[str, Learner]:
        return {"half": Scaled(0.5)}

    def splits(self) -> dict[str, Task]:
        return {"train": self, "again": self}


class Spread(Ragged):
    """With a facet that does not follow from the shot."""

    def facets(self, prompt: Prompt) -> dict[str, Tensor]:
        return {"parity": (prompt.shot + prompt.scored.sum(1, keepdim=True)) % 3}


class Scaled(Learner):
    """Errs by a part of what the task holds."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, prompt: Prompt) -> Tensor:
        return self.share * prompt.targets


def bootstrap(total: np.ndarray, count: np.ndarray) -> tuple[float, float]:
    """sum(total) / sum(count), each [prompts], and 1.96 standard deviations of it over prompts drawn anew."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(total), size=(4000, len(total)))
    return float(total.sum() / count.sum()), Z95 * float((total[drawn].sum(1) / count[drawn].sum(1)).std())


def hold(row: Mapping[str, Any], total: Tensor, count: Tensor) -> None:
    value, half = bootstrap(total.double().numpy(), count.double().numpy())
    assert row["value"] == pytest.approx(value, rel=1e-6)
    assert row["ci_high"] - row["value"] == pytest.approx(half, rel=0.06)
    assert row["value"] - row["ci_low"] == pytest.approx(half, rel=0.06)


@pytest.fixture(scope="module")
def measured() -> tuple[pd.DataFrame, list[dict[str, Any]], Prompt]:
    """Results, rows of facets and the prompts of all batches, the last of which is smaller."""
    seen: list[Prompt] = []
    facets = FacetTally(bins=3)

    def watch(name: str, split: str, task: Task, prompt: Prompt, prediction: Tensor, errors: dict[str, Tensor]) -> None:
        seen.append(prompt)
        facets.add(task, prompt, errors)

    changes = {"prompts": PROMPTS, "batch": BATCH, "splits": ("train",)}
    found = evaluate(Scaled(1.0), Spread(), watch=watch, **changes)
    names = ("inputs", "targets", "scored", "shot")
    return found, list(facets.rows()), Prompt(*(torch.cat([getattr(p, name) for p in seen]) for name in names))


@pytest.mark.parametrize("metric", ["error", "excess_error"])
def test_intervals_of_prompts_that_score_different_numbers_of_positions(measured: Any, metric: str) -> None:
    found, _, prompt = measured
    error = prompt.targets.squeeze(-1) * (1.0 if metric == "error" else 0.5)
    rows = found[found["metric"] == metric]
    each = (error * prompt.scored).sum(1) / prompt.scored.sum(1)
    whole = rows[rows["shot"].isna()].iloc[0]
    assert whole["n"] == PROMPTS
    hold(whole, each, torch.ones(PROMPTS))
    for shot in (0, 3, 7):
        row, there = rows[rows["shot"] == shot].iloc[0], prompt.scored[:, shot]
        assert row["n"] == int(there.sum())
        hold(row, error[there, shot], torch.ones(int(there.sum())))


def test_intervals_by_facet_count_prompts_not_positions(measured: Any) -> None:
    _, rows, prompt = measured
    facet = Spread().facets(prompt)["parity"]
    assert [row["low"] for row in rows] == [0, 1, 2]
    for row in rows:
        there = prompt.scored & (facet == row["low"])
        assert row["n"] == int(there.sum())
        hold(row, (prompt.targets.squeeze(-1) * there).sum(1), there.sum(1))


def test_intervals_of_compress_are_over_prompts_too() -> None:
    task, trials, generator, seen = Spread(), Trials(), torch.Generator().manual_seed(0), []
    for _ in range(20):
        prompt = task.sample(BATCH, generator)
        prompt.scored[0] = False  # a prompt of which nothing is scored in the tail is left out
        reading = Reading(prompt.targets, 1.0, 1.0, 1.0, 0.0, 1.0, [])
        trials.add(reading, reading, task, measure.Drawn(prompt, 0))
        seen.append(prompt.rows(1, BATCH))
    row = next(
        row for row in trials.rows(measure.Setting("full", "full", model()), "needle") if row["metric"] == "error"
    )
    each = torch.cat([(p.targets.squeeze(-1) * p.scored).sum(1) / p.scored.sum(1) for p in seen])
    assert row["n"] == len(each) == 20 * (BATCH - 1)
    hold(row, each, torch.ones(len(each)))


@pytest.mark.parametrize(("answered", "spread"), [((400, 400, 400, 400), 0.05), ((100, 200, 300, 400), 0.15)])
def test_intervals_over_seeds_hold_the_truth(answered: tuple[int, ...], spread: float) -> None:
    """Seeds differ by `spread`; all answer the same prompts, each so many of them."""
    rng, rows = np.random.default_rng(0), []
    for repeat in range(300):
        noise, own = rng.normal(size=400), spread * rng.normal(size=4)
        for seed, n in enumerate(answered):
            value, half = noise[:n].mean() + own[seed], Z95 * noise[:n].std(ddof=1) / math.sqrt(n)
            who = {"run": "r", "model": "m", "kind": "model", "seed": seed, "task": str(repeat), "split": "train"}
            rows.append({**who, "metric": "e", "value": value, "ci_low": value - half, "ci_high": value + half, "n": n})
    found = summarise(table(rows))
    assert len(found) == 300
    assert (found["n"] == min(answered)).all()
    held = ((found["ci_low"] <= 0) & (found["ci_high"] >= 0)).mean()
    assert 0.94 <= held <= 0.999  # on the safe side: part of the prompts' noise shows between seeds, too


def test_every_batch_split_and_seed_has_prompts_of_its_own() -> None:
    drawn: list[Tensor] = []
    for seed in (0, 1):
        spec = {"prompts": 40, "batch": 16, "seed": seed}
        evaluate(Scaled(1.0), Ragged(), spec, watch=lambda *told: drawn.append(told[3].inputs.flatten(1)))
    rows = torch.cat(drawn)
    assert len(rows) == 2 * 2 * 40
    assert len(rows.unique(dim=0)) == len(rows)


def test_every_batch_and_seed_of_compress_has_prompts_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []

    def watched(task: Task, count: int, *rest: Any) -> measure.Drawn:
        found = plainly(task, count, *rest)
        if count > 1:  # else the settings are only tried
            drawn.append(found.prompt.inputs)
        return found

    plainly = measure.draw
    monkeypatch.setattr(measure, "draw", watched)
    for seed in (0, 1):
        compress(model(), ["quantize"], [], ["mqar:pairs=4"], [64], prompts=6, batch=2, seed=seed)
    rows = torch.cat(drawn)
    assert len(rows) == 2 * 6
    assert len(rows.unique(dim=0)) == len(rows)


def test_the_shortest_prompts_that_hold_two_pairs_are_drawn() -> None:
    two = build_prompts("kv_retrieval", 512, model()).replace(pairs=2)
    shortest = two.sample(1, torch.Generator().manual_seed(0)).length
    assert build_prompts("kv_retrieval", shortest, model()).pairs == 2  # type: ignore[attr-defined]
