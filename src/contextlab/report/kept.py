"""How much of the full cache's quality policies keep, compared on tasks that all of those compared can serve.

A mean over other tasks is another scale: a policy that cannot keep to a small budget where it is hard would look better
for it. So a mean is of policies that served the very same tasks; the others have no cell, and what they could not
serve is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd

from contextlab.evaluation.compress import FULL, OWN
from contextlab.policies import Budget
from contextlab.prompt import HIGHER_IS_BETTER
from contextlab.report.compress import bounds, built, knows_what_follows, main_metric, over_seeds, short
from contextlab.report.naming import value_in_words

EQUAL = 0.005
"""Parts of the full cache's quality that are told apart."""

Key = tuple[str, str]
"""A policy as it was written, and its budget."""
On = tuple[str, int]
"""A task as it was written, and the tokens of its prompts."""


class Cell(NamedTuple):
    """What a policy keeps on one task: parts of the full cache's quality and of its bytes, and the quality in words."""

    quality: float
    bytes: float
    words: str


@dataclass(frozen=True)
class Mean:
    """The same over several tasks: means, and the words of each."""

    quality: float
    bytes: float
    words: list[str]


Kept = Mapping[Key, Mapping[On, Cell]]


def kept_tables(results: pd.DataFrame) -> dict[str, list[dict[str, str]]]:
    """Title -> a row a policy: the part of the full cache's quality that it keeps at each budget, a mean over tasks.

    All cells of a table are means over the same tasks, which its title names. Where small budgets cannot be kept to in
    every task there are two tables: all tasks at the budgets that most policies can keep to in each, and the tasks in
    which most can keep to every budget. A policy has no cell where it served fewer; `not_served` tells which. The rows
    with every cell stand first, the best before the others; those that take no budget come last, under "own". "holds"
    is the part of the full cache's bytes that is held, the least and the most; a policy that holds everything bounds
    what is read.
    """
    kept = _kept(results)
    tasks, budgets = list(kept[FULL, FULL]), _budgets(kept)
    groups = {budget: _setting_tasks(kept, budget) for budget in budgets}
    wanted = [budget for budget in budgets if _common(kept, tasks, [groups[budget]]) == tasks]
    everywhere = _common(kept, tasks, list(groups.values()))
    tables = {}
    if wanted or not budgets:
        tables[_titled(tasks)] = _rows(kept, tasks, wanted)
    if everywhere and wanted != budgets:
        tables[_titled(everywhere)] = _rows(kept, everywhere, budgets)
    return {title: rows for title, rows in tables.items() if rows}


def not_served(results: pd.DataFrame, policies: Sequence[str] = ()) -> list[str]:
    """What policies could not serve, a line for those that failed at the same: "text (512 tokens) at 2%: h2o, tova".

    policies: all that were asked for; those without any result are told, too.
    """
    kept = _kept(results)
    tasks, budgets = list(kept[FULL, FULL]), _budgets(kept)
    names = [name for name in dict.fromkeys(name for name, _ in kept) if name != FULL]
    found: dict[str, list[str]] = {}
    for name in names:
        missing = []
        for task, length in tasks:
            at = [b for b in _tried(name, kept, budgets) if (task, length) not in kept.get((name, b), {})]
            if at:
                missing.append(f"{task} ({length} tokens)" + ("" if at == [OWN] else f" at {_and(at)}"))
        if missing:
            found.setdefault("; ".join(missing), []).append(name)
    nothing = [name for name in policies if name not in names]
    if nothing:
        found["any task at any budget"] = nothing
    return [f"{what}: {', '.join(each)}" for what, each in found.items()]


def compress_words(results: pd.DataFrame) -> list[str]:
    """A sentence for each budget: the policy that keeps most of the full cache's quality.

    Compared are the policies that served all of the tasks that most can keep to at the budget; the tasks that do not
    count and the policies that are not compared are named. The oracle, which knows what follows, is told beside them.
    What is kept is the ratio to the full cache's accuracy (its inverse for errors and perplexity), the mean over tasks
    and lengths. Policies without a budget take part where their state is no larger than that of some policy with it.
    """
    kept = _kept(results)
    tasks = list(kept[FULL, FULL])
    policies = [key for key in kept if key[0] != FULL and not knows_what_follows(key[0])]
    sentences = []
    for budget in _budgets(kept):
        limited = [key for key in policies if key[1] == budget and not Budget.of(budget).everything]
        shared: list[On] = []
        for kind in ("held", "read", "prefill"):
            group = [key for key in limited if bounds(key[0]) == kind]
            on = _common(kept, tasks, [group]) if group else []
            means = {key: mean for key in group if (mean := _mean(kept[key], on)) is not None}
            apart = [key[0] for key in group if key not in means]
            if kind == "held":
                shared = on
                most = max((mean.bytes for mean in means.values()), default=0.0)
                own = {key: _mean(kept[key], on) for key in policies if key[1] == OWN}
                means |= {key: mean for key, mean in own.items() if mean is not None and mean.bytes <= most}
            if means:
                sentences.append(_sentence(kind, budget, means, [t for t in tasks if t not in on], apart))
        for key in kept:
            mean = _mean(kept[key], shared or tasks)
            if key[1] == budget and knows_what_follows(key[0]) and mean is not None:
                sentences.append(
                    f"At {budget}{_without([t for t in tasks if t not in (shared or tasks)])}, {key[0]}, which knows "
                    f"what follows, keeps {mean.quality:.1%}: a bound, not a method."
                )
    return sentences


def _sentence(kind: str, budget: str, means: Mapping[Key, Mean], left: Sequence[On], apart: Sequence[str]) -> str:
    """The best of policies with the same bounds at a budget. left: tasks that do not count; apart: not compared."""
    best = max(means, key=lambda key: means[key].quality)
    near = [key[0] for key in means if key != best and means[key].quality > means[best].quality - EQUAL]
    equal = f" (and {', '.join(near)}, which {'is' if len(near) == 1 else 'are'} as good)" if near else ""
    reads = f"read{'s' if len(means) == 1 else ''} {budget} of it " + (
        "a token" if kind == "read" else "for a token of the prompt"
    )
    without, one = _without(left), means[best]
    if len(means) > 1:
        who = f"At {budget}" if kind == "held" else f"Of the policies that hold everything and {reads}"
        who += f"{without}, {best[0]} is the best policy{equal}: it keeps"
    elif kind == "held":
        who = f"At {budget}{without}, {best[0]} keeps"
    else:
        who = f"{best[0]}, which holds everything and {reads}, keeps{without}"
    part = f" in {one.bytes:.1%} of its bytes" if kind == "held" else ""
    rest = f" Not compared, as they cannot keep to it in all of these: {', '.join(apart)}." if apart else ""
    return f"{who} {one.quality:.1%} of the full cache's quality{part}: {'; '.join(one.words)}.{rest}"


def _without(tasks: Sequence[On]) -> str:
    return f" (without {_on(tasks)}, where most policies cannot keep to it)" if tasks else ""


def _kept(results: pd.DataFrame) -> Kept:
    """(policy, budget) -> task and length -> what it keeps; what some seed's model could not serve is left out."""
    policies = results[results["kind"] == "policy"]
    seeds = policies.groupby(["task", "length", "model", "split"], sort=False)["seed"].nunique()
    found: dict[Key, dict[On, Cell]] = {}
    over = over_seeds(policies)
    for task, length in over[["task", "length"]].drop_duplicates().itertuples(index=False):
        rows = over[(over["task"] == task) & (over["length"] == length)]
        metric = main_metric(str(task), rows)
        value = rows[rows["metric"] == metric].set_index(["model", "split"])["value"]
        size = rows[rows["metric"] == "state_bytes"].set_index(["model", "split"])["value"]
        full = float(value[(FULL, FULL)])
        for name, budget in value.index:
            if seeds[task, length, name, budget] < seeds[task, length, FULL, FULL]:
                continue
            mine = float(value[name, budget])
            better, worse = (mine, full) if metric in HIGHER_IS_BETTER else (full, mine)
            words = (
                f"{task} at {length} tokens {short(metric)} {value_in_words(mine, metric, '.4g')} "
                f"(full {value_in_words(full, metric, '.4g')})"
            )
            part = float(size[name, budget] / size[FULL, FULL])
            cell = Cell(better / worse if worse else 1.0, part, words)
            found.setdefault((str(name), str(budget)), {})[str(task), int(length)] = cell
    return found


def _budgets(kept: Kept) -> list[str]:
    return list(dict.fromkeys(budget for _, budget in kept if budget not in (FULL, OWN)))


def _setting_tasks(kept: Kept, budget: str) -> list[Key]:
    """The policies whose tasks count at a budget: those that hold less, or where there are none, the others."""
    group = [key for key in kept if key[1] == budget]
    return [key for key in group if bounds(key[0]) == "held"] or group


def _common(kept: Kept, tasks: Sequence[On], groups: Sequence[Iterable[Key]]) -> list[On]:
    """The tasks on which policies are compared: one after the other, as long as of each group more than half stay.

    The tasks that most can serve come first. A policy stays that serves all of the tasks chosen so far.
    """
    staying = [set(group) for group in groups]
    served = {task: sum(task in kept[key] for group in staying for key in group) for task in tasks}
    chosen = []
    for task in sorted(tasks, key=lambda task: -served[task]):
        left = [{key for key in group if task in kept[key]} for group in staying]
        if all(2 * len(new) > len(old) for new, old in zip(left, staying, strict=True)):
            chosen.append(task)
            staying = left
    return [task for task in tasks if task in chosen]


def _mean(cells: Mapping[On, Cell], tasks: Sequence[On]) -> Mean | None:
    """Over the tasks; None where one of them was not served."""
    if not tasks or any(task not in cells for task in tasks):
        return None
    each = [cells[task] for task in tasks]
    quality, size = (sum(values) / len(each) for values in zip(*(cell[:2] for cell in each), strict=True))
    return Mean(quality, size, [cell.words for cell in each])


def _rows(kept: Kept, tasks: Sequence[On], budgets: Sequence[str]) -> list[dict[str, str]]:
    columns = [*budgets, *([OWN] if any(budget == OWN for _, budget in kept) else [])]
    found: dict[str, dict[str, Mean]] = {}
    for name, budget in kept:
        if name != FULL and budget in columns and (mean := _mean(kept[name, budget], tasks)) is not None:
            found.setdefault(name, {})[budget] = mean

    def order(name: str) -> tuple[bool, int, float]:
        each = found[name]
        return OWN in each, -len(each), -sum(mean.quality for mean in each.values())

    rows = []
    for name in sorted(found, key=order):
        parts = [mean.bytes for mean in found[name].values()]
        holds = f"{min(parts):.0%}" if max(parts) - min(parts) < 0.01 else f"{min(parts):.0%} to {max(parts):.0%}"
        cells = {b: f"{found[name][b].quality:.1%}" if b in found[name] else "" for b in columns}
        rows.append({"policy": name, **cells, "holds": holds})
    return rows


def _tried(name: str, kept: Kept, budgets: Sequence[str]) -> list[str]:
    """The budgets that a policy was asked to keep to: all, unless it takes none or was made with its own."""
    own, made = [budget for each, budget in kept if each == name], built(name)
    if OWN in own or (made is not None and made.limits) or (made is None and len(own) == 1):
        return own
    return list(budgets)


def _titled(tasks: Sequence[On]) -> str:
    return f"mean over {_on(tasks)}" if len(tasks) > 1 else _on(tasks)


def _on(tasks: Sequence[On]) -> str:
    """needle and text at 512 tokens; lengths with each task where they are several."""
    lengths = {length for _, length in tasks}
    if len(lengths) == 1:
        return f"{_and([name for name, _ in tasks])} at {lengths.pop()} tokens"
    return _and([f"{name} at {length} tokens" for name, length in tasks])


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
