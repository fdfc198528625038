"""Which algorithm is it? What similarities of errors say of it, in words."""

from __future__ import annotations

import pandas as pd

from contextlab.evaluation import summarise
from contextlab.evaluation.intervals import Interval
from contextlab.report.naming import and_so_on, interval_in_words, label

ALIKE = 0.5
"""Cosine of errors below which a model errs like none of the learners."""


def similarity_words(similarity: pd.DataFrame, several: bool = False) -> list[str]:
    """A sentence a model: the learner that it errs most like, or those that cannot be told apart on these prompts.

    similarity: rows of one task and split (see `evaluation.measure`). several: whether they are of several runs.
    """
    found = summarise(similarity[similarity["measure"].isin(["errors", "behind"])])
    found = found.assign(name=label(found, several))
    words = []
    for name, rows in found.groupby("name", sort=False):
        cosines, behind = (
            {str(r["learner"]): Interval.known(r["value"], r["ci_low"], r["ci_high"]) for _, r in own.iterrows()}
            for own in (rows[rows["measure"] == measure] for measure in ("errors", "behind"))
        )
        order = sorted(cosines, key=lambda learner: -cosines[learner].value)
        if len(order) < 2 or set(behind) != set(cosines):
            continue
        best = min(behind, key=lambda learner: behind[learner].value)
        near = [learner for learner in order if learner != best and behind[learner].low <= 0]
        told = f"{best} {interval_in_words(cosines[best], '')}"
        if cosines[best].value < ALIKE:
            words.append(f"{name} errs like none of the learners (largest cosine of errors: {told}).")
        elif near:
            others = ", ".join(f"{learner} {interval_in_words(cosines[learner], '')}" for learner in near[:3])
            words.append(
                f"{name} cannot be told to be like one of {and_so_on([best, *near])} on these prompts (cosine of "
                f"errors: {told}, {others})."
            )
        else:
            words.append(f"{name} errs most like {best} (cosine of errors: {told}).")
    return words


__all__ = ["similarity_words"]
