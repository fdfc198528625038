"""State-space models against the recurrences of their papers, token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.mixers.recurrence import agrees, convolved, every_case, linear, recurrence, rms, turned


def softplus(x: Tensor) -> Tensor:
    return (1 + x.exp()).log()


@recurrence("s4d")
def s4d(mixer: Any, x: Tensor) -> Tensor:
    """2206.11893, eqs. 2 and 3, zero-order hold: h = exp(dt A) h + (exp(dt A) - 1) / A u, y = 2 Re(C h) + D u; GLU."""
    u, A = linear(mixer.in_proj, x), torch.complex(-mixer.A_log.exp(), mixer.A_imaginary)
    step = (A * mixer.log_dt.exp()).exp()
    C, h, rows = torch.complex(mixer.C[..., 0], mixer.C[..., 1]), torch.zeros_like(A), []
    for token in u:
        h = step * h + (step - 1) / A * token[:, None]
        rows.append(2 * (C * h).sum(1).real + mixer.D * token)
    value, gate = linear(mixer.out_proj, F.gelu(torch.stack(rows))).chunk(2, 1)
    return value * gate.sigmoid()


@recurrence("mamba")
def mamba(mixer: Any, x: Tensor) -> Tensor:
    """2312.00752, algorithm 2: h = exp(dt A) h + dt B u for each channel, y = C . h + D u."""
    u, gate = linear(mixer.in_proj, x).chunk(2, 1)
    u = convolved(mixer.conv, u, activation=True)
    size, rank = mixer.given.get("state_size", 16), mixer.dt_proj.in_features
    h, rows = torch.zeros(u.shape[1], size, dtype=x.dtype), []
    for t in range(len(x)):
        low, B, C = linear(mixer.x_proj, u[t]).split((rank, size, size))
        dt = softplus(linear(mixer.dt_proj, low))
        h = (dt[:, None] * -mixer.A_log.exp()).exp() * h + (dt * u[t])[:, None] * B
        rows.append((h @ C + mixer.D * u[t]) * F.silu(gate[t]))
    return linear(mixer.out_proj, torch.stack(rows))


@recurrence("mamba2")
def mamba2(mixer: Any, x: Tensor) -> Tensor:
    """2405.21060, section 7: one scalar decay exp(dt A) for each head; heads of a group share B and C."""
    heads, groups, inner = mixer.heads, mixer.given.get("groups", 1), mixer.width * mixer.given.get("expand", 2)
    size, value = mixer.given.get("state_size", 64), inner // heads
    z, xBC, dt = linear(mixer.in_proj, x).split((inner, inner + 2 * groups * size, heads), 1)
    u, B, C = convolved(mixer.conv, xBC, activation=True).split((inner, groups * size, groups * size), 1)
    u, B, C = u.view(len(x), heads, value), B.view(len(x), groups, size), C.view(len(x), groups, size)
    S, y = torch.zeros(heads, size, value, dtype=x.dtype), torch.zeros_like(u)
    for t in range(len(x)):
        for h in range(heads):
            group, step = h * groups // heads, softplus(dt[t, h] + mixer.dt_bias[h])
            S[h] = (-step * mixer.A_log[h].exp()).exp() * S[h] + step * torch.outer(B[t, group], u[t, h])
            y[t, h] = S[h].T @ C[t, group] + mixer.D[h] * u[t, h]
    y = rms((y.flatten(1) * F.silu(z)).view(len(x), groups, -1), 1e-5).flatten(1)
    return linear(mixer.out_proj, y * mixer.norm_weight)


@recurrence("mamba3")
def mamba3(mixer: Any, x: Tensor) -> Tensor:
    """2603.15569: trapezoidal writing, B and C normalised, biased and turned by the sum of dt pi tanh(theta).

    S = a S + (1 - l) dt a B_(t-1) u_(t-1)^T + l dt B_t u_t^T, with a = exp(dt A) and l a sigmoid.
    """
    heads, groups, inner = mixer.heads, mixer.given.get("groups", 1), mixer.width * mixer.given.get("expand", 2)
    size, value = mixer.given["state_size"], inner // heads
    angles = int(size * mixer.given.get("rope_fraction", 0.5)) // 2
    sizes = (inner, inner, groups * size, groups * size, heads, heads, heads, angles)
    z, u, B, C, dt, A, mix, theta = linear(mixer.in_proj, x).split(sizes, 1)
    u = u.view(len(x), heads, value)
    S, y = torch.zeros(heads, size, value, dtype=x.dtype), torch.zeros_like(u)
    phase, last = torch.zeros(heads, angles, dtype=x.dtype), torch.zeros(heads, size, value, dtype=x.dtype)
    for t in range(len(x)):
        b = rms(B[t].view(groups, size), 1e-5) * mixer.B_norm.weight
        c = rms(C[t].view(groups, size), 1e-5) * mixer.C_norm.weight
        for h in range(heads):
            step = softplus(dt[t, h] + mixer.dt_bias[h])
            phase[h] += step * math.pi * theta[t].tanh()
            key, query = b[h * groups // heads] + mixer.B_bias[h], c[h * groups // heads] + mixer.C_bias[h]
            for n in range(angles):
                pair = slice(2 * n, 2 * n + 2)
                key[pair], query[pair] = (turned(part[pair], float(phase[h, n])) for part in (key, query))
            decay = (-step * softplus(A[t, h]).clamp_min(1e-4)).exp()
            share, written = mix[t, h].sigmoid(), torch.outer(key, u[t, h])
            S[h] = decay * S[h] + (1 - share) * step * decay * last[h] + share * step * written
            last[h] = written
            y[t, h] = S[h].T @ query + mixer.D[h] * u[t, h]
    if mixer.norm_weight is not None:
        y = rms(y, 1e-5) * mixer.norm_weight.view(heads, value)
    return linear(mixer.out_proj, y.flatten(1) * F.silu(z))


@every_case("state space")
def test_agrees_with_the_papers_recurrence(name: str, options: Mapping[str, Any]) -> None:
    agrees(name, options)
