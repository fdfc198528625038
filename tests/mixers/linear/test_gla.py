"""GLA, HGRN2 and RWKV-6 against their papers' recurrences, token by token."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from contextlab.mixers import GatedLinearAttention, Hgrn2, Rwkv6


def draw(length: int = 12, width: int = 16) -> torch.Tensor:
    return torch.randn(2, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def noisy(mixer: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer.double()


def test_gla_is_the_papers_layer() -> None:
    x, mixer = draw(), noisy(GatedLinearAttention(16, heads=2, gate_rank=3))
    q, k, v, gate, low = mixer.in_proj(x).split([8, 8, 16, 16, 3], -1)
    alpha = (low @ mixer.decay_proj.weight.T + mixer.decay_proj.bias).sigmoid() ** (1 / 16)
    q, k, v, alpha = (y.unflatten(-1, (2, -1)) for y in (q, k, v, alpha))
    S, os = torch.zeros(2, 2, 4, 8, dtype=torch.float64), []
    for t in range(x.shape[1]):
        S = alpha[:, t].unsqueeze(-1) * S + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        os.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) / 2)
    o = F.rms_norm(torch.stack(os, 1), (8,), mixer.norm.weight, 1e-6).flatten(2)
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(o * F.silu(gate)), rtol=1e-8, atol=1e-9)


def test_hgrn2_writes_what_it_forgets() -> None:
    x, mixer = draw(), noisy(Hgrn2(16, heads=2, lower_bound=0.2))
    q, forget, v = (y.unflatten(-1, (2, -1)) for y in mixer.in_proj(x).chunk(3, -1))
    f = 0.2 + 0.8 * forget.sigmoid()
    S, os = torch.zeros(2, 2, 8, 8, dtype=torch.float64), []
    for t in range(x.shape[1]):
        S = f[:, t].unsqueeze(-1) * S + (1 - f[:, t]).unsqueeze(-1) * v[:, t].unsqueeze(-2)
        os.append(torch.einsum("bhkv,bhk->bhv", S, F.silu(q[:, t])) / 8**0.5)
    o = F.rms_norm(torch.stack(os, 1).flatten(2), (16,), mixer.norm.weight, 1e-6)
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(o), rtol=1e-8, atol=1e-9)


def test_rwkv6_is_the_papers_time_mixing() -> None:
    x, mixer = draw(), noisy(Rwkv6(16, heads=2, shift_rank=4, decay_rank=3))
    W_r, W_k, W_v, W_g = mixer.in_proj.weight.chunk(4)
    S, before, ys = torch.zeros(2, 2, 8, 8, dtype=torch.float64), torch.zeros(2, 16, dtype=torch.float64), []
    shift_in = mixer.shift_in.weight.chunk(5)
    for t in range(x.shape[1]):
        now, delta = x[:, t], before - x[:, t]
        first = now + delta * mixer.shift[0]
        # ddlerp (eq. 9): x + (x' - x) (lambda + tanh(first A) B), for w, r, k, v and the gate
        w, r, k, v, g = (
            now + delta * (mixer.shift[n + 1] + (first @ shift_in[n].T).tanh() @ mixer.shift_out[n]) for n in range(5)
        )
        decay = (-(mixer.decay + (w @ mixer.decay_in.weight.T).tanh() @ mixer.decay_out).exp()).exp()
        r, k, v, decay = (y.unflatten(-1, (2, 8)) for y in (r @ W_r.T, k @ W_k.T, v @ W_v.T, decay))
        written = k.unsqueeze(-1) * v.unsqueeze(-2)
        o = torch.einsum("bhkv,bhk->bhv", S + mixer.bonus.unsqueeze(-1) * written, r)
        S, before = decay.unsqueeze(-1) * S + written, now
        o = F.layer_norm(o, (8,), eps=64e-5).flatten(1) * mixer.norm_weight
        ys.append(mixer.out_proj(o * F.silu(g @ W_g.T)))
    torch.testing.assert_close(mixer(x)[0], torch.stack(ys, 1), rtol=1e-8, atol=1e-9)
