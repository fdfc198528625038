"""What `compress` measured: tables for the terminal and the pages, and a sentence a budget."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import pandas as pd

from contextlab.errors import InputError
from contextlab.evaluation.compress import FULL, OWN, is_text
from contextlab.policies import Budget, Policy, parse_policy
from contextlab.prompt import HIGHER_IS_BETTER
from contextlab.report.naming import bytes_in_words, value_in_words

EQUAL = 0.005
"""Parts of the full cache's quality that are told apart."""
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


def compress_words(results: pd.DataFrame) -> list[str]:
    """A sentence for each budget: the policy that keeps most of the full cache's quality, over all tasks and lengths.

    The oracle, which knows what follows, is told beside it. What is kept is the ratio to the full cache's accuracy (its
    inverse for errors and perplexity), the mean over tasks and lengths. Policies without a budget take part where their
    state is no larger than that of some policy with it.
    """
    found = _settings(results)
    policies = [key for key in found if key[1] not in (FULL, OWN) and not knows_what_follows(key[0])]
    tasks = dict.fromkeys(over_seeds(results)["task"])
    sentences = []
    for budget in dict.fromkeys(split for _, split in found if split not in (FULL, OWN)):
        groups: dict[str, list[tuple[str, str]]] = {"held": [], "read": [], "prefill": []}
        for key in policies:
            if key[1] == budget and not Budget.of(budget).everything:
                groups[_bounds(key[0])].append(key)
        most = max((found[key].bytes for key in groups["held"]), default=0.0)
        groups["held"] += [key for key in found if key[1] == OWN and found[key].bytes <= most]
        for bounds, group in groups.items():  # those that were measured on most of the tasks are compared
            widest = min(1.0, max((found[key].share for key in group), default=0.0))
            groups[bounds] = [key for key in group if found[key].share >= widest]
        counted = {task for key in groups["held"] for task in found[key].tasks}
        apart = ", ".join(str(task) for task in tasks if task not in counted)
        apart = f" (without {apart}, where most policies cannot keep to it)" if apart else ""
        for bounds, group in groups.items():
            if not group:
                continue
            best = max(group, key=lambda key: found[key].quality)
            near = [key[0] for key in group if key != best and found[key].quality > found[best].quality - EQUAL]
            equal = f" (and {', '.join(near)}, which {'is' if len(near) == 1 else 'are'} as good)" if near else ""
            what = {
                "held": f"At {budget}{apart}",
                "read": f"Of the policies that hold everything and read {budget} of it a token",
                "prefill": f"Of the policies that hold everything and read {budget} of it for a token of the prompt",
            }[bounds]
            part = f" in {found[best].bytes:.1%} of its bytes" if bounds == "held" else ""
            sentences.append(
                f"{what}, {best[0]} is the best policy{equal}: it keeps {found[best].quality:.1%} of the full cache's "
                f"quality{part}: {'; '.join(found[best].words)}."
            )
        sentences += [
            f"At {budget}, {key[0]}, which knows what follows, keeps {each.quality:.1%}: a bound, not a method."
            for key, each in found.items()
            if key[1] == budget and knows_what_follows(key[0]) and each.share >= 1
        ]
    return sentences


@lru_cache(maxsize=1024)
def _built(policy: str) -> Policy | None:
    """A policy as it was written; None where it is a plugin's, or goes by a name that someone gave it."""
    try:
        return parse_policy(policy)
    except InputError:
        return None


def _bounds(policy: str) -> str:
    """What the budget of a policy as it was written limits: what is "held", or "read", or read at "prefill"."""
    built = _built(policy)
    return "held" if built is None else built.bounds


def knows_what_follows(policy: str) -> bool:
    """Whether a policy as it was written chooses by what it cannot know."""
    built = _built(policy)
    return built is not None and built.reads_first == "everything"


class _Kept(NamedTuple):
    """What a setting keeps of the full cache's quality and of its bytes, means over tasks and lengths, and in words.

    tasks: those that were measured. share: their number over that of the tasks which count for what holds less.
    """

    quality: float
    bytes: float
    words: list[str]
    tasks: list[str]
    share: float


def _settings(results: pd.DataFrame) -> dict[tuple[str, str], _Kept]:
    """(policy, budget) -> what it keeps. A task in which most of a kind cannot keep to a budget does not count."""
    results = over_seeds(results)
    policies = results[results["kind"] == "policy"]
    policies = policies.assign(bounds=policies["model"].map({name: _bounds(name) for name in set(policies["model"])}))
    counts = policies.groupby(["task", "length", "split", "bounds"], sort=False)["model"].nunique()
    few = set(counts[2 * counts < counts.groupby(["split", "bounds"]).transform("max")].index)
    found: dict[tuple[str, str], list[tuple[float, float, str, str]]] = {}
    for (task, length), rows in policies.groupby(["task", "length"], sort=False):
        metric = main_metric(str(task), rows)
        value = rows[rows["metric"] == metric].set_index(["model", "split"])["value"]
        size = rows[rows["metric"] == "state_bytes"].set_index(["model", "split"])["value"]
        full = float(value[(FULL, FULL)])
        for key in value.index:
            if (task, length, key[1], _bounds(key[0])) in few:
                continue
            mine = float(value[key])
            better, worse = (mine, full) if metric in HIGHER_IS_BETTER else (full, mine)
            words = (
                f"{task} at {length} tokens {short(metric)} {value_in_words(mine, metric, '.4g')} "
                f"(full {value_in_words(full, metric, '.4g')})"
            )
            part = better / worse if worse else 1.0
            found.setdefault(key, []).append((part, float(size[key] / size[(FULL, FULL)]), words, str(task)))
    count: dict[str, int] = {}
    for kinds in ({"held"}, {"read", "prefill"}):  # what holds less sets the tasks, where there is any such policy
        for budget in {budget for name, budget in found if _bounds(name) in kinds} - count.keys():
            count[budget] = max(len(x) for (name, b), x in found.items() if b == budget and _bounds(name) in kinds)
    return {
        key: _Kept(
            sum(x[0] for x in each) / len(each), sum(x[1] for x in each) / len(each), [x[2] for x in each],
            [x[3] for x in each], len(each) / count[key[1]],
        )
        for key, each in found.items()
    }  # fmt: skip


def kept_table(results: pd.DataFrame) -> list[dict[str, str]]:
    """A row a policy: the part of the full cache's quality that it keeps at each budget, over all tasks and lengths.

    A star marks a mean over some of the tasks that count: the policy cannot keep to the budget in the others. The best
    stand first, where what a policy cannot keep to counts as nothing kept, and those that take no budget last, under
    "own". "holds" is the part of the full cache's bytes that it holds, the least and the most; a policy that holds
    everything bounds what is read.
    """
    found = {key: each for key, each in _settings(results).items() if 2 * each.share >= 1}
    budgets = [b for b in dict.fromkeys(split for _, split in found) if b != FULL]
    names = [name for name in dict.fromkeys(name for name, _ in found) if name != FULL]

    def order(name: str) -> tuple[bool, float]:
        each = [found[name, b] for b in budgets if (name, b) in found]
        return (name, OWN) in found, -sum(one.quality * one.share for one in each)

    rows = []
    for name in sorted(names, key=order):
        each = {b: found[name, b] for b in budgets if (name, b) in found}
        parts = [one.bytes for one in each.values()]
        holds = f"{min(parts):.0%}" if max(parts) - min(parts) < 0.01 else f"{min(parts):.0%} to {max(parts):.0%}"
        cells = {b: f"{each[b].quality:.1%}{'*' * (each[b].share < 1)}" if b in each else "" for b in budgets}
        rows.append({"policy": name, **cells, "holds": holds})
    return rows


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


def _named(keys: list[tuple[str, str]]) -> str:
    return ", ".join(key[0] for key in keys)
