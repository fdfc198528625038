"""Log-linear attention: linear attention whose past lies in O(log T) states, one for each bit of the place.

The tokens before place t are parted as the binary digits of t say (a Fenwick tree): the digit of weight 2^l stands for
a bucket of 2^l tokens, the largest farthest back. Each bucket is a state of gated linear attention, and a query weighs
it by a factor of its own for that level; level 0 is the token itself (2506.04761).
"""

from __future__ import annotations

import torch
from torch import Tensor

from contextlab.ops.decays import decay_matrix, log_decays
from contextlab.ops.precision import without_autocast


def fenwick_levels(length: int, device: torch.device | str = "cpu") -> Tensor:
    """[length, length] int64: the level of the bucket that holds key s for query t > s; 0 for t = s.

    Level l >= 1 holds 2^(l - 1) tokens: it is the place of the highest bit in which t and s differ, counted from 1.
    Above the diagonal the value means nothing.
    """
    place = torch.arange(length, device=device)
    differ = place[:, None] ^ place
    bits = torch.arange(max(1, length.bit_length()), device=device)
    return ((differ[..., None] >> bits) > 0).sum(-1)


@without_autocast
def log_linear_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the tokens of an aligned chunk of 2^n tokens read from each other, and the state that they make.

    q, k: [B, L, H, K]. v: [B, L, H, V]. g: [B, L, H] log decay. weights: [B, L, H, levels >= n + 1] of each level.
    Returns (o [B, L, H, V]; the chunk's state [B, H, K, V]; the decay from its start to each token [B, L, H]).
    """
    length = q.shape[1]
    c = log_decays(g, v.dtype).cumsum(1)
    index = fenwick_levels(length, q.device).tril()
    weighed = weights.transpose(1, 2).gather(-1, index.expand(q.shape[0], q.shape[2], -1, -1))  # [B, H, L, L]
    scores = torch.einsum("bthk,bshk->bhts", q, k) * decay_matrix(c.transpose(1, 2), v.dtype) * weighed.tril()
    state = torch.einsum("bshk,bshv->bhkv", k * (c[:, -1:] - c).exp().to(v.dtype).unsqueeze(-1), v)
    return torch.einsum("bhts,bshv->bthv", scores, v), state, c.exp().to(v.dtype)


def naive_log_linear_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor, weights: Tensor) -> Tensor:
    """What defines log-linear attention, pair by pair: the weight of a pair is that of its bucket's level.

    q, k: [B, T, H, K]. v: [B, T, H, V]. g: [B, T, H]. weights: [B, T, H, levels]. Returns o [B, T, H, V].
    """
    o = torch.zeros_like(v)
    for t in range(q.shape[1]):
        end, buckets = t, [(t, t + 1, 0)]
        for bit in range(t.bit_length()):  # the smallest bucket is the nearest
            if t >> bit & 1:
                buckets.append((end - 2**bit, end, bit + 1))
                end -= 2**bit
        for first, last, level in buckets:
            for s in range(first, last):
                decay = g[:, s + 1 : t + 1].sum(1).exp()
                score = (q[:, t] * k[:, s]).sum(-1) * decay * weights[:, t, :, level]
                o[:, t] += score.unsqueeze(-1) * v[:, s]
    return o
