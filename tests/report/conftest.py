"""A realistic table of results that no training had to make."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from contextlab.evaluation.results import table

MODELS = ("transformer", "lightning", "gated_delta_net", "mambaformer")
LEARNERS = ("ridge", "ols", "averaging")
SHIFTS = ("train", "scaled inputs", "skewed covariance", "other noise", "more examples", "orthogonal query")
LOADS = ("train", "pairs=8", "pairs=16", "pairs=32", "length=192")


def make_results(seeds: int = 1, run: str = "demo", models: tuple[str, ...] = MODELS) -> pd.DataFrame:
    rng, rows = np.random.default_rng(0), []

    def add(model, kind, seed, task, split, metric, shot, value, half):
        rows.append(
            {
                "run": run, "model": model, "kind": kind, "seed": seed, "task": task, "split": split, "metric": metric,
                "shot": shot, "length": 16, "value": value, "ci_low": value - half, "ci_high": value + half, "n": 1024,
            }
        )  # fmt: skip

    for i, name in enumerate([*models, *LEARNERS]):
        kind = "model" if i < len(models) else "learner"
        excess = 0.05 * (i + 1) if kind == "model" else 0.0 if name == "ridge" else 2.0
        for seed in range(seeds if kind == "model" else 1):
            noise = 0.01 * rng.standard_normal() if kind == "model" else 0.0
            for j, split in enumerate(SHIFTS):
                for shot in [None, *range(16)]:
                    floor = 5 / (1 + (shot if shot is not None else 7)) + 0.25
                    extra = (excess + noise) * (1 + j)
                    add(name, kind, seed, "regression", split, "squared_error", shot, floor + extra, 0.05)
                    add(name, kind, seed, "regression", split, "excess_squared_error", shot, extra, 0.02)
            if kind == "model":
                for metric, value in (("parameters", 2e5 + i), ("flops", 1e7), ("state_bytes", 4096 * 2.0**i)):
                    add(name, kind, seed, "regression", "cost", metric, None, value, 0)
                    add(name, kind, seed, "recall", "cost", metric, None, value, 0)
                for j, split in enumerate(LOADS):
                    accuracy = max(0.0, 1 - 0.03 * i - 0.02 * j)
                    for shot in (None, 16):
                        add(name, kind, seed, "recall", split, "accuracy", shot, accuracy, 0.004)
                        add(name, kind, seed, "recall", split, "excess_accuracy", shot, 1 - accuracy, 0.004)
    for split in LOADS:
        add("lookup", "learner", 0, "recall", split, "accuracy", None, 1.0, 0)
        add("lookup", "learner", 0, "recall", split, "excess_accuracy", None, 0.0, 0)
    return table(rows)


def make_records(models: tuple[str, ...] = MODELS) -> list[dict]:
    steps = list(range(10, 510, 10))
    return [
        {
            "key": f"{task}.{name}.seed0", "task": task, "model": name, "seed": 0, "status": "finished", "message": "",
            "parameters": 200_000, "steps": 500, "seconds": 30.0, "model_spec": {}, "train_spec": {},
            "history": {"step": steps, "loss": [4.0 / (1 + 0.02 * s) for s in steps]},
        }
        for task in ("regression", "recall")
        for name in models
    ]  # fmt: skip


RUN = {
    "name": "demo",
    "description": "A test.",
    "status": "finished",
    "device": "cpu",
    "jobs": 2,
    "versions": {"torch": "2.13.0"},
    "machine": {"cores": 2, "gpus": []},
    "backends": [{"op": "simple_gla", "chosen": "torch", "why": "no CUDA device"}],
}


@pytest.fixture
def results():
    return make_results()


@pytest.fixture
def records():
    return make_records()


@pytest.fixture
def run_record():
    return dict(RUN)
