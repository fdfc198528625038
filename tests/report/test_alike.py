"""Which algorithm a model is like is said where the prompts tell, and only there."""

from __future__ import annotations

from contextlab.evaluation.results import SIMILARITY_COLUMNS, table
from contextlab.report.alike import similarity_words


def rows(cosines: dict[str, float], behind: dict[str, tuple[float, float]]):
    who = {"run": "r", "model": "m", "seed": 0, "task": "t", "split": "train", "n": 64}
    found = [
        {**who, "learner": name, "measure": "errors", "value": value, "ci_low": value - 0.02, "ci_high": value + 0.02}
        for name, value in cosines.items()
    ]
    found += [
        {**who, "learner": name, "measure": "behind", "value": value, "ci_low": value - half, "ci_high": value + half}
        for name, (value, half) in behind.items()
    ]
    return table(found, SIMILARITY_COLUMNS)


def test_the_learner_that_is_told_apart_is_named_and_others_are_not() -> None:
    cosines = {"ridge": 0.98, "ols": 0.97, "knn": 0.4}
    clear = {"ridge": (0.0, 0.0), "ols": (0.01, 0.005), "knn": (0.58, 0.1)}
    assert similarity_words(rows(cosines, clear)) == ["m errs most like ridge (cosine of errors: ridge 0.980 ± 0.020)."]
    near = {**clear, "ols": (0.01, 0.015)}
    assert similarity_words(rows(cosines, near)) == [
        "m cannot be told to be like one of ridge and ols on these prompts (cosine of errors: ridge 0.980 ± 0.020, "
        "ols 0.970 ± 0.020)."
    ]
    low = {name: value / 3 for name, value in cosines.items()}
    assert similarity_words(rows(low, clear))[0].startswith("m errs like none of the learners (largest cosine of ")
    assert similarity_words(rows({"ridge": 1.0}, {"ridge": (0.0, 0.0)})) == []
