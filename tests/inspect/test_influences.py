"""Gradient times input: closed forms, what each token adds to what is linear, and slopes by differences."""

from __future__ import annotations

import pytest
import torch

from contextlab import ModelSpec, build_model, capture
from contextlab.errors import InputError
from contextlab.inspect import influence, mixing
from contextlab.models.within import Within


def vectors(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_step_of_gradient_descent_rests_on_its_examples_as_written():
    d, n, rate = 4, 6, 0.5  # whose root has no rounding
    model = build_model("gd_construction", dimensions=d, learning_rate=rate).double()
    x = vectors(2, n, 2 * d + 1)
    x[:, 0, d:] = 0  # no example came before the first query
    found = influence(model, x, said=lambda y: y[:, 0])
    query, example, y = x[..., :d], x[..., d : 2 * d], x[..., 2 * d]
    count = torch.arange(n, dtype=torch.float64).clamp_min(1)
    terms = (rate * torch.einsum("btd,bjd->btj", query, example) * y[:, None] / count[:, None]).tril()
    at = torch.arange(n)
    wanted = 2 * terms  # of degree 2 in an example before; what asks stands in all of them once, and in its own twice
    wanted[:, at, at] = 3 * terms[:, at, at] + (terms.sum(-1) - terms[:, at, at])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.sum(-1), 3 * model(x)[..., 0], rtol=1e-12, atol=1e-12)  # Euler


def test_of_a_linear_model_it_is_what_each_token_adds():
    """A state-space layer whose recurrence does not depend on the tokens, without norms and MLPs."""
    spec = ModelSpec(
        width=6, depth=2, heads=2, layers=[{"mixer": "token_shift"}], mlp="none", norm="none", input_size=3,
        output_size=2, read_out_bias=False,
    )  # fmt: skip
    model, x = build_model(spec).double(), vectors(2, 7, 3)
    with capture(model, "embedded") as taken:
        model(x)
    embedded = taken["embedded"]

    def answered(only):
        return model(x, within=Within(embedded=only))[..., 1]

    alone = torch.stack([answered(embedded * (torch.arange(7) == j)[:, None]) for j in range(7)], -1)
    torch.testing.assert_close(alone.sum(-1), answered(embedded), rtol=1e-10, atol=1e-10)  # it is linear
    torch.testing.assert_close(influence(model, x, said=lambda y: y[:, 1]), alone, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_where_heads_only_weigh_values_a_layer_is_its_matrix():
    """Attention whose queries are nil looks at all alike: J is that matrix times what each value adds."""
    spec = ModelSpec(width=6, depth=1, heads=1, layers=["attention"], input_size=3, output_size=1)
    model, x = build_model(spec).double(), vectors(2, 5, 3)
    mixer = model.blocks[0].mixer
    mixer.qkv_proj.weight[:12] = 0
    with capture(model, "blocks.0.mixer.input") as taken:
        model(x)
    adds = (
        taken["blocks.0.mixer.input"] @ (mixer.out_proj.weight @ mixer.qkv_proj.weight[12:]).T @ torch.ones(6).double()
    )
    wanted = mixing(model, x)["blocks.0.mixer"][:, 0] * adds[:, None]
    found = influence(model, x, layer=0, said=lambda y: y.sum(-1))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["attention", "gated_delta_net", "lstm", "mamba2", "rwkv7"])
@pytest.mark.parametrize("layer", [None, 0])
def test_slopes_are_those_of_differences(name, layer):
    spec = ModelSpec(width=8, depth=2, heads=2, layers=[name], read_in="token", input_size=5, output_size=5)
    model = build_model(spec).double().eval()
    tokens = torch.randint(0, 5, (2, 6), generator=torch.Generator().manual_seed(1))
    found = influence(model, tokens, layer=layer, places=[2, 5], said=lambda y: y[:, 1])
    site = "embedded" if layer is None else "blocks.0.mixer.input"
    with capture(model, site) as taken, torch.no_grad():
        model(tokens)

    def said(x):
        if layer is not None:
            return model.blocks[0].mixer(x, None, None, False)[0][:, [2, 5], 1]
        return model(tokens, within=Within(embedded=x))[:, [2, 5], 1]

    with torch.no_grad():
        for j in range(6):
            step = 1e-5 * taken[site] * (torch.arange(6) == j)[:, None]
            slope = (said(taken[site] + step) - said(taken[site] - step)) / 2e-5
            torch.testing.assert_close(found[..., j], slope, rtol=1e-5, atol=1e-8)


def test_bad_questions():
    model = build_model("transformer", width=8, depth=1, heads=2, read_in="token", input_size=5, output_size=5)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(InputError, match="places: expected one or more from 0 to 3, got"):
        influence(model, tokens, places=[4])
    with pytest.raises(InputError, match="layer 3 has no mixer that reads the whole stream; those that do: 0"):
        influence(model, tokens, layer=3)
    with torch.inference_mode(), pytest.raises(InputError, match="no gradients"):
        influence(model, tokens)
    with pytest.raises(InputError, match="expected a model of ours"):
        influence(torch.nn.Linear(2, 2), tokens)
