"""What the results say, in words and in a small table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from contextlab.evaluation import sample_complexity, summarise
from contextlab.prompt import HIGHER_IS_BETTER
from contextlab.report.naming import (
    ASIDE,
    bytes_in_words,
    count_in_words,
    label,
    main_metric,
    metric_title,
    record_label,
    value_in_words,
)

GOOD_RECALL = 0.98
CERTAIN = 0.9995
"""Accuracy from which on a learner counts as always right."""
MANY = 6
"""Models that fall short on one task are told one by one up to this number, in groups beyond it."""
NEAR = (0.2, 0.1, 0.05)
"""Excess over the best learner, as parts of its own error, at which a model counts as near it; see `_scale`."""
NOTHING = 0.01
"""Part of its error with the fewest examples, below which the best learner makes none with the most: no yardstick."""
FEW_SHOTS = 4
"""Numbers of examples below which the examples that are needed tell nothing."""
STILL_FALLING = 0.1
"""A loss counts as still falling when it fell by this fraction over the last fifth of the training."""


def summary_table(results: pd.DataFrame, records: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """Task -> rows, best model first, then the best known learner; every cell is text."""
    tables = {}
    for task, rows in _by_task(results):
        metric = main_metric(rows)
        overall = _overall(rows, metric)
        excess = _overall(rows, f"excess_{metric}").set_index("label")
        costs = {m: _cost(rows, m) for m in ("parameters", "state_bytes", "training_seconds")}
        regret = _overall(rows, "regret", "online").set_index("label")
        shown = []
        for _, row in _ranked(overall, metric).iterrows():
            name = row["label"]
            has = name in excess.index and row["kind"] == "model"
            shown.append(
                {
                    "model": name if row["kind"] == "model" else f"{name} (best learner)",
                    metric_title(metric): value_in_words(row["value"], metric),
                    "excess": _interval(excess.loc[name]) if has else "",
                    **({"regret": _interval(regret.loc[name]) if name in regret.index else ""} if len(regret) else {}),
                    "parameters": _told(costs["parameters"], name, count_in_words),
                    "state": _told(costs["state_bytes"], name, bytes_in_words),
                    "training": _told(costs["training_seconds"], name, lambda s: f"{s:.0f} s"),
                }
            )
        tables[task] = shown
    return tables


def summary_words(results: pd.DataFrame, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences: who wins on each task and by how much, who falls short and what the data say of why."""
    sentences = []
    for task, rows in _by_task(results):
        metric = main_metric(rows)
        own = [r for r in records if r["task"] == task]
        if metric in HIGHER_IS_BETTER:
            sentences += _recall_words(task, rows, metric, own)
        else:
            sentences += _error_words(task, rows, metric)
        sentences += _example_words(task, rows, metric)
        sentences += _regret_words(task, rows)
        sentences += _shift_words(task, rows, metric)
        sentences += _state_words(task, rows)
    for record in records:
        if record["status"] != "finished":
            sentences.append(f"{record['model']} on {record['task']} {record['status']}: {record.get('message', '')}")
    return sentences


def _error_words(task: str, rows: pd.DataFrame, metric: str) -> list[str]:
    """For errors: closeness to the best known learner, over the same positions as the table: all that are scored."""
    errors, found = _overall(rows, metric), _overall(rows, f"excess_{metric}")
    learners, found = errors[errors["kind"] == "learner"], found[found["kind"] == "model"]
    if found.empty or learners.empty:
        return []
    best, floor = learners["label"].iloc[0], float(learners["value"].iloc[0])
    excess = found.set_index("label")["value"].sort_values(kind="stable")
    shots = rows.loc[(rows["metric"] == metric) & (rows["split"] == "train"), "shot"].dropna()
    first, last = (int(shots.min()), int(shots.max())) if len(shots) else (0, 0)
    over = f"Averaged over {first} to {last} in-context examples its" if last > first else "Its"
    name = excess.index[0]

    def relative(value: float) -> str:
        return f" ({value / floor:+.1%})" if floor else ""  # a learner that looks the answer up makes no error

    sentences = [
        f"{task}: {name} comes closest to {best}, the best known learner. {over} {metric_title(metric)} is "
        f"{excess.iloc[0]:.3g} above {best}'s {floor:.3g}{relative(excess.iloc[0])}{_seeds(found)}."
    ]
    if len(excess) > 1:
        others = ", ".join(f"{n} {v:.3g}{relative(v)}" for n, v in excess.iloc[1:].items())
        sentences.append(f"{task}: above {best} by: {others}.")
    return sentences


def _recall_words(task: str, rows: pd.DataFrame, metric: str, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """For accuracies: who gets nearly all, and what is known of the rest."""
    overall = _overall(rows, metric)
    models = _ranked(overall[overall["kind"] == "model"], metric)
    if models.empty:
        return []
    best = overall[overall["kind"] == "learner"].head(1)
    most = float(best["value"].iloc[0]) if len(best) else 1.0
    wanted = most - (1 - GOOD_RECALL)  # where the best known learner errs, nobody is asked for more
    good, short = models[models["value"] >= wanted], models[models["value"] < wanted]
    told, nearest = (models, short[:0]) if len(short) <= MANY else (good, short.head(3))
    aim = f"reach {GOOD_RECALL:.0%} {metric_title(metric)} or more"
    if most < CERTAIN:
        points, name = 100 * (1 - GOOD_RECALL), best["label"].iloc[0]
        aim = f"come within {points:.0f} points of {name}, the best known learner ({most:.1%}),"
    sentences = [
        f"{task}: {len(good)} of {len(models)} models {aim} on the training distribution: "
        + "; next come ".join(
            ", ".join(f"{row['label']} {value_in_words(row['value'], metric)}" for _, row in group.iterrows())
            for group in (told, nearest)
            if len(group)
        )
        + _seeds(models)
        + "."
    ]
    several = rows["run"].nunique() > 1
    falls: dict[str, list[float]] = {name: [] for name in short["label"]}
    for record in records:
        name, fall = record_label(record, several), _late_fall(record)
        if name in falls and fall is not None:
            falls[name].append(fall)
    late = {name: sum(each) / len(each) for name, each in falls.items() if each}
    if len(short) > MANY:
        return sentences + _short_in_groups(task, short, metric, late)
    for _, row in short.iterrows():
        reasons = _reasons(row["label"], rows, metric, late.get(row["label"]))
        if reasons:  # by how much each falls short stands above
            value = value_in_words(row["value"], metric)
            sentences.append(f"{task}: {row['label']} falls short ({value}): {'; '.join(reasons)}.")
    return sentences


def _short_in_groups(task: str, short: pd.DataFrame, metric: str, late: Mapping[str, float]) -> list[str]:
    """One sentence for all that were still learning, one for those that had stopped, one for the rest."""
    groups: dict[str, list[str]] = {"falling": [], "level": [], "unknown": []}
    for _, row in short.iterrows():
        fall = late.get(row["label"])
        group = "unknown" if fall is None else "falling" if fall > STILL_FALLING else "level"
        groups[group].append(row["label"])
    endings = {
        "falling": f"whose loss was still falling when training ended (by more than {STILL_FALLING:.0%} over the last "
        "fifth of the steps), so longer training would help",
        "level": "whose loss had levelled off: at their limit, or on a plateau, which a longer curriculum of small "
        "prompts may end",
        "unknown": "for which the measurements here give no reason",
    }
    return [
        f"{task}: {len(names)} of those that fall short: {', '.join(names)}, {endings[group]}."
        for group, names in groups.items()
        if names
    ]


def _reasons(name: str, rows: pd.DataFrame, metric: str, fall: float | None) -> list[str]:
    """What the measurements say of why a model falls short; nothing that they do not say."""
    reasons = []
    if fall is not None and fall > STILL_FALLING:
        reasons.append(
            f"its loss was still falling when training ended, by {fall:.0%} over the last fifth of the steps, so "
            "longer training would help"
        )
    elif fall is not None:
        reasons.append(
            f"its loss had levelled off (it changed by {-fall:+.0%} over the last fifth of the steps): it is at its "
            "limit, or on a plateau, which a longer curriculum of small prompts may end"
        )
    easier = _overall(rows, metric, split=None)
    easier = easier[(easier["label"] == name) & easier["split"].str.startswith("pairs=")]
    if len(easier) > 1:
        told = ", ".join(
            f"{row['split'].removeprefix('pairs=')} pairs {row['value']:.1%}" for _, row in easier.iterrows()
        )
        reasons.append(f"by the number of pairs it answers: {told}")
    return reasons


def example_table(rows: pd.DataFrame, metric: str) -> list[dict[str, str]]:
    """Sample complexity: the in-context examples from which on each predictor stays near the best known learner.

    rows: the results of one task. Near is an excess of 20%, 10% or 5% of the best learner's own error with the most
    examples (where it makes none then, with the fewest); of shares such as accuracy, that many points. Cells: the
    count, and in brackets what the ends of the intervals give. Empty where the prompts have few numbers of examples, or
    where no model comes near.
    """
    train = rows[(rows["split"] == "train") & rows["metric"].isin([metric, f"excess_{metric}"])]
    scale = _scale(train, metric)
    if scale is None or train["shot"].nunique() < FEW_SHOTS:
        return []
    best = train.loc[train["kind"] == "learner", "model"].iloc[0]
    several = rows["run"].nunique() > 1
    cells: dict[str, dict[str, str]] = {}
    reached = False
    for share in NEAR:
        found = sample_complexity(train, share * scale, metric)
        for (_, row), name in zip(found.iterrows(), label(found, several), strict=True):
            if row["kind"] == "learner" and row["model"] == best:
                continue
            reached |= row["kind"] == "model" and not pd.isna(row["examples"])
            title = f"within {share:.0%}" if metric in HIGHER_IS_BETTER else f"within {share * scale:.3g} ({share:.0%})"
            cells.setdefault(str(name), {"predictor": str(name)})[title] = _count(row)
    return list(cells.values()) if reached else []


def _count(row: pd.Series) -> str:
    """4 [3, 6]: the count, and those at the ends of the interval; "never" where there is none within the prompt."""
    value, low, high = (
        "never" if pd.isna(row[name]) else str(int(row[name])) for name in ("examples", "examples_low", "examples_high")
    )
    return value if value == low == high else f"{value} [{low}, {high}]"


def _scale(train: pd.DataFrame, metric: str) -> float | None:
    """What an excess is held against: of errors, the best learner's with the most examples; of shares, 1.

    Where it makes next to no error then, as without noise, its error with the fewest.
    """
    if metric in HIGHER_IS_BETTER:
        return 1.0 if (train["kind"] == "learner").any() else None
    learners = train[(train["kind"] == "learner") & (train["metric"] == metric) & train["shot"].notna()]
    if learners.empty:
        return None
    errors = learners[learners["model"] == learners["model"].iloc[0]].sort_values("shot")["value"]
    first, last = float(errors.iloc[0]), float(errors.iloc[-1])
    scale = last if last > NOTHING * first else first
    return scale if scale > 0 else None


def _example_words(task: str, rows: pd.DataFrame, metric: str) -> list[str]:
    """How many examples bring the models near the best known learner, for the middle one of the distances."""
    table = example_table(rows, metric)
    models = set(label(rows[rows["kind"] == "model"], rows["run"].nunique() > 1))
    found = {row["predictor"]: row[list(row)[2]] for row in table if row["predictor"] in models}
    there = {name: cell for name, cell in found.items() if not cell.startswith("never")}
    if not there or set(found.values()) == {str(int(rows["shot"].min()))}:  # near from the start: no examples needed
        return []
    best = rows.loc[rows["kind"] == "learner", "model"].iloc[0]
    told = sorted(there, key=lambda name: int(there[name].split()[0]))
    shown = ", ".join(f"{name} {there[name]}" for name in told[:MANY])
    shown += f" and {len(told) - MANY} more later" if len(told) > MANY else ""
    missing = [name for name in found if name not in there]
    return [
        f"{task}: in-context examples after which a model stays {list(table[0])[2]} of {best}: {shown}"
        + (f"; not within the prompt: {_named(missing)}" if missing else "")
        + "."
    ]


def _regret_words(task: str, rows: pd.DataFrame) -> list[str]:
    """Who loses least reward when it acts for itself."""
    regret = _overall(rows, "regret", "online").sort_values("value", kind="stable")
    models, learners = (regret[regret["kind"] == kind] for kind in ("model", "learner"))
    if models.empty:
        return []
    told = ", ".join(f"{row['label']} {_interval(row)}" for _, row in models.head(MANY).iterrows())
    words = f"{task}: reward lost in {int(models['length'].iloc[0])} steps played online (regret): {told}"
    if len(learners):
        words += f"; of the learners {learners['label'].iloc[0]} loses least, {_interval(learners.iloc[0])}"
    return [words + "."]


def _late_fall(record: Mapping[str, Any]) -> float | None:
    """The relative fall of the loss over the last fifth of a training, from means of tenths; None without history."""
    losses = (record.get("history") or {}).get("loss") or []
    tenth = len(losses) // 10
    if tenth < 1:
        return None
    before, after = losses[-3 * tenth : -2 * tenth], losses[-tenth:]
    start, end = sum(before) / tenth, sum(after) / tenth
    return None if start <= 0 or math.isnan(end) else (start - end) / start


def _shift_words(task: str, rows: pd.DataFrame, metric: str) -> list[str]:
    """Which change of the prompts costs the models most."""
    excess = _overall(rows, f"excess_{metric}", split=None)
    excess = excess[(excess["kind"] == "model") & excess["value"].notna()]
    wide = excess.pivot_table(index="split", columns="label", values="value", sort=False)
    if "train" not in wide.index or len(wide) < 2:
        return []
    harm = (wide.drop(index="train") - wide.loc["train"]).mean(axis=1).sort_values()
    worst = harm.index[-1]
    if harm.iloc[-1] <= 0:
        return [f"{task}: no shift takes the models farther from the best known learner than they are in training."]
    several = wide.shape[1] > 1
    what = f"of the {len(harm)} shifts, '{worst}' costs" if len(harm) > 1 else f"the shift '{worst}' costs"
    most = f"the model{'s' * several}{' most' * (len(harm) > 1)}"
    up = f"{metric_title(f'excess_{metric}')} up by {harm.iloc[-1]:.3g}{' on average' * several}"
    steady = f"; {wide.loc[worst].idxmin()} loses least" if several else ""
    return [f"{task}: {what} {most} ({up}){steady}."]


def _state_words(task: str, rows: pd.DataFrame) -> list[str]:
    states = _cost(rows, "state_bytes")
    if len(states) < 2:
        return []
    least, most = min(states.values()), max(states.values())
    if least == most:
        return [f"{task}: after one prompt all models hold the same amount of state, {bytes_in_words(least)}."]
    small, large = ([name for name, size in states.items() if size == extreme] for extreme in (least, most))
    return [
        f"{task}: after one prompt {_named(small)} {'holds' if len(small) == 1 else 'hold'} the least state, "
        f"{bytes_in_words(least)}; {_named(large)} {'holds' if len(large) == 1 else 'hold'} the most, "
        f"{bytes_in_words(most)} ({most / least:.1f} times as much)."
    ]


def _named(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    shown, more = names[:MANY], len(names) - MANY
    if more > 0:
        return f"{', '.join(shown)} and {more} more"
    return " and ".join((", ".join(shown[:-1]), shown[-1])) if len(shown) > 1 else shown[0]


def _by_task(results: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    groups = results.groupby("task", sort=False)
    return [(str(task), rows) for task, rows in groups if not rows["split"].isin(ASIDE).all()]


def _overall(rows: pd.DataFrame, metric: str, split: str | None = "train") -> pd.DataFrame:
    """The means over all that is scored, seeds put together."""
    chosen = rows[(rows["metric"] == metric) & rows["shot"].isna() & rows["value"].notna()]
    chosen = chosen if split is None else chosen[chosen["split"] == split]
    found = summarise(chosen)
    return found.assign(label=label(found, rows["run"].nunique() > 1))


def _ranked(overall: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Models, best first, then the best known learner (the first that was written)."""
    models = overall[overall["kind"] == "model"].sort_values("value", ascending=metric not in HIGHER_IS_BETTER)
    return pd.concat([models, overall[overall["kind"] == "learner"].head(1)])


def _cost(rows: pd.DataFrame, metric: str) -> dict[str, float]:
    chosen = rows[(rows["metric"] == metric) & (rows["split"] == "cost")]
    named = chosen.assign(label=label(chosen, rows["run"].nunique() > 1))
    return {str(name): float(value) for name, value in named.groupby("label")["value"].mean().items()}


def _told(values: Mapping[str, float], name: str, words: Any) -> str:
    return words(values[name]) if name in values else ""


def _interval(row: pd.Series) -> str:
    half = (row["ci_high"] - row["ci_low"]) / 2
    return f"{row['value']:.3f} ± {half:.3f}"


def _seeds(rows: pd.DataFrame) -> str:
    count = int(rows["seeds"].min())
    return " (one seed)" if count == 1 else f" (means of {count} seeds)"
