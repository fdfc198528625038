"""Mixers side by side: the outputs are joined as the docstring says, and impossible members are refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.mixers import build_mixer

MEMBERS = ["attention", {"mixer": "mamba2", "options": {"short_conv": 0}}]


def both(combine):
    torch.manual_seed(0)
    mixer = build_mixer("parallel", width=16, mixers=MEMBERS, combine=combine).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    return mixer(x)[0], [member(x)[0] for member in mixer.members]


def unit(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize(
    ("combine", "join"),
    [
        ("mean", lambda a, b: (unit(a) + unit(b)) / 2),
        ("sum", lambda a, b: a + b),
        ("gate", lambda a, b: unit(a) * F.sigmoid(unit(b))),
    ],
)
def test_outputs_are_joined_as_told(combine, join):
    y, outputs = both(combine)
    torch.testing.assert_close(y, join(*outputs), rtol=1e-5, atol=1e-6)


def test_members_get_the_layers_heads_and_position_unless_they_say_otherwise():
    mixer = build_mixer(
        "parallel",
        width=24,
        heads=3,
        position="alibi",
        mixers=["attention", {"mixer": "attention", "options": {"heads": 2, "position": "none"}}],
    )
    assert [(m.heads, m.position) for m in mixer.members] == [(3, "alibi"), (2, "none")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixers": ["attention"]}, "at least 2 items"),
        ({}, "mixers: mixer 'parallel' requires it"),
        ({"mixers": ["attention", "mamba9"]}, "unknown mixer 'mamba9'"),
        ({"mixers": ["attention", {"mixer": "mamba2", "options": {"heds": 2}}]}, "did you mean 'heads'?"),
        ({"mixers": ["attention", "mamba2"], "combine": "man"}, "did you mean 'mean'?"),
    ],
)
def test_impossible_members_are_refused(options, message):
    with pytest.raises(InputError) as caught:
        build_mixer("parallel", width=16, **options)
    assert message in str(caught.value)
