"""The tasks of the suites garg, mambaformer and multitask draw as their authors' code does."""

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


MAMBAFORMER: dict[str, Figure] = {
    "share of outliers, many_outliers": (0.90044, 0.01272, 512),
    "y^2, many_outliers": (19.823, 7.067, 512),
    "y^2, many_outliers, 5 dimensions": (4.9317, 3.431, 512),
    "|x| of an outlier, many_outliers, 5 dimensions": (4.4721, 0.0, 512),
    "share of outliers, orthogonal_outliers": (0.49814, 0.05451, 512),
    "y^2, orthogonal_outliers": (19.891, 7.808, 512),
    "y^2, orthogonal_outliers, 5 dimensions": (4.8579, 3.184, 512),
    "share of +1, sparse_parity": (0.50117, 0.04164, 2048),
    "|key|, vector_recall": (4.4721, 0.0, 528384),
    "largest cosine of another key, vector_recall": (0.49863, 0.08011, 4096),
    "place of the key, vector_recall": (31.421, 18.49, 4043),
}
"""Of src/tasks.py, src/samplers.py and src/filtering_utils.py of github.com/krafton-ai/mambaformer-icl at commit
7e202841c7c54e87c62fb2d34f263c56f23cc0c7; y^2 as above, of the examples that are no outliers. The place is that of the
pairs, where the query is a key: there it is not in one of 65 prompts (0.013 of 4096)."""

CHAIN: dict[str, Figure] = {
    "y^2": (9.9878, 9.827, 2048),
    "squared features": (10.068, 2.648, 2048),
    "share of features that are zero": (0.50036, 0.02432, 2048),
}
"""Of src/tasks.py and src/samplers.py of github.com/yingcong-li/Dissecting-CoT at commit
d6a168a5d7763d251e07a0336b19d96b7964859b, with src/conf/cot_2nn.yaml; the features are summed over units."""

MULTITASK: dict[str, Figure] = {
    "y^2, linear": (1.0051, 0.1419, 2048),
    "y^2, quadratic": (1.0048, 0.337, 2048),
    "y^2, cubic": (1.0042, 0.7999, 2048),
    "mean of y, linear": (-0.0018712, 0.09859, 2048),
    "mean of y, quadratic": (-0.0011254, 0.1014, 2048),
    "mean of y, cubic": (-0.00053275, 0.1026, 2048),
    "largest |y|, linear": (2.7474, 0.401, 2048),
    "largest |y|, quadratic": (4.561, 1.515, 2048),
    "largest |y|, cubic": (6.0574, 3.145, 2048),
    "y^2, quadratic, skewed inputs": (1.4458, 2.504, 2048),
}
"""Of src/tasks.py and src/samplers.py of github.com/harmonbhasin/curriculum_learning_icl at commit
1c896e348c54f4437fe29cc48bd50ddbba20adfb, with `weight_type` "normalized" and 100 examples."""


def draw(task: str, split: str = "train", suite: str = "garg", count: int = PROMPTS, **options: Any) -> Prompt:
    entry = load_recipe(suite).build_task(task).replace(**options)
    return entry.splits()[split].sample(count, torch.Generator().manual_seed(len(task + split)))


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


def test_mambaformers_regressions_are_those_of_garg_et_al() -> None:
    """Their classes are copies of those of the other code, so that its figures hold."""
    own, garg = load_recipe("mambaformer"), load_recipe("garg")
    for name in ("linear", "sparse_linear", "relu_network", "decision_tree"):
        assert own.build_task(name) == garg.build_task(name)
        changed = own.train_spec("transformer", name).curriculum
        assert changed == garg.train_spec("transformer", name).curriculum


@pytest.mark.parametrize("name", ["many_outliers", "orthogonal_outliers"])
def test_outliers_are_as_many_as_in_mambaformers_code(name: str) -> None:
    """All but the last example, which we keep whole."""
    prompt = draw(name, suite="mambaformer", count=500)
    scored = prompt.scored[:, prompt.at]
    hold("outliers", (~scored[:, :-1]).float().mean(1), MAMBAFORMER[f"share of outliers, {name}"])
    for each, key in (
        (prompt, f"y^2, {name}"),
        (draw(name, suite="mambaformer", count=500, active_dimensions=5), f"y^2, {name}, 5 dimensions"),
    ):
        scored = each.scored[:, each.at]
        hold(key, (each.ys[..., 0].square() * scored).sum(1) / scored.sum(1), MAMBAFORMER[key], 0.2)
    outliers = prompt.xs[~prompt.scored[:, prompt.at]]
    if name == "many_outliers":
        hold("|x|", outliers.norm(dim=1), MAMBAFORMER["|x| of an outlier, many_outliers, 5 dimensions"])


def test_parity_and_recall_are_those_of_mambaformers_code() -> None:
    parity = draw("sparse_parity", suite="mambaformer")
    hold("parity", (parity.ys > 0).float().mean((1, 2)), MAMBAFORMER["share of +1, sparse_parity"])
    both = [x[w != 0] for x, w in zip(parity.xs.mT, parity.hidden["weights"], strict=True)]
    product = torch.stack([x.prod(0) for x in both])  # the label there, ours with the other sign
    assert torch.equal(product, -parity.ys[..., 0])
    recall = draw("vector_recall", suite="mambaformer", count=2000)
    keys, query = recall.inputs[:, :-1:2], recall.inputs[:, -1:]
    hold("|key|", keys.norm(dim=2), MAMBAFORMER["|key|, vector_recall"])
    cosines = torch.cosine_similarity(keys, query, dim=2).topk(2)
    hold("others", cosines.values[:, 1], MAMBAFORMER["largest cosine of another key, vector_recall"])
    assert (cosines.values[:, 0] > 0.999).all()
    hold("place", cosines.indices[:, 0], MAMBAFORMER["place of the key, vector_recall"])


def test_chains_of_thought_are_those_of_their_authors_code() -> None:
    prompt = draw("chain_of_thought", suite="mambaformer")
    tokens = prompt.inputs.unflatten(1, (101, 3))  # x, the features, y
    features = tokens[:, :, 1, 10:-1]
    hold("y^2", tokens[:, :, 2, -1].square().mean(1), CHAIN["y^2"], 0.3)
    hold("features", features.square().sum(2).mean(1), CHAIN["squared features"])
    hold("zeros", (features == 0).float().mean((1, 2)), CHAIN["share of features that are zero"])
    sizes = load_recipe("mambaformer").train_spec("mamba", "chain_of_thought").curriculum["examples"]
    assert [sizes.value(step) for step in (0, 2000, 29_999, 30_000, 500_000)] == [26, 31, 96, 101, 101]


@pytest.mark.parametrize("name", ["linear", "quadratic", "cubic"])
def test_hermite_polynomials_are_those_of_the_multitask_code(name: str) -> None:
    ys = draw(name, suite="multitask").ys[..., 0]
    hold("y^2", ys.square().mean(1), MULTITASK[f"y^2, {name}"], 0.25)
    hold("mean", ys.mean(1), MULTITASK[f"mean of y, {name}"])
    hold("largest", ys.abs().amax(1), MULTITASK[f"largest |y|, {name}"])
    if name == "quadratic":
        ys = draw(name, "skewed inputs", "multitask").ys[..., 0]
        hold("skewed", ys.square().mean(1), MULTITASK["y^2, quadratic, skewed inputs"], 0.5)
