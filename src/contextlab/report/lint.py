"""`lint`: what is wrong with the sentences of a report, held against the data that they were made from.

It reads the sentences as a reader does, and works out anew from the data what they claim; the writer is not asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import pandas as pd

from contextlab.report.findings import Findings, Mean, Term, findings

_NUMBER = r"(?<![\w.=])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
_COUNTED = "models|shifts|seeds|prompts|examples|steps|tasks|pairs|policies|budgets|problems|learners|tokens"
_UNIT = rf"(?:%|\s*(?:points|times|to|of|more|and|± |[KMGTP]?i?B\b|{_COUNTED}|pair\b|in-context|that))"
RANKS = r"\b(?:best|better|wins?|worst|worse|highest|lowest|closest|superior|outperforms?|beats?|most|least)\b"
_EXEMPT = r"better than chance|best known learner|at (?:most|least)|more by more"
_GRAMMAR = (
    (r"\bthe 1\b", "'the 1'"),
    (rf"(?<![\d.,])\b1 (?:of the )?(?:{_COUNTED})\b(?! of)", "a plural after 1"),
    (rf"\bof 1 (?:{_COUNTED})\b", "a choice among 1"),
    (r"\ball 1\b|\b0 of\b", "a count that is no count"),
    (r"\b(?:1|none) of \d+ models (?:reach|come)\b", "a plural verb after one or none"),
    (r"\b(?:[2-9]|\d\d+) of \d+ models (?:reaches|comes)\b", "a singular verb after several"),
    (r"\bnan\b|\binf\b|\bNone\b|-0(?:\.0+)?%?(?![\d.])", "what is no number"),
    (r"  |\( ?\)|,,| ,| \.(?!\d)|::", "a gap"),
)


def lint(
    sentences: Sequence[str], results: pd.DataFrame | None = None, by_prompt: pd.DataFrame | None = None
) -> list[str]:
    """What is wrong with the sentences of a report, a line each; nothing where all is well.

    sentences: as `summary_words` gives them, or others; those that begin with a task's name are held against its data.
    results, by_prompt: from which they were made; None holds them to their form alone.

    A sentence may not say only zeros, rank what the data do not part, count one as many, leave out a unit, tell a share
    above 1, or call a model good that is at chance.
    """
    found = [f"{what}: {sentence}" for sentence in sentences for what in _form(sentence)]
    for here in findings(results, by_prompt) if results is not None else ():
        own = [each.removeprefix(f"{here.task}: ") for each in sentences if each.startswith(f"{here.task}: ")]
        found += [f"{here.task}: {what}: {sentence}" for sentence in own for what in _sentence(here, sentence)]
        found += [f"{here.task}: {what}" for what in _together(here, own)]
    return found


def _form(sentence: str) -> Iterator[str]:
    """What is wrong whatever the data are."""
    for pattern, what in _GRAMMAR:
        if re.search(pattern, sentence):
            yield f"grammar ({what})"


def _sentence(here: Findings, sentence: str) -> Iterator[str]:
    """What is wrong with one sentence of a task."""
    named = {mean.label for mean in here.means}
    splits = {mean.split for mean in here.means}
    plain = _without(sentence, named | {f"'{split}'" for split in splits})
    amounts = re.sub(rf"\d+ (?:{_COUNTED}|pair\b)", "", plain)
    measured = [float(each.replace(",", "")) for each in re.findall(_NUMBER, amounts)]
    if measured and not any(measured):
        yield "says nothing but zeros"
    if here.rising or "state" in plain:
        for match in re.finditer(_NUMBER, plain):
            follows = plain[match.end() :]
            if not re.match(_UNIT, follows) and not re.match(r"\s*[,\]]|\s*\[", follows):
                yield f"a number without a unit ({match[0]})"
    if here.rising and any(float(each) > 100 for each in re.findall(r"(?<![-+\d.])(\d+(?:\.\d+)?)%", plain)):
        yield "a share above 1"
    yield from _claims(here, sentence, plain, sorted(named, key=len, reverse=True), splits)


def _claims(here: Findings, sentence: str, plain: str, named: Sequence[str], splits: set[str]) -> Iterator[str]:
    """Every word that ranks must be one whose claim is worked out here, and holds."""
    name = "(?P<name>" + "|".join(map(re.escape, named)) + ")"
    split = "'(?P<split>" + "|".join(map(re.escape, sorted(splits, key=len, reverse=True))) + ")'"
    checked = 0
    for word, pattern, check in _CLAIMS:
        if word not in sentence:
            continue
        for match in re.finditer(pattern.replace("NAME", name).replace("SPLIT", split), sentence):
            checked += 1
            if (wrong := check(here, match)) is not None:
                yield wrong
    ranking = len(re.findall(RANKS, re.sub(_EXEMPT, "", plain)))
    if ranking > checked:
        yield "ranks in words that no check knows"
    if " are not told apart" in sentence:
        head = sentence.partition(" are not told apart")[0]
        if "shifts" in plain.partition(" are not told apart")[0]:
            yield from _tied_shifts(here, re.findall(split, head))
        elif "of the learners" in head:
            yield from _tied(here, re.findall(name, head.rpartition("of the learners")[2]), "regret", "online")
        else:
            yield from _tied(here, re.findall(name, head), here.metric, "train")
    if counted := re.search(r"\bof the (\d+) shifts", plain):
        shifts = {mean.split for mean in here.of(f"excess_{here.metric}", None, "model")} - {"train"}
        if int(counted[1]) != len(shifts):
            yield f"{counted[1]} shifts where there are {len(shifts)}"
    models = here.of(here.metric, kind="model")
    if re.search(r"\bthe models\b|on average", plain) and len(models) == 1:
        yield "several models where there is one"


def _closest(here: Findings, match: re.Match[str]) -> str | None:
    models = {mean.label: mean for mean in here.of(here.metric, kind="model")}
    own = models[match["name"]]
    if here.at_chance(own):
        return f"{own.label} is at chance"
    if len(models) == 1:
        return "ranks one model"
    for other in models:
        told = here.difference(own.label, other) if other != own.label else None
        if told is not None and not (told.low > 0 if here.rising else told.high < 0):
            return f"{own.label} is not told apart from {other}"
    return None


def _harm(here: Findings, split: str, weight: float, who: Sequence[str]) -> list[Term]:
    excess = f"excess_{here.metric}"
    return [
        Term(sign * weight / len(who), name, at, excess) for name in who for sign, at in ((1.0, split), (-1.0, "train"))
    ]


def _who(here: Findings, *splits: str) -> list[str]:
    """The models that answered all of the splits, and 'train'."""
    excess = f"excess_{here.metric}"
    sets = [{mean.label for mean in here.of(excess, split, "model")} for split in ("train", *splits)]
    return sorted(set.intersection(*sets))


def _costs_most(here: Findings, match: re.Match[str]) -> str | None:
    worst = match["split"]
    shifts = {mean.split for mean in here.of(f"excess_{here.metric}", None, "model")} - {"train", worst}
    if not shifts and " most" in match[0]:
        return "the most of one shift"
    if here.combine(_harm(here, worst, 1.0, _who(here, worst))).low <= 0:
        return f"'{worst}' is not seen to cost anything"
    for other in shifts:
        who = _who(here, worst, other)
        if who and here.combine([*_harm(here, worst, 1.0, who), *_harm(here, other, -1.0, who)]).low <= 0:
            return f"'{worst}' is not told apart from '{other}'"
    return None


def _least_excess(here: Findings, match: re.Match[str]) -> str | None:
    excess, split = f"excess_{here.metric}", match["split"]
    for mean in here.of(excess, split, "model"):
        if mean.label != match["name"]:
            told = here.combine([Term(1.0, match["name"], split, excess), Term(-1.0, mean.label, split, excess)])
            if told.high >= 0:
                return f"{match['name']} is not told apart from {mean.label} on '{split}'"
    return None


def _least_regret(here: Findings, match: re.Match[str]) -> str | None:
    for mean in here.of("regret", "online", "learner"):
        if mean.label != match["name"] and here.difference(match["name"], mean.label, "regret", "online").high >= 0:
            return f"{match['name']} is not told apart from {mean.label}"
    return None


def _holds(here: Findings, match: re.Match[str]) -> str | None:
    sizes = {mean.label: mean.value for mean in here.of("state_bytes", "cost")}
    bound = min(sizes.values()) if match["end"] == "least" else max(sizes.values())
    if sizes[match["name"]] != bound:
        return f"{match['name']} does not hold the {match['end']}"
    several = sum(size == bound for size in sizes.values()) > 1
    return "a verb of the wrong number" if (match["verb"] == "hold") != several else None


def _reach(here: Findings, match: re.Match[str]) -> str | None:
    """The count of those that reach the aim."""
    models, best = here.of(here.metric, kind="model"), here.of(here.metric, kind="learner")[:1]
    aim = float(match["aim"]) / 100 if match["aim"] else best[0].value - float(match["points"]) / 100
    found = sum(mean.value >= aim and not here.at_chance(mean) for mean in models)
    told = 0 if match["count"] == "none" else int(match["count"])
    return None if (told, int(match["of"])) == (found, len(models)) else f"{found} of {len(models)} do"


_CLAIMS: tuple[tuple[str, str, Callable[[Findings, re.Match[str]], str | None]], ...] = (
    ("closest", r"^NAME (?:comes closest to|is not told apart from [^.]+, and comes closest to)", _closest),
    ("costs", r"SPLIT costs the models? most", _costs_most),
    ("costs", r"SPLIT costs the models?(?! most)", _costs_most),
    ("the least", r"SPLIT costs [^;]*; there NAME has the least excess", _least_excess),
    ("loses least", r"of the learners NAME loses least", _least_regret),
    ("the least", r"(?:prompt|;|,|and) NAME (?P<verb>holds?) the (?P<end>least|most)\b", _holds),
    (
        " models ",
        r"^(?P<count>\d+|none) of (?P<of>\d+) models \w+ (?:(?P<aim>\d+)%|within (?P<points>\d+) points)",
        _reach,
    ),
)


def _tied(here: Findings, named: Sequence[str], metric: str, split: str) -> Iterator[str]:
    if len(named) < 2:
        yield "fewer than two that are not told apart"
    for other in named[1:]:
        if here.difference(named[0], other, metric, split).parts:
            yield f"{named[0]} and {other} are told apart"


def _tied_shifts(here: Findings, named: Sequence[str]) -> Iterator[str]:
    for other in named[1:]:
        who = _who(here, named[0], other)
        if here.combine([*_harm(here, named[0], 1.0, who), *_harm(here, other, -1.0, who)]).parts:
            yield f"'{named[0]}' and '{other}' are told apart"


def _together(here: Findings, own: Sequence[str]) -> Iterator[str]:
    """What is wrong with the sentences of a task taken together."""
    models = here.of(here.metric, kind="model")
    named = [mean.label for mean in models]
    lost = [mean.label for mean in models if here.at_chance(mean)]
    told = next((each for each in own if each.startswith("not seen to be better than chance")), "")
    if models and own:
        listed = _listed(told.partition(": ")[2], named)
        if set(listed) != set(lost):
            yield f"at chance are {', '.join(lost) or 'none'}, and told are {', '.join(listed) or 'none'}"
        yield from _seeds(here, models, own)
    excess = here.of(f"excess_{here.metric}", kind="model")
    if not here.rising and len(models) > max(1, len(lost)) and len(excess) == len(models):
        able = [mean for mean in here.ranked(f"excess_{here.metric}") if mean.label not in lost]
        alone = not here.peers(able[0].label, [name for name in named if name != able[0].label])
        if alone != any("closest to" in each for each in own):
            yield f"{able[0].label} is {'' if alone else 'not '}told apart from all others, and the words differ"


def _seeds(here: Findings, models: Sequence[Mean], own: Sequence[str]) -> Iterator[str]:
    counts = {mean.seeds for mean in models}
    if any("±" in each or "(≥" in each for each in own):
        alone = any("one seed: intervals are over prompts alone" in each for each in own)
        if alone != (counts == {1}):
            yield f"the intervals are over {min(counts)} to {max(counts)} seeds, and that is not what is said"


def _listed(text: str, named: Sequence[str]) -> list[str]:
    found = (
        re.match("|".join(map(re.escape, sorted(named, key=len, reverse=True))), each) for each in text.split(", ")
    )
    return [match[0] for match in found if match]


def _without(sentence: str, names: set[str]) -> str:
    """The sentence with every name left out, so that digits in names are no numbers."""
    return re.sub(
        "|".join(rf"(?<![\w.]){re.escape(each)}(?!\w)" for each in sorted(names, key=len, reverse=True)), "it", sentence
    )
