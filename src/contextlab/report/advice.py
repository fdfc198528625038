"""What `advise` found, in a table, one sentence and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contextlab.evaluation.advise import Advice, Way
from contextlab.evaluation.compress import FULL
from contextlab.evaluation.intervals import Interval
from contextlab.policies import Budget
from contextlab.report.compress_total import ITSELF, Point, as_policies, part_in_words, points, way_name
from contextlab.report.kept_cells import difference, kept
from contextlab.report.naming import and_so_on, difference_in_words
from contextlab.report.page import render
from contextlab.report.sections import Drawn
from contextlab.report.total_figure import kept_against_total
from contextlab.words import bytes_in_words, counted, listed


def name_of(way: Way) -> str:
    """How a way is told."""
    return way_name(*way.key)


def measured(advice: Advice) -> dict[str, Point]:
    """Name -> what it keeps, in its foretold bytes; of all that was measured, whether it fits or not."""
    sizes = {name_of(way): float(way.total) for way in advice.ways}
    return {each.name: each for each in points(advice.results, advice.at, sizes)}


def where_in_words(advice: Advice) -> str:
    """64MB at 16,384 tokens and 8 sequences."""
    held = counted(advice.batch, "sequence")
    return f"{Budget('bytes', advice.memory)} at {counted(advice.length, 'token')} and {held}"


def advice_table(advice: Advice) -> list[dict[str, str]]:
    """A row a way: first those that fit, by what they keep, then the others by their bytes; every cell is text."""
    known = measured(advice)

    def order(way: Way) -> tuple[bool, float, int]:
        point = known.get(name_of(way))
        return bool(way.left_out), 0.0 if way.left_out or point is None else -point.part.value, way.total

    rows = []
    for way in sorted(advice.ways, key=order):
        least, foretold = "" if way.exact else "≤ ", way.state_bytes > 0
        rows.append(
            {
                "weights": way.form.label or "own",
                "policy": "full cache" if way.policy == FULL else way.policy,
                "budget": "" if way.policy == FULL else way.budget,
                "kept": _kept(known.get(name_of(way))),
                "stored": bytes_in_words(way.weight_bytes),
                "states": least + bytes_in_words(way.state_bytes) if foretold else "",
                "total": least + bytes_in_words(way.total) if foretold else "",
                "left out": way.left_out,
            }
        )
    return rows


def told_rows(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Those of the table that tell something: not what is left out as more of it fits."""
    return [row for row in rows if not row["left out"].endswith(" fits")]


def _kept(point: Point | None) -> str:
    if point is None:
        return ""
    return "100%" if point.name == ITSELF else part_in_words(point.part)


def advice_words(advice: Advice) -> str:
    """One sentence: which way to take. "best" is one that is told apart from all others that fit."""
    where = where_in_words(advice)
    fitting = advice.fitting
    if not fitting:
        return _nothing_fits(advice)
    at = "" if advice.at == advice.length else f" (quality measured at {advice.at:,} tokens)"
    known = measured(advice)
    found = [known[name] for way in fitting if (name := name_of(way)) in known]
    if not found:
        return _not_ranked(advice)
    own = next((each for each in found if each.name == ITSELF), None)
    first = own or max(found, key=lambda each: each.part.value)
    near = [each for each in found if each is not first and (not _apart(each, first) or _above(each, first))]
    small = min([first, *near], key=lambda each: each.bytes)
    if own is not None:
        start = f"The model itself fits in {where}, in {bytes_in_words(own.bytes)}"
        if small is own:
            return f"{start}: nothing need be given up{at}."
        return (
            f"{start}, and {small.name}, which keeps {part_in_words(small.part)} of its quality in "
            f"{bytes_in_words(small.bytes)}, is not told apart from it{at}."
        )
    keeps = f"keeps {part_in_words(small.part)} of the model's quality in {bytes_in_words(small.bytes)}{at}"
    if len(found) == 1:
        return f"Only {small.name} fits in {where}: it {keeps}."
    if all(each.part.low <= 0 for each in found):
        return (
            f"Of the {len(found)} ways that fit in {where}, none is seen to keep anything of the model's quality{at}."
        )
    if not near:
        return f"{small.name} is the best of the {len(found)} ways that fit in {where}: it {keeps}."
    widest = max((difference(each.mean, first.mean) for each in near), key=lambda told: abs(told.value))
    largest = "largest " if len(near) > 1 and widest != (0.0, 0.0, 0.0) else ""
    return (
        f"Of the {len(found)} ways that fit in {where}, {and_so_on([each.name for each in [first, *near]])} are not "
        f"told apart ({largest}{difference_in_words(widest, 'accuracy')}): {small.name} takes the fewest bytes of "
        f"these, and {keeps}."
    )


def _apart(one: Point, other: Point) -> bool:
    return difference(one.mean, other.mean).parts


def _above(one: Point, other: Point) -> bool:
    return difference(one.mean, other.mean).low > 0


def _nothing_fits(advice: Advice) -> str:
    foretold = [way for way in advice.ways if way.state_bytes > 0 or way.total > advice.memory]
    if not foretold:
        return f"Nothing that was tried can be used at {counted(advice.length, 'token')}: {advice.ways[0].left_out}."
    small = min(foretold, key=lambda way: way.total)
    if small.total <= advice.memory:
        return (
            f"What would fit in {where_in_words(advice)}, such as {name_of(small)}, could not be measured on prompts "
            f"of {counted(advice.at, 'token')}: give longer ones (--at)."
        )
    return (
        f"Nothing that was tried fits in {where_in_words(advice)}: {name_of(small)}, the smallest, takes "
        f"{bytes_in_words(small.total)}."
    )


def _not_ranked(advice: Advice) -> str:
    lost = kept(as_policies(advice.results)).at_chance
    tasks = listed([line.partition(":")[0] if " at " not in line else line.partition(": the")[0] for line in lost])
    names = and_so_on([name_of(way) for way in advice.fitting])
    return (
        f"In {where_in_words(advice)} {'fit' if len(advice.fitting) > 1 else 'fits'} {names}, but the model itself "
        f"is not seen to be better than chance on {tasks or 'these tasks'}, so nothing is ranked: give tasks that it "
        "knows (--task), or a length that it was trained for (--at)."
    )


def advice_record(advice: Advice) -> dict[str, Any]:
    """All of it as plain data."""
    known = measured(advice)

    def quality(way: Way) -> dict[str, float | None]:
        part = known[name_of(way)].part if name_of(way) in known else Interval(float("nan"), 0.0, 0.0)
        lost = part.value != part.value
        return {k: None if lost else float(v) for k, v in zip(("kept", "kept_low", "kept_high"), part, strict=True)}

    return {
        "model": advice.name, "memory": advice.memory, "length": advice.length, "batch": advice.batch,
        "measured_at": advice.at, "advice": advice_words(advice),
        "ways": [
            {
                "name": name_of(way), "weights": way.form.label, "policy": way.policy, "budget": way.budget,
                "weight_bytes": way.weight_bytes, "state_bytes": way.state_bytes, "total_bytes": way.total,
                "exact": way.exact, "fits": not way.left_out, "left_out": way.left_out, **quality(way),
            }
            for way in advice.ways
        ],
    }  # fmt: skip


def write_advice_page(advice: Advice, path: str | Path) -> Path:
    """Write what `contextlab advise` found as one HTML file that needs nothing else."""
    shown = list(measured(advice).values())
    drawn = []
    if len(shown) > 1:
        states = f"{counted(advice.batch, 'state')} of {counted(advice.length, 'token')}"
        note = (
            f"Bytes of the weights and {states}, foretold; the upright line is the memory that there is, "
            f"{bytes_in_words(advice.memory)}. Bars are 95% intervals of what is kept, on prompts of "
            f"{counted(advice.at, 'token')}."
        )
        drawn = [Drawn("Kept quality against all bytes", kept_against_total.sketch(shown, advice.memory), note)]
    lost = kept(as_policies(advice.results)).at_chance if len(advice.results) else []
    return render(
        "advise.html.j2", path, drawn, title=f"How to spend {where_in_words(advice)} on {advice.name}",
        words=[advice_words(advice), *lost], rows=told_rows(advice_table(advice)), at=counted(advice.at, "token"),
    )  # fmt: skip
