"""Corrupted prompts: what each family changes, and what it leaves."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import contextlab.tasks  # noqa: F401  (registers every task)
from contextlab import build_task, registry
from contextlab.errors import InputError
from contextlab.prompt import asked_at

HAVE = {
    "associative_recall", "boolean_function", "bursty_classification", "chained_recall", "compositional_recall", "copy",
    "counters", "decision_tree", "fourier_series", "gaussian_mixture_regression", "group_word", "hermite_regression",
    "induction_head", "linear_regression", "logistic_regression", "mad_fuzzy_recall", "mad_noisy_recall", "mad_recall",
    "markov_chain", "mixed_regression", "monomial_regression", "multi_value_recall", "outlier_regression",
    "overwritten_recall", "phonebook", "polynomial_series", "quadratic_regression", "random_automata", "relu_network",
    "representation_regression", "selective_copy", "sliding_window", "softmax_regression", "superposition",
    "vector_recall",
}  # fmt: skip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(name, batch=32, **options):
    task = build_task(name, **options)
    clean = task.sample(batch, generator(1))
    return task, clean, task.corrupt(clean, generator(2))


@pytest.mark.parametrize("entry", registry.entries("task"), ids=lambda entry: entry.name)
def test_a_task_that_tells_no_corrupted_prompts_says_so(entry):
    task = entry.build(**({"new": 1.0} if entry.name == "bursty_classification" else entry.cases[0]))
    prompt = task.sample(2, generator())
    if entry.name in HAVE:
        assert (asked_at(prompt, task.corrupt(prompt, generator())) >= 0).any()
        return
    with pytest.raises(InputError, match=f"corrupt: {entry.name} tells no context"):
        task.corrupt(prompt, generator())


def test_recall_changes_two_keys_and_nothing_else():
    _, clean, corrupted = pair("associative_recall", vocabulary=32, pairs=6, length=32)
    changed = clean.inputs != corrupted.inputs
    assert (changed.sum(1) == 2).all()
    assert not changed[:, 1:12:2].any()
    assert not changed[:, 12:].any()
    at = asked_at(clean, corrupted)
    assert torch.equal(at, torch.where(clean.scored, torch.arange(32), -1).amax(1))
    values = clean.inputs[:, 1:12:2]
    answer = corrupted.targets.gather(1, at[:, None])
    assert (values == answer).any(1).all()
    assert (answer != clean.targets.gather(1, at[:, None])).all()


def test_regression_keeps_the_inputs_and_draws_other_weights():
    task, clean, corrupted = pair("linear_regression", dimensions=4, examples=9, layout="interleaved")
    assert torch.equal(clean.xs, corrupted.xs)
    torch.testing.assert_close(corrupted.ys, corrupted.xs @ corrupted.hidden["weights"])
    gap = (clean.hidden["weights"] - corrupted.hidden["weights"]).flatten(1).norm(dim=1)
    assert gap.min() > 0.1
    assert (asked_at(clean, corrupted) == 16).all()
    double = task.corrupt(clean.to(torch.float64), generator(2))
    assert double.inputs.dtype == torch.float64


def test_the_trigger_moves():
    _, clean, corrupted = pair("induction_head", vocabulary=8, length=16)
    moved = corrupted.hidden["at"]
    assert (moved != clean.hidden["at"]).all()
    assert (corrupted.inputs.gather(1, moved[:, None]) == 8).all()
    assert ((clean.inputs == 8).sum(1) == (corrupted.inputs == 8).sum(1)).all()
    assert ((clean.inputs != corrupted.inputs).sum(1) == 2).all()


@pytest.mark.parametrize("orders", [(1,), (1, 2)])
def test_a_chain_is_renamed_with_its_table(orders):
    task, clean, corrupted = pair("markov_chain", vocabulary=4, orders=orders, length=48)
    oracle = task.learners()["oracle"]
    for prompt in (clean, corrupted):
        prompt.likelihood = oracle(prompt).log_softmax(-1).gather(2, prompt.targets[..., None])[..., 0]
    torch.testing.assert_close(clean.likelihood, corrupted.likelihood)
    assert (clean.inputs != corrupted.inputs).any(1).all()


def test_an_automaton_is_renamed():
    task, clean, corrupted = pair("random_automata", **registry.lookup("task", "random_automata").cases[0])
    for prompt in (clean, corrupted):
        prompt.allowed = task.errors(torch.nn.functional.one_hot(prompt.targets, task.input_size).float(), prompt)
    assert (corrupted.allowed["allowed_accuracy"][corrupted.scored] == 1).all()
    assert (clean.inputs != corrupted.inputs).any(1).all()


def test_outliers_stay():
    _, clean, corrupted = pair("outlier_regression", dimensions=3, examples=12)
    away = ~clean.scored
    assert torch.equal(clean.ys[away], corrupted.ys[away])
    assert (clean.ys[~away] != corrupted.ys[~away]).all()


def test_a_boolean_function_of_the_class_labels_the_last_input_otherwise():
    task, clean, corrupted = pair("boolean_function", dimensions=8, examples=12, function="dnf")
    assert torch.equal(clean.xs[:, -1], corrupted.xs[:, -1])
    assert (clean.ys[:, -1] != corrupted.ys[:, -1]).float().mean() > 0.9
    torch.testing.assert_close(task._labels(corrupted.xs, corrupted.hidden), corrupted.ys)


def test_a_row_without_another_answer_stays_as_it_is():
    task, clean, _ = pair("mad_recall", vocabulary=4, length=4, batch=64)  # one pair and its key: no other key is shown
    corrupted = task.corrupt(clean, generator(3))
    assert torch.equal(clean.inputs, corrupted.inputs)
    assert (asked_at(clean, corrupted) == -1).all()


def test_what_cannot_be_corrupted_is_told_in_one_line():
    for name, options, said in (
        ("group_word", {"length": 1}, "use length 2 or more"),
        ("superposition", {"functions": ("first",)}, "use two functions or more"),
        ("sliding_window", {"order": "shuffled"}, "use order 'sequential'"),
        ("vector_recall", {"pairs": 1, "queries": 1}, "use 2 pairs or more"),
        ("markov_chain", {"vocabulary": 2}, "takes 3 symbols or more"),
        ("bursty_classification", {}, "use new 1"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            pair(name, **options)
        assert "\n" not in str(caught.value)


def test_hidden_and_other_fields_are_carried():
    _, clean, corrupted = pair("copy", vocabulary=8, shortest=4, longest=6)
    assert {each.name for each in dataclasses.fields(corrupted)} == {each.name for each in dataclasses.fields(clean)}
    assert torch.equal(clean.hidden["length"], corrupted.hidden["length"])
