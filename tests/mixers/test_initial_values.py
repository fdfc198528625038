"""Where training starts: the values that papers and docstrings name, read off freshly built mixers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab import registry
from contextlab.mixers import build_mixer

WIDTH, HEADS = 24, 4
SHARE = torch.arange(WIDTH) / WIDTH  # from the first channel to the last but one
WHOLE = torch.linspace(0, 1, WIDTH)

# Parameters that start at known values: mixer, parameter, value (what broadcasts to it).
KNOWN: list[tuple[str, str, Any]] = [
    ("rwkv6", "shift", WHOLE),
    ("rwkv6", "shift_out", 0.0),
    ("rwkv6", "decay_out", 0.0),
    ("rwkv6", "decay", -6 + 5 * WHOLE**0.7),
    ("rwkv7", "shift", torch.stack([1 - SHARE**power for power in (0.2, 0.7, 0.7, 0.9, 0.9, 0.2)])),
    ("rwkv7", "decay_out.weight", 0.0),
    ("rwkv7", "decay_out.bias", -5.5 + 6 * SHARE),
    ("rwkv7", "rate_out.weight", 0.0),
    ("rwkv7", "removal", 0.71),
    ("rwkv7", "replacement", 1.02),
    ("rwkv7", "bonus", -0.04),
    ("mamba", "A_log", torch.arange(1.0, 17.0).log()),
    ("mamba", "D", 1.0),
    ("mamba2", "D", 1.0),
    ("mamba3", "B_bias", 1.0),
    ("mamba3", "C_bias", 1.0),
    ("mamba3", "D", 1.0),
    ("s4d", "A_log", math.log(0.5)),
    ("s4d", "A_imaginary", math.pi * torch.arange(32)),
    ("s4d", "D", 1.0),
    ("log_linear_attention", "decay_bias", torch.linspace(2, 6, HEADS)),
    ("log_linear_attention", "level_scale", 1.0),
    ("rodimus", "residual", 1.0),
    ("slstm", "bias", torch.stack([torch.zeros(6), torch.zeros(6), torch.linspace(3, 6, 6), torch.zeros(6)])),
    ("rg_lru", "gate_bias", 0.0),
    ("ttt_linear", "share", 1 / torch.arange(1.0, 17.0)),
    ("ttt_linear", "b", 0.0),
    ("ttt_linear", "rate_bias", 0.0),
    ("titans", "gate_bias", torch.tensor([0.0, -2.0, 4.6])[:, None]),
    ("titans_mac", "gate_bias", torch.tensor([0.0, -2.0, 4.6])[:, None]),
    ("atlas", "gate_bias", torch.tensor([0.0, -2.0, 4.6])[:, None]),
    ("atlas", "coefficients", torch.tensor([1.0, 1.0, 0.5]).sqrt()),
    ("atlas", "step", 0.5),
    ("mesa_net", "gate_bias", torch.tensor([0.0, 4.6])[:, None]),
    ("mesa_net", "ridge", math.log(math.expm1(0.75))),  # softplus of it and least_ridge make 1
    ("complex_attention", "delta", 1.0),
    ("complex_attention", "shift", 0.0),
    ("shaped_attention", "gains", 1.0),
    ("cope_attention", "position_embedding", 0.0),
    ("landmark", "landmark", 1.0),
    ("nsa", "key_place", 0.0),
    ("nsa", "value_place", 0.0),
    ("carope_attention", "freq_proj.weight", 0.0),
    ("clex_attention", "ode_down", 0.0),
]

# Parameters that are drawn: mixer, parameter, what is made of it, and the interval that it fills.
DRAWN: list[tuple[str, str, Any, float, float]] = [
    *(
        (name, parameter, lambda x: F.softplus(x), 1e-3, 0.1)  # step sizes, log-uniform (2405.21060)
        for name, parameter in (
            ("mamba", "dt_proj.bias"),
            ("mamba2", "dt_bias"),
            ("mamba3", "dt_bias"),
            ("gated_delta_net", "dt_bias"),
            ("kda", "dt_bias"),
        )
    ),
    *((name, "A_log", torch.exp, 1.0, 16.0) for name in ("mamba2", "gated_delta_net", "kda")),
    ("s4d", "log_dt", torch.exp, 1e-3, 0.1),
    ("rg_lru", "Lambda", lambda x: (-8 * F.softplus(x)).exp(), 0.9, 0.999),  # 2402.19427, section 2.4
]

# Parameters that are drawn from a normal distribution: mixer, parameter, standard deviation.
NORMAL: list[tuple[str, str, float]] = [
    ("attention", "qkv_proj.weight", 24**-0.5),
    ("rwkv6", "bonus", 0.5),
    ("slstm", "R", 6**-0.5),
    ("rg_lru", "gate_weight", 6**-0.5),
    ("ttt_linear", "W", 0.02),
    ("ttt_mlp", "W1", 0.02),
    ("ttt_mlp", "W2", 0.02),
    ("s4d", "C", 0.5**0.5),
    ("gru", "rnn.weight_ih_l0", 24**-0.5),
    ("lstm", "rnn.weight_ih_l0", 24**-0.5),
]


def parameter(mixer: nn.Module, name: str) -> Tensor:
    return mixer.get_parameter(name).detach()


def built(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_mixer(name, width=WIDTH)


@pytest.mark.parametrize(("name", "what", "value"), KNOWN, ids=lambda value: value if isinstance(value, str) else "")
def test_known_values(name: str, what: str, value: Any) -> None:
    found = parameter(built(name), what)
    torch.testing.assert_close(found, torch.as_tensor(value).to(found).expand_as(found), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "what", "made", "low", "high"), DRAWN, ids=lambda value: str(value)[:12])
def test_intervals_are_filled(name: str, what: str, made: Any, low: float, high: float) -> None:
    draws = torch.cat([made(parameter(built(name, seed), what)).flatten() for seed in range(40)])
    assert draws.min() >= low * 0.9999
    assert draws.max() <= high * 1.0001
    assert draws.min() < low + 0.2 * (high - low)
    assert draws.max() > high - 0.2 * (high - low)


@pytest.mark.parametrize(("name", "what", "deviation"), NORMAL, ids=str)
def test_deviations(name: str, what: str, deviation: float) -> None:
    draws = torch.cat([parameter(built(name, seed), what).flatten() for seed in range(12)])
    assert abs(float(draws.mean())) < 4 * deviation / len(draws) ** 0.5
    assert float(draws.std()) == pytest.approx(deviation, rel=4 * len(draws) ** -0.5)


def test_the_mlstm_starts_with_small_input_gates_and_long_memories() -> None:
    draws = torch.stack([parameter(built("mlstm", seed), "gate_bias") for seed in range(60)])
    assert float(draws[:, :HEADS].std()) == pytest.approx(0.1, rel=0.3)
    torch.testing.assert_close(draws[0, HEADS:], torch.linspace(3, 6, HEADS))


def test_every_normalisation_starts_at_one() -> None:
    for entry in registry.entries("mixer"):
        if not entry.factory.__module__.startswith("contextlab."):
            continue
        mixer = entry.build(width=WIDTH, **entry.cases[0])
        for name, value in mixer.named_parameters():
            if name.endswith(("norm.weight", "norm_weight")):
                assert (value == 1).all(), f"{entry.name}: {name}"
