"""MLPs: each is the formula of its docstring, written out anew here."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import contextlab.models  # noqa: F401  (registers the MLPs)
from contextlab import registry
from contextlab.errors import InputError
from contextlab.models.mlp import Gelu
from contextlab.testing import Component, LawBroken, laws, parametrize_with_laws

WIDTH = 12


def build(kind, **options):
    torch.manual_seed(0)
    return registry.lookup("mlp", kind).build(width=WIDTH, **options).double()


@parametrize_with_laws("mlp")
def test_laws(law):
    law()


class SeesOthers(Gelu):
    """Adds the mean over tokens."""

    def forward(self, x):
        return super().forward(x) + x.mean(1, keepdim=True)


class WrongGradient(Gelu):
    """Says that its gradient is zero."""

    def forward(self, x):
        return super().forward(x).detach() + 0 * x


class Frugal(Gelu):
    """Counts no operations."""

    def flops(self, length):
        return 0


class ReadsItsWeight(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = torch.nn.Linear(width, width)

    def forward(self, x):
        return torch.nn.functional.linear(x, 1 * self.up.weight)


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (SeesOthers, "tokens apart"),
        (WrongGradient, "gradients"),
        (Frugal, "flops"),
        (ReadsItsWeight, "adapters"),
        (ReadsItsWeight, "int8"),
        (ReadsItsWeight, "linear forms"),
    ],
)
def test_a_broken_mlp_is_found_out(broken, name):
    law = next(law for law in laws("mlp") if law.name == name)
    with pytest.raises(LawBroken):
        law(Component("mlp", "broken", broken, {"width": WIDTH}))


def test_block_shuffle_and_block_dense_are_products_of_block_matrices():
    for structure in ("block_shuffle", "block_dense", "low_rank"):
        mlp = build("gelu", structure=structure, rank=4, blocks=2)
        x = torch.randn(3, WIDTH, dtype=torch.float64)
        blocks = 1 if structure == "low_rank" else 2
        first = torch.block_diag(*mlp.up.first)
        hidden = x @ first.T
        if structure == "block_shuffle":
            order = torch.arange(hidden.shape[-1]).view(blocks, -1).T.flatten()
            hidden = hidden[:, order]
        expected = hidden @ torch.block_diag(*mlp.up.weight).T
        torch.testing.assert_close(mlp.up(x), expected, rtol=0, atol=1e-12)
        assert mlp.up.first.shape[0] == blocks


def naive_moe(mlp, x, gate, activation):
    out = torch.zeros_like(x)
    for n, token in enumerate(x):
        scores = gate(mlp.router(token))
        for e in scores.argsort(descending=True)[: mlp.top_k].tolist():
            out[n] += scores[e] * (mlp.out_proj.weight[e] @ activation(mlp.up.weight[e] @ token))
        for e in range(mlp.experts, mlp.experts + mlp.shared):
            out[n] += mlp.out_proj.weight[e] @ activation(mlp.up.weight[e] @ token)
    return out


def test_experts_are_weighted_by_the_routers_scores():
    x = torch.randn(20, WIDTH, dtype=torch.float64)
    switch = build("moe", experts=4, activation="gelu").eval()
    expected = naive_moe(switch, x, lambda s: s.softmax(-1), F.gelu)
    torch.testing.assert_close(switch(x[None])[0], expected, rtol=0, atol=1e-12)
    sigma = build("moe", experts=5, top_k=2, shared=1, router="sigmoid", activation="relu").eval()
    torch.testing.assert_close(sigma(x[None])[0], naive_moe(sigma, x, torch.sigmoid, F.relu), rtol=0, atol=1e-12)


@pytest.mark.parametrize("balance", ["switch", "entropy"])
def test_the_balancing_term_joins_the_gradient_in_training_only(balance):
    mlp = build("moe", experts=4, balance=balance, balance_weight=0.5)
    x = torch.randn(1, 30, WIDTH, dtype=torch.float64)
    weight = mlp.router.weight

    def gradient():
        return torch.autograd.grad(mlp(x).square().mean(), weight)[0]

    trained = gradient()
    mlp.eval()
    plain = gradient()
    scores = mlp.router(x[0]).softmax(-1)
    mean = scores.mean(0)
    share = F.one_hot(scores.argmax(-1), 4).double().mean(0)
    term = 4 * (share * mean).sum() if balance == "switch" else (mean * mean.log()).sum()
    expected = plain + torch.autograd.grad(0.5 * term, weight)[0]
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(trained, plain)


def test_balancing_evens_out_the_experts():
    """A router that starts by sending all to one expert ends by using all of them, when only the term trains it."""
    mlp = build("moe", experts=4, balance_weight=1.0)
    x = torch.randn(1, 400, WIDTH, dtype=torch.float64) + 1
    with torch.no_grad():
        mlp.router.weight[0] += 1.0
    optimizer = torch.optim.Adam([mlp.router.weight], 0.05)

    def largest_share():
        return mlp.router(x[0]).argmax(-1).bincount(minlength=4).max().item() / 400

    before = largest_share()
    for _ in range(100):
        optimizer.zero_grad()
        (mlp(x) * 0).sum().backward()
        optimizer.step()
    assert before > 0.9
    assert largest_share() < 0.45


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("moe", {"experts": 2, "top_k": 3}, "top_k 3 is more than the 2 experts; the nearest that fits is 2"),
        (
            "gelu",
            {"structure": "block_dense", "blocks": 5},
            "does not divide the inputs 12; the nearest that does is 4",
        ),
        ("gelu", {"structure": "low_rang"}, "did you mean 'low_rank'?"),
        ("gelu", {"experts": 3}, "unknown option 'experts' of mlp 'gelu'"),
    ],
)
def test_impossible_options_are_refused(kind, options, message):
    with pytest.raises(InputError) as caught:
        build(kind, **options)
    assert message in str(caught.value)
