"""Softmax attention: the definition in loops, and the form that runs, through PyTorch's SDPA kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from contextlab.errors import InputError
from contextlab.ops.precision import working_dtype


def naive_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    slopes: Tensor | None = None,
    sink: Tensor | None = None,
    cap: float | None = None,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> Tensor:
    """Softmax attention by its definition (1706.03762, eq. 1), query by query.

    q: [B, Tq, H, D]. k: [B, Tk, Hkv, D]. v: [B, Tk, Hkv, V]. Others as for `softmax_attention`. Returns [B, Tq, H, V].
    """
    q_at, k_at = resolve_positions(q, k, q_position, k_position)
    batch, _, heads, dim = q.shape
    shared = heads // k.shape[2]  # query heads on one key head
    rows = []
    for b, i, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        at, keys_at = q_at[b % len(q_at), i], k_at[b % len(k_at)]
        distance = at - keys_at
        sees = (keys_at >= 0) & ((distance >= 0) if causal else torch.ones_like(distance, dtype=torch.bool))
        if window is not None:
            sees &= (distance < window) | (keys_at < sinks)
        score = k[b, sees, h // shared] @ q[b, i, h] * (dim**-0.5 if scale is None else scale)
        score = score if cap is None else cap * (score / cap).tanh()
        if slopes is not None:
            score = score - slopes[h].to(score) * distance[sees].abs()
        if sink is not None:
            score = torch.cat((score, sink[h : h + 1].to(score)))
        rows.append(
            score.softmax(0)[: int(sees.sum())] @ v[b, sees, h // shared]
        )  # a query that sees nothing gets zeros
    return torch.stack(rows).view(batch, -1, heads, v.shape[-1])


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    slopes: Tensor | None = None,
    sink: Tensor | None = None,
    cap: float | None = None,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> Tensor:
    """Softmax attention (1706.03762, eq. 1) through PyTorch's SDPA, with the smallest mask that will do.

    A query sees the keys at its own position and before, within the window if there is one, and the sinks.
    A query that sees no key gets zeros.

    q: [B, Tq, H, D].
    k: [B, Tk, Hkv, D]; Hkv divides H, and H / Hkv query heads in a row share one key head (GQA, 2305.13245).
    v: [B, Tk, Hkv, V].
    scale: of the scores; default D ** -0.5.
    causal: False lets every query see every key; then no window.
    window: tokens that a query sees, its own counted; None for all.
    sinks: the first positions, which stay visible beyond the window (2309.17453).
    slopes: [H]; adds -slope * distance to the scores (ALiBi, 2108.12409).
    sink: [H], the score of a learned sink, which takes attention from every query and gives nothing (2309.17453).
    cap: of the scores; each becomes cap tanh(score / cap) before slopes and masks (Gemma 2, 2408.00118). None for none.
    q_position, k_position: [B or 1, Tq] and [B or 1, Tk] int64, both or neither. Keys at negative positions
        are seen by no query: padding, empty slots. By default keys count from 0 and the queries are the last.

    Returns [B, Tq, H, V].
    """
    _check(q, k, v, causal, window, sinks, slopes)
    length, n_keys = q.shape[1], k.shape[1]
    plain = slopes is None and sink is None
    if q_position is None and k_position is None and plain and (window is None or window >= n_keys):
        if not causal or length == 1:
            return attend(q, k, v, scale, cap=cap)
        if length == n_keys:
            return attend(q, k, v, scale, is_causal=True, cap=cap)
    q_at, k_at = resolve_positions(q, k, q_position, k_position)

    def part(queries: slice, keys: Tensor | slice) -> Tensor:
        mask = _mask(q_at[:, queries], k_at[:, keys], causal, window, sinks, slopes, q.dtype)
        some_k, some_v = k[:, keys], v[:, keys]
        if sink is not None:
            some_k, some_v, mask = beside_sink(some_k, some_v, mask, sink, q.dtype)
        return attend(q[:, queries], some_k, some_v, scale, mask, cap=cap)

    # Queries are taken in chunks, so that no mask is larger than [chunk, Tk], and a window costs O(T window).
    chunk = min(max(window or 1024, 128), 1024)
    if length <= chunk:
        return part(slice(None), slice(None))
    outputs = []
    for first in range(0, length, chunk):
        queries = slice(first, min(first + chunk, length))
        keys: Tensor | slice = slice(None)
        if causal and q_position is None:  # then places in k are positions, and most keys are out of sight
            last = n_keys - length + queries.stop
            low = max(0, n_keys - length + first - window + 1) if window is not None else 0
            keys = slice(low, last)
            if sinks > 0 and low > 0:
                keys = torch.cat([torch.arange(min(sinks, low)), torch.arange(low, last)]).to(k.device)
        outputs.append(part(queries, keys))
    return torch.cat(outputs, 1)


def capped(scores: Tensor, cap: float | None) -> Tensor:
    """Scores of any shape, each cap tanh(score / cap), so that none is beyond the cap; as they are where it is None."""
    return scores if cap is None else (scores / cap).tanh() * cap


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    cap: float | None = None,
) -> Tensor:
    """PyTorch's SDPA on the layout [B, T, H, D], with grouped heads; mask: bool or bias [B or 1, H or 1, Tq, Tk].

    SDPA caps no scores, so that with a `cap` (see `softmax_attention`) they are made here, block by block.

    On a CPU with several threads SDPA takes as long as with one where sequences are short: there plain matrix
    products are 1.2 to 1.9 times as fast (two threads, forward and backward, 16 to 128 tokens;
    `python benchmarks/training.py` measures the whole step).

    Gradients of scores beyond 1e5 are those of matrix products on a CPU, with memory O(Tq Tk). On CUDA nothing is
    checked, for that would wait for the device: such gradients are what PyTorch's kernels give.
    """
    length, heads, dim = q.shape[1:]
    if cap is not None:
        return _capped(q, k, v, dim**-0.5 if scale is None else scale, mask, is_causal, cap)
    if _scores_may_be_vast(q, k, scale):
        with sdpa_kernel(SDPBackend.MATH):
            return _sdpa(q, k, v, scale, mask, is_causal)
    if is_causal and _many_threads(q) and length <= 128 and heads == k.shape[2]:
        return _short(q, k, v, dim**-0.5 if scale is None else scale)
    return _sdpa(q, k, v, scale, mask, is_causal)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None, is_causal: bool) -> Tensor:
    """See `attend`."""
    batch, length, heads, dim = q.shape
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    shared = heads // k.shape[1]
    if length == 1 and shared > 1:
        # One query a head: the heads that share a key head are as many queries on it, and no key is copied.
        q = q.reshape(batch, -1, shared, dim)
        if mask is not None and mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], -1, shared, mask.shape[-1])
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        return y.reshape(batch, 1, heads, v.shape[-1])
    value = v.shape[-1]
    if value < dim:  # the kernels whose memory is linear want keys and values of one size
        v, scale = F.pad(v, (0, dim - value)), dim**-0.5 if scale is None else scale
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=shared > 1)
    return (y[..., :value] if value < dim else y).transpose(1, 2)


VAST = 1e5
"""Scores from which on a kernel that makes its weights again in the backward pass, as exp of a difference of scores,
errs by more than a hundredth in float32; from 1e9 on its gradients are NaN."""


def _scores_may_be_vast(q: Tensor, k: Tensor, scale: float | None) -> bool:
    """Whether gradients are wanted, on a CPU, of scores of q and k that may be beyond `VAST`."""
    if q.device.type != "cpu" or not torch.is_grad_enabled() or not (q.requires_grad or k.requires_grad):
        return False
    if torch.compiler.is_compiling() or type(q) is not Tensor or torch._C._are_functorch_transforms_active():
        return False  # what a tensor holds cannot be asked
    if not q.numel() or not k.numel():
        return False
    dim, most = q.shape[-1], 1.0
    for x in (q, k):
        low, high = torch.aminmax(x.detach())  # one pass; a norm takes twenty times as long
        most *= max(-low.item(), high.item())
    return dim * most * (dim**-0.5 if scale is None else abs(scale)) > VAST


def _many_threads(q: Tensor) -> bool:
    """Asked before any length is: an exported program would be bound to the lengths that go the short way."""
    plain = q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)
    return plain and not torch.compiler.is_compiling() and torch.get_num_threads() > 1


def _short(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of whole sequences by matrix products; memory O(T^2)."""
    batch, length, heads, _ = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    bias = q.new_full((length, length), float("-inf")).triu(1)
    y = torch.baddbmm(bias, q, k.mT, alpha=scale).softmax(-1) @ v
    return y.unflatten(0, (batch, heads)).transpose(1, 2)


CAPPED = 2**20
"""Capped scores that are made at once: 4 MB of float32."""


def _capped(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, is_causal: bool, cap: float) -> Tensor:
    """`attend` where scores are capped: matrix products of blocks of queries, with memory O(Tk) where none is kept."""
    batch, length, heads, _ = q.shape
    n_keys, kv_heads = k.shape[1:3]
    rows = (q * scale).transpose(1, 2).unflatten(1, (kv_heads, -1))  # heads that share a key head: its queries
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    block, outputs = min(length, max(16, CAPPED // max(1, batch * heads * n_keys))), []
    for first in range(0, length, block):
        last = min(first + block, length)
        stop = last if is_causal else n_keys
        few = rows[..., first:last, :].flatten(2, 3)
        scores = capped(few @ k[:, :, :stop].mT, cap).unflatten(2, (-1, last - first)).flatten(1, 2)
        if is_causal:
            future = torch.ones(last - first, last - first, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(F.pad(future, (first, 0)), float("-inf"))
        if mask is not None:
            part = mask[:, :, first:last] if mask.shape[2] > 1 else mask
            scores = scores.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else scores + part
        weights = scores.softmax(-1, dtype=working_dtype(q.dtype)).to(v.dtype)
        weights = weights if mask is None else weights.nan_to_num(0.0)
        each = weights.unflatten(1, (kv_heads, -1)).flatten(2, 3) @ v[:, :, :stop]
        outputs.append(each.unflatten(2, (-1, last - first)).flatten(1, 2))
    return torch.cat(outputs, 2).transpose(1, 2)


def _mask(
    q_at: Tensor,
    k_at: Tensor,
    causal: bool,
    window: int | None,
    sinks: int,
    slopes: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[B or 1, 1, Tq or 1, Tk] bool, or with slopes the bias [B or 1, H, Tq, Tk] in `dtype`."""
    keys = k_at[:, None, None, :]
    distance = q_at[:, None, :, None] - keys
    sees = keys >= 0
    if causal:
        sees = sees & (distance >= 0)
    if window is not None:
        near = distance < window
        sees = sees & (near | (keys < sinks) if sinks else near)
    if slopes is None:
        return sees
    bias = distance.abs() * -slopes.to(q_at.device, dtype)[:, None, None]
    return bias.masked_fill(~sees, float("-inf"))


def beside_sink(k: Tensor, v: Tensor, mask: Tensor, sink: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, N, Hkv, ...] after a token of zeros whose score is `sink` [H], and the bias that says so.

    mask: bool or bias [B or 1, H or 1, T, N]. Returns k and v [B, 1 + N, Hkv, ...] and the bias [B or 1, H, T, 1 + N].
    """
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
    column = sink.to(mask.device, dtype)[:, None, None].expand(len(mask), -1, mask.shape[2], 1)
    bias = torch.cat((column, mask.expand(-1, len(sink), -1, -1)), -1)
    return F.pad(k, (0, 0, 0, 0, 1, 0)), F.pad(v, (0, 0, 0, 0, 1, 0)), bias


def resolve_positions(
    q: Tensor, k: Tensor, q_position: Tensor | None, k_position: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The positions [B or 1, Tq] and [B or 1, Tk]; by default keys count from 0 and the queries are the last."""
    if (q_position is None) != (k_position is None):
        raise InputError("give both q_position and k_position, or neither")
    if q_position is None or k_position is None:
        queries, keys = q.shape[1], k.shape[1]
        k_position = torch.arange(keys, device=k.device)[None]
        return torch.arange(keys - queries, keys, device=k.device)[None], k_position
    for name, position, tensor in (("q", q_position, q), ("k", k_position, k)):
        if position.ndim != 2 or position.shape[0] not in (1, q.shape[0]) or position.shape[1] != tensor.shape[1]:
            expected = f"[{q.shape[0]} or 1, {tensor.shape[1]}]"
            raise InputError(f"{name}_position: expected {expected}, got {list(position.shape)}")
    return q_position, k_position


def _check(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, sinks: int, slopes: Tensor | None
) -> None:
    check_shapes(q, k, v)
    if causal and q.shape[1] > k.shape[1]:
        raise InputError(f"causal attention of {q.shape[1]} queries needs as many keys at least, got {k.shape[1]}")
    if window is not None and (window < 1 or not causal):
        raise InputError(f"a window needs causal=True and at least 1 token, got window={window}, causal={causal}")
    if sinks < 0:
        raise InputError(f"sinks must be at least 0, got {sinks}")
    if slopes is not None and slopes.shape != q.shape[2:3]:
        raise InputError(f"slopes: expected [{q.shape[2]}], got {list(slopes.shape)}")


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises InputError unless q [B, Tq, H, D], k [B, Tk, Hkv, D] and v [B, Tk, Hkv, V] fit together."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or q.shape[-1] != k.shape[-1] or k.shape[:3] != v.shape[:3]:
        raise InputError(
            "expected q [B, Tq, H, D], k [B, Tk, Hkv, D], v [B, Tk, Hkv, V], "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if q.shape[2] % k.shape[2]:
        raise InputError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
