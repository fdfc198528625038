"""Recurrent networks against the recurrences of their papers, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.mixers.recurrence import agrees, convolved, every_case, linear, normed, recurrence, rms


def projected(mixer: Any, x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """The projections of x [T, width], the first of them behind the convolution."""
    first, *rest = linear(mixer.in_proj, x).chunk(parts, 1)
    return convolved(mixer.conv, first, activation=False), *rest


def candidate(x: Tensor) -> Tensor:
    """g of 2410.01201, appendix B."""
    return torch.where(x >= 0, x + 0.5, x.sigmoid())


@recurrence("min_gru")
def min_gru(mixer: Any, x: Tensor) -> Tensor:
    """2410.01201: h_t = (1 - z) h_(t-1) + z g(c)."""
    c, z = projected(mixer, x, 2)
    h, rows = torch.zeros_like(c[0]), []
    for t in range(len(x)):
        h = (1 - z[t].sigmoid()) * h + z[t].sigmoid() * candidate(c[t])
        rows.append(h)
    return linear(mixer.out_proj, torch.stack(rows))


@recurrence("min_lstm")
def min_lstm(mixer: Any, x: Tensor) -> Tensor:
    """2410.01201: h_t = f / (f + i) h_(t-1) + i / (f + i) g(c)."""
    c, f, i = projected(mixer, x, 3)
    h, rows = torch.zeros_like(c[0]), []
    for t in range(len(x)):
        keep, enter = f[t].sigmoid(), i[t].sigmoid()
        h = (keep * h + enter * candidate(c[t])) / (keep + enter)
        rows.append(h)
    return linear(mixer.out_proj, torch.stack(rows))


@recurrence("mlgru")
def mlgru(mixer: Any, x: Tensor) -> Tensor:
    """2406.02528, section 3.3.1: h_t = f h_(t-1) + (1 - f) silu(c), o = h sigmoid(g)."""
    c, f, g = projected(mixer, x, 3)
    h, rows = torch.zeros_like(c[0]), []
    for t in range(len(x)):
        h = f[t].sigmoid() * h + (1 - f[t].sigmoid()) * F.silu(c[t])
        rows.append(h * g[t].sigmoid())
    return linear(mixer.out_proj, torch.stack(rows))


@recurrence("hgrn")
def hgrn(mixer: Any, x: Tensor) -> Tensor:
    """2311.04823: h_t = f h_(t-1) + (1 - f) silu(c), f = b + (1 - b) sigmoid(.); out rms(h) silu(g)."""
    c, f, g = projected(mixer, x, 3)
    h, rows, bound = torch.zeros_like(c[0]), [], mixer.lower_bound
    for t in range(len(x)):
        keep = bound + (1 - bound) * f[t].sigmoid()
        h = keep * h + (1 - keep) * F.silu(c[t])
        rows.append(rms(h, 1e-6) * mixer.norm_weight * F.silu(g[t]))
    return linear(mixer.out_proj, torch.stack(rows))


@recurrence("rg_lru")
def rg_lru(mixer: Any, x: Tensor) -> Tensor:
    """2402.19427, eqs. 1 to 4: a = exp(-8 softplus(Lambda) r), h_t = a h_(t-1) + sqrt(1 - a^2) (i u)."""
    u, branch = projected(mixer, x, 2)
    block = u.shape[1] // mixer.heads
    h, rows = torch.zeros_like(u[0]), []
    for t in range(len(x)):
        i, r = torch.zeros_like(u[0]), torch.zeros_like(u[0])
        for n in range(mixer.heads):
            own = slice(n * block, (n + 1) * block)
            i[own] = (u[t, own] @ mixer.gate_weight[n, :, 0] + mixer.gate_bias[0, own]).sigmoid()
            r[own] = (u[t, own] @ mixer.gate_weight[n, :, 1] + mixer.gate_bias[1, own]).sigmoid()
        a = (-8 * (1 + mixer.Lambda.exp()).log() * r).exp()
        h = a * h + (1 - a**2).sqrt() * i * u[t]
        rows.append(h * F.gelu(branch[t], approximate="tanh"))
    return linear(mixer.out_proj, torch.stack(rows))


@recurrence("lstm")
def lstm(mixer: Any, x: Tensor) -> Tensor:
    """Hochreiter and Schmidhuber (1997) with forget gates: c = f c + i tanh(.), h = o tanh(c)."""
    W, U, b, d = mixer.rnn.all_weights[0]
    h, c, rows = torch.zeros(mixer.hidden, dtype=x.dtype), torch.zeros(mixer.hidden, dtype=x.dtype), []
    for token in x:
        i, f, g, o = (W @ token + b + U @ h + d).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        rows.append(h)
    return linear(mixer.out_proj, torch.stack(rows))


@recurrence("gru")
def gru(mixer: Any, x: Tensor) -> Tensor:
    """Cho et al. (1406.1078), the reset gate on the recurrent product: h = (1 - z) tanh(n) + z h."""
    W, U, b, d = mixer.rnn.all_weights[0]
    h, rows = torch.zeros(mixer.hidden, dtype=x.dtype), []
    for token in x:
        (reset, z, n), (reset_h, z_h, n_h) = (W @ token + b).chunk(3), (U @ h + d).chunk(3)
        z = (z + z_h).sigmoid()
        h = (1 - z) * (n + (reset + reset_h).sigmoid() * n_h).tanh() + z * h
        rows.append(h)
    return linear(mixer.out_proj, torch.stack(rows))


@recurrence("mlstm")
def mlstm(mixer: Any, x: Tensor) -> Tensor:
    """2405.04517, eqs. 19 to 27, without the stabiliser: C = sigmoid(f) C + exp(i) k v^T, n likewise of k.

    h = C^T q / max(|n . q|, 1); both gates are capped, c tanh(. / c) (2503.13427).
    """
    heads, key, value, cap = mixer.heads, mixer.key, mixer.width // mixer.heads, mixer.given.get("gate_cap", 15.0)
    keys = heads * key
    qk, v, gate, gates = linear(mixer.in_proj, x).split((2 * keys, mixer.width, mixer.width, 2 * heads), 1)
    q, k = convolved(mixer.conv, qk, activation=mixer.conv is not None).view(len(x), 2, heads, key).unbind(1)
    v = v.view(len(x), heads, value)
    C, n = torch.zeros(heads, key, value, dtype=x.dtype), torch.zeros(heads, key, dtype=x.dtype)
    y = torch.zeros_like(v)
    for t in range(len(x)):
        i, f = (cap * ((gates[t] + mixer.gate_bias) / cap).tanh()).chunk(2)
        for h in range(heads):
            C[h] = f[h].sigmoid() * C[h] + i[h].exp() * torch.outer(k[t, h], v[t, h])
            n[h] = f[h].sigmoid() * n[h] + i[h].exp() * k[t, h]
            query = q[t, h] / key**0.5
            y[t, h] = C[h].T @ query / (n[h] @ query).abs().clamp_min(1)
    return linear(mixer.out_proj, normed(y, 1e-6).flatten(1) * mixer.norm_weight * gate.sigmoid())


@recurrence("slstm")
def slstm(mixer: Any, x: Tensor) -> Tensor:
    """2405.04517, eqs. 8 to 18, without the stabiliser: c = sigmoid(f) c + exp(i) tanh(z), n = sigmoid(f) n + exp(i).

    h = sigmoid(o) c / n; the gates see the head's last h by R, and i and f the convolved token.
    """
    heads, size = mixer.heads, mixer.width // mixer.heads
    z, o = linear(mixer.straight_proj, x).chunk(2, 1)
    gated = x if mixer.conv is None else convolved(mixer.conv, x, activation=True)
    i, f = linear(mixer.gate_proj, gated).chunk(2, 1)
    c, n, h = (torch.zeros(heads, size, dtype=x.dtype) for _ in range(3))
    y = torch.zeros(len(x), heads, size, dtype=x.dtype)
    for t in range(len(x)):
        before = h.clone()
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            recurrent = (before[head] @ mixer.R[head]).view(4, size) + mixer.bias[head]
            write = (i[t, own] + recurrent[1]).exp()
            keep = (f[t, own] + recurrent[2]).sigmoid()
            c[head] = keep * c[head] + write * (z[t, own] + recurrent[0]).tanh()
            n[head] = keep * n[head] + write
            h[head] = (o[t, own] + recurrent[3]).sigmoid() * c[head] / n[head]
        y[t] = h
    return linear(mixer.out_proj, normed(y, 1e-6).flatten(1) * mixer.norm_weight)


@every_case("recurrent")
def test_agrees_with_the_papers_recurrence(name: str, options: Mapping[str, Any]) -> None:
    agrees(name, options)
