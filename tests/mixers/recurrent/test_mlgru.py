"""MLGRU token by token, and its ternary matrices."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from contextlab.mixers import build_mixer
from contextlab.mixers.layers import TernaryLinear


def test_agrees_with_the_recurrence() -> None:
    torch.manual_seed(0)
    mixer = build_mixer("mlgru", width=6, expand=2).double()
    x, h, outputs = torch.randn(1, 20, 6, dtype=torch.float64), 0.0, []
    for token in x[0]:
        c, f, g = mixer.in_proj(token).chunk(3)
        h = torch.sigmoid(f) * h + (1 - torch.sigmoid(f)) * F.silu(c)
        outputs.append(mixer.out_proj(h * torch.sigmoid(g)))
    torch.testing.assert_close(mixer(x)[0][0], torch.stack(outputs), rtol=0, atol=1e-10)


def test_ternary_matrices_have_three_values_and_eight_bit_inputs() -> None:
    torch.manual_seed(0)
    layer = TernaryLinear(7, 5)
    unit = layer(torch.eye(7)) / layer.weight.abs().mean()  # an input of one size is rounded to itself
    assert {round(value, 3) for value in (unit / unit.abs().max()).flatten().tolist()} <= {-1.0, 0.0, 1.0}
    x = torch.randn(50, 7)
    normed = F.rms_norm(x, (7,), eps=1e-6)
    steps = normed.abs().amax(-1, keepdim=True) / 127
    scale = layer.weight.abs().mean()
    weight = (layer.weight / scale).round().clamp(-1, 1) * scale
    torch.testing.assert_close(layer(x), (normed / steps).round() * steps @ weight.T)


def test_ternary_gradients_pass_straight_through_and_it_learns() -> None:
    torch.manual_seed(0)
    mixer = build_mixer("mlgru", width=8, ternary=True)
    x = torch.randn(16, 12, 8)
    target = x.roll(1, 1)
    optimizer = torch.optim.Adam(mixer.parameters(), 0.01)

    def loss() -> torch.Tensor:
        return (mixer(x)[0] - target)[:, 1:].square().mean()

    before = loss().item()
    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.8 * before


def test_what_merges_or_quantizes_linear_layers_leaves_ternary_ones_alone() -> None:
    mixer = build_mixer("mlgru", width=8, ternary=True)
    assert not any(isinstance(module, nn.Linear) for module in mixer.modules())
