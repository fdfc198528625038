"""The engine of `ops.delta`: a state that corrects its error, in chunks (2412.06464, section 3.3), both ways by hand.

With D_ij = exp(c_i - c_j), c the sums of log decays in a chunk, and A = beta k k^T D (strictly lower): a chunk writes
the values (I + A)^-1 beta (v - exp(c) k S), and S becomes exp(c_L) S + Kd^T times these, Kd = exp(c_L - c) k. Only
these three products are done one chunk after the other; all else for a block of chunks at a time, which stays in the
processor's cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from contextlab.ops.blocks import Scratch, blocks, folded, inputs_of, put
from contextlab.ops.decays import Decays, add_share_of_outputs, each_its_decays
from contextlab.ops.exported import corrected_chunks
from contextlab.ops.precision import without_autocast
from contextlab.ops.triangular import unit_lower_inverse


def corrected(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor, beta: Tensor, state: Tensor | None, scale: float, size: int
) -> tuple[Tensor, Tensor]:
    """The gated delta rule, differentiable once.

    q, k: [B, T, H, K]. v: [B, T, H, V]. beta: [B, T, H]. state: [B, H, K, V] or None. All at least float32, T >= 1.
    c: sums of log decays within each chunk, float64, broadcastable to [B, N, L, H] for N chunks of L = `size` tokens.
    Returns o [B, T, H, V] and the last state [B, H, K, V].
    """
    if torch.compiler.is_exporting():
        return corrected_chunks(q, k, v, c, beta, state, scale, size)
    o, last, *_ = _Corrected.apply(q, k, v, c, beta, state, scale, size, torch.is_grad_enabled())
    return o, last


class _Corrected(torch.autograd.Function):
    """Returns o, last state; for the backward, chunks first: weights, masks, inverses, values written, states."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        c: Tensor,
        beta: Tensor,
        state: Tensor | None,
        scale: float,
        size: int,
        keep: bool,
    ) -> tuple[Tensor | None, ...]:
        (batch, length, heads, key), value = k.shape, v.shape[-1]
        rows, count = batch * heads, -(-length // size)
        plan, decays = blocks(count, rows, size, max(key, value, size // 2)), Decays(c, heads, v.dtype, count, batch)
        kept = count if keep else plan[0][1]
        masks = v.new_empty(kept if len(decays.c) > 1 else 1, *decays.c.shape[1:], size)
        Ps, inverses = (v.new_empty(kept, rows, size, size) for _ in range(2))
        news, states = v.new_empty(kept, rows, size, value), v.new_empty(kept + 1, rows, key, value)
        o, scratch = v.new_empty(v.shape), Scratch(v)
        S = v.new_zeros(rows, key, value) if state is None else state.flatten(0, 1)
        for first, number in plan:
            many, at = number * rows, first if keep else 0
            qs, ks, vs, betas = inputs_of(scratch, (q, k, v, beta.unsqueeze(-1)), first, number, size)
            start, end, whole = _columns(decays, first, number)
            P, inverse, new = (x[at : at + number].flatten(0, 1) for x in (Ps, inverses, news))
            lie = (number, batch, heads, 1, size, size)
            mask = decays.between(masks, first, number, at)
            torch.bmm(qs.mul_(scale), ks.mT, out=P).view(lie).mul_(mask)
            A = torch.bmm(ks, ks.mT, out=scratch("A", many, size, size))
            A.view(lie).mul_(mask)
            inverse.copy_(unit_lower_inverse(A.mul_(betas), base=32))
            known = torch.mul(ks, start * betas, out=scratch("known", many, size, key))
            run, Kd = states[at : at + number + 1], ks.mul_(end)
            run[0].copy_(S)
            each = (x.unflatten(0, (number, rows)).unbind() for x in (vs.mul_(betas), known, inverse, new, Kd.mT))
            for S, after, wanted, read, solve, write, kd, fade in zip(
                run.unbind(), run[1:].unbind(), *each, whole.unbind(), strict=False
            ):
                torch.bmm(solve, wanted.baddbmm_(read, S, alpha=-1), out=write)
                torch.mul(S, fade, out=after).baddbmm_(kd, write)
            S = run[-1] if keep else run[-1].clone()
            answer = torch.bmm(P, new, out=vs)
            put(o, answer.baddbmm_(qs.mul_(start), run[:-1].flatten(0, 1)), first)
        last = S.clone().view(batch, heads, key, value)
        return (o, last, Ps, masks, inverses, news, states) if keep else (o, last, *[None] * 5)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, c, beta, state, ctx.scale, ctx.size, _ = inputs
        ctx.has_state = state is not None
        ctx.mark_non_differentiable(*(x for x in output[2:] if x is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, c, beta, output[0], *output[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlast: Tensor | None, *_: Any) -> Any:
        q, k, v, c, beta, o, *kept = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        wanted = ctx.needs_input_grad[3]
        found = _Backward.apply(q, k, v, c, beta, o, do, dlast, *kept, ctx.scale, ctx.size, wanted, ctx.has_state)
        return *found, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        in_dims, inputs = each_its_decays(info.batch_size, in_dims, inputs)
        return folded(_Corrected, info.batch_size, in_dims, inputs, (0,) * 6, (0, 0, *[1] * 5))


class _Backward(torch.autograd.Function):
    """The gradients of q, k, v, c, beta and state; a function of its own so that it too can be mapped.

    With R the gradient of the right side beta v, that of beta exp(c) k is -R S^T, and that of A is
    -R (U - W S)^T. The decay's gradient is that of the linear engine (`ops.scalar_decay`), because
    S_t exp(-c_t) obeys the rule without decay and with values exp(-c_t) v_t.
    """

    @staticmethod
    @without_autocast
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        c: Tensor,
        beta: Tensor,
        o: Tensor,
        do: Tensor,
        dlast: Tensor | None,
        Ps: Tensor,
        masks: Tensor,
        inverses: Tensor,
        news: Tensor,
        states: Tensor,
        scale: float,
        size: int,
        of_decays: bool,
        of_state: bool,
    ) -> tuple[Tensor | None, ...]:
        (batch, length, heads, key), value = k.shape, v.shape[-1]
        rows, count = batch * heads, -(-length // size)
        decays, scratch = Decays(c, heads, v.dtype, count, batch), Scratch(v)
        dq, dk, dv, dbeta = (x.new_empty(x.shape) for x in (q, k, v, beta))
        dc = None
        if of_decays:
            dc = v.new_zeros(batch, count * size, heads)
        dS = torch.zeros_like(states[0]) if dlast is None else dlast.flatten(0, 1).clone()
        for first, number in reversed(blocks(count, rows, size, max(key, value, size // 2))):
            many = number * rows
            of_keys, of_values, square = (many, size, key), (many, size, value), (many, size, size)
            qs, ks, vs, dos, betas = inputs_of(scratch, (q, k, v, do, beta.unsqueeze(-1)), first, number, size)
            start, end, whole = _columns(decays, first, number)
            P, inverse, new = (x[first : first + number].flatten(0, 1) for x in (Ps, inverses, news))
            mask, lie = (
                masks[first : first + number] if len(masks) > 1 else masks,
                (number, batch, heads, 1, size, size),
            )
            run, slopes = states[first : first + number + 1], scratch("slopes", number + 1, rows, key, value)
            qs.mul_(scale)
            grown = torch.mul(dos, start, out=scratch("grown", *of_values))
            slopes[-1].copy_(dS)
            torch.bmm(qs.mT, grown, out=slopes[:-1].flatten(0, 1))
            dnew = torch.bmm(P.mT, dos, out=scratch("dnew", *of_values))
            Kd = torch.mul(ks, end, out=scratch("Kd", *of_keys))
            known = torch.mul(ks, start * betas, out=scratch("known", *of_keys))
            dR = scratch("dR", *of_values)
            each = (x.unflatten(0, (number, rows)).unbind() for x in (dnew, Kd, inverse.mT, dR, known.mT))
            steps = list(zip(slopes.unbind(), slopes[1:].unbind(), *each, whole.unbind(), strict=False))
            for slope, after, write, kd, solve, right, read, fade in reversed(steps):
                torch.bmm(solve, write.baddbmm_(kd, after), out=right)
                slope.addcmul_(after, fade).baddbmm_(read, right, alpha=-1)
            dS.copy_(slopes[0])
            before, after = run[:-1].flatten(0, 1), slopes[1:].flatten(0, 1)
            dG = torch.bmm(dos, new.mT, out=scratch("dG", *square))
            dG.view(lie).mul_(mask)
            E = torch.bmm(dR, new.mT, out=scratch("E", *square))  # of k k^T, before beta; its sign turned
            E.view(lie).mul_(mask)
            E.diagonal(dim1=1, dim2=2).zero_()
            dqs = torch.bmm(dG, ks, out=scratch("dq", *of_keys)).baddbmm_(grown, before.mT)
            dks = torch.bmm(dG.mT, qs, out=scratch("dk", *of_keys))
            dks.baddbmm_(torch.mul(new, end, out=grown), after.mT)
            Ek = torch.bmm(E, ks, out=qs).baddbmm_(torch.mul(dR, start, out=grown), before.mT)
            dks.baddbmm_(E.mul_(betas).mT, ks, alpha=-1).addcmul_(Ek, betas, value=-1)
            share = vs.mul_(dR).sum(-1)
            put(dbeta.unsqueeze(-1), (share - Ek.mul_(ks).sum(-1)).unsqueeze(-1), first)
            put(dv, dR.mul_(betas), first)
            put(dq, dqs.mul_(scale), first)
            put(dk, dks, first)
            if dc is not None:
                add_share_of_outputs(dc, do, o, slice(first * size, (first + number) * size), scratch)
                here = dc.unflatten(1, (count, size))[:, first : first + number]
                here -= (share * betas.squeeze(-1)).view(number, batch, heads, size).permute(1, 0, 3, 2)
                ends = slopes[1:].mul_(run[1:]).sum((2, 3))
                here[:, :, -1] += ends.view(number, batch, heads).transpose(0, 1)
        if dc is not None:
            dc = dc.unflatten(1, (count, size)).sum_to_size(c.shape).to(c.dtype)
        return dq, dk, dv, dc, dbeta, dS.view(batch, heads, key, value) if of_state else None

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing: it is not differentiated again."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        in_dims, inputs = each_its_decays(info.batch_size, in_dims, inputs)
        return folded(_Backward, info.batch_size, in_dims, inputs, (0,) * 8 + (1,) * 5, (0,) * 6)


def _columns(decays: Decays, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Decays from the start of the chunk and to its end [N X, L, 1], and over chunks [N, X, 1, 1]."""
    start, end = (x.flatten(0, 2).squeeze(-1) for x in (decays.start(first, count), decays.end(first, count)))
    whole = torch.stack([decays.whole(first + n).reshape(-1, 1, 1) for n in range(count)])
    return start, end, whole
