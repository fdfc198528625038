"""Mamba-2 against transformers' mixer, and its refusals."""

from __future__ import annotations

import inspect

import pytest
import torch

from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.mixers.state_space.mamba2 import Mamba2


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [3, 150])
def test_agrees_with_transformers(groups: int, length: int) -> None:
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    if groups > 1 and "group_size" not in inspect.signature(modeling.MambaRMSNormGated).parameters:
        pytest.skip("before 5.23 transformers norms all groups together, unlike Mamba-2")
    config = modeling.Mamba2Config(
        hidden_size=16,
        num_heads=4,
        head_dim=8,
        state_size=6,
        n_groups=groups,
        chunk_size=32,
        num_hidden_layers=1,
    )
    theirs = modeling.Mamba2Mixer(config, layer_idx=0).eval()
    ours = Mamba2(16, heads=4, state_size=6, groups=groups)
    copied = {
        "in_proj.weight": theirs.in_proj.weight,
        "conv.weight": theirs.conv1d.weight[:, 0],
        "conv.bias": theirs.conv1d.bias,
        "A_log": theirs.A_log,
        "D": theirs.D,
        "dt_bias": theirs.dt_bias,
        "norm_weight": theirs.norm.weight,
        "out_proj.weight": theirs.out_proj.weight,
    }
    ours.load_state_dict(copied)
    x = torch.randn(2, length, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], theirs(x), rtol=1e-4, atol=1e-4)


def test_sizes() -> None:
    assert (Mamba2(16).heads, Mamba2(16).value) == (4, 8)
    assert (Mamba2(16, head_dim=4).heads, Mamba2(16, head_dim=4).value) == (8, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "width 32 is not divisible by 5 heads"),
        ({"heads": 4, "head_dim": 4}, "head_dim 8 fits"),
        ({"heads": 4, "groups": 3}, "groups 3 does not divide heads 4"),
        ({"state_size": 0}, "state_size"),
        ({"short_conv": -1}, "short_conv"),
    ],
)
def test_bad_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_mixer("mamba2", width=16, **options)
