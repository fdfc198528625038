"""Elementwise recurrences against transformers' layers and the papers' recurrences."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.mixers import Hgrn, Mamba, MinGru, MinLstm, RgLru, build_mixer


def draw(length: int, width: int = 16) -> torch.Tensor:
    return torch.randn(2, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("length", [3, 100])
def test_mamba_agrees_with_transformers(length: int) -> None:
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = modeling.MambaConfig(hidden_size=16, state_size=5, time_step_rank=2, num_hidden_layers=1)
    theirs = modeling.MambaMixer(config, layer_idx=0).double().eval()
    ours = Mamba(16, state_size=5, dt_rank=2).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    own_names = {"conv.weight": theirs.conv1d.weight[:, 0], "conv.bias": theirs.conv1d.bias}
    ours.load_state_dict({n: p for n, p in theirs.state_dict().items() if not n.startswith("conv1d")} | own_names)
    x = draw(length)
    with torch.no_grad():
        # their scan runs in float32
        torch.testing.assert_close(ours(x)[0], theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [4, 70])
def test_rg_lru_agrees_with_transformers(length: int) -> None:
    modeling = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    config = modeling.RecurrentGemmaConfig(hidden_size=16, lru_width=16, num_attention_heads=4, num_hidden_layers=1)
    theirs = modeling.RecurrentGemmaRecurrentBlock(config, 0).double().eval()
    ours = RgLru(16, heads=4).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
        for layer in (theirs.linear_x, theirs.linear_y, theirs.linear_out):
            layer.bias.zero_()
        unit = theirs.rg_lru
        ours.in_proj.weight.copy_(torch.cat((theirs.linear_x.weight, theirs.linear_y.weight)))
        ours.conv.weight.copy_(theirs.conv_1d.weight[:, 0])
        ours.conv.bias.copy_(theirs.conv_1d.bias)
        ours.gate_weight.copy_(torch.stack((unit.input_gate_weight, unit.recurrent_gate_weight), 2))
        ours.gate_bias.copy_(torch.stack((unit.input_gate_bias.flatten(), unit.recurrent_gate_bias.flatten())))
        ours.Lambda.copy_(unit.recurrent_param)
        ours.out_proj.weight.copy_(theirs.linear_out.weight)
        x = draw(length)
        # Position 0 is where theirs starts anew without the factor sqrt(1 - a^2), which the paper does not have.
        places = torch.arange(1, length + 1)[None].expand(2, -1)
        expected = theirs(x, places, torch.ones(2, length), use_cache=False)
    torch.testing.assert_close(
        ours(x)[0], expected[0] if isinstance(expected, tuple) else expected, rtol=1e-4, atol=1e-4
    )


def test_min_gru_and_min_lstm_are_the_papers_recurrences() -> None:
    x = draw(20)
    for mixer in (MinGru(16).double(), MinLstm(16).double()):
        parts = mixer.in_proj(x).chunk(mixer.in_proj.out_features // 16, -1)
        candidate = torch.where(parts[0] >= 0, parts[0] + 0.5, parts[0].sigmoid())
        h, hs = torch.zeros(2, 16, dtype=torch.float64), []
        for t in range(20):
            if isinstance(mixer, MinGru):
                z = parts[1][:, t].sigmoid()
                h = (1 - z) * h + z * candidate[:, t]
            else:
                f, i = parts[1][:, t].sigmoid(), parts[2][:, t].sigmoid()
                h = f / (f + i) * h + i / (f + i) * candidate[:, t]
            hs.append(h)
        torch.testing.assert_close(mixer(x)[0], mixer.out_proj(torch.stack(hs, 1)), rtol=1e-9, atol=1e-10)


def test_hgrn_is_the_papers_recurrence() -> None:
    x, mixer = draw(20), Hgrn(16, lower_bound=0.3).double()
    candidate, forget, gate = mixer.in_proj(x).chunk(3, -1)
    f = 0.3 + 0.7 * forget.sigmoid()
    h, hs = torch.zeros(2, 16, dtype=torch.float64), []
    for t in range(20):
        h = f[:, t] * h + (1 - f[:, t]) * F.silu(candidate[:, t])
        hs.append(h)
    y = mixer.out_proj(F.rms_norm(torch.stack(hs, 1), (16,), eps=1e-6) * F.silu(gate))
    torch.testing.assert_close(mixer(x)[0], y, rtol=1e-9, atol=1e-10)


def test_rg_lru_starts_with_slow_decays() -> None:
    decay = (-8 * F.softplus(RgLru(64).Lambda)).exp()
    assert decay.min() > 0.89
    assert decay.max() < 0.9995


def test_bad_options() -> None:
    with pytest.raises(InputError, match="not divisible by 3 heads"):
        build_mixer("rg_lru", width=16, heads=3)
    with pytest.raises(InputError, match="lower_bound"):
        build_mixer("hgrn", width=16, lower_bound=1.0)
