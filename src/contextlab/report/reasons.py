"""Why a model falls short, as far as measurements tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from contextlab.report.findings import Findings
from contextlab.report.naming import interval_in_words, record_label

STILL_FALLING = 0.1
"""A loss counts as still falling when it fell by this fraction over the last fifth of the training."""


def late_falls(records: Sequence[Mapping[str, Any]], several: bool) -> dict[str, float]:
    """Label of a model -> the relative fall of its loss over the last fifth of the training, the mean over seeds."""
    falls: dict[str, list[float]] = {}
    for record in records:
        if (fall := _late_fall(record)) is not None:
            falls.setdefault(record_label(record, several), []).append(fall)
    return {name: sum(each) / len(each) for name, each in falls.items()}


def short_in_groups(task: str, short: Sequence[str], late: Mapping[str, float]) -> list[str]:
    """One sentence for all that were still learning, one for those that had stopped, one for the rest."""
    groups: dict[str, list[str]] = {"falling": [], "level": [], "unknown": []}
    for name in short:
        fall = late.get(name)
        groups["unknown" if fall is None else "falling" if fall > STILL_FALLING else "level"].append(name)
    endings = {
        "falling": f"whose loss was still falling when training ended (by more than {STILL_FALLING:.0%} over the last "
        "fifth of the steps), so longer training would help",
        "level": "whose loss had levelled off: at their limit, or on a plateau, which a longer curriculum of small "
        "prompts may end",
        "unknown": "for which the measurements here give no reason",
    }
    return [
        f"{task}: {f'{len(names)} of the {len(short)}' if len(names) < len(short) else f'all {len(short)}'} that fall "
        f"short: {', '.join(names)}, {endings[group]}."
        for group, names in groups.items()
        if names
    ]


def reasons(here: Findings, name: str, fall: float | None) -> list[str]:
    """What the measurements say of why a model falls short; nothing that they do not say."""
    found = []
    if fall is not None and fall > STILL_FALLING:
        found.append(
            f"its loss was still falling when training ended, by {fall:.0%} over the last fifth of the steps, so "
            "longer training would help"
        )
    elif fall is not None:
        changed = "it did not change" if f"{abs(fall):.0%}" == "0%" else f"it changed by {-fall:+.0%}"
        found.append(
            f"its loss had levelled off ({changed} over the last fifth of the steps): it is at its "
            "limit, or on a plateau, which a longer curriculum of small prompts may end"
        )
    easier = [mean for mean in here.of(here.metric, None) if mean.label == name and mean.split.startswith("pairs=")]
    if len(easier) > 1 and not all(here.at_chance(mean) or f"{mean.value:.1%}" == "0.0%" for mean in easier):
        counts = [mean.split.removeprefix("pairs=") for mean in easier]
        told = ", ".join(
            f"{count} {'pair' if count == '1' else 'pairs'} {interval_in_words(mean.told, here.metric)}"
            for count, mean in zip(counts, easier, strict=True)
        )
        found.append(f"by the number of pairs it answers: {told}")
    return found


def _late_fall(record: Mapping[str, Any]) -> float | None:
    """The relative fall of the loss over the last fifth of a training, from means of tenths; None without history."""
    losses = (record.get("history") or {}).get("loss") or []
    tenth = len(losses) // 10
    if tenth < 1:
        return None
    before, after = losses[-3 * tenth : -2 * tenth], losses[-tenth:]
    start, end = sum(before) / tenth, sum(after) / tenth
    return None if start <= 0 or math.isnan(end) else (start - end) / start
