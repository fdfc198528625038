"""Shifts of the query, of scales and of the noise: each draws what its name says, and learners answer it."""

from __future__ import annotations

import math

import pytest
import torch

from contextlab import build_task
from contextlab.prompt import Prompt
from contextlab.tasks import LinearRegression

SHIFTS = ("random quadrants", "opposite quadrants", "overlapping query")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def split(name: str, **options) -> LinearRegression:
    task = build_task("linear_regression", **{"dimensions": 5, "examples": 9, **options}).splits()[name]
    assert isinstance(task, LinearRegression)
    return task


def query(prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
    """The x that is asked [B, d], and where it stands [B]."""
    return prompt.xs[prompt.scored[:, prompt.at]], prompt.scored[:, prompt.at].long().argmax(1)


@pytest.mark.parametrize("layout", ["paired", "interleaved"])
@pytest.mark.parametrize("name", SHIFTS)
def test_one_query_a_prompt_anywhere_from_the_second_example_on(name: str, layout: str) -> None:
    task = split(name, layout=layout)
    prompt = task.sample(800, generator(1))
    assert (prompt.scored.sum(1) == 1).all()
    counts = torch.bincount(query(prompt)[1], minlength=9)
    assert counts[0] == 0
    assert (counts[1:] - 100).abs().max() < 5 * 100**0.5
    weights = torch.linalg.lstsq(prompt.xs.double(), prompt.ys.double()).solution  # of all, the query too: no noise
    torch.testing.assert_close(prompt.xs.double() @ weights, prompt.ys.double(), rtol=1e-3, atol=1e-3)


def test_quadrants() -> None:
    """Before the query the signs are those of one pattern; of the query they are opposite, or even chances."""
    for name in ("random quadrants", "opposite quadrants"):
        prompt = split(name, spectrum="skewed").sample(1000, generator(2))
        x, cut = query(prompt)
        pattern = prompt.xs[:, 0].sign()
        earlier = torch.arange(9).unsqueeze(0) < cut.unsqueeze(1)
        assert (prompt.xs.sign() == pattern.unsqueeze(1))[earlier].all()
        assert abs((pattern > 0).float().mean() - 0.5) < 4 * 0.5 / 5000**0.5
        same = (x.sign() == pattern).float()
        if name == "opposite quadrants":
            assert not same.any()
        else:
            assert abs(same.mean() - 0.5) < 4 * 0.5 / 5000**0.5
        plain = split("train", spectrum="skewed")._draw_xs(4000, generator(3), "cpu")
        assert x.norm(dim=1).mean().item() == pytest.approx(plain[:, 0].norm(dim=1).mean().item(), rel=0.05)


def test_an_overlapping_query_is_one_of_the_examples_before() -> None:
    task = split("overlapping query", noise=0.5)
    prompt = task.sample(2000, generator(4))
    x, cut = query(prompt)
    equal = (prompt.xs == x.unsqueeze(1)).all(2) & (torch.arange(9) < cut.unsqueeze(1))
    assert (equal.sum(1) == 1).all()
    place = equal.long().argmax(1)[cut == 8]
    assert (torch.bincount(place, minlength=8) / len(place) - 1 / 8).abs().max() < 4 * (1 / 8 / len(place)) ** 0.5
    shown = prompt.ys[torch.arange(2000), equal.long().argmax(1)] - prompt.ys[torch.arange(2000), cut]
    assert shown.square().mean().item() == pytest.approx(2 * 0.25, rel=0.2)  # noise of its own


def test_without_noise_an_overlapping_query_has_been_answered() -> None:
    task = split("overlapping query")
    prompt = task.sample(100, generator(5))
    for name in ("ridge", "ols"):
        errors = task.errors(task.learners()[name](prompt), prompt)["squared_error"]
        assert errors[prompt.scored].max() < 1e-4


@pytest.mark.parametrize(
    ("name", "factor"), [("inputs times 1/3", 1 / 3), ("inputs times 1/2", 0.5), ("inputs times 3", 3.0)]
)
def test_inputs_are_scaled(name: str, factor: float) -> None:
    shifted, plain = (split(each, input_scale=0.8).sample(50, generator(6)) for each in (name, "train"))
    torch.testing.assert_close(shifted.xs, factor * plain.xs)
    torch.testing.assert_close(shifted.ys, factor * plain.ys, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("words", ["1/3", "1/2", "2", "3"])
@pytest.mark.parametrize("options", [{}, {"sparsity": 2}, {"pool": 3}, {"noise": 0.5}])
def test_outputs_are_scaled_but_for_the_noise(words: str, options: dict) -> None:
    factor = {"1/3": 1 / 3, "1/2": 0.5, "2": 2.0, "3": 3.0}[words]
    names = f"outputs times {words}", "train"
    shifted, plain = (split(each, weight_scale=1.5, **options).sample(50, generator(7)) for each in names)
    assert torch.equal(shifted.xs, plain.xs)
    clean = [(split(each, weight_scale=1.5, **{**options, "noise": 0.0}).sample(50, generator(7))).ys for each in names]
    torch.testing.assert_close(clean[0], factor * clean[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shifted.ys - clean[0], plain.ys - clean[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"sparsity": 2, "input_scale": 2.0}, {"pool": 3}, {"noise": 0.5}])
def test_noise_of_one_leaves_the_size_of_y(options: dict) -> None:
    """Before y is scaled back, its noise has a standard deviation of 1."""
    task, train = split("renormalised noise", **options), split("train", **options)
    prompt = task.sample(20_000, generator(8))
    square = prompt.ys.square().mean((1, 2)).double()
    assert abs(square.mean() - train.chance()["squared_error"]) < 5 * square.std() / len(square) ** 0.5
    clean = task.replace(noise=0.0).sample(20_000, generator(8))  # noise is drawn last
    assert torch.equal(prompt.xs, clean.xs)
    factor = task.weight_scale / train.weight_scale
    noise = (prompt.ys - clean.ys) / factor
    assert noise.square().mean().item() == pytest.approx(1.0, abs=4 * math.sqrt(2 / noise.numel()))
    assert factor < 1


@pytest.mark.parametrize("name", [*SHIFTS, "renormalised noise", "outputs times 1/3", "inputs times 3"])
@pytest.mark.parametrize("sparsity", [None, 2])
def test_ridge_and_the_sparse_posterior_stay_the_best(name: str, sparsity: int | None) -> None:
    """They do not depend on how x is drawn, and know the scales of the split: none beats them there."""
    task = split(name, sparsity=sparsity, noise=0.5)
    prompt = task.sample(600, generator(9))
    errors = {
        learner: (task.errors(answer(prompt), prompt)["squared_error"] * prompt.scored).sum(1) / prompt.scored.sum(1)
        for learner, answer in task.learners().items()
    }
    best = errors.pop("ridge" if sparsity is None else "sparse_posterior")
    assert best.mean() < task.chance()["squared_error"]
    for rival, values in errors.items():
        assert (values - best).mean() > -3 * (values - best).std() / len(best) ** 0.5, rival


def test_sparse_weights_stay_within_the_active_dimensions() -> None:
    task = build_task("linear_regression", dimensions=6, sparsity=3, active_dimensions=4, examples=12)
    weights = task._draw_weights(500, generator(10), "cpu")
    assert ((weights != 0).sum(1) == 3).all()
    assert not weights[:, 4:].any()
    assert (weights != 0).any(0)[:4].all()
    assert ((task.replace(active_dimensions=2)._draw_weights(9, generator(), "cpu") != 0).sum(1) == 2).all()
    prompt = task.sample(200, generator(11))
    errors = {n: task.errors(a(prompt), prompt)["squared_error"][:, 2].mean() for n, a in task.learners().items()}
    assert min(errors, key=lambda name: errors[name]) == "sparse_posterior"
