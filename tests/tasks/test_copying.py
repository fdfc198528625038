"""Copying prompts hold what they promise, and their evaluators make no error on any split."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from contextlab import build_task
from contextlab.errors import InputError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 3), st.integers(4, 9), st.integers(0, 5), st.integers(0, 99))
def test_copy_shows_the_string_then_asks_for_it(ngram: int, shortest: int, more: int, seed: int) -> None:
    longest = shortest + more
    task = build_task("copy", vocabulary=4, shortest=shortest, longest=longest, ngram=ngram)
    prompt = task.sample(6, generator(seed))
    begin, bar, end, pad = 4, 5, 6, 7
    assert prompt.inputs.shape == (6, 2 * longest + 2)
    for b in range(6):
        row, length = prompt.inputs[b].tolist(), int(prompt.hidden["length"][b])
        assert shortest <= length <= longest
        assert row[0] == begin
        assert row[length + 1] == bar
        string, rest = row[1 : length + 1], row[length + 2 :]
        assert max(string) < 4
        shown = [x for x in rest if x != pad]
        assert rest == shown + [pad] * (len(rest) - len(shown))
        start = next(i for i in range(length) if string[i : i + ngram] == shown[:ngram])
        assert shown == string[start:]
        at = prompt.scored[b].nonzero().squeeze(1).tolist()
        assert at == list(range(length + 1 + ngram, length + 2 + len(shown)))
        assert prompt.targets[b, at].tolist() == [*string[start + ngram :], end]
        assert prompt.shot[b, at].tolist() == list(range(len(at)))


def test_copied_strings_are_uniform_in_length_and_symbols() -> None:
    prompt = build_task("copy", vocabulary=5, shortest=3, longest=8).sample(6000, generator())
    lengths = torch.bincount(prompt.hidden["length"] - 3, minlength=6)
    assert stats.chisquare(lengths.numpy()).pvalue > 1e-4
    assert stats.chisquare(torch.bincount(prompt.inputs[:, 1], minlength=5).numpy()).pvalue > 1e-4


def test_selective_copy_puts_blanks_before_symbols() -> None:
    task = build_task("selective_copy", vocabulary=6, length=20, copies=3)
    prompt = task.sample(4000, generator())
    first = prompt.inputs[:, :16]
    assert (prompt.inputs[:, 16] == 5).all()
    assert (prompt.inputs[:, 17:] == 4).all()
    assert ((first != 4).sum(1) == 3).all()
    assert (first[:, -1] != 4).all()  # no blank after the last symbol
    assert prompt.scored.nonzero()[:, 1].unique().tolist() == [17, 18, 19]
    for row, targets in zip(first[:50].tolist(), prompt.targets[:50, 17:].tolist(), strict=True):
        assert [x for x in row if x != 4] == targets
    # 13 blanks, each before one of three symbols: the number before the first is binomial
    before = (first != 4).int().argmax(1)
    seen = torch.bincount(before, minlength=14).double()
    expected = torch.tensor(stats.binom(13, 1 / 3).pmf(range(14))) * 4000
    seen = torch.cat([seen[:8], seen[8:].sum().view(1)])
    expected = torch.cat([expected[:8], expected[8:].sum().view(1)])
    assert stats.chisquare(seen.numpy(), expected.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("trigger", ["special", "any"])
def test_induction_head_has_its_trigger_twice(trigger: str) -> None:
    task = build_task("induction_head", vocabulary=5, length=12, trigger=trigger)
    prompt = task.sample(3000, generator())
    key = prompt.inputs[:, -1]
    assert ((prompt.inputs == key.unsqueeze(1)).sum(1) == 2).all()
    assert (key == 5).all() == (trigger == "special")
    at = prompt.hidden["at"]
    assert torch.equal(prompt.inputs[torch.arange(3000), at], key)
    assert torch.equal(prompt.targets[:, -1], prompt.inputs[torch.arange(3000), at + 1])
    assert prompt.scored.nonzero()[:, 1].unique().tolist() == [11]
    assert stats.chisquare(torch.bincount(at, minlength=10).numpy()).pvalue > 1e-4
    offset = (prompt.targets[:, -1] - (key if trigger == "any" else 0)) % 5
    seen = torch.bincount(offset, minlength=5).numpy()
    assert stats.chisquare(seen[1:] if trigger == "any" else seen).pvalue > 1e-4
    assert (seen[0] == 0) == (trigger == "any")


@pytest.mark.parametrize("digits", [1, 4])
def test_chance_of_a_phonebook_counts_the_digits_that_come_up_at_each_place(digits: int) -> None:
    task = build_task("phonebook", entries=5, digits=digits, names=3)
    prompt = task.sample(1000, torch.Generator().manual_seed(0))
    answers = prompt.targets[prompt.scored].view(1000, digits)
    kinds = [len(answers[:, place].unique()) for place in range(digits)]
    assert task.chance() == {
        "accuracy": pytest.approx(sum(1 / kind for kind in kinds) / digits),
        "cross_entropy": pytest.approx(sum(map(math.log, kinds)) / digits),
    }


def test_phonebook_asks_for_a_number_that_is_in_the_book() -> None:
    task = build_task("phonebook", entries=5, digits=4, names=3)
    prompt = task.sample(300, generator())
    for row, targets in zip(prompt.inputs.tolist(), prompt.targets.tolist(), strict=True):
        text = "".join(f"<{task.symbol(x)}>" if x < 6 else task.symbol(x) for x in [*row, targets[-1]])
        book, examples, question = text.split("\n\n")
        entries = dict(line.split(":") for line in book.split("\n"))
        assert len(entries) == 5
        assert all(len(number) == 4 and number[0] in "6789" for number in entries.values())
        shown = [line.split(":")[0] for line in examples.split("\n")]
        name, number = question.split(":")
        assert len({*shown, name}) == 3
        assert all(entries[line.split(":")[0]] == line.split(":")[1] for line in examples.split("\n"))
        assert entries[name] == number
        assert "".join(task.symbol(x) for x in targets[-4:]) == number
    assert (prompt.scored.nonzero()[:, 1].unique() == torch.arange(prompt.length - 4, prompt.length)).all()
    first = torch.bincount(prompt.targets[:, -4] - 6, minlength=10)
    assert stats.chisquare(first[6:].numpy()).pvalue > 1e-4
    assert "[" in task.words(prompt)


def test_distances_lead_back_to_what_is_asked_for() -> None:
    task = build_task("induction_head", length=20)
    prompt = task.sample(100, generator())
    at = 19 - task.facets(prompt)["distance"][:, -1]
    assert torch.equal(prompt.inputs.gather(1, at.unsqueeze(1)).squeeze(1), prompt.inputs[:, -1])
    task = build_task("phonebook", entries=5, digits=3, names=4)
    prompt = task.sample(100, generator())
    facets = task.facets(prompt)
    question = prompt.length - 3 - 2  # its first name
    entry = question - facets["distance"][:, -1:]
    assert torch.equal(prompt.inputs.gather(1, entry), prompt.inputs[:, question : question + 1])
    assert torch.equal(prompt.inputs.gather(1, entry + 1), prompt.inputs[:, question + 1 : question + 2])
    assert entry.max() < 5 * 7
    assert facets["digit"][prompt.scored].view(100, 3).unique(dim=0).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("copy", {"shortest": 5, "longest": 9, "vocabulary": 8}),
        ("copy", {"shortest": 5, "longest": 9, "vocabulary": 3, "ngram": 2}),
        ("selective_copy", {"length": 40, "copies": 5}),
        ("induction_head", {"length": 20}),
        ("induction_head", {"length": 20, "trigger": "any"}),
        ("phonebook", {"entries": 5, "digits": 3, "names": 5}),
    ],
)
def test_the_best_learner_makes_no_error_on_any_split(name: str, options: dict[str, object]) -> None:
    task = build_task(name, **options)
    assert len(task.splits()) > 1
    for split, changed in task.splits().items():
        prompt = changed.sample(20, generator(2))
        answer = next(iter(changed.learners().values()))(prompt)
        assert changed.errors(answer, prompt)["accuracy"][prompt.scored].min() == 1, split
        assert changed.loss(answer, prompt) < 1e-4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("copy", {"shortest": 9, "longest": 8}, "shortest 9 is more than longest 8; at most 8"),
        ("copy", {"shortest": 3, "ngram": 3}, "at most 2"),
        ("selective_copy", {"vocabulary": 3}, "use 4 or more"),
        ("selective_copy", {"length": 20, "copies": 10}, "at most 9"),
        ("induction_head", {"length": 2}, "use 3 or more"),
        ("induction_head", {"vocabulary": 2}, "use 3 or more"),
        ("phonebook", {"entries": 2}, "use 3 or more"),
        ("phonebook", {"entries": 10, "names": 3}, "at most 9"),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_task(name, **options)


def test_the_largest_copies_that_fit_are_drawn() -> None:
    prompt = build_task("selective_copy", length=20, copies=9).sample(4, generator())
    assert ((prompt.inputs[:, :10] == 14).sum(1) == 1).all()
