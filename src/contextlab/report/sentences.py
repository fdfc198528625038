"""What the results say, in sentences.

A sentence ranks two predictors or two shifts only where the 95% interval of their difference, paired by prompts,
excludes 0; otherwise it says that they are not told apart. `contextlab.report.lint` holds every sentence to that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from contextlab.evaluation.intervals import Interval
from contextlab.prompt import HIGHER_IS_BETTER
from contextlab.report.digest import Digest
from contextlab.report.examples import FEW_SHOTS
from contextlab.report.findings import Findings, Mean, Term, without_number
from contextlab.report.naming import (
    MANY,
    ONE_PROMPT,
    and_so_on,
    bytes_in_words,
    difference_in_words,
    interval_in_words,
    label,
    metric_title,
    record_label,
    value_in_words,
)
from contextlab.report.reasons import late_falls, reasons, short_in_groups

GOOD_RECALL = 0.98
CERTAIN = 0.9995
"""Accuracy from which on a learner counts as always right."""


def summary_words(
    results: pd.DataFrame,
    records: Sequence[Mapping[str, Any]],
    by_prompt: pd.DataFrame | None = None,
    digest: Digest | None = None,
) -> list[str]:
    """Sentences: how near the models come to the best known learner on each task, which of them are told apart, who
    falls short and what the data say of why.

    results: a tidy table. records: one mapping a training. by_prompt: values by prompt (see `evaluation.Measured`),
    from which differences are paired; without them they have wider intervals. digest: of these results, where it is
    made already.
    """
    sentences = []
    digest = digest or Digest(results, by_prompt)
    several = digest.several
    train = results[results["shot"].notna() & (results["split"] == "train")]  # of which the sentences are
    shots = train.groupby("task", sort=False)["shot"].agg(["min", "max", "nunique"])
    for here in digest.findings:
        over: Any = shots.loc[here.task] if here.task in shots.index else None
        if here.rising:
            own = [record for record in records if record["task"] == here.task]
            sentences += _recall_words(here, late_falls(own, several))
        else:
            sentences += _error_words(here, None if over is None else (int(over["min"]), int(over["max"])))
        if over is not None and over["nunique"] >= FEW_SHOTS:
            sentences += _example_words(here, digest)
        sentences += _regret_words(here)
        sentences += _shift_words(here)
        sentences += _state_words(here)
        sentences += _no_number_words(here, digest.rows[here.task], several)
    for record in records:
        if record["status"] != "finished":
            name = record_label(record, several)
            sentences.append(f"{name} on {record['task']} {record['status']}: {record.get('message', '')}")
    return sentences


def _no_number_words(here: Findings, results: pd.DataFrame, several: bool) -> list[str]:
    """Who is left out of all that is said, as it answered a prompt with what is no number."""
    lost = without_number(results, here.task, here.metric, several)
    told = [name if some == seeds else f"{name} ({some} of {seeds} seeds)" for name, (some, seeds) in lost.items()]
    return [f"{here.task}: left out, as an answer was no number: {and_so_on(told)}."] if told else []


def _error_words(here: Findings, shots: tuple[int, int] | None) -> list[str]:
    """For errors: closeness to the best known learner, over the same positions as the table: all that are scored."""
    learners, excess = here.of(here.metric, kind="learner"), here.ranked(f"excess_{here.metric}")
    if not excess or not learners:
        return []
    best, floor = learners[0].label, learners[0].value
    means = {mean.label: mean for mean in here.of(here.metric, kind="model")}
    lost = {name for name, mean in means.items() if here.at_chance(mean)}
    able = [mean for mean in excess if mean.label not in lost]
    title, task = metric_title(here.metric), here.task
    over = f"averaged over {shots[0]} to {shots[1]} in-context examples, " if shots and shots[1] > shots[0] else ""

    def above(mean: Mean) -> str:
        """0.050 ± 0.020 (+5.6%): what it is above the best; a learner that looks the answer up makes no error."""
        share = f" ({mean.value / floor:+.1%})" if floor and f"{mean.value / floor:.1%}".strip("-") != "0.0%" else ""
        return f"{_plain(mean.told)}{share}"

    sentences = []
    if able:
        leader = able[0]
        others = [mean for mean in excess if mean is not leader]
        peers = here.peers(leader.label, [mean.label for mean in others])
        same = leader.told == (0.0, 0.0, 0.0)
        reached = leader.told.holds(0.0)
        if peers:
            widest = max((here.difference(name, leader.label) for name in peers), key=lambda told: abs(told.value))
            largest = "largest " if len(peers) > 1 and widest != (0.0, 0.0, 0.0) else ""
            who = (
                f"{and_so_on([leader.label, *peers])} are not told apart "
                f"({largest}{difference_in_words(widest, here.metric)}). "
            )
            whose = f"{over}the {title} of {leader.label} is"
        elif reached:
            closest = ", and comes closest to it" if others else ""
            who = f"{leader.label} is not told apart from {best}, the best known learner{closest}. "
            whose = f"{over}its {title} is"
        elif others:
            who = f"{leader.label} comes closest to {best}, the best known learner. "
            whose = f"{over}its {title} is"
        else:
            who, whose = "", f"{over}the {title} of {leader.label} is"
        reference = f"{best}'s {floor:.3g}" if who else f"that of {best}, the best known learner, {floor:.3g}"
        below = Interval(-leader.value, -leader.told.high, -leader.told.low)
        if same:
            gap = f"that of {best}, {floor:.3g}" if floor else f"nothing, as {best}'s is"
        elif leader.value < 0 and not reached:
            gap = f"{_plain(below)} below {reference}"
        else:
            gap = f"{above(leader)} above {reference}"
        sentences.append(f"{task}: {who}{_capital(whose) if who else whose} {gap}{_seeds(excess)}.")
        if others := [mean for mean in able[1:] if mean.told != (0.0, 0.0, 0.0)]:
            told = ", ".join(f"{mean.label} {above(mean)}" for mean in others[:MANY])
            more = f", and {len(others) - MANY} more by more" if len(others) > MANY else ""
            sentences.append(f"{task}: above {best}'s {title} by: {told}{more}.")
    if lost:
        chance = here.chance["train"]
        names = ", ".join(f"{name} {_plain(means[name].told)}" for name in list(means) if name in lost)
        sentences.append(
            f"{task}: not seen to be better than chance (a {title} of {chance:.3g}): {names}"
            f"{'' if able else _seeds(excess)}."
        )
    return sentences


def _recall_words(here: Findings, late: Mapping[str, float]) -> list[str]:
    """For accuracies: who gets nearly all, who is at chance, and what is known of the rest."""
    models, best = here.ranked(here.metric), here.of(here.metric, kind="learner")[:1]
    if not models:
        return []
    most = best[0].value if best else 1.0
    wanted = most - (1 - GOOD_RECALL)  # where the best known learner errs, nobody is asked for more
    lost = [mean for mean in models if here.at_chance(mean)]
    good = [mean for mean in models if mean.value >= wanted and mean not in lost]
    short = [mean for mean in models if mean not in good and mean not in lost]
    unsure = [mean.label for mean in models if mean.told.low < wanted <= mean.told.high and mean not in lost]
    title, task = metric_title(here.metric), here.task
    aim = f"{GOOD_RECALL:.0%} {title} or more"
    verbs = ("reaches", "reach")
    if most < CERTAIN:
        points = 100 * (1 - GOOD_RECALL)
        aim = f"within {points:.0f} points of {best[0].label}, the best known learner ({most:.1%}),"
        verbs = ("comes", "come")

    def each(means: Sequence[Mean]) -> str:
        return ", ".join(f"{mean.label} {interval_in_words(mean.told, here.metric)}" for mean in means)

    told, nearest = ([*good, *short], []) if len(short) + len(lost) <= MANY else (good, short[:3])
    listed = "; next: ".join(each(group) for group in (told, nearest) if group)
    if len(models) == 1 and not lost:
        verb = verbs[0] if good else f"does not {verbs[1]}"
        start = f"{task}: {models[0].label} {verb} {aim} on the training distribution: "
        listed = interval_in_words(models[0].told, here.metric)
    else:
        count = f"{len(good) or 'none'} of {len(models)} models" if len(models) > 1 else "the one model does not"
        verb = verbs[1] if len(models) == 1 else verbs[len(good) > 1]
        start = f"{task}: {count} {verb} {aim} on the training distribution" + (": " if listed else "")
    if unsure and len(models) > 1:
        listed += f"; not told apart from {wanted:.1%}: {and_so_on(unsure)}"
    elif unsure:
        listed += f", which is not told apart from {wanted:.1%}"
    sentences = [f"{start}{listed}{_seeds(models)}."]
    if lost:
        chance = here.chance["train"]
        sentences.append(
            f"{task}: not seen to be better than chance ({value_in_words(chance, here.metric)}): {each(lost)}."
        )
    clear = [mean for mean in [*short, *lost] if mean.told.high < wanted]
    if len(clear) > MANY:
        return sentences + short_in_groups(task, [mean.label for mean in clear], late)
    for mean in clear:
        if known := reasons(here, mean.label, late.get(mean.label)):  # by how much each falls short stands above
            value = value_in_words(mean.value, here.metric)
            sentences.append(f"{task}: {mean.label} falls short ({value}): {'; '.join(known)}.")
    return sentences


def _example_words(here: Findings, digest: Digest) -> list[str]:
    """How many examples bring the models near the best known learner, for the middle one of the distances."""
    table, rows = digest.examples(here), digest.rows[here.task]
    models = set(label(rows[rows["kind"] == "model"], digest.several))
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
        f"{here.task}: in-context examples after which a model stays {list(table[0])[2]} of {best}: {shown}"
        + (f"; not within the prompt: {and_so_on(missing)}" if missing else "")
        + "."
    ]


def _regret_words(here: Findings) -> list[str]:
    """What is lost by each model that acts for itself, and the learner that loses least where one is told apart."""
    models, learners = (here.ranked("regret", "online", kind) for kind in ("model", "learner"))
    if not models:
        return []
    told = ", ".join(f"{mean.label} {_plain(mean.told)}" for mean in models[:MANY])
    more = f" and {len(models) - MANY} more" if len(models) > MANY else ""
    words = f"{here.task}: reward lost in {models[0].length} steps played online (regret): {told}{more}"
    if learners:
        least, *others = learners
        peers = here.peers(least.label, [mean.label for mean in others], "regret", "online")
        if not others:
            words += f"; the learner {least.label} loses {_plain(least.told)}"
        elif not peers:
            words += f"; of the learners {least.label} loses least, {_plain(least.told)}"
        else:
            told = and_so_on([least.label, *peers])
            words += f"; of the learners {told} are not told apart, {least.label} at {_plain(least.told)}"
    return [words + "."]


def _shift_words(here: Findings) -> list[str]:
    """Which change of the prompts costs the models most, as far as one is told apart from the others."""
    excess = f"excess_{here.metric}"
    models: dict[str, set[str]] = {}
    for mean in here.of(excess, None, "model"):
        models.setdefault(mean.split, set()).add(mean.label)
    names = list(dict.fromkeys(mean.label for mean in here.of(excess, "train", "model")))
    shifts = [split for split in models if split != "train" and models[split] & set(names)]
    if not names or not shifts:
        return []
    answered = {split: [name for name in names if name in models[split]] for split in shifts}

    def harm(split: str, weight: float = 1.0, who: Sequence[str] | None = None) -> list[Term]:
        each = answered[split] if who is None else who
        part = weight / len(each)
        return [term for name in each for term in (Term(part, name, split, excess), Term(-part, name, "train", excess))]

    harms = {split: here.combine(harm(split)) for split in shifts}
    order = sorted(shifts, key=lambda split: -harms[split].value)
    worst, task = order[0], here.task
    if harms[worst].low <= 0:
        one = f"the shift '{worst}' is" if len(shifts) == 1 else f"none of the {len(shifts)} shifts is"
        verb = f"{one} {'not ' * (len(shifts) == 1)}seen to take"
        which = "the model" if len(names) == 1 else "the models, on average,"
        return [f"{task}: {verb} {which} farther from the best known learner than in training."]
    up, average = metric_title(excess), " on average" if len(names) > 1 else ""
    rise = _gap(harms[worst], excess)
    models_word = "the model" if len(names) == 1 else "the models"
    near: list[tuple[str, Interval]] = []
    for split in order[1:]:
        common = [name for name in answered[worst] if name in answered[split]]
        if common and not (told := here.combine([*harm(worst, 1.0, common), *harm(split, -1.0, common)])).parts:
            near.append((split, told))
    if near:
        others, (second, told) = [split for split, _ in near], near[0]
        named = and_so_on([f"'{split}'" for split in [worst, *others]])
        return [
            f"{task}: of the {len(shifts)} shifts {named} are not told apart in what they cost {models_word} "
            f"({up} up by {rise}{average} by '{worst}'; "
            f"{difference_in_words(told, here.metric)} to '{second}')."
        ]
    what = f"of the {len(shifts)} shifts, '{worst}' costs" if len(shifts) > 1 else f"the shift '{worst}' costs"
    most = f"{models_word}{' most' * (len(shifts) > 1)}"
    return [f"{task}: {what} {most} ({up} up by {rise}{average}){_steady(here, worst, excess)}."]


def _steady(here: Findings, split: str, excess: str) -> str:
    """The model of the least excess on a shift, where it is told apart from all others."""
    least, *others = here.ranked(excess, split)
    if not others or any(
        not here.combine([Term(1.0, mean.label, split, excess), Term(-1.0, least.label, split, excess)]).parts
        for mean in others
    ):
        return ""
    return f"; there {least.label} has the least excess, {_gap(least.told, excess)}"


def _state_words(here: Findings) -> list[str]:
    states = {mean.label: mean.value for mean in here.of("state_bytes", "cost")}
    if len(states) < 2:
        return []
    least, most = min(states.values()), max(states.values())
    if least == most:
        return [f"{here.task}: after one prompt all models hold the same amount of state, {bytes_in_words(least)}."]
    small, large = ([name for name, size in states.items() if size == extreme] for extreme in (least, most))
    return [
        f"{here.task}: after one prompt {and_so_on(small)} {'holds' if len(small) == 1 else 'hold'} the least state, "
        f"{bytes_in_words(least)}; {and_so_on(large)} {'holds' if len(large) == 1 else 'hold'} the most, "
        f"{bytes_in_words(most)}" + (f" ({most / least:.3g} times as much)." if least else ".")
    ]


def _plain(told: Interval) -> str:
    """A value that is no share, with its interval."""
    return interval_in_words(told, "")


def _gap(told: Interval, excess: str) -> str:
    """An excess with its interval; of shares in points."""
    if excess.removeprefix("excess_") not in HIGHER_IS_BETTER:
        return _plain(told)
    return f"{_plain(Interval(*(100 * each for each in told)))} points"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _seeds(means: Sequence[Mean]) -> str:
    """What the intervals are over."""
    counts = {mean.seeds for mean in means}
    if not any(math.isfinite(mean.told.high) for mean in means):
        return f" ({ONE_PROMPT} can be told, and nothing is told apart)"
    if counts == {1}:
        return " (one seed: intervals are over prompts alone)"
    if 1 in counts:
        return f" (1 to {max(counts)} seeds: of one seed, intervals are over prompts alone)"
    return (
        f" (means of {min(counts)} seeds)" if len(counts) == 1 else f" (means of {min(counts)} to {max(counts)} seeds)"
    )
