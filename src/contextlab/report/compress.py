"""What `compress` measured, task by task: tables for the terminal and the pages."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pandas as pd

from contextlab.errors import InputError
from contextlab.evaluation.compress import FULL, OWN, is_text
from contextlab.evaluation.intervals import Interval, t95
from contextlab.policies import Policy, parse_policy
from contextlab.prompt import HIGHER_IS_BETTER
from contextlab.report.naming import bytes_in_words, interval_in_words

SETTING = ["run", "weights", "model", "kind", "split", "task", "length", "metric"]


def with_weights(results: pd.DataFrame) -> pd.DataFrame:
    """Results whose column `weights` is "" of the model's own; those of older versions have none."""
    if "weights" not in results:
        return results.assign(weights="", sequences=None)
    return results.assign(weights=results["weights"].fillna(""))


def over_seeds(results: pd.DataFrame) -> pd.DataFrame:
    """Results of several seeds as one: the means of the seeds.

    Each seed has prompts of its own, so that the seeds' means hold all noise: of qualities the interval is Student's t
    over them, no narrower than that over prompts. Of times and bytes it goes from the least to the most of the batches.
    """
    if results["seed"].nunique() < 2:
        return results
    results = with_weights(results)
    chance = results.get("chance", math.nan)
    halves = results.assign(half=(results["ci_high"] - results["ci_low"]) / 2, chance=chance)
    found = halves.groupby(SETTING, sort=False, dropna=False).agg(
        value=("value", "mean"), ci_low=("ci_low", "min"), ci_high=("ci_high", "max"), n=("n", "sum"),
        seed=("seed", "min"), chance=("chance", "first"), half=("half", "mean"), spread=("value", "std"),
        seeds=("value", "size"), sequences=("sequences", "first"),
    ).reset_index()  # fmt: skip
    t = np.array([t95(max(1, int(seeds) - 1)) for seeds in found["seeds"]])
    half = np.fmax(t * found["spread"].fillna(0), found["half"]) / np.sqrt(found["seeds"])
    cost = found["metric"].str.contains("bytes|_ratio|_per_second|overhead")
    share = found["metric"].isin(HIGHER_IS_BETTER)
    for end, sign in (("ci_low", -1), ("ci_high", 1)):
        bound = found["value"] + sign * half
        found[end] = found[end].where(cost, bound.clip(0, 1).where(share, bound))
    return found.drop(columns=["half", "spread", "seeds"])


def main_metric(task: str, rows: pd.DataFrame) -> str:
    """The metric that a task is judged by here: perplexity of text, else accuracy or the first that was measured."""
    if is_text(task):
        return "perplexity"
    known = list(dict.fromkeys(rows["metric"]))
    return "accuracy" if "accuracy" in known else str(known[0])


def compress_table(results: pd.DataFrame) -> dict[str, list[dict[str, str]]]:
    """Title of a task and length -> rows, in the order of the settings; every cell is text."""
    results, tables = with_weights(over_seeds(results)), {}
    for (task, length), rows in results.groupby(["task", "length"], sort=False):
        metric, reads = main_metric(str(task), rows), bool((rows["metric"] == "read_bytes").any())
        several = bool((rows["weights"] != "").any())
        shown = []
        for (weights, policy, budget, kind), own in rows.groupby(["weights", "model", "split", "kind"], sort=False):
            values = {str(row["metric"]): row for _, row in own.iterrows()}
            value = {metric: row["value"] for metric, row in values.items()}
            plain, other = policy == FULL and not weights, kind == "model"
            shown.append(
                {
                    **({"weights": str(policy) if other else str(weights) or OWN} if several else {}),
                    "policy": "full cache" if policy == FULL or (other and several) else str(policy),
                    "budget": "" if policy == FULL or other else str(budget),
                    short(metric): _quality(values[metric], metric),
                    "KL": "" if plain or other or "kl" not in value else f"{value['kl']:.2g}",
                    **({"stored": bytes_in_words(value["weight_bytes"])} if several else {}),
                    "state": bytes_in_words(value["state_bytes"]),
                    **({"total": bytes_in_words(value["total_bytes"])} if several else {}),
                    **(
                        {"reads": bytes_in_words(value["read_bytes"]) if "read_bytes" in value else ""} if reads else {}
                    ),
                    "decode": f"{value['decode_tokens_per_second']:,.0f}/s" if plain else _times(values, "decode"),
                    "prefill": f"{value['prefill_tokens_per_second']:,.0f}/s" if plain else _times(values, "prefill"),
                    "peak": bytes_in_words(value["peak_bytes"]),
                }
            )
        tables[f"{task}, {length} tokens"] = shown
    return tables


@lru_cache(maxsize=1024)
def built(policy: str) -> Policy | None:
    """A policy as it was written; None where it is a plugin's, or goes by a name that someone gave it."""
    try:
        return parse_policy(policy)
    except InputError:
        return None


def bounds(policy: str) -> str:
    """What the budget of a policy as it was written limits: what is "held", or "read", or read at "prefill"."""
    made = built(policy)
    return "held" if made is None else made.bounds


def knows_what_follows(policy: str) -> bool:
    """Whether a policy as it was written chooses by what it cannot know."""
    made = built(policy)
    return made is not None and made.reads_first == "everything"


def short(metric: str) -> str:
    """A metric in the head of a narrow column."""
    return {"cross_entropy": "nats"}.get(metric, metric.replace("_", " "))


def _quality(row: pd.Series, metric: str) -> str:
    return interval_in_words(Interval.known(row["value"], row["ci_low"], row["ci_high"]), metric)


def _bytes(value: dict[str, float], metric: str) -> str:
    return bytes_in_words(value[metric]) if metric in value else ""


def _times(values: dict[str, pd.Series], what: str) -> str:
    """How many times as fast as the full cache, with the least and the most of the batches; nothing of one batch."""
    row = values[f"{what}_ratio"]
    return f"{row['value']:.2g}x ({row['ci_low']:.2g}-{row['ci_high']:.2g})" if row["n"] > 1 else ""
