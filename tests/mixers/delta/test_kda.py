"""Kimi delta attention against transformers' layer, with its weights."""

from __future__ import annotations

import pytest
import torch

from contextlab.mixers import build_mixer


@pytest.mark.parametrize("length", [1, 3, 90])
def test_agrees_with_transformers(length: int) -> None:
    modeling = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    config = modeling.KimiLinearConfig(
        hidden_size=16,
        linear_num_heads=2,
        linear_head_dim=6,
        linear_conv_kernel_dim=3,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        rms_norm_eps=1e-5,
    )
    torch.manual_seed(0)
    theirs = modeling.KimiLinearDeltaAttention(config, layer_idx=0).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    ours = build_mixer("kda", width=16, heads=2, head_dim=6, short_conv=3)
    gate = theirs.forget_gate
    names = ("q_proj", "k_proj", "v_proj", "b_proj")
    rows = [getattr(theirs, name).weight for name in names] + [gate.f_a_proj.weight, theirs.g_a_proj.weight]
    ours.load_state_dict(
        {
            "in_proj.weight": torch.cat(rows),
            "conv.weight": theirs.conv1d.weight[:, 0],
            "decay_proj.weight": gate.f_b_proj.weight,
            "gate_proj.weight": theirs.g_b_proj.weight,
            "A_log": gate.A_log.flatten(),
            "dt_bias": gate.dt_bias,
            "norm.weight": theirs.o_norm.weight,
            "out_proj.weight": theirs.o_proj.weight,
        }
    )
    x = torch.randn(2, length, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], theirs(x), rtol=1e-4, atol=1e-5)
