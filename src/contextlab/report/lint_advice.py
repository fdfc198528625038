"""`lint_advice`, `lint_weights`: what is wrong with the sentences of `advise` and of forms of the weights.

As `lint_kept` does, it works out anew which ways are told apart; the writer is not asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from contextlab.evaluation.advise import Advice
from contextlab.evaluation.compress import FULL
from contextlab.report.advice import measured, name_of
from contextlab.report.compress import with_weights
from contextlab.report.compress_total import ITSELF, Point, points
from contextlab.report.kept_cells import difference
from contextlab.report.lint import RANKS, lint
from contextlab.words import bytes_in_words

_EXEMPT = r"better than chance"


def lint_advice(sentence: str, advice: Advice) -> list[str]:
    """What is wrong with a sentence about this advice, a line each; nothing where all is well.

    "Best" may be called only what is told apart from all others that fit; those said not to be told apart must be all
    that are not, and what is recommended the smallest of them; nothing that does not fit may be recommended; what is
    kept, and in how many bytes, must be what was measured and foretold.
    """
    known = measured(advice)
    found = {name: known[name] for way in advice.fitting if (name := name_of(way)) in known}
    return [*lint([sentence]), *(f"{what}: {sentence}" for what in _wrong(sentence, advice, found))]


def lint_weights(sentences: Sequence[str], results: pd.DataFrame) -> list[str]:
    """What is wrong with the sentences of `weights_words`, a line each; nothing where all is well.

    results: the table of `compress`. Each form of the weights must have its own, which tells what it keeps with the
    full cache, in which part of the bytes of the model's own weights, and ranks nothing.
    """
    found, known = lint(sentences), with_weights(results)
    rows = known[(known["metric"] == "weight_bytes") & (known["model"] == FULL)]
    bytes_of = dict(zip(rows["weights"], rows["value"], strict=True))
    lengths = [int(length) for length in dict.fromkeys(known["length"])]
    forms = {
        (point.weights, length): point
        for length in lengths
        for point in points(known, length)
        if point.weights in bytes_of and point.weights and not point.policy
    }
    form = r"(\S+) keeps (-?\d+\.\d)% .*? of the model's quality in (\d+\.\d)% of the bytes of its weights: .*"
    told = [match.groups() for each in sentences if (match := re.fullmatch(form, each))]
    wanted = [
        (name, f"{100 * point.part.value:.1f}", f"{100 * bytes_of[name] / bytes_of['']:.1f}")
        for (name, _), point in forms.items()
    ]
    if told != wanted or len(told) != len(sentences):
        found.append(f"{wanted} is kept in these bytes, and told is {told}")
    ranked = [each for each in sentences if re.search(RANKS, each)]
    return found + [f"ranks in words that no check knows: {each}" for each in ranked]


def _wrong(sentence: str, advice: Advice, found: Mapping[str, Point]) -> Iterator[str]:
    names = sorted([ITSELF, *(name_of(way) for way in advice.ways)], key=len, reverse=True)
    any_name = f"(?P<name>{'|'.join(map(re.escape, names))})"
    plain = re.sub("|".join(map(re.escape, names)), "it", re.sub(_EXEMPT, "", sentence))
    ranks = len(re.findall(RANKS, plain))
    small = rf"Nothing that was tried fits in .*?: {any_name}, the smallest, takes (?P<size>.*)\.$"
    alike = r"Of the (?P<count>\d+) ways that fit in .*? sequences?, (?P<who>.*) are not told apart "
    if smallest := re.match(small, sentence):
        totals = {name_of(way): way.total for way in advice.ways if way.total > way.weight_bytes}
        least = min(totals, key=lambda name: totals[name])
        said = smallest["name"], smallest["size"]
        if advice.fitting or totals[least] <= advice.memory or said != (least, bytes_in_words(totals[least])):
            yield f"the smallest is {least}, which takes {bytes_in_words(totals[least])}"
    elif best := re.match(rf"{any_name} is the best of the (?P<count>\d+) ways that fit", sentence):
        ranks -= 1
        yield from _best(best["name"], int(best["count"]), found)
    elif tied := re.match(alike, sentence):
        yield from _tied(tied["who"], int(tied["count"]), sentence, any_name, found)
    elif sentence.startswith("The model itself fits"):
        yield from _itself(sentence, any_name, found)
    elif none := re.match(r"Of the (\d+) ways that fit in .*, none is seen to keep anything", sentence):
        if int(none[1]) != len(found) or any(each.part.low > 0 for each in found.values()):
            yield "some keep something"
    elif only := re.match(rf"Only {any_name} fits in ", sentence):
        if list(found) != [only["name"]]:
            yield f"{len(found)} ways fit"
    elif "so nothing is ranked" in sentence:
        if found:
            yield "some ways can be ranked"
    elif sentence.startswith("What would fit in "):
        if advice.fitting or all(way.total > advice.memory for way in advice.ways):
            yield "nothing would fit, or what fits was measured"
    elif not sentence.startswith("Nothing that was tried can be used"):
        yield "a sentence of no known form"
    if ranks:
        yield "ranks in words that no check knows"
    yield from _amounts(sentence, any_name, found)


def _itself(sentence: str, any_name: str, found: Mapping[str, Point]) -> Iterator[str]:
    if ITSELF not in found:
        yield "the model itself does not fit"
        return
    other = re.search(rf", and {any_name}, which keeps .* is not told apart from it", sentence)
    if other is not None and difference(found[other["name"]].mean, found[ITSELF].mean).high < 0:
        yield f"{other['name']} keeps less than the model itself"


def _best(name: str, count: int, found: Mapping[str, Point]) -> Iterator[str]:
    if count != len(found) or count < 2 or name not in found:
        yield f"{len(found)} ways fit"
        return
    for other, point in found.items():
        if other != name and difference(found[name].mean, point.mean).low <= 0:
            yield f"{name} is not told apart from {other}"


def _tied(who: str, count: int, sentence: str, any_name: str, found: Mapping[str, Point]) -> Iterator[str]:
    named = [match["name"] for match in re.finditer(rf"(?:^|(?<=, )|(?<= and )){any_name}(?=, | and |$)", who)]
    if count != len(found) or any(name not in found for name in named):
        yield f"{len(found)} ways fit"
        return
    first = max(found.values(), key=lambda point: point.part.value)
    near = {name: p for name, p in found.items() if p is first or not difference(p.mean, first.mean).parts}
    more = re.search(r" and (\d+) more$", who)
    if len(near) != len(named) + (int(more[1]) if more else 0) or any(name not in near for name in named):
        yield f"{len(near)} are not told apart"
    taken = re.search(rf": {any_name} takes the fewest bytes of these", sentence)
    if taken is None or taken["name"] not in near or near[taken["name"]].bytes > min(p.bytes for p in near.values()):
        yield "what is recommended is not the smallest"


def _amounts(sentence: str, any_name: str, found: Mapping[str, Point]) -> Iterator[str]:
    """What ways are said to keep, and in how many bytes."""
    start = "(?: takes the fewest bytes of these, and| fits in [^:]*: it| is the best [^:]*: it|, which)"
    told = rf"{any_name}{start} keeps "
    for match in re.finditer(told + r"(?P<part>-?\d+\.\d)%.*? in (?P<size>[\d.]+ \wi?B|[\d.]+ B)", sentence):
        point = found.get(match["name"])
        if point is None:
            yield f"{match['name']} does not fit"
        elif f"{point.part.value:.1%}" != f"{match['part']}%":
            yield f"{match['name']} keeps {point.part.value:.1%}"
        elif bytes_in_words(point.bytes) != match["size"]:
            yield f"{match['name']} takes {bytes_in_words(point.bytes)}"
