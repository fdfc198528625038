"""Softmax attention that looks up what followed, and that copies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlab import InputError, build_model
from contextlab.constructions import CopyConstruction, InductionConstruction
from contextlab.learners.answers import SMOOTHING
from contextlab.prompt import Prompt
from contextlab.tasks import build_task
from tests.constructions.agreement import apart, prompts


def sure(said, vocabulary):
    """`said` [B, T], -1 where nothing is known, as log-probabilities in float64."""
    logits = torch.full((*said.shape, vocabulary), SMOOTHING / (vocabulary - 1), dtype=torch.float64)
    logits.scatter_(-1, said.clamp_min(0)[..., None], 1 - SMOOTHING)
    return torch.where((said >= 0)[..., None], logits, 1 / vocabulary).log()


def followed(tokens, size):
    """What followed the last occurrence of the last `size` tokens, by a search backwards; -1 for none."""
    said = torch.full_like(tokens, -1)
    for row, answer in zip(tokens.tolist(), said, strict=True):
        for t in range(size - 1, len(row)):
            for j in range(t - 1, size - 2, -1):
                if row[j - size + 1 : j + 1] == row[t - size + 1 : t + 1]:
                    answer[t] = row[j + 1]
                    break
    return said


def close(made, prompt, wanted):
    """To a naive search in log-probabilities, and to the learner, which answers in float32, in probabilities."""
    models = made.build(torch.float64), build_model(made.spec()).double()
    for model in models:
        logits = model(prompt.inputs).log_softmax(-1)
        assert apart(logits, wanted) < 1e-6
        assert (logits.exp() - made.learner()(prompt).double().exp()).abs().max() < 1e-6


@settings(max_examples=6, deadline=None)
@given(
    vocabulary=st.integers(2, 7), size=st.integers(1, 3), length=st.integers(1, 40), spare=st.integers(0, 9),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_any_tokens(vocabulary, size, length, spare, seed):
    tokens = torch.randint(vocabulary, (3, length), generator=torch.Generator().manual_seed(seed))
    prompt = Prompt(tokens, tokens, tokens >= 0, tokens)
    close(InductionConstruction(vocabulary, size, length + spare), prompt, sure(followed(tokens, size), vocabulary))


@pytest.mark.parametrize("trigger", ["special", "any"])
def test_prompts_of_the_induction_head_task(trigger):
    task = build_task("induction_head", vocabulary=9, length=30, trigger=trigger)
    made = InductionConstruction(task.input_size, 1, 30)
    made.check_task(task)
    prompt = prompts(task, batch=8)
    close(made, prompt, sure(followed(prompt.inputs, 1), task.input_size))
    assert task.errors(made.build()(prompt.inputs), prompt)["accuracy"][prompt.scored].mean() == 1


@settings(max_examples=6, deadline=None)
@given(
    vocabulary=st.integers(1, 6), shortest=st.integers(1, 6), more=st.integers(0, 6), spare=st.integers(0, 4),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_copying(vocabulary, shortest, more, spare, seed):
    task = build_task("copy", vocabulary=vocabulary, shortest=shortest, longest=shortest + more)
    made = CopyConstruction(vocabulary, shortest + more + spare)
    made.check_task(task)
    prompt = prompts(task, batch=4, seed=seed)
    said = torch.full_like(prompt.inputs, -1)
    for row, answer in zip(prompt.inputs.tolist(), said, strict=True):
        bar = row.index(vocabulary + 1)
        answer[bar : 2 * bar] = torch.tensor([*row[1:bar], vocabulary + 2])
    close(made, prompt, sure(said, task.input_size))


def test_in_float32_it_still_copies_long_strings():
    task = build_task("copy", vocabulary=5, shortest=200, longest=200)
    prompt = task.sample(2, torch.Generator().manual_seed(0))
    model = build_model("copy_construction", vocabulary=5, longest=200)
    assert task.errors(model(prompt.inputs), prompt)["accuracy"][prompt.scored].mean() == 1


@pytest.mark.parametrize(
    ("made", "task", "message"),
    [
        (
            InductionConstruction(),
            ("copy", {}),
            "written for vocabulary 16, the task has 30 tokens; give vocabulary: 30",
        ),
        (InductionConstruction(), ("linear_regression", {}), "reads and predicts tokens of one vocabulary"),
        (InductionConstruction(17), ("induction_head", {"length": 300}), "reads at most 256 tokens, the task has 300"),
        (CopyConstruction(), ("copy", {"ngram": 2}), "the task has ngram 2; set ngram to 0"),
        (CopyConstruction(), ("copy", {"longest": 60}), "strings of up to 50, the task has 60; give longest: 60"),
        (CopyConstruction(), ("induction_head", {}), "copies strings as the task copy has them"),
    ],
)
def test_a_task_that_does_not_fit_is_refused_in_one_line(made, task, message):
    name, options = task
    with pytest.raises(InputError, match=message) as caught:
        made.spec().for_task(build_task(name, **options))
    assert "\n" not in str(caught.value)


def test_one_token_is_no_vocabulary():
    with pytest.raises(InputError, match="leaves nothing to predict"):
        build_model("induction_construction", vocabulary=1)
