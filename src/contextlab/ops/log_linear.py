"""Log-linear attention: linear attention whose past lies in O(log T) states, one for each bit of the place.

The tokens before place t are parted as the binary digits of t say (a Fenwick tree): the digit of weight 2^l stands for
a bucket of 2^l tokens, the largest farthest back. Each bucket is a state of gated linear attention, and a query weighs
it by a factor of its own for that level; level 0 is the token itself (2506.04761).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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


@without_autocast
def log_linear_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, weights: Tensor, matrices: Tensor, done: int = 0, complete: int = 0
) -> tuple[Tensor, Tensor]:
    """Many chunks at once, a product a level: no loop over the length (2506.04761, sec. 3.3).

    q, k: [B, N, L, H, K]. v: [B, N, L, H, V]. g: [B, N, L, H] log decay. weights: [B, N, L, H, levels]; what lies
        farther back than they reach has the weight of the last.
    matrices: [B, digits, H, K, V], the states of the binary digits of `done`, as many as `done + complete` has; those
        of digits that are 0 are not read.
    done: chunks before. complete: of the N, those that the states shall hold; N or N - 1.

    Returns o [B, N, L, H, V], and the states of the digits of `done + complete`, zeros where the digit is 0.
    """
    batch, count, size = q.shape[:3]
    folded = log_linear_chunk(*(x.flatten(0, 1) for x in (q, k, v, g, weights)))
    o, blocks, decayed = (x.unflatten(0, (batch, count)) for x in folded)
    # Log decays from the first chunk's start to the start of each, and to the end of each block of 2^j chunks.
    sums = F.pad(log_decays(g, v.dtype).sum(2).cumsum(1), (0, 0, 1, 0))
    blocks, ends = blocks[:, :complete], sums[:, 1 : complete + 1]
    q, start, after = q * decayed.unsqueeze(-1), done, []
    for j in range(matrices.shape[1]):
        if done >> j & 1:  # what was read before ends where the first chunk starts
            blocks, ends = torch.cat((matrices[:, j : j + 1], blocks), 1), F.pad(ends, (0, 0, 1, 0))
            start -= 1
        readers = [n for n in range(count) if (done + n) >> j & 1]
        if readers:
            bucket = [2 * ((done + n) >> j + 1) - start for n in readers]
            between = (sums[:, readers] - ends[:, bucket]).exp().to(v.dtype)
            level = min(size.bit_length() + j, weights.shape[-1] - 1)
            weighed = weights[:, readers, ..., level] * between.unsqueeze(2)
            read = torch.einsum("bnthk,bnhkv->bnthv", q[:, readers] * weighed.unsqueeze(-1), blocks[:, bucket])
            o = o.index_add(1, torch.tensor(readers, device=o.device), read)
        if (done + complete) >> j & 1:
            left = (sums[:, complete] - ends[:, -1]).exp().to(v.dtype)
            after.append(blocks[:, -1] * left[..., None, None])
        else:
            after.append(torch.zeros_like(matrices[:, j]))
        even = blocks.shape[1] // 2 * 2
        whole = (ends[:, 1:even:2] - ends[:, :even:2]).exp().to(v.dtype)
        blocks = blocks[:, :even:2] * whole[..., None, None] + blocks[:, 1:even:2]
        ends, start = ends[:, 1:even:2], start // 2
    return o, torch.stack(after, 1) if after else matrices


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
