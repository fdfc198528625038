"""The engines' chunks as plain operations, for exported programs: these hold what is below an autograd function.

The engines (`ops.scalar_decay`, `ops.delta_engine`, `ops.channel_decay`) write into memory that they use again, by
hand in both directions, which a program with gradients cannot. Here autograd differentiates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from contextlab.ops.decays import decay_matrix, log_decays
from contextlab.ops.triangular import unit_lower_inverse


def scalar_decay_chunks(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor | None, state: Tensor | None, scale: float, size: int
) -> tuple[Tensor, Tensor]:
    """As `ops.scalar_decay.scalar_decay`, with the last state always. q, k: [B, T, G, K]. v: [B, T, H, V]."""
    heads = v.shape[2]
    q, k = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    S = _state(state, k, v)
    c = k.new_zeros(1, 1, size, 1, dtype=torch.float64) if c is None else c
    found = []
    for n, (qs, ks, vs) in enumerate(_chunks(size, q * scale, k, v)):
        cs = _sums(c, n, qs.shape[2])
        between, start, end, whole = _decays(cs, v.dtype)
        found.append((qs @ ks.mT * between) @ vs + (qs * start) @ S)
        S = S * whole + (ks * end).mT @ vs
    return torch.cat(found, 2).transpose(1, 2), S


def corrected_chunks(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor, beta: Tensor, state: Tensor | None, scale: float, size: int
) -> tuple[Tensor, Tensor]:
    """As `ops.delta_engine.corrected`. q, k: [B, T, H, K]. v: [B, T, H, V]. beta: [B, T, H]."""
    S, found = _state(state, k, v), []
    for n, (qs, ks, vs, betas) in enumerate(_chunks(size, q * scale, k, v, beta.unsqueeze(-1))):
        between, start, end, whole = _decays(_sums(c, n, qs.shape[2]), v.dtype)
        inverse = unit_lower_inverse(((ks * betas) @ ks.mT * between).tril(-1), base=32)
        new = inverse @ (betas * (vs - (ks * start) @ S))
        found.append((qs * start) @ S + (qs @ ks.mT * between) @ new)
        S = S * whole + (ks * end).mT @ new
    return torch.cat(found, 2).transpose(1, 2), S


def channel_decay_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor | None, state: Tensor, scale: float, size: int
) -> tuple[Tensor, Tensor]:
    """As `ops.channel_decay.channel_decay`. q, k, g: [B, T, H, K]. v: [B, T, H, V]. bonus: [H, K]."""
    S, found = state, []
    for qs, ks, vs, gs in _chunks(size, q * scale, k, v, log_decays(g, g.dtype)):
        length = qs.shape[2]
        c = gs.cumsum(2)
        reads = c if bonus is None else c - gs  # with a bonus a token reads the state before its own decay
        seen = torch.ones(length, length, dtype=torch.bool, device=v.device).tril(0 if bonus is None else -1)
        between = (reads.unsqueeze(3) - c.unsqueeze(2)).masked_fill(~seen[..., None], -math.inf).exp().to(v.dtype)
        weight = torch.einsum("bhik,bhjk,bhijk->bhij", qs, ks, between)
        o = weight @ vs + (qs * reads.exp().to(v.dtype)) @ S
        if bonus is not None:
            o = o + (qs * ks * bonus[:, None]).sum(-1, keepdim=True) * vs
        found.append(o)
        S = S * c[:, :, -1].exp().to(v.dtype).unsqueeze(-1) + (ks * (c[:, :, -1:] - c).exp().to(v.dtype)).mT @ vs
    return torch.cat(found, 2).transpose(1, 2), S


def _state(state: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    return v.new_zeros(len(k), v.shape[2], k.shape[-1], v.shape[-1]) if state is None else state


def _chunks(size: int, *given: Tensor) -> list[list[Tensor]]:
    """Chunks of each [B, T, H, D] as [B, H, L, D]; the last may be shorter."""
    return [list(each) for each in zip(*(x.transpose(1, 2).split(size, 2) for x in given), strict=True)]


def _sums(c: Tensor, chunk: int, length: int) -> Tensor:
    """Sums of log decays of one chunk, [B or 1, H or 1, L]."""
    return c[:, chunk if c.shape[1] > 1 else 0, :length].transpose(1, 2)


def _decays(c: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decays between tokens [..., L, L], from the start and to the end [..., L, 1], of the whole chunk [..., 1, 1]."""
    start, end, whole = c.unsqueeze(-1), (c[..., -1:] - c).unsqueeze(-1), c[..., -1:].unsqueeze(-1)
    start, end, whole = (x.exp().to(dtype) for x in (start, end, whole))
    return decay_matrix(c, dtype), start, end, whole
