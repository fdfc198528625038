"""What `compress` measured, task by task: tables for the terminal and the pages."""

from __future__ import annotations

from functools import lru_cache

import pandas as pd

from contextlab.errors import InputError
from contextlab.evaluation.compress import FULL, is_text
from contextlab.policies import Policy, parse_policy
from contextlab.prompt import HIGHER_IS_BETTER
from contextlab.report.naming import bytes_in_words

SETTING = ["run", "model", "kind", "split", "task", "length", "metric"]


def over_seeds(results: pd.DataFrame) -> pd.DataFrame:
    """Results of several seeds as one: the means of the seeds, and as interval the least and the most of them."""
    if results["seed"].nunique() < 2:
        return results
    found = results.groupby(SETTING, sort=False, dropna=False).agg(
        value=("value", "mean"), ci_low=("value", "min"), ci_high=("value", "max"), n=("n", "sum"), seed=("seed", "min")
    )
    return found.reset_index()


def main_metric(task: str, rows: pd.DataFrame) -> str:
    """The metric that a task is judged by here: perplexity of text, else accuracy or the first that was measured."""
    if is_text(task):
        return "perplexity"
    known = list(dict.fromkeys(rows["metric"]))
    return "accuracy" if "accuracy" in known else str(known[0])


def compress_table(results: pd.DataFrame) -> dict[str, list[dict[str, str]]]:
    """Title of a task and length -> rows, in the order of the settings; every cell is text."""
    results, tables = over_seeds(results), {}
    for (task, length), rows in results.groupby(["task", "length"], sort=False):
        metric, reads = main_metric(str(task), rows), bool((rows["metric"] == "read_bytes").any())
        shown = []
        for (policy, budget, kind), own in rows.groupby(["model", "split", "kind"], sort=False):
            values = {str(row["metric"]): row for _, row in own.iterrows()}
            value = {metric: row["value"] for metric, row in values.items()}
            plain = policy == FULL
            shown.append(
                {
                    "policy": "full cache" if plain else str(policy),
                    "budget": "" if plain or kind == "model" else str(budget),
                    short(metric): _quality(values[metric], metric),
                    "KL": "" if plain or kind == "model" or "kl" not in value else f"{value['kl']:.2g}",
                    "state": bytes_in_words(value["state_bytes"]),
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
    half = (row["ci_high"] - row["ci_low"]) / 2
    if metric in HIGHER_IS_BETTER:
        return f"{row['value']:.1%} ± {100 * half:.1f}"
    return f"{row['value']:.4g} ± {half:.2g}"


def _bytes(value: dict[str, float], metric: str) -> str:
    return bytes_in_words(value[metric]) if metric in value else ""


def _times(values: dict[str, pd.Series], what: str) -> str:
    """How many times as fast as the full cache, with the least and the most of the batches."""
    row = values[f"{what}_ratio"]
    spread = f" ({row['ci_low']:.2g}-{row['ci_high']:.2g})" if row["n"] > 1 else ""
    return f"{row['value']:.2g}x{spread}"
