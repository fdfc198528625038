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

from contextlab.ops.blocks import Chunks, Scratch, blocks, folded, inputs_of
from contextlab.ops.decays import Decays, each_its_decays
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
        most = plan[0][1]
        kept = count if keep else most
        masks = v.new_empty(kept if len(decays.c) > 1 else 1, *decays.c.shape[1:], size)
        Ps, inverses = (v.new_empty(kept * rows, size, size) for _ in range(2))
        news, Ws = v.new_empty(kept, rows, size, value), v.new_empty(kept, rows, size, key)
        states = v.new_empty(kept + 1, rows, key, value)
        o, scratch = v.new_empty(v.shape), Scratch(v)
        start, end, whole = decays.columns()
        betas = _per_token(beta, count, size)
        reads, grown = start * scale, (start * betas).mT
        given, answers = [Chunks(x, size) for x in (q, k, v)], Chunks(o, size)
        # One view a chunk, made once; that of the keys is where `inputs_of` puts them.
        Kds = scratch("input 1", most, rows, size, key).mT.unbind()
        S, write, read = states.unbind(), news.unbind(), Ws.unbind()
        S[0].zero_() if state is None else S[0].copy_(state.flatten(0, 1))
        for first, number in plan:
            many, at = number * rows, first if keep else 0
            of_keys, of_values = (many, size, key), (many, size, value)
            lie = (number, batch, heads, 1, size, size)
            here, there = slice(first * rows, first * rows + many), slice(at * rows, at * rows + many)
            qs, ks, vs = inputs_of(scratch, given, first, number)
            P, inverse, mask = Ps[there], inverses[there], decays.between(masks, first, number, at)
            P.baddbmm_(qs, ks.mT, beta=0, alpha=scale).view(lie).mul_(mask)
            A = torch.bmm(ks, ks.mT, out=scratch("A", many, size, size))
            A.view(lie).mul_(mask)
            inverse.copy_(unit_lower_inverse(A.mul_(betas[here]), base=32))
            new = torch.bmm(torch.mul(inverse, betas[here].mT, out=A), vs, out=news[at : at + number].view(of_values))
            torch.bmm(torch.mul(inverse, grown[here], out=A), ks, out=Ws[at : at + number].view(of_keys))
            ks.mul_(end[here])
            for n in range(number):
                write[at + n].baddbmm_(read[at + n], S[at + n], alpha=-1)
                torch.mul(S[at + n], whole[first + n], out=S[at + n + 1]).baddbmm_(Kds[n], write[at + n])
            answer = torch.bmm(P, new, out=vs)
            answer.baddbmm_(qs.mul_(reads[here]), states[at : at + number].view(many, key, value))
            answers.write(first, answer)
            if not keep:
                S[0].copy_(S[number])
        last = S[count if keep else 0].clone().view(batch, heads, key, value)
        if not keep:
            return o, last, *[None] * 6
        Ps, inverses = (x.view(kept, rows, size, size) for x in (Ps, inverses))  # sequences on an axis, for vmap
        return o, last, Ps, masks, inverses, news, Ws, states

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, c, beta, state, ctx.scale, ctx.size, _ = inputs
        ctx.has_state = state is not None
        ctx.mark_non_differentiable(*(x for x in output[2:] if x is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, c, beta, *output[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlast: Tensor | None, *_: Any) -> Any:
        q, k, v, c, beta, *kept = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else do
        wanted = ctx.needs_input_grad[3]
        found = _Backward.apply(q, k, v, c, beta, do, dlast, *kept, ctx.scale, ctx.size, wanted, ctx.has_state)
        return *found, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        in_dims, inputs = each_its_decays(info.batch_size, in_dims, inputs)
        return folded(_Corrected, info.batch_size, in_dims, inputs, (0,) * 6, (0, 0, *[1] * 6))


class _Backward(torch.autograd.Function):
    """The gradients of q, k, v, c, beta and state; a function of its own so that it too can be mapped.

    With R the gradient of the right side beta v, that of beta exp(c) k is -R S^T, and that of A is
    -R (U - W S)^T. The decay's gradient is that of the linear engine (`ops.scalar_decay`), because
    S_t exp(-c_t) obeys the rule without decay and with values exp(-c_t) v_t; do . o is dq . q, as o is linear in q.
    """

    @staticmethod
    @without_autocast
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        c: Tensor,
        beta: Tensor,
        do: Tensor,
        dlast: Tensor | None,
        Ps: Tensor,
        masks: Tensor,
        inverses: Tensor,
        news: Tensor,
        Ws: Tensor,
        states: Tensor,
        scale: float,
        size: int,
        of_decays: bool,
        of_state: bool,
    ) -> tuple[Tensor | None, ...]:
        (batch, length, heads, key), value = k.shape, v.shape[-1]
        rows, count = batch * heads, -(-length // size)
        plan, decays = blocks(count, rows, size, max(key, value, size // 2)), Decays(c, heads, v.dtype, count, batch)
        most, scratch = plan[0][1], Scratch(v)
        dq, dk, dv, dbeta = (x.new_empty(x.shape) for x in (q, k, v, beta))
        start, end, whole = decays.columns()
        betas = _per_token(beta, count, size)
        reads, dbetas, dcs = start * scale, torch.empty_like(betas), v.new_empty(count * rows, size)
        Ps, inverses = Ps.flatten(0, 1), inverses.flatten(0, 1)
        given = [Chunks(x, size) for x in (q, k, v, do)]
        dq_chunks, dk_chunks, dv_chunks, dbeta_chunks = (Chunks(x, size) for x in (dq, dk, dv, dbeta.unsqueeze(-1)))
        slopes = v.new_empty(most + 1, rows, key, value)
        # One view a chunk, made once.
        dS, read = slopes.unbind(), Ws.mT.unbind()
        write, Kds = scratch("dnew", most, rows, size, value).unbind(), scratch("Kd", most, rows, size, key).unbind()
        carried = torch.zeros_like(dS[0]) if dlast is None else dlast.flatten(0, 1)
        for first, number in reversed(plan):
            many = number * rows
            of_keys, of_values, square = (many, size, key), (many, size, value), (many, size, size)
            here, lie = slice(first * rows, first * rows + many), (number, batch, heads, 1, size, size)
            qs, ks, vs, dos = inputs_of(scratch, given, first, number)
            P, inverse, beta_here, start_here, end_here = (x[here] for x in (Ps, inverses, betas, start, end))
            new, mask = news[first : first + number].view(of_values), masks
            if len(masks) > 1:
                mask = masks[first : first + number]
            grown = torch.mul(dos, reads[here], out=scratch("grown", *of_values))
            dS[number].copy_(carried)
            torch.bmm(qs.mT, grown, out=slopes[:number].view(many, key, value))
            dnew = torch.bmm(P.mT, dos, out=scratch("dnew", *of_values))
            spare = torch.mul(ks, end_here, out=scratch("Kd", *of_keys))
            for n in reversed(range(number)):
                write[n].baddbmm_(Kds[n], dS[n + 1])
                dS[n].addcmul_(dS[n + 1], whole[first + n]).baddbmm_(read[first + n], write[n], alpha=-1)
            carried = dS[0]
            before = states[first : first + number].view(many, key, value)
            after = slopes[1 : number + 1].view(many, key, value)
            dR = torch.bmm(inverse.mT, dnew, out=scratch("dR", *of_values))
            dG = scratch("dG", *square).baddbmm_(dos, new.mT, beta=0, alpha=scale)
            dG.view(lie).mul_(mask)
            E = torch.bmm(dR, new.mT, out=scratch("E", *square))  # of k k^T, before beta; its sign turned
            E.view(lie).mul_(mask)
            E.diagonal(dim1=1, dim2=2).zero_()
            dqs = torch.bmm(dG, ks, out=spare).baddbmm_(grown, before.mT)
            dq_chunks.write(first, dqs)
            of_outputs = dqs.mul_(qs).sum(-1)
            dks = torch.bmm(dG.mT, qs, out=spare)
            dks.baddbmm_(torch.mul(new, end_here, out=grown), after.mT)
            Ek = torch.bmm(E, ks, out=qs).baddbmm_(torch.mul(dR, start_here, out=grown), before.mT)
            dks.baddbmm_(E.mul_(beta_here).mT, ks, alpha=-1).addcmul_(Ek, beta_here, value=-1)
            dk_chunks.write(first, dks)
            dv_chunks.write(first, dR, beta_here)
            share = vs.mul_(dR).sum(-1, keepdim=True)
            torch.sub(share, Ek.mul_(ks).sum(-1, keepdim=True), out=dbetas[here])
            if of_decays:
                torch.sub(of_outputs, (share * beta_here).squeeze(-1), out=dcs[here])
                ends = slopes[1 : number + 1].mul_(states[first + 1 : first + number + 1])
                dcs[here, -1] += ends.flatten(0, 1).sum((1, 2))
        dbeta_chunks.write(0, dbetas)
        dc = None
        if of_decays:
            dc = dcs.view(count, batch, heads, size).permute(1, 0, 3, 2).sum_to_size(c.shape).to(c.dtype)
        return dq, dk, dv, dc, dbeta, carried.clone().view(batch, heads, key, value) if of_state else None

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing: it is not differentiated again."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        in_dims, inputs = each_its_decays(info.batch_size, in_dims, inputs, masks=8)
        return folded(_Backward, info.batch_size, in_dims, inputs, (0,) * 7 + (1,) * 6, (0,) * 6)


def _per_token(x: Tensor, count: int, size: int) -> Tensor:
    """x [B, T, H] of all `count` chunks, [N B H, size, 1], zeros after the end."""
    out = x.new_empty(count * x.shape[0] * x.shape[2], size, 1)
    return Chunks(x.unsqueeze(-1), size).read(0, count, out)
