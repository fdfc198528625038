"""The words of drawn reports rank nothing that the data do not part, and what is wrong in them is found."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from contextlab.evaluation.intervals import Interval
from contextlab.report import sentences, summary_words
from contextlab.report.findings import Findings
from contextlab.report.lint import lint
from tests.report.conftest import make_records, make_results
from tests.report.drawn import KINDS, draw


@pytest.fixture(scope="module")
def drawn():
    return draw(160)


@pytest.fixture(scope="module")
def few():
    return draw(2 * len(KINDS), seed=7)


@pytest.fixture(scope="module")
def words(few):
    """What the writers say of `few`, in which there is no fault."""
    results, by_prompt, _ = few
    said = summary_words(results, [], by_prompt)
    assert lint(said, results, by_prompt) == []
    return said


def test_the_words_of_drawn_reports_are_clean(drawn) -> None:
    """All kinds of task: ties, noise, chance, all perfect, all zero, one model, one shift; 1 to 3 seeds."""
    results, by_prompt, truth = drawn
    words = summary_words(results, [], by_prompt)
    assert lint(words, results, by_prompt) == []
    assert {each["seeds"] for each in truth.values()} == {1, 2, 3}
    for said in ("comes closest", "not told apart", "better than chance", "costs the model", "least excess", "reaches"):
        assert any(said in each for each in words), said


def test_words_without_values_by_prompt_are_clean_too(few) -> None:
    results, by_prompt, _ = few
    assert lint(summary_words(results, []), results) == []
    for number, task in enumerate(results["task"].unique()[:6]):  # a report of one task
        rows, values = (each[each["task"] == task] for each in (results, by_prompt))
        assert lint(summary_words(rows, [], values), rows, values) == [], number
    realistic = make_results(2)
    assert lint(summary_words(realistic, make_records()), realistic) == []


def test_equal_models_are_seldom_ranked(drawn) -> None:
    """Of tasks on which all models and all shifts of one cost are equal, chance may rank one in twenty."""
    results, by_prompt, truth = drawn
    words = summary_words(results, [], by_prompt)
    ties = [task for task, each in truth.items() if each["kind"] in ("ties", "perfect") and len(each["means"]) > 1]
    ranked = {each.partition(":")[0] for each in words if "comes closest" in each}
    assert len(ties) >= 30
    assert len(ranked & set(ties)) <= 3


def written(changed: Callable[[pytest.MonkeyPatch], None], data, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a changed writer says; the linter that reads it is whole."""
    results, by_prompt, _ = data
    with monkeypatch.context() as patch:
        changed(patch)
        words = summary_words(results, [], by_prompt)
    return lint(words, results, by_prompt)


def parted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Interval, "parts", True)


def never_parted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Interval, "parts", False)


def no_peers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Findings, "peers", lambda *_: [])


def never_chance(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Findings, "at_chance", lambda *_: False)


def bare_numbers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sentences, "interval_in_words", lambda told, metric: f"{told.value:.3f}")


def twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sentences, "interval_in_words", lambda told, metric: f"{1.5 * told.value:.1%}")


def bare_bytes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sentences, "bytes_in_words", lambda size: f"{size:.0f}")


def worst_first(patch: pytest.MonkeyPatch) -> None:
    ranked = Findings.ranked
    patch.setattr(Findings, "ranked", lambda *given, **more: ranked(*given, **more)[::-1])


def harmless(patch: pytest.MonkeyPatch) -> None:
    combine = Findings.combine
    patch.setattr(Findings, "combine", lambda *given: Interval(combine(*given).value, 1.0, 2.0))


@pytest.mark.parametrize(
    "change",
    [parted, never_parted, no_peers, never_chance, bare_numbers, twice, bare_bytes, worst_first, harmless],
)
def test_a_writer_with_a_fault_is_caught(change, few, words, monkeypatch) -> None:
    assert written(change, few, monkeypatch)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r" reaches ", " reach "),
        (r"none of \d+ models", "0 of 1 models"),
        (r"of the \d+ shifts", "the 1 shifts"),
        (r"(\d) models reach ", r"\1 models reaches "),
        (r" hold the least", " holds the least"),
        (r" \(one seed: [^)]*\)", ""),
        (r"[^:]*: not seen to be better than chance.*", ""),
        (r"the best known learner\.", "the best known learner, and is the winner of all, the best."),
        (r" ± \d[\d.]*", " ± nan"),
        (r"above (\w+)'s squared error by: .*", r"above \1's squared error by: mamba 0, gla 0."),
        (r"(\d) KiB", r"\1"),
    ],
)
def test_a_sentence_with_a_fault_is_caught(old: str, new: str, few, words) -> None:
    results, by_prompt, _ = few
    changed = [re.sub(old, new, each) for each in words]
    assert changed != words
    assert lint(changed, results, by_prompt)
