"""`lint_kept`: what is wrong with the sentences of `compress`, held against the table that they were made from.

As `lint` does it reads the sentences as a reader does: who is compared with whom, on which tasks, follows from the
table and from what the sentence says; which policies are told apart is worked out anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from contextlab.evaluation.compress import FULL, OWN
from contextlab.policies import Budget
from contextlab.report.compress import bounds, knows_what_follows
from contextlab.report.kept import WHOLE
from contextlab.report.kept_cells import Kept, Key, Mean, On, difference, kept, mean_of
from contextlab.report.lint import RANKS, lint

_LEFT = r"(?: \(without (?P<left>.+?), where most policies cannot keep to it\))?"
_READS = r"reads? (?P<budget>\S+) of it (?P<when>a token|for a token of the prompt)"
_STARTS = (
    rf"At (?P<budget>\S+?){_LEFT}, (?P<said>.*)",
    rf"Of the policies that hold everything and {_READS}{_LEFT}, (?P<said>.*)",
    rf"(?P<said>(?P<name>\S+), which holds everything and {_READS}, keeps{_LEFT} .*)",
)
_PART = r"(?P<part>-?\d+\.\d)% (?:± (?:<?\d+\.\d)%|\(all alike\))"
_EXEMPT = r"better than chance|most policies cannot"


def lint_kept(sentences: Sequence[str], results: pd.DataFrame) -> list[str]:
    """What is wrong with the sentences of `compress_words`, a line each; nothing where all is well.

    results: the table of `compress`. A policy may be called the best only where it is told apart from every other of
    its kind that served the same tasks at the same budget; those said not to be told apart must be all that are not;
    what is kept, and in which part of the bytes, must be the table's; and what knows what follows must be said to.
    """
    found = lint(sentences)
    whole = kept(results)
    for sentence in sentences:
        found += [f"{what}: {sentence}" for what in _sentence(whole, sentence)]
    said = [sentence for sentence in sentences if sentence in whole.at_chance]
    if missing := len(whole.at_chance) - len(said):
        found.append(f"{missing} tasks on which the full cache is at chance are not told")
    return found


def _sentence(whole: Kept, sentence: str) -> Iterator[str]:
    """What is wrong with one of them."""
    if sentence in whole.at_chance:
        return
    if over := re.match(r"What is kept is told above chance; 95% intervals over (.*)\.$", sentence):
        if over[1] != whole.over:
            yield f"intervals are over {whole.over}"
        return
    match = next((m for pattern in _STARTS if (m := re.match(pattern, sentence, re.DOTALL))), None)
    if match is None:
        yield "a sentence of no known form"
        return
    when = match.groupdict().get("when")
    kind = "held" if when is None else "read" if when == "a token" else "prefill"
    left = _tasks(whole, match["left"] or "")
    on = [task for task in whole.tasks if task not in left]
    said = match["said"].partition(" Not compared, ")[0]
    means = _compared(whole, kind, match["budget"], on)
    ranked = len(re.findall(RANKS, re.sub(_EXEMPT, "", _unnamed(said, whole))))
    if " is the best policy: " in said:
        ranked -= 1
        yield from _best(means, said)
    elif " are not told apart (" in said:
        yield from _tied(means, said)
    elif none := re.match(r"none of the (\d+) policies is seen to keep anything", said):
        if int(none[1]) != len(means) or any(mean.quality.low > 0 for mean in means.values()):
            yield f"{len(means)} policies are compared, and some keep something"
    elif ", which knows what follows, keeps " in said:
        name = said.partition(", which knows")[0]
        if not knows_what_follows(name):
            yield f"{name} does not know what follows"
        found = _mean(whole, (name, match["budget"]), on)
        means = {} if found is None else {name: found}
    elif len(means) != 1:
        yield f"one policy is told of, and there are {len(means)}"
    if ranked:
        yield "ranks in words that no check knows"
    yield from _amounts(means, said)


def _compared(whole: Kept, kind: str, budget: str, on: Sequence[On]) -> dict[str, Mean]:
    """Name -> what it keeps, of the policies that a sentence must compare."""
    policies = [key for key in whole.cells if key[0] != FULL and not knows_what_follows(key[0])]
    limited = [key for key in policies if key[1] == budget and bounds(key[0]) == kind]
    limited = [key for key in limited if not Budget.of(budget).everything]
    means = {key[0]: mean for key in limited if (mean := _mean(whole, key, on)) is not None}
    if kind != "held":
        return means
    means = {name: mean for name, mean in means.items() if mean.bytes < WHOLE}
    most = max((mean.bytes for mean in means.values()), default=0.0)
    free = {key[0]: mean for key in policies if key[1] == OWN and (mean := _mean(whole, key, on)) is not None}
    return means | {name: mean for name, mean in free.items() if mean.bytes <= most}


def _mean(whole: Kept, key: Key, on: Sequence[On]) -> Mean | None:
    return mean_of(whole.cells.get(key, {}), on)


def _best(means: Mapping[str, Mean], said: str) -> Iterator[str]:
    name = said.partition(" is the best policy: ")[0]
    if name not in means or len(means) == 1:
        yield f"{name} is compared with nothing"
        return
    for other, mean in means.items():
        if other != name and difference(means[name], mean).low <= 0:
            yield f"{name} is not told apart from {other}"


def _tied(means: Mapping[str, Mean], said: str) -> Iterator[str]:
    """The first that is named keeps most; with it stand all that are not told apart from it, or as many as are told."""
    head = said.partition(" are not told apart (")[0]
    named = _names(head, means)
    if len(named) < 2:
        yield "fewer than two that are not told apart"
        return
    first = means[named[0]]
    if first.quality.value < max(mean.quality.value for mean in means.values()):
        yield f"{named[0]} does not keep most"
    near = {name for name, mean in means.items() if name == named[0] or not difference(mean, first).parts}
    for name in named:
        if name not in near:
            yield f"{name} and {named[0]} are told apart"
    more = re.search(r" and (\d+) more$", head)
    if len(near) != len(named) + (int(more[1]) if more else 0):
        yield f"{len(near)} are not told apart"


def _amounts(means: Mapping[str, Mean], said: str) -> Iterator[str]:
    """What policies are said to keep, and in how many bytes."""
    any_name = "|".join(re.escape(name) for name in sorted(means, key=len, reverse=True))
    told = r"(?: is the best policy: it|, which knows what follows,|, which holds everything and [^,]+,)? keeps"
    for match in re.finditer(rf"(?<!\S)(?P<name>{any_name}){told}{_LEFT} {_PART}", said) if any_name else ():
        mean = means[match["name"]]
        if f"{mean.quality.value:.1%}" != f"{match['part']}%":
            yield f"{match['name']} keeps {mean.quality.value:.1%}"
        bytes_said = re.match(r" of the full cache's quality in (\d+\.\d)% of its bytes", said[match.end() :])
        if bytes_said and f"{mean.bytes:.1%}" != f"{bytes_said[1]}%":
            yield f"{match['name']} holds {mean.bytes:.1%}"


def _tasks(whole: Kept, text: str) -> list[On]:
    """The tasks that "needle and text at 512 tokens" names; a length counts for those before it that have none."""
    known = sorted({name for name, _ in whole.tasks}, key=len, reverse=True)
    found: list[On] = []
    waiting: list[str] = []
    for name, length in re.findall(rf"({'|'.join(map(re.escape, known))})(?: at (\d+) tokens)?", text) if known else ():
        waiting.append(name)
        if length:
            found += [(each, int(length)) for each in waiting]
            waiting = []
    return found


def _names(text: str, means: Mapping[str, Mean]) -> list[str]:
    any_name = "|".join(re.escape(name) for name in sorted(means, key=len, reverse=True))
    return re.findall(rf"(?:^|, | and )({any_name})(?=, | and |$)", text)


def _unnamed(text: str, whole: Kept) -> str:
    """The text without the names of policies: one of them may hold a word that ranks."""
    names = sorted({name for name, _ in whole.cells}, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, names)), "it", text)
