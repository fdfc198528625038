"""How much of the full cache's quality policies keep, compared on tasks that all of those compared can serve.

A mean over other tasks is another scale: a policy that cannot keep to a small budget where it is hard would look better
for it. So a mean is of policies that served the very same tasks; the others have no cell, and what they could not
serve is told. Policies are ranked only where the interval of their difference, on the same prompts, excludes 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from contextlab.evaluation.compress import FULL, OWN
from contextlab.policies import Budget
from contextlab.report.compress import bounds, built, knows_what_follows
from contextlab.report.kept_cells import Cell, Key, Mean, On, difference, kept, mean_of
from contextlab.report.naming import ALL_ALIKE, MANY, and_so_on, difference_in_words, percent
from contextlab.words import listed

WHOLE = 0.97
"""A policy that holds at least this part of the full cache's bytes saves no memory."""
APART = {
    "whole": "hold everything and save no memory",
    "ceiling": "know what follows: a bound, not a method",
}
"""What stands apart from the ranking, by the name of its group."""
Cells = Mapping[Key, Mapping[On, Cell]]


def kept_tables(results: pd.DataFrame) -> dict[str, list[dict[str, str]]]:
    """Title -> a row a policy: the part of the full cache's quality that it keeps at each budget, a mean over tasks.

    All cells of a table are means over the same tasks, which its title names. Where small budgets cannot be kept to in
    every task there are two tables: all tasks at the budgets that most policies can keep to in each, and the tasks in
    which most can keep to every budget. A policy has no cell where it served fewer; `not_served` tells which. The rows
    with every cell stand first, by their means; those that take no budget come last, under "own". "holds" is the part
    of the full cache's bytes that is held, the least and the most. What holds everything, and what knows what follows,
    stands in tables of its own. Cells have 95% intervals. Where the full cache is at chance on every task there is
    nothing to keep, and no table.
    """
    whole = kept(results)
    cells, tasks = whole.cells, whole.tasks
    budgets = _budgets(cells)
    if not tasks:
        return {}
    groups = {budget: _setting_tasks(cells, budget) for budget in budgets}
    wanted = [budget for budget in budgets if _common(cells, tasks, [groups[budget]]) == tasks]
    everywhere = _common(cells, tasks, list(groups.values()))
    tables: dict[str, list[dict[str, str]]] = {}
    if wanted or not budgets:
        tables |= _tables(cells, tasks, wanted)
    if everywhere and wanted != budgets:
        tables |= _tables(cells, everywhere, budgets)
    return tables


def not_served(results: pd.DataFrame, policies: Sequence[str] = ()) -> list[str]:
    """What policies could not serve, a line for those that failed at the same: "text (512 tokens) at 2%: h2o, tova".

    policies: all that were asked for; those without any result are told, too.
    """
    whole = kept(results)
    cells, tasks = whole.cells, whole.tasks
    budgets = _budgets(cells)
    names = [name for name in dict.fromkeys(name for name, _ in cells) if name != FULL]
    found: dict[str, list[str]] = {}
    for name in names:
        missing = []
        for task, length in tasks:
            at = [b for b in _tried(name, cells, budgets) if (task, length) not in cells.get((name, b), {})]
            if at:
                missing.append(f"{task} ({length} tokens)" + ("" if at == [OWN] else f" at {listed(at)}"))
        if missing:
            found.setdefault("; ".join(missing), []).append(name)
    nothing = [name for name in policies if name not in names] if tasks else []
    if nothing:
        found["any task at any budget"] = nothing
    return [f"{what}: {', '.join(each)}" for what, each in found.items()]


def compress_words(results: pd.DataFrame) -> list[str]:
    """Sentences for each budget: which policy keeps most of the full cache's quality, where one is told apart.

    Compared are the policies that served all of the tasks that most can keep to at the budget; the tasks that do not
    count and the policies that are not compared are named. The oracle, which knows what follows, is told beside them,
    and so is what holds everything. Tasks on which the full cache itself is at chance come first: nothing is ranked
    there. Policies without a budget take part where their state is no larger than that of some policy with it.
    """
    whole = kept(results)
    cells, tasks = whole.cells, whole.tasks
    policies = [key for key in cells if key[0] != FULL and not knows_what_follows(key[0])]
    sentences = list(whole.at_chance)
    for budget in _budgets(cells):
        limited = [key for key in policies if key[1] == budget and not Budget.of(budget).everything]
        shared: list[On] = []
        for kind in ("held", "read", "prefill"):
            group = [key for key in limited if bounds(key[0]) == kind]
            on = _common(cells, tasks, [group]) if group else []
            means = {key: mean for key in group if (mean := mean_of(cells[key], on)) is not None}
            apart = [key[0] for key in group if on and key not in means]
            if kind == "held":
                shared = on
                means = {key: mean for key, mean in means.items() if mean.bytes < WHOLE}  # else nothing is saved
                most = max((mean.bytes for mean in means.values()), default=0.0)
                own = {key: mean_of(cells[key], on) for key in policies if key[1] == OWN}
                means |= {key: mean for key, mean in own.items() if mean is not None and mean.bytes <= most}
            if means:
                sentences.append(_sentence(kind, budget, means, [t for t in tasks if t not in on], apart))
        for key in cells:
            mean = mean_of(cells[key], shared or tasks)
            if key[1] == budget and knows_what_follows(key[0]) and mean is not None:
                sentences.append(
                    f"At {budget}{_without([t for t in tasks if t not in (shared or tasks)])}, {key[0]}, which knows "
                    f"what follows, keeps {_part(mean)}: a bound, not a method."
                )
    return [*sentences, f"What is kept is told above chance; 95% intervals over {whole.over}."] if tasks else sentences


def _part(mean: Mean) -> str:
    """99.5% ± 0.4%: a part of the full cache's quality, which may be above 100%."""
    half = mean.quality.high - mean.quality.value
    return f"{mean.quality.value:.1%} " + (f"± {percent(half)}%" if half > 0 else f"({ALL_ALIKE})")


def _sentence(kind: str, budget: str, means: Mapping[Key, Mean], left: Sequence[On], apart: Sequence[str]) -> str:
    """What policies with the same bounds keep at a budget. left: tasks that do not count; apart: not compared."""
    order = sorted(means, key=lambda key: -means[key].quality.value)
    best, without = order[0], _without(left)
    one = means[best]
    reads = f"read{'s' if len(means) == 1 else ''} {budget} of it " + (
        "a token" if kind == "read" else "for a token of the prompt"
    )
    rest = f" Not compared, as they cannot keep to it in all of these: {', '.join(apart)}." if apart else ""
    part = f" in {one.bytes:.1%} of its bytes" if kind == "held" else ""
    kept_words = f"{_part(one)} of the full cache's quality{part}: {'; '.join(one.words)}"
    if len(means) == 1:
        who = f"At {budget}{without}, {best[0]} keeps"
        if kind != "held":
            who = f"{best[0]}, which holds everything and {reads}, keeps{without}"
        return f"{who} {kept_words}.{rest}"
    start = f"At {budget}" if kind == "held" else f"Of the policies that hold everything and {reads}"
    start += without
    if all(mean.quality.low <= 0 for mean in means.values()):
        return (
            f"{start}, none of the {len(means)} policies is seen to keep anything of the full cache's quality: "
            f"{best[0]} {_part(one)}.{rest}"
        )
    near = [(key[0], told) for key in order[1:] if not (told := difference(means[key], one)).parts]
    if not near:
        return f"{start}, {best[0]} is the best policy: it keeps {kept_words}.{rest}"
    widest = max((told for _, told in near), key=lambda told: abs(told.value))
    largest = "largest " if len(near) > 1 and widest != (0.0, 0.0, 0.0) else ""
    others = "; ".join(f"{name} keeps {_part(means[_key(means, name)])}" for name, _ in near[: MANY - 1])
    return (
        f"{start}, {and_so_on([best[0], *(name for name, _ in near)])} are not told apart "
        f"({largest}{difference_in_words(widest, 'accuracy')}): {best[0]} keeps {kept_words}; {others}.{rest}"
    )


def _key(means: Mapping[Key, Mean], name: str) -> Key:
    return next(key for key in means if key[0] == name)


def _without(tasks: Sequence[On]) -> str:
    return f" (without {_on(tasks)}, where most policies cannot keep to it)" if tasks else ""


def _budgets(kept: Cells) -> list[str]:
    return list(dict.fromkeys(budget for _, budget in kept if budget not in (FULL, OWN)))


def _setting_tasks(kept: Cells, budget: str) -> list[Key]:
    """The policies whose tasks count at a budget: those that hold less, or where there are none, the others."""
    group = [key for key in kept if key[1] == budget]
    return [key for key in group if bounds(key[0]) == "held"] or group


def _common(kept: Cells, tasks: Sequence[On], groups: Sequence[Iterable[Key]]) -> list[On]:
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


def _tables(cells: Cells, tasks: Sequence[On], budgets: Sequence[str]) -> dict[str, list[dict[str, str]]]:
    """The table of what is ranked, and one for each group that stands apart."""
    columns = [*budgets, *([OWN] if any(budget == OWN for _, budget in cells) else [])]
    found: dict[str, dict[str, Mean]] = {}
    for name, budget in cells:
        if name != FULL and budget in columns and (mean := mean_of(cells[name, budget], tasks)) is not None:
            found.setdefault(name, {})[budget] = mean

    def order(name: str) -> tuple[bool, int, float]:
        each = found[name]
        return OWN in each, -len(each), -sum(mean.quality.value for mean in each.values())

    tables: dict[str, list[dict[str, str]]] = {}
    for group in ("", *APART):
        names = [name for name in found if _group(name, found[name]) == group]
        filled = [column for column in columns if any(column in found[name] for name in names)]
        rows = []
        for name in sorted(names, key=order):
            parts = [mean.bytes for mean in found[name].values()]
            holds = f"{min(parts):.0%}" if max(parts) - min(parts) < 0.01 else f"{min(parts):.0%} to {max(parts):.0%}"
            shown = {b: _cell(found[name][b]) if b in found[name] else "" for b in (filled if group else columns)}
            rows.append({"policy": name, **shown, "holds": holds})
        if rows:
            tables[_titled(tasks) + (f"; these {APART[group]}" if group else "")] = rows
    return tables


def _group(name: str, means: Mapping[str, Mean]) -> str:
    """Where a policy stands: "" in the ranking, or the name of a group apart."""
    if knows_what_follows(name):
        return "ceiling"
    return "whole" if bounds(name) != "held" or min(mean.bytes for mean in means.values()) >= WHOLE else ""


def _cell(mean: Mean) -> str:
    """93.1% ± 2.0."""
    half = mean.quality.high - mean.quality.value
    return f"{mean.quality.value:.1%} " + (f"± {percent(half)}" if half > 0 else f"({ALL_ALIKE})")


def _tried(name: str, kept: Cells, budgets: Sequence[str]) -> list[str]:
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
        return f"{listed([name for name, _ in tasks])} at {lengths.pop()} tokens"
    return listed([f"{name} at {length} tokens" for name, length in tasks])
