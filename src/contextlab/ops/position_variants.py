"""Positions beyond plain rotary ones: xPos, CARoPE, CLEX and GALI."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.ops.position import rope_table
from contextlab.ops.softmax import resolve_positions, softmax_attention


def xpos_rates(size: int, scale_base: float = 512.0) -> Tensor:
    """The logarithm of xPos's factor for each step of distance, [size / 2] float64, negative.

    Pair j fades by ((2 j / size + 0.4) / 1.4)^(1 / scale_base) (2212.10554, eq. 9): those that turn fastest fade most.
    """
    pair = torch.arange(0, size, 2, dtype=torch.float64) / size
    return ((pair + 0.4) / 1.4).log() / scale_base


def xpos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: int,
    *,
    scale_base: float = 512.0,
    scale: float | None = None,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> Tensor:
    """Causal attention whose scores fade with distance, each pair of dimensions at a rate of its own (xPos).

    The score of key m for query n is the sum over pairs j of Re(q_j conj(k_j)) zeta_j^((n - m) / scale_base), with
    zeta_j = (2 j / size + 0.4) / 1.4 (2212.10554, algorithm 1; the division by 512 is that of the authors' code).
    There q is multiplied by zeta^n and k by zeta^-m, which overflow in float32 from position 36,000 on. Here keys come
    as they are and both factors count from the first query of a chunk: a key's is at most 1 but in the chunk itself,
    where it is at most e^8, so that no position is too large.

    q, k: [B, Tq, H, D] and [B, Tk, Hkv, D], turned by `rotate` already. v: [B, Tk, Hkv, V].
    size: of the dimensions that fade, the first of each head, even; the rest do not.
    scale_base: steps in which a pair fades by its zeta, at least 16.
    scale, q_position, k_position: as for `softmax_attention`; the queries' positions follow one another.

    Returns [B, Tq, H, V].
    """
    rates = xpos_rates(size, scale_base).to(q.device)
    length, n_keys = q.shape[1], k.shape[1]
    chunk = min(1024, int(-8 / rates[0].item()))
    if chunk < 64:
        raise InputError(f"scale_base must be at least 16, got {scale_base:g}")
    q_at, k_at = resolve_positions(q, k, q_position, k_position)
    outputs = []
    for first in range(0, length, chunk):
        last = min(first + chunk, length)
        seen = n_keys if q_position is not None else n_keys - length + last
        origin = q_at[:, first : first + 1]
        part_q = _faded(q[:, first:last], rates, q_at[:, first:last] - origin)
        # Keys after the chunk are seen by no query of it; the clamp keeps what the mask hides finite.
        part_k = _faded(k[:, :seen], rates, (origin - k_at[:, :seen]).clamp_min(-chunk))
        given = (None, None) if q_position is None else (q_at[:, first:last], k_at)
        y = softmax_attention(part_q, part_k, v[:, :seen], scale=scale, q_position=given[0], k_position=given[1])
        outputs.append(y)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _faded(x: Tensor, rates: Tensor, steps: Tensor) -> Tensor:
    """x [B, T, H, D], its pairs multiplied by exp(rates steps); steps: [B or 1, T] int64."""
    factor = (steps[..., None, None].to(torch.float64) * rates).exp()
    factor = factor.masked_fill(factor < 1e-26, 0.0)  # subnormal numbers are slow, and nothing next to any other key
    factor = factor.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    size = 2 * len(rates)
    faded = (x[..., :size].unflatten(-1, (-1, 2)) * factor[..., None]).flatten(-2).to(x.dtype)
    return faded if size == x.shape[-1] else torch.cat((faded, x[..., size:]), -1)


def carope_phases(
    log_f: Tensor, pairs: int, before: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The angles that tokens add up to when each says how fast its head turns (CARoPE, 2507.23083, section 2).

    Pair i stands at phi_i(m) = sum over t <= m of f(x_t)^i, in float64.

    log_f: [B, T, H], the logarithm of f, at most 0. pairs: P; i is 0 to P - 1.
    before: [B, H, P], what an earlier piece came to. mask: [B, T] bool; padding adds nothing.

    Returns phi [B, T, H, P] and its last, modulo 2 pi: cosines and sines are the same, and no stream too long.
    """
    steps = (log_f[..., None].to(torch.float64) * torch.arange(pairs, device=log_f.device)).exp()
    if mask is not None:
        steps = steps.masked_fill(~mask[..., None, None], 0.0)
    total = steps.cumsum(1)
    if before is not None:
        total = total + before[:, None].to(torch.float64)
    return total, total[:, -1].remainder(2 * math.pi)


def clex_frequencies(count: int, size: int, base: float, up: Tensor, down: Tensor) -> list[Tensor]:
    """RoPE's frequencies at the length factors t = 1 to `count`, by a neural ODE in t (CLEX, 2310.16450).

    d log theta / dt = silu((log theta + log theta_ntk(t)) up) down + xi(t), from RoPE's frequencies at t = 1, where
    theta_ntk(t), those of the NTK-aware rule for a factor alpha = 2 t - 1, solves the equation without the network:
    xi_i(t) = -4 i / ((size - 2) alpha). All this, the sum within the network included, is as in the authors' code.
    It is solved by RK4 in log alpha, in which xi is constant, in `clex_steps(t)` steps from each t to the next.

    size: of the turned dimensions, at least 4. up: [size / 2, W]. down: [W, size / 2].

    Returns `count` tensors [size / 2] float64, differentiable in up and down.
    """
    if size < 4:
        raise InputError(f"CLEX needs at least 4 rotated dimensions, got {size}; the nearest that fits is 4")
    up, down = up.to(torch.float64), down.to(torch.float64)
    index = torch.arange(0, size, 2, dtype=torch.float64, device=up.device)
    start, slope = index * (-math.log(base) / size), index / (size - 2)

    def rate(u: float, z: Tensor) -> Tensor:  # dz / du, for dt = (alpha / 2) du
        return F.silu((z + start - slope * u) @ up) @ down * (math.exp(u) / 2) - slope

    z, found = start, [start.exp()]
    for t in range(1, count):
        begin, end = math.log(2 * t - 1), math.log(2 * t + 1)
        h = (end - begin) / clex_steps(t)
        for n in range(clex_steps(t)):
            u = begin + n * h
            a = rate(u, z)
            b = rate(u + h / 2, z + h / 2 * a)
            c = rate(u + h / 2, z + h / 2 * b)
            z = z + h / 6 * (a + 2 * b + 2 * c + rate(u + h, z + h * c))
        found.append(z.exp())
    return found


def clex_steps(t: int) -> int:
    """RK4 steps from the factor t to t + 1: of at most 0.25 in log(2 t - 1)."""
    return math.ceil(4 * math.log((2 * t + 1) / (2 * t - 1)))


def gali_places(places: Tensor, length: int, original: int, window: int) -> Tensor:
    """The places that the first `length` tokens take within a trained length of `original` (GALI, 2502.02659, eq. 2).

    As many of the first tokens as must share a step of 1 / g each, with the least g that leaves the last `window`
    their whole steps; the rest keep theirs, up to original - 1 (the paper's algorithm 2).

    places: [...] int64, of 0 to length - 1. original: more than `window`. Returns [...] float64.
    """
    more = length - original
    if more <= 0:
        return places.to(torch.float64)
    group = -(-(length - window) // (original - window))
    shared = more - (-more // (group - 1))  # tokens on shared steps: `more`, and the steps that they take
    exact = places.to(torch.float64)
    return torch.where(places < shared, exact / group, exact - more)


def gali_table(places: Tensor, original: int, size: int, base: float, dtype: torch.dtype) -> Tensor:
    """`rope_table` at places between whole ones, by linear interpolation of the rotations, not of the angles.

    A score is linear in the rotation of its key, so that this interpolates scores between whole distances, as GALI
    does (2502.02659, eq. 3 without its noise), for queries at whole places.

    places: [T] or [B, T] float64; those beyond original - 1 count as that.
    """
    whole = rope_table(torch.arange(original, device=places.device), size, base, dtype)  # few, however many tokens
    places = places.clamp_max(original - 1)
    below = places.floor()
    part = (places - below).to(whole.dtype)[..., None, None, None]
    return torch.lerp(whole[below.long()], whole[places.ceil().long()], part)
