"""The tasks of the suite garg draw as the authors' code does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.experiments import load_recipe
from contextlab.prompt import Prompt
from tests.tasks.published import Figure, hold

PROMPTS = 1000

GARG: dict[str, Figure] = {
    "linear": (19.909, 7.975, 2048),
    "sparse_linear": (2.9011, 2.44, 2048),
    "sparse_linear, 5 dimensions": (3.0781, 2.676, 2048),
    "quadratic": (19.782, 11.97, 2048),
    "relu_network": (20.243, 10.78, 2048),
    "relu_network, 5 dimensions": (4.9898, 3.149, 2048),
    "decision_tree": (1.0133, 0.4195, 2048),
    "renormalised noise": (20.001, 7.372, 2048),
    "outputs times 1/3": (2.227, 0.8634, 2048),
    "inputs times 1/3": (2.2256, 0.8651, 2048),
}
"""The mean of y^2 over a prompt, by task, number of dimensions that are not zero, and split.

With the classes of src/tasks.py and src/samplers.py of github.com/dtsip/in-context-learning at commit
338337192195827c58356f9b627e5f999ea703d2, on the sizes of src/conf and the shifts of src/eval.py.
"""

GARG_MORE: dict[str, Figure] = {
    "mean of y, relu_network": (0.11161, 2.584, 2048),
    "variance of y, relu_network": (13.691, 4.393, 2048),
    "values, decision_tree": (13.686, 1.751, 2048),
    "values, decision_tree, 5 dimensions": (2.2344, 1.156, 2048),
    "variance of the noise, renormalised noise": (0.94472, 0.2901, 2048),
    "|x|^2, skewed covariance": (20.011, 2.867, 2048),
    "share of the largest eigenvalue, skewed covariance": (0.6318, 0.05514, 2048),
    "|x|^2, low-rank inputs": (20.33, 9.145, 2048),
    "cosine of two examples, random quadrants": (0.65342, 0.09426, 2048),
    "cosine of an example and the query, random quadrants": (0.00082706, 0.2221, 2048),
    "cosine of an example and the query, opposite quadrants": (-0.65337, 0.09455, 2048),
}
"""Others, of the same code: the noise by least squares on the prompt, |x|^2 of a prompt's mean or of its first x."""


def draw(task: str, split: str = "train", **options: Any) -> Prompt:
    entry = load_recipe("garg").build_task(task).replace(**options)
    return entry.splits()[split].sample(PROMPTS, torch.Generator().manual_seed(len(task + split)))


@pytest.mark.parametrize("name", GARG)
def test_y_is_as_large_as_in_the_code_of_garg_et_al(name: str) -> None:
    if name in ("renormalised noise", "outputs times 1/3", "inputs times 1/3"):
        prompt = draw("linear", name)
    else:
        task, *few = name.split(", ")
        prompt = draw(task, active_dimensions=5) if few else draw(task)
    hold(name, prompt.ys.square().mean((1, 2)), GARG[name], 0.2)


def cosine(prompt: Prompt, other: Tensor) -> Tensor:
    return torch.cosine_similarity(prompt.xs[:, 0], other)


def values(prompt: Prompt) -> Tensor:
    return torch.tensor([len(set(row)) for row in prompt.ys[..., 0].tolist()])


def residual(prompt: Prompt) -> Tensor:
    fitted = torch.linalg.lstsq(prompt.xs, prompt.ys).solution
    return (prompt.xs @ fitted - prompt.ys).square().sum((1, 2)) / 21


def test_the_rest_is_as_in_the_code_of_garg_et_al() -> None:
    relu, trees, skewed = draw("relu_network"), draw("decision_tree"), draw("linear", "skewed covariance")
    random, opposite = draw("linear", "random quadrants"), draw("linear", "opposite quadrants")
    later = random.scored[:, random.at].long().argmax(1) > 1  # the second example is not the query
    found = {
        "mean of y, relu_network": relu.ys.mean((1, 2)),
        "variance of y, relu_network": relu.ys[..., 0].var(1),
        "values, decision_tree": values(trees),
        "values, decision_tree, 5 dimensions": values(draw("decision_tree", active_dimensions=5)),
        "variance of the noise, renormalised noise": residual(draw("linear", "renormalised noise")),
        "|x|^2, skewed covariance": skewed.xs.square().sum(2).mean(1),
        "share of the largest eigenvalue, skewed covariance": torch.linalg.eigvalsh(skewed.xs.mT @ skewed.xs)[:, -1]
        / skewed.xs.square().sum((1, 2)),
        "|x|^2, low-rank inputs": draw("linear", "low-rank inputs").xs[:, 0].square().sum(1),
        "cosine of two examples, random quadrants": cosine(random, random.xs[:, 1])[later],
        "cosine of an example and the query, random quadrants": cosine(random, random.xs[random.scored[:, random.at]]),
        "cosine of an example and the query, opposite quadrants": cosine(
            opposite, opposite.xs[opposite.scored[:, opposite.at]]
        ),
    }
    assert list(found) == list(GARG_MORE)
    for name, own in found.items():
        hold(name, own, GARG_MORE[name])
