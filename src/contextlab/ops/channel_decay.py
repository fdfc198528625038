"""The engine of `ops.gla`: a matrix state whose rows decay, in chunks, by hand forwards and backwards.

Between the halves of a block of tokens the decays are parted at the middle, so that both parts are at most 1
(`ops.halves`). Here they are products and not exp of sums: exp(g) is taken once, and each level of halving multiplies
what it has by the decay of the other half, in place. A block of chunks at a time stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from contextlab.ops.blocks import Chunks, Scratch, blocks, folded, inputs_of
from contextlab.ops.exported import channel_decay_chunks
from contextlab.ops.halves import by_halves
from contextlab.ops.precision import without_autocast


def channel_decay(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor | None, state: Tensor, scale: float, size: int
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T and o_t = scale S_t^T q_t, twice differentiable.

    q, k, g: [B, T, H, K], T at least 1. v: [B, T, H, V]. state: [B, H, K, V]. All of one dtype, at least float32.
    bonus: [H, K], or None. With it a token reads the state before its own decay, and itself times the bonus.
    size: tokens a chunk, a power of two. Returns o [B, T, H, V] and the last state.
    """
    if torch.compiler.is_exporting():
        return channel_decay_chunks(q, k, v, g, bonus, state, scale, size)
    bonus = None if bonus is None else bonus.expand(len(q), -1, -1)
    o, last, *_ = _ChannelDecay.apply(q, k, v, g, bonus, state, scale, size, torch.is_grad_enabled())
    return o, last


class _ChannelDecay(torch.autograd.Function):
    """Returns o, the last state, and if `keep`, for the backward, the weights and states of all chunks."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        bonus: Tensor | None,
        state: Tensor,
        scale: float,
        size: int,
        keep: bool,
    ) -> tuple[Tensor | None, ...]:
        (batch, length, heads, key), value = k.shape, v.shape[-1]
        rows, count = batch * heads, -(-length // size)
        plan = blocks(count, rows, size, max(key, value))
        kept = count if keep else plan[0][1]
        weights = v.new_zeros(kept, rows, size + 1, size)  # a row more: then all pieces of a level are evenly spaced
        states = v.new_empty(kept + 1, rows, key, value)
        o, S, scratch = v.new_empty(v.shape), state.flatten(0, 1), Scratch(v)
        given, answers = [Chunks(x, size) for x in (q, k, v, g)], Chunks(o, size)
        for first, number in plan:
            many, at = number * rows, first if keep else 0
            qs, ks, vs, decay = inputs_of(scratch, given, first, number)
            qs.mul_(scale)
            decay.exp_()
            own = torch.mul(qs, ks, out=scratch("own", many, size, key))
            if bonus is not None:
                own.view(number, rows, size, key).mul_(bonus.reshape(1, rows, 1, key))
            else:
                qs.mul_(decay)
            weight, total = weights[at : at + number], decay
            weight.view(-1, size + 1)[:, 0] = own.sum(-1).flatten()
            for half in _levels(size):
                (_, right), (left, _) = _parts(qs, half), _parts(ks, half)
                _cross(weight, half).copy_(_products(scratch, right, left))
                total = _joined(total, right, left)
            run = states[at : at + number + 1]
            run[0].copy_(S)
            torch.bmm(ks.mT, vs, out=run[1:].flatten(0, 1))
            fade = total.view(number, rows, key, 1)
            for n in range(number):
                run[n + 1].addcmul_(fade[n], run[n])
            S = run[-1] if keep else run[-1].clone()
            answer = torch.bmm(_square(weight), vs, out=scratch("answer", many, size, value))
            answers.write(first, answer.baddbmm_(qs, run[:-1].flatten(0, 1)))
        last = S.clone().view(state.shape)
        return (o, last, weights, states) if keep else (o, last, None, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.scale, ctx.size, _ = inputs[6:]
        ctx.mark_non_differentiable(*(x for x in output[2:] if x is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6], *output[2:])

    @staticmethod
    @without_autocast
    def backward(ctx: Any, do: Tensor | None, dlast: Tensor | None, *_: Any) -> Any:
        q, k, v, g, bonus, state, *kept = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else do
        dlast = torch.zeros_like(state) if dlast is None else dlast
        found = _Backward.apply(q, k, v, g, bonus, state, do, dlast, *kept, ctx.scale, ctx.size)
        return *found, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return folded(_ChannelDecay, info.batch_size, in_dims, inputs, (0,) * 6, (0, 0, 1, 1))


class _Backward(torch.autograd.Function):
    """The gradients of q, k, v, g, bonus and state; differentiable itself, by the form that autograd follows.

    That of a log decay uses that o_i is proportional to exp(c_i) q_i and depends on k_j by exp(-c_j) k_j: of c it is
    q dq - k dk, and <dS, S> of the state S after a chunk at its last token.
    """

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        bonus: Tensor | None,
        state: Tensor,
        do: Tensor,
        dlast: Tensor,
        weights: Tensor,
        states: Tensor,
        scale: float,
        size: int,
    ) -> tuple[Tensor | None, ...]:
        (batch, length, heads, key), value = k.shape, v.shape[-1]
        rows, count = batch * heads, -(-length // size)
        dq, dk, dv, dg = (x.new_empty(x.shape) for x in (q, k, v, g))
        dbonus = None if bonus is None else torch.zeros_like(bonus, memory_format=torch.contiguous_format)
        each = None if bonus is None else bonus.reshape(1, rows, 1, key)
        later, dS, scratch = v.new_ones(size, size).triu(), dlast.flatten(0, 1).clone(), Scratch(v)
        given = [Chunks(x, size) for x in (q, k, v, g, do)]
        dq_chunks, dk_chunks, dv_chunks, dg_chunks = (Chunks(x, size) for x in (dq, dk, dv, dg))
        for first, number in reversed(blocks(count, rows, size, max(key, value))):
            many = number * rows
            keys = (many, size, key)
            qs, ks, vs, decay, dos = inputs_of(scratch, given, first, number)
            qs.mul_(scale)
            decay.exp_()
            weight, run = weights[first : first + number], states[first : first + number + 1]
            dweight = scratch("dweight", *weight.shape)
            _square(dweight).copy_(torch.bmm(dos, vs.mT, out=scratch("square", many, size, size)))
            read, rest, total = scratch("read", *keys), scratch("rest", *keys).fill_(1), decay
            read.copy_(decay) if bonus is None else read.fill_(1)  # decay from the chunk's start; `rest`: to its end
            dqs, dks = scratch("dqs", *keys).zero_(), scratch("dks", *keys).zero_()
            for half in _levels(size):
                (_, reads), (rests, _), cross = _parts(read, half), _parts(rest, half), _cross(dweight, half)
                left = torch.mul(_parts(ks, half)[0], rests, out=scratch("part", *rests.shape))
                _parts(dqs, half)[1].addcmul_(_mixed(scratch, cross, left), reads)
                right = torch.mul(_parts(qs, half)[1], reads, out=scratch("part", *reads.shape))
                _parts(dks, half)[0].addcmul_(_mixed(scratch, cross.mT, right), rests)
                total = _joined(total, reads, rests)
            slopes = scratch("slopes", number + 1, rows, key, value)  # of the states
            slopes[-1].copy_(dS)
            grown = torch.mul(qs, read, out=scratch("whole", *keys))
            torch.bmm(grown.mT, dos, out=slopes[:-1].flatten(0, 1))
            fade = total.view(number, rows, key, 1)
            for n in reversed(range(number)):
                slopes[n].addcmul_(fade[n], slopes[n + 1])
            dS.copy_(slopes[0])
            after, of_keys = slopes[1:].flatten(0, 1), scratch("of keys", *keys)
            dqs.addcmul_(torch.bmm(dos, run[:-1].flatten(0, 1).mT, out=of_keys), read)
            dks.addcmul_(torch.bmm(vs, after.mT, out=of_keys), rest)
            dvs = torch.bmm(_square(weight).mT, dos, out=vs)
            dv_chunks.write(first, dvs.baddbmm_(torch.mul(ks, rest, out=grown), after))
            own = torch.mul(qs, dqs, out=read)
            dc = torch.addcmul(own, ks, dks, value=-1, out=rest)
            dc[:, -1] += after.mul_(run[1:].flatten(0, 1)).sum(-1)
            dgs = torch.bmm(later.expand(many, -1, -1), dc, out=of_keys)
            if bonus is not None:
                dgs.sub_(own)
            # Nothing passes where a decay is zero; the sums above give zero there but for rounding.
            dg_chunks.write(first, dgs.masked_fill_(decay == 0, 0))
            diagonal = dweight.view(-1, size + 1)[:, :1].unflatten(0, (many, size))
            if each is None or dbonus is None:
                dqs.addcmul_(diagonal, ks)
                dks.addcmul_(diagonal, qs)
            else:
                split = (number, rows, size, key)
                dbonus += (diagonal * qs * ks).view(split).sum((0, 2)).view(dbonus.shape)
                dqs.addcmul_(diagonal, (ks.view(split) * each).view(keys))
                dks.addcmul_(diagonal, (qs.view(split) * each).view(keys))
            dq_chunks.write(first, dqs.mul_(scale))
            dk_chunks.write(first, dks)
        return dq, dk, dv, dg, dbonus, dS.view(state.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.scale, ctx.size = inputs[10:]
        ctx.save_for_backward(*inputs[:8])

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *slopes: Tensor | None) -> Any:
        q, k, v, g, bonus, state, do, dlast = ctx.saved_tensors

        more = () if bonus is None else (bonus,)

        def gradients(q, k, v, g, state, do, dlast, *bonus):  # type: ignore[no-untyped-def]
            def form(q, k, v, g, state, *bonus):  # type: ignore[no-untyped-def]
                return by_halves(q * ctx.scale, k, v, g, bonus[0] if bonus else None, state, ctx.size)

            return torch.func.vjp(form, q, k, v, g, state, *bonus)[1]((do, dlast))

        pull = torch.func.vjp(gradients, q, k, v, g, state, do, dlast, *more)[1]
        dq, dk, dv, dg, dbonus, dstate = slopes
        found = pull((dq, dk, dv, dg, dstate, *(() if bonus is None else (dbonus,))))
        return *found[:4], None if bonus is None else found[7], *found[4:7], *[None] * 4

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return folded(_Backward, info.batch_size, in_dims, inputs, (0,) * 8 + (1,) * 2, (0,) * 6)


def _levels(size: int) -> Iterator[int]:
    """1, 2, 4, ... below `size`: tokens in half a block."""
    half = 1
    while half < size:
        yield half
        half *= 2


def _parts(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Views of the left and right halves of blocks of 2 `half` tokens: [N, L, D] -> [N L / 2 half, half, D] each."""
    x = x.view(-1, 2 * half, x.shape[-1])
    return x[:, :half], x[:, half:]


def _square(x: Tensor) -> Tensor:
    """The weights [N, L, L] in a buffer [..., L + 1, L]."""
    return x.flatten(0, -3)[:, :-1]


def _cross(x: Tensor, half: int) -> Tensor:
    """The weights of left halves for right ones, in a buffer of L + 1 rows: a view [N L / 2 half, half, half]."""
    size = x.shape[-1]
    return x.view(-1, 2 * half * (size + 1))[:, half * size : 2 * half * size].unflatten(1, (half, size))[..., :half]


def _products(scratch: Scratch, a: Tensor, b: Tensor) -> Tensor:
    """a, b: [N, L, D] -> a b^T [N, L, L]. Of few vectors, sums are faster than matrix products."""
    count, size, width = a.shape
    if size > 2:
        return torch.bmm(a, b.mT, out=scratch("products", count, size, size))
    each = scratch("each", count, size, size, width)
    return torch.mul(a.unsqueeze(2), b.unsqueeze(1), out=each).sum(-1)


def _mixed(scratch: Scratch, weights: Tensor, x: Tensor) -> Tensor:
    """weights: [N, L, L]. x: [N, L, D]. Returns weights x, likewise."""
    out = scratch("mixed", *x.shape)
    if x.shape[1] > 2:
        return torch.bmm(weights, x, out=out)
    torch.mul(weights[..., :1], x[:, :1], out=out)
    return out if x.shape[1] == 1 else out.addcmul_(weights[..., 1:], x[:, 1:])


def _joined(total: Tensor, read: Tensor, rest: Tensor) -> Tensor:
    """A level up: what right halves read fades by the left's decay, what left ones keep by the right's, in place.

    total: the decay of each half [..., K]. Returns that of each block [N, 1, K].
    """
    left, right = total.reshape(-1, 2, 1, total.shape[-1]).unbind(1)
    read.mul_(left)
    rest.mul_(right)
    return left * right
