"""Softmax attention within a window and linear attention before it, under one normalising sum (LoLCATs)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.ops.linear import simple_gla
from contextlab.ops.precision import without_autocast, working_dtype

LEAST_BLOCK, MOST_BLOCK = 32, 256
"""Queries that are compared with the window's keys at once: as many as the window, within these."""


@without_autocast
def window_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_features: Tensor,
    k_features: Tensor,
    share: Tensor,
    seen: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """LoLCATs' hybrid (2410.10254, eq. 6): the last W keys weigh share exp(s - c), those before phi(q) . phi(k).

    Both stand in one sum, which divides: with c_t the largest score s of the window,
    y_t = (share sum_near exp(s - c_t) v + sum_far phi(q) . phi(k) v) / (share sum_near exp(s - c_t) + sum_far ...).

    q: [B, T, H, D]. k: [B, W + T, Hkv, D]: the W keys before, then the new ones; Hkv divides H. v: [B, W + T, Hkv, V].
    q_features: [B, T, H, F]. k_features: [B, T, H, F], >= 0, of the first T of k, which leave the window one by one.
    share: [H], > 0. seen: [B or 1, W + T] bool: where a token stands; k, v and features elsewhere are zeros.
    scale: of the scores s; D ** -0.5 by default. initial_state: [B, H, F, V + 1] of what left the window before, or
        None.
    Returns (o [B, T, H, V], the state after the last token (at least float32) or None).
    """
    dtype, work = v.dtype, working_dtype(v.dtype)
    length, heads, dim = q.shape[1:]
    scale = dim**-0.5 if scale is None else scale
    q, k, v = q.to(work) * scale, k.to(work), v.to(work)
    gone = v[:, :length].repeat_interleave(heads // v.shape[2], 2)
    there = seen[:, :length, None, None].to(work).expand(*gone.shape[:3], 1)
    far, state = simple_gla(
        q_features.to(work), k_features.to(work), torch.cat((gone, there), -1), None, None, 1.0, initial_state,
        output_final_state,
    )  # fmt: skip
    near, total = _near(q, k, v, seen)
    share = share.to(work)[:, None]
    o = (share * near + far[..., :-1]) / (share * total + far[..., -1:])
    return o.to(dtype), state


def block_of(length: int, window: int) -> int:
    """Queries that are compared at once."""
    return min(length, max(LEAST_BLOCK, min(window, MOST_BLOCK)))


def compared(length: int, window: int) -> int:
    """Pairs of query and key whose scores are made."""
    block = max(1, block_of(length, window))
    return -(-length // block) * block * (block + window - 1)


def _near(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """sum exp(s - c) v [B, T, H, V] and sum exp(s - c) [B, T, H, 1] over each query's window; q is scaled."""
    length = q.shape[1]
    groups, window = k.shape[2], k.shape[1] - length
    block = block_of(length, window)
    short = -length % block
    q = F.pad(q, (0, 0, 0, 0, 0, short)).unflatten(1, (-1, block)).unflatten(3, (groups, -1))
    size = block + window - 1  # keys of a block: its queries' own and those before them
    keys, values = (F.pad(x[:, 1:], (0, 0, 0, 0, 0, short)).unfold(1, size, block) for x in (k, v))
    here = F.pad(seen[:, 1:], (0, short)).unfold(1, size, block)
    place = torch.arange(size, device=q.device) - torch.arange(block, device=q.device)[:, None]
    # A query at padding has its own key alone in sight, so that its answer is finite.
    visible = ((place >= 0) & (place < window) & here[:, :, None]) | (place == window - 1)
    s = torch.einsum("bncgrd,bngdm->bngrcm", q, keys)
    s = s.masked_fill(~visible[:, :, None, None], float("-inf"))
    p = (s - s.amax(-1, keepdim=True)).exp()
    near = torch.einsum("bngrcm,bngvm->bncgrv", p, values).flatten(3, 4).flatten(1, 2)
    total = p.sum(-1, keepdim=True).permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)
    return near[:, :length], total[:, :length]


def naive_window_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, q_features: Tensor, k_features: Tensor, share: Tensor, window: int
) -> Tensor:
    """The definition, token by token, of one sequence from its start: q, k, v and features are [B, T, H, ...]."""
    answers = []
    for t in range(q.shape[1]):
        first = max(0, t - window + 1)
        s = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, first : t + 1]) * q.shape[-1] ** -0.5
        near = share[:, None] * (s - s.amax(-1, keepdim=True)).exp()
        far = torch.einsum("bhf,bshf->bhs", q_features[:, t], k_features[:, :first])
        weights = torch.cat((far, near), -1)
        answers.append(torch.einsum("bhs,bshv->bhv", weights / weights.sum(-1, keepdim=True), v[:, : t + 1]))
    return torch.stack(answers, 1)
