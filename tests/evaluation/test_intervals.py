"""Intervals are those of a bootstrap over prompts, on ragged data; prompts are drawn once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor

from contextlab.evaluation import evaluate, evaluate_learners, summarise
from contextlab.evaluation.breakdown import FacetTally, breakdown
from contextlab.evaluation.compress import build_prompts, compress, measuring
from contextlab.evaluation.compress.reading import Reading
from contextlab.evaluation.compress.rows import Trials
from contextlab.evaluation.decisions import regret
from contextlab.evaluation.intervals import TELLS, contrast, share_bounds, usual, weighted
from contextlab.evaluation.results import table
from contextlab.models import build_model, preset
from contextlab.prompt import Learner, Prompt, Task
from contextlab.tasks import build_task
from contextlab.training.validation import ValidationSpec, validate
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
        trials.add(reading, reading, task, measuring.Drawn(prompt, 0))
        seen.append(prompt.rows(1, BATCH))
    row = next(
        row for row in trials.rows(measuring.Setting("full", "full", model()), "needle") if row["metric"] == "error"
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
        spec = {"prompts": 40, "batch": 16, "seed": seed, "splits": ("train", "again")}
        evaluate(Scaled(1.0), Ragged(), spec, watch=lambda *told: drawn.append(told[3].inputs.flatten(1)))
    rows = torch.cat(drawn)
    assert len(rows) == 2 * 2 * 40
    assert len(rows.unique(dim=0)) == len(rows)


def test_every_batch_and_seed_of_compress_has_prompts_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []

    def watched(task: Task, count: int, *rest: Any) -> Any:
        found = plainly(task, count, *rest)
        if count > 1:  # else the settings are only tried
            drawn.append(found.prompt.inputs)
        return found

    plainly = measuring.draw
    monkeypatch.setattr(measuring, "draw", watched)
    for seed in (0, 1):
        compress(model(), ["quantize"], [], ["mqar:pairs=4"], [64], prompts=6, batch=2, seed=seed)
    rows = torch.cat(drawn)
    assert len(rows) == 2 * 6
    assert len(rows.unique(dim=0)) == len(rows)


def test_the_shortest_prompts_that_hold_two_pairs_are_drawn() -> None:
    two = build_prompts("kv_retrieval", 512, model()).replace(pairs=2)
    shortest = two.sample(1, torch.Generator().manual_seed(0)).length
    assert build_prompts("kv_retrieval", shortest, model()).pairs == 2  # type: ignore[attr-defined]


CROSSED = [
    (1, 0.0, 1.0, 0.3),
    (2, 0.05, 1.0, 0.3),
    (2, 0.5, 1.0, 0.3),
    (3, 0.2, 1.0, 0.3),
    (3, 0.0, 0.3, 1),
    (5, 1, 1, 1),
]
"""Seeds, and the standard deviations of what seeds add, what prompts add, and what is left."""


@pytest.mark.parametrize("difference", [False, True])
def test_intervals_over_prompts_and_seeds_are_calibrated(difference: bool) -> None:
    """A 95% interval holds the truth in 92 to 98 of 100 draws; few seeds are on the safe side of that."""
    rng, prompts, draws, held = np.random.default_rng(3), 100, 300, []
    for seeds, spread, shared, noise in CROSSED:
        holds = 0
        for _ in range(draws):
            both, samples = shared * rng.normal(size=prompts), []
            for who, weight in (("a", 1.0), ("b", -1.0))[: 1 + difference]:
                hard = both + 0.5 * shared * rng.normal(size=prompts) * difference
                own = [spread * rng.normal() + hard + noise * rng.normal(size=prompts) for _ in range(seeds)]
                samples += weighted([(who, seed, "p", values) for seed, values in enumerate(own)], weight)
            holds += contrast(samples).holds(0.0)
        held.append(holds / draws)
    assert 0.94 <= sum(held) / len(held) <= 0.98
    assert min(held) >= 0.91
    assert max(held) <= 0.995


@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (2, 0.3), (3, 0.5), (5, 0.3)])
def test_intervals_of_seeds_with_prompts_of_their_own_are_calibrated(seeds: int, spread: float) -> None:
    rng, held = np.random.default_rng(4), 0
    for _ in range(600):
        own = [spread * rng.normal() + rng.normal(size=32) for _ in range(seeds)]
        held += contrast(weighted([("a", s, ("p", s), values) for s, values in enumerate(own)], 1.0)).holds(0.0)
    assert 0.92 <= held / 600 <= 0.985


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.995])
def test_intervals_of_shares_are_calibrated_and_stay_within_bounds(share: float) -> None:
    rng = np.random.default_rng(5)
    values = rng.binomial(1, share, size=(2000, 400)).astype(float)
    mean, half = values.mean(1), Z95 * values.std(1, ddof=1) / 20
    low, high = share_bounds(mean, half, np.full(2000, 400))
    assert ((low >= 0) & (high <= 1)).all()
    assert 0.92 <= ((low <= share) & (share <= high)).mean() <= 0.98
    alone = share_bounds(*(np.array([x]) for x in (1.0, 0.0, 1024)))
    assert alone[0][0] == pytest.approx(1 / (1 + Z95**2 / 1024))
    assert alone[1][0] == 1


def test_a_paired_difference_is_that_of_the_prompts_differences() -> None:
    rng = np.random.default_rng(6)
    one, two = rng.normal(size=(2, 40)) + 10 * rng.normal(size=40)
    one[3] = math.nan  # what one does not answer counts for neither
    told = contrast([*weighted([("a", 0, "p", one)], 1.0), *weighted([("b", 0, "p", two)], -1.0)])
    found = stats.ttest_rel(np.delete(one, 3), np.delete(two, 3)).confidence_interval()
    assert (told.low, told.high) == pytest.approx((found.low, found.high), rel=0.02)
    apart = contrast([*weighted([("a", 0, "p", one)], 1.0), *weighted([("b", 0, "q", two)], -1.0)])
    assert apart.high - apart.low > 4 * (told.high - told.low)
    assert contrast(weighted([("a", 0, "p", one[:1])], 1.0)).low == -math.inf


def test_one_prompt_has_no_interval() -> None:
    """Not of width 0: nothing is known of how far off it is, from one seed or several."""
    task = build_task("linear_regression", dimensions=2, examples=4, noise=0.5)
    recall = build_task("associative_recall", vocabulary=16, pairs=3, length=16)
    for each in (task, recall):
        found = evaluate_learners(each, prompts=1, splits=("train",))
        assert (found["n"] == 1).all()
        assert found["value"].notna().all()
        assert found[["ci_low", "ci_high"]].isna().all(axis=None)
    both = pd.concat([found, found.assign(seed=1)], ignore_index=True)
    assert summarise(both)[["ci_low", "ci_high"]].isna().all(axis=None)
    assert summarise(both.assign(n=2)).dropna(subset="ci_low").empty is False
    groups = breakdown(recall.learners(), recall, prompts=1)
    assert groups[["ci_low", "ci_high"]].isna().all(axis=None)
    untrained = build_model(preset("transformer", width=8, depth=1, heads=1).for_task(task))
    score = validate(untrained, task, ValidationSpec(prompts=1))
    assert math.isnan(score.ci_low)
    assert math.isnan(score.ci_high)
    bandit = build_task("bandit", preset="easy")
    played = regret(bandit.learners(), bandit, problems=1, horizon=2)
    assert played[["ci_low", "ci_high"]].isna().all(axis=None)


def test_shares_that_are_all_alike_have_wilsons_interval() -> None:
    for count in (2, 3, 8, 64):
        ones, zeros = np.ones(count), np.zeros(count)
        told = contrast(weighted([("a", s, "p", ones) for s in (0, 1)], 1.0, (0.0, 1.0)))
        (low,), (high,) = share_bounds(*(np.array([x]) for x in (1.0, 0.0, count)))
        assert (told.low, min(told.high, 1.0)) == pytest.approx((low, high))
        apart = [*weighted([("a", 0, "p", ones)], 1.0, (0.0, 1.0)), *weighted([("b", 0, "p", zeros)], -1.0, (0.0, 1.0))]
        assert contrast(apart).parts == (count > 3)  # 1.0 and 0.0 on two prompts tell nothing apart
        same = [*weighted([("a", 0, "p", ones)], 1.0, (0.0, 1.0)), *weighted([("b", 0, "p", ones)], -1.0, (0.0, 1.0))]
        assert contrast(same).high == pytest.approx(1 - low)
    assert contrast(weighted([("a", 0, "p", ones)], 1.0)) == (1.0, 1.0, 1.0)  # of what has no bounds nothing is known


@pytest.mark.parametrize("sets", [1, 3])  # seeds that answer the same prompts, or prompts of their own
def test_no_share_is_surer_than_one_of_which_all_prompts_are_right(sets: int) -> None:
    def told(values: np.ndarray) -> tuple[float, float]:
        parts = np.split(values, sets) if sets > 1 else [values] * 3
        found = contrast(weighted([("a", s, ("p", s % sets), part) for s, part in enumerate(parts)], 1.0, (0.0, 1.0)))
        half = Z95 * values.std(ddof=1) / len(values) ** 0.5
        (low,), _ = share_bounds(*(np.array([x]) for x in (values.mean(), half, len(values), usual(values)[1])))
        return found.low, float(low)

    whole = told(np.ones(96))
    assert whole == pytest.approx((1 - Z95**2 / (96 + Z95**2),) * 2)  # of sets together as of one
    lower = whole
    for missed in range(1, TELLS):
        values = np.ones(96)
        values[:: 96 // missed][:missed] = 0.75
        now = told(values)
        assert now[0] < lower[0]  # each prompt that misses takes something away
        assert now[1] < lower[1]
        lower = now


def test_means_of_shares_near_one_hold_the_truth_where_prompts_that_fail_are_rare() -> None:
    """Most draws have a prompt or two that miss a little, and none of those that fail."""
    rng, held = np.random.default_rng(8), 0
    for _ in range(500):
        drawn = rng.uniform(size=100)
        values = np.where(drawn < 0.006, 0.0, np.where(drawn < 0.03, 0.9, 1.0))
        held += contrast(weighted([("a", 0, "p", values)], 1.0, (0.0, 1.0))).holds(1 - 0.006 - 0.0024)
    assert held / 500 >= 0.95  # by the variance of the prompts alone it is 50%


def test_where_few_prompts_may_differ_the_truth_is_held() -> None:
    """Shares near 1, of which most draws are all alike: an interval of width 0 would hold the truth in none of them."""
    rng, held = np.random.default_rng(7), 0
    for _ in range(500):
        values = (rng.uniform(size=32) < 0.97).astype(float)
        held += contrast(weighted([("a", 0, "p", values)], 1.0, (0.0, 1.0))).holds(0.97)
    assert held / 500 >= 0.9
