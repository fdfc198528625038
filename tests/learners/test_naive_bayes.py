"""Naive Bayes against scikit-learn, a sum over pairs of classes, a loop over prefixes, and Monte Carlo."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.naive_bayes import STRENGTH, NaiveBayes, NaiveBayesPairs, byte_likelihoods
from contextlab.prompt import Prompt

SEPARATOR = 256


def ask(tokens: Tensor) -> Prompt:
    scored = torch.zeros_like(tokens, dtype=torch.bool)
    scored[:, -1] = True
    return Prompt(tokens, torch.zeros_like(tokens), scored, torch.zeros_like(tokens))


def documents(classes: int = 3, size: int = 400) -> list[list[Tensor]]:
    """Two documents of each class, of bytes 97 to 116, and how often differs by class."""
    found = []
    for _ in range(classes):
        weight = torch.rand(20) ** 2
        found.append([torch.multinomial(weight, size, True).add(97).to(torch.uint8) for _ in range(2)])
    return found


@pytest.mark.parametrize("order", [1, 2])
def test_it_is_the_naive_bayes_of_scikit_learn(order: int) -> None:
    """One multinomial model for each byte before, smoothed by a vector of counts, multiplied."""
    bayes = pytest.importorskip("sklearn.naive_bayes")
    known = documents()
    text = torch.randint(90, 120, (7, 30))
    table = byte_likelihoods(known, order)
    counts = torch.zeros(3, 257, 256, dtype=torch.float64)
    for c, texts in enumerate(known):
        for one in texts:
            ids = one.tolist()
            for a, b in zip([None, *ids], [*ids, None], strict=True):
                if a is not None and b is not None:
                    counts[c, a, b] += 1
                if b is not None:
                    counts[c, 256, b] += 1
    pool = counts.sum(0)
    alone = (pool[256] + STRENGTH / 256) / (pool[256].sum() + STRENGTH)
    total = torch.zeros(7, 3, dtype=torch.float64)
    for row in range(7):
        before = 256
        for token in text[row].tolist():
            prior = alone if before == 256 else (pool[before] + STRENGTH * alone) / (pool[before].sum() + STRENGTH)
            model = bayes.MultinomialNB(alpha=(STRENGTH * prior).numpy(), fit_prior=False)
            model.fit(counts[:, before].numpy(), [0, 1, 2])
            total[row] += torch.tensor(model.feature_log_prob_[:, token])
            before = token if order == 2 else 256
    answer = NaiveBayes(table)(ask(text))
    assert answer.shape == (7, 30, 259)
    torch.testing.assert_close(answer[:, -1, 256:], total.log_softmax(1).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(table.exp().sum(2), torch.ones(table.shape[:2], dtype=torch.float64))


def by_prefix(table: Tensor, text: list[int], correlation: float) -> list[list[float]]:
    """Probabilities of the classes after each byte of one text, a loop over prefixes."""
    found = []
    for end in range(1, len(text) + 1):
        scores = []
        for c in range(len(table)):
            pairs = zip([256, *text], text[:end], strict=False)
            scores.append(sum(table[c, a if table.shape[1] > 1 else 0, b].item() for a, b in pairs))
        worth = [score / (1 + (end - 1) * correlation) for score in scores]
        rest = [math.exp(each - max(worth)) for each in worth]
        found.append([each / sum(rest) for each in rest])
    return found


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("correlation", [0.0, 0.1])
def test_every_prefix_is_answered_as_if_it_were_all(order: int, correlation: float) -> None:
    table = byte_likelihoods(documents(), order)
    text = torch.randint(97, 117, (4, 12))
    answer = NaiveBayes(table, correlation)(ask(text)).exp()
    for row in range(4):
        expected = torch.tensor(by_prefix(table, text[row].tolist(), correlation))
        torch.testing.assert_close(answer[row, :, 256:], expected, atol=1e-5, rtol=1e-4)
        assert answer[row, :, :256].sum(1).max() < 1e-5


@pytest.mark.parametrize(("classes", "correlation"), [(2, 0.0), (4, 0.05)])
def test_pairs_are_summed_over(classes: int, correlation: float) -> None:
    """All pairs of classes, half of the weight on the equal ones; at every position of the second text."""
    table = byte_likelihoods(documents(classes), 2)
    texts = torch.randint(97, 117, (3, 2, 8))
    separator = torch.full((3, 1), SEPARATOR)
    answer = NaiveBayesPairs(table, correlation)(ask(torch.cat([texts[:, 0], separator, texts[:, 1]], 1))).exp()
    assert answer.shape == (3, 17, 259)
    torch.testing.assert_close(answer[:, :9, 257:], torch.full((3, 9, 2), 0.5), atol=1e-5, rtol=0)
    for row in range(3):
        one = by_prefix(table, texts[row, 0].tolist(), correlation)[-1]
        for t, two in enumerate(by_prefix(table, texts[row, 1].tolist(), correlation)):
            weight = {True: 0.0, False: 0.0}
            for a in range(classes):
                for b in range(classes):
                    weight[a == b] += one[a] * two[b] / (classes if a == b else classes * (classes - 1))
            yes = weight[True] / (weight[True] + weight[False])
            assert answer[row, 9 + t, 258].item() == pytest.approx(yes, abs=1e-5)
            assert answer[row, 9 + t, 257].item() == pytest.approx(1 - yes, abs=1e-5)


def test_no_posterior_is_better_where_the_classes_are_what_it_takes_them_for() -> None:
    """Monte Carlo: texts drawn from the likelihoods themselves. Its cross-entropy is the mean entropy of its answers,
    within five errors, and neither more nor less trust in the evidence does better."""
    table = byte_likelihoods(documents(), 2)
    label = torch.randint(3, (4000,))
    ids = [torch.full((4000,), 256)]
    for _ in range(10):
        ids.append(torch.multinomial(table[label, ids[-1]].exp(), 1).squeeze(1))
    prompt = ask(torch.stack(ids[1:], 1))
    loss = {}
    for trust in (0.7, 1.0, 1.4):
        answer = NaiveBayes(table * trust)(prompt)[:, -1, 256:].double()
        loss[trust] = -answer.gather(1, label.unsqueeze(1)).squeeze(1)
        if trust == 1:
            gap = loss[trust] + (answer.exp() * answer).sum(1)
            assert gap.mean().abs() < 5 * gap.std() / 4000**0.5
            assert 0.1 < loss[trust].mean() < 1
    assert loss[1.0].mean() < min(loss[0.7].mean(), loss[1.4].mean())


def test_it_is_faster_than_a_loop_over_prefixes() -> None:
    table = byte_likelihoods(documents(), 2)
    text = torch.randint(97, 117, (32, 100))
    learner = NaiveBayes(table)
    learner(ask(text))
    begin = time.process_time()
    learner(ask(text))
    ours = time.process_time() - begin
    begin = time.process_time()
    for t in range(100):
        for row in range(0, 32, 8):  # a quarter of them
            learner(ask(text[row : row + 1, : t + 1]))
    assert 4 * (time.process_time() - begin) > 20 * ours


def test_other_prompts_and_tables_are_refused() -> None:
    table = byte_likelihoods(documents(), 1)
    with pytest.raises(InputError, match="has vocabulary 259, but the prompt holds token 300"):
        NaiveBayes(table)(ask(torch.tensor([[1, 300]])))
    with pytest.raises(InputError, match="naive_bayes_pairs needs a prompt of token ids"):
        NaiveBayesPairs(table)(ask(torch.rand(2, 3, 4)))
    with pytest.raises(InputError, match=r"likelihoods of shape \[1, 1, 256\]: expected \[classes, 1 or 257, 256\]"):
        NaiveBayes(table[:1])
