"""The engine of `ops.linear`: a matrix state that decays by a scalar, in chunks, by hand forwards and backwards.

The backward is by hand because autograd would keep and re-read many [L, L] temporaries. A block of chunks at a time
stays in the processor's cache. Heads that share queries and keys lie side by side: one product writes all their states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from contextlab.ops.blocks import Chunks, Scratch, blocks, folded, inputs_of
from contextlab.ops.decays import Decays, each_its_decays
from contextlab.ops.exported import scalar_decay_chunks
from contextlab.ops.precision import without_autocast


def scalar_decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor | None,
    state: Tensor | None,
    scale: float,
    count: int,
    size: int,
    final: bool,
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T and o_t = scale S_t^T q_t, differentiable once.

    q, k: [B, T, G, K]. v: [B, T, H, V], H a multiple of G. state: [B, H, K, V] or None. All at least float32, T >= 1.
    c: sums of log decays within each chunk, float64, broadcastable to [B, N, L, H]; None: no decay. count, size: N
    chunks of L tokens. Returns o [B, T, H, V] and, if `final`, the last state [B, H, K, V].
    """
    if torch.compiler.is_exporting():
        found = scalar_decay_chunks(q, k, v, c, state, scale, size)
        return found[0], found[1] if final else None
    groups, heads, value = q.shape[2], *v.shape[2:]
    if c is None and heads > groups:  # no decay tells the heads of a group apart: they are one that is wide
        v = v.unflatten(2, (groups, -1)).flatten(3)
        state = None if state is None else state.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)
    o, last, *_ = _ScalarDecay.apply(q, k, v, c, state, scale, count, size, final, torch.is_grad_enabled())
    if o.shape[2] < heads:
        o = o.unflatten(3, (-1, value)).flatten(2, 3)
        last = None if last is None else last.unflatten(3, (-1, value)).transpose(2, 3).flatten(1, 2)
    return o, last


class _ScalarDecay(torch.autograd.Function):
    """Returns o, the last state or None, and for the backward: weights, decays within chunks, states.

    Chunks first: weights [N, B, G, R, L, L] of R heads a group, states [N + 1, B, G, K, R, V].
    """

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        c: Tensor | None,
        state: Tensor | None,
        scale: float,
        count: int,
        size: int,
        final: bool,
        keep: bool,
    ) -> tuple[Tensor | None, ...]:
        (batch, _, groups, key), (heads, value) = k.shape, v.shape[2:]
        repeat, rows = heads // groups, batch * groups
        plan = blocks(count, rows, size, max(key, repeat * value, repeat * size // 2))
        kept = count if keep else plan[0][1]
        passes = state is not None or count > 1
        decays = None if c is None else Decays(c, groups, v.dtype, count, batch)
        weights = v.new_empty(kept, batch, groups, repeat, size, size)
        masks = states = None
        if decays is not None:
            masks = v.new_empty(kept if len(decays.c) > 1 else 1, *decays.c.shape[1:], size)
        if passes or final:
            states = v.new_empty(kept + 1, batch, groups, key, repeat, value)
        S = None if state is None else state.unflatten(1, (groups, repeat)).transpose(2, 3)
        o, wide, scratch = v.new_empty(v.shape), v.flatten(2).unflatten(2, (groups, -1)), Scratch(v)
        given, answers = [Chunks(x, size) for x in (q, k, wide)], Chunks(o.flatten(2).unflatten(2, (groups, -1)), size)
        for first, number in plan:
            many, at = number * rows, first if keep else 0
            lie = (number, batch, groups, size, repeat, value)
            qs, ks, vs = inputs_of(scratch, given, first, number)
            gram = torch.bmm(qs.mul_(scale), ks.mT, out=scratch("gram", many, size, size))
            weight = weights[at : at + number]
            gram = gram.view(number, batch, groups, 1, size, size)
            if decays is None or masks is None:
                weight.copy_(gram).tril_()
            else:
                torch.mul(gram, decays.between(masks, first, number, at), out=weight)
            by_head = _by_head(scratch, "v", vs, repeat)
            answer = torch.bmm(weight.flatten(0, 3), by_head, out=scratch("o", *by_head.shape))
            answer = _side_by_side(scratch, "wide o", answer, repeat)
            if states is not None:
                run = states[at : at + number + 1]
                if S is None:
                    run[0].zero_()
                else:
                    run[0].copy_(S)
                kept_v = vs
                if decays is not None:
                    kept_v = torch.mul(vs.view(lie), decays.end(first, number), out=scratch("kept", *lie)).view(
                        vs.shape
                    )
                torch.bmm(ks.mT, kept_v, out=run[1:].view(many, key, -1))
                for n in range(number):
                    _fade(run[n + 1], run[n], decays, first + n)
                S = run[-1] if keep else run[-1].clone()
                if passes and decays is None:
                    answer.baddbmm_(qs, run[:-1].view(many, key, -1))
                elif passes and decays is not None:
                    read = torch.bmm(qs, run[:-1].view(many, key, -1), out=scratch("read", *vs.shape))
                    answer.view(lie).addcmul_(read.view(lie), decays.start(first, number))
            answers.write(first, answer)
        last = None
        if final and S is not None:
            last = S.transpose(2, 3).flatten(1, 2).clone(memory_format=torch.contiguous_format)
        return (o, last, weights, masks, states) if keep else (o, last, None, None, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, c, state, *ctx.options, _, _ = inputs
        ctx.has_state = state is not None
        ctx.mark_non_differentiable(*(x for x in output[2:] if x is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, c, output[0], *output[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlast: Tensor | None, *_: Any) -> Any:
        q, k, v, c, o, *kept = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        wanted = ctx.needs_input_grad[3]
        found = _Backward.apply(q, k, v, c, o, do, dlast, *kept, *ctx.options, wanted, ctx.has_state)
        return *found, *[None] * 5

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        in_dims, inputs = each_its_decays(info.batch_size, in_dims, inputs)
        return folded(_ScalarDecay, info.batch_size, in_dims, inputs, (0,) * 5, (0, 0, 1, 1, 1))


class _Backward(torch.autograd.Function):
    """The gradients of q, k, v, c and state; a function of its own so that it too can be mapped.

    For the decay it uses that o_i is proportional to exp(c_i) and depends on v_j only by exp(-c_j) v_j: so
    dc = do . o - dv . v, and the state S after a chunk adds <dS, S> at the last token.
    """

    @staticmethod
    @without_autocast
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        c: Tensor | None,
        o: Tensor,
        do: Tensor,
        dlast: Tensor | None,
        weights: Tensor,
        masks: Tensor | None,
        states: Tensor | None,
        scale: float,
        count: int,
        size: int,
        of_decays: bool,
        of_state: bool,
    ) -> tuple[Tensor | None, ...]:
        (batch, length, groups, key), (heads, value) = k.shape, v.shape[2:]
        repeat, rows = heads // groups, batch * groups
        decays = None if c is None else Decays(c, groups, v.dtype, count, batch)
        dq, dk, dv, scratch = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), Scratch(v)
        dc = dS = None
        if of_decays:
            dc = v.new_zeros(batch, count * size, heads)
        if states is not None:
            dS = torch.zeros_like(states[0])
            if dlast is not None:
                dS.copy_(dlast.unflatten(1, (groups, repeat)).transpose(2, 3))
        wide_v, wide_do, wide_dv = (x.flatten(2).unflatten(2, (groups, -1)) for x in (v, do, dv))
        given = [Chunks(x, size) for x in (q, k, wide_v, wide_do)]
        dq_chunks, dk_chunks, dv_chunks = (Chunks(x, size) for x in (dq, dk, wide_dv))
        for first, number in reversed(blocks(count, rows, size, max(key, repeat * value, repeat * size // 2))):
            many = number * rows
            lie = (number, batch, groups, size, repeat, value)
            qs, ks, vs, dos = inputs_of(scratch, given, first, number)
            weight = weights[first : first + number]
            by_head, slope = _by_head(scratch, "v", vs, repeat), _by_head(scratch, "do", dos, repeat)
            dgram = torch.bmm(slope, by_head.mT, out=scratch("gram", many * repeat, size, size)).view(weight.shape)
            if masks is None:
                dgram.tril_()
            else:
                dgram.mul_(masks[first : first + number] if len(masks) > 1 else masks)
            dgram = dgram.squeeze(3) if repeat == 1 else dgram.sum(3)
            dgram = dgram.flatten(0, 2)
            qs.mul_(scale)
            dqs = torch.bmm(dgram, ks, out=scratch("dq", *ks.shape))
            dks = torch.bmm(dgram.mT, qs, out=scratch("dk", *ks.shape))
            dvs = torch.bmm(weight.flatten(0, 3).mT, slope, out=scratch("dv", *slope.shape))
            dvs = _side_by_side(scratch, "wide dv", dvs, repeat)
            if states is not None and dS is not None:
                run, grown, kept_v = states[first : first + number + 1], dos, vs
                if decays is not None:
                    grown = torch.mul(dos.view(lie), decays.start(first, number), out=scratch("grown", *lie))
                    kept_v = torch.mul(vs.view(lie), decays.end(first, number), out=scratch("kept", *lie))
                    grown, kept_v = grown.view(vs.shape), kept_v.view(vs.shape)
                slopes = scratch("slopes", number + 1, *dS.shape)
                slopes[-1].copy_(dS)
                torch.bmm(qs.mT, grown, out=slopes[:-1].view(many, key, -1))
                for n in reversed(range(number)):
                    _fade(slopes[n], slopes[n + 1], decays, first + n)
                dS.copy_(slopes[0])
                after = slopes[1:].view(many, key, -1)
                dqs.baddbmm_(grown, run[:-1].view(many, key, -1).mT)
                dks.baddbmm_(kept_v, after.mT)
                if decays is None:
                    dvs.baddbmm_(ks, after)
                else:
                    read = torch.bmm(ks, after, out=scratch("grown", *vs.shape))
                    dvs.view(lie).addcmul_(read.view(lie), decays.end(first, number))
                if dc is not None:
                    ends = slopes[1:].mul_(run[1:]).sum((3, 5)).permute(1, 0, 2, 3).flatten(2)
                    dc.unflatten(1, (count, size))[:, first : first + number, -1] += ends
            dv_chunks.write(first, dvs)
            if dc is not None:
                part = slice(first * size, min((first + number) * size, length))
                of_part = scratch("part", batch, part.stop - part.start, heads, value)
                dc[:, part] += torch.mul(do[:, part], o[:, part], out=of_part).sum(-1)
                share = vs.mul_(dvs).view(lie).sum(-1).permute(1, 0, 3, 2, 4).flatten(3)
                dc.unflatten(1, (count, size))[:, first : first + number] -= share
            dq_chunks.write(first, dqs.mul_(scale))
            dk_chunks.write(first, dks)
        if dc is not None and c is not None:
            dc = dc.unflatten(1, (count, size)).sum_to_size(c.shape).to(c.dtype)
        start = dS.transpose(2, 3).flatten(1, 2).contiguous() if of_state and dS is not None else None
        return dq, dk, dv, dc, start

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing: it is not differentiated again."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        in_dims, inputs = each_its_decays(info.batch_size, in_dims, inputs, masks=8)
        return folded(_Backward, info.batch_size, in_dims, inputs, (0,) * 7 + (1,) * 3, (0,) * 5)


def _fade(into: Tensor, state: Tensor, decays: Decays | None, n: int) -> None:
    """Add a state [B, G, K, R, V], decayed over chunk n, to another."""
    if decays is None:
        into.add_(state)
    else:
        into.addcmul_(state, decays.whole(n))


def _by_head(scratch: Scratch, name: str, x: Tensor, repeat: int) -> Tensor:
    """[N, L, R V] -> [N R, L, V]."""
    if repeat == 1:
        return x
    many, size, width = x.shape
    x = x.view(many, size, repeat, -1).transpose(1, 2)
    return scratch(f"{name} by head", many, repeat, size, width // repeat).copy_(x).flatten(0, 1)


def _side_by_side(scratch: Scratch, name: str, x: Tensor, repeat: int) -> Tensor:
    """[N R, L, V] -> [N, L, R V]."""
    if repeat == 1:
        return x
    many, size, width = x.shape
    x = x.view(-1, repeat, size, width).transpose(1, 2)
    return scratch(name, many // repeat, size, repeat, width).copy_(x).flatten(2)
