"""Sparse State Expansion: many partitions of a gated matrix state, of which a token writes and reads a few."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.mixers.base import head_size
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.layers import Linear, RMSNorm, multiplications, with_loss
from contextlab.mixers.matrix import MatrixMixer, recurrent
from contextlab.ops.gla import gla, gla_flops
from contextlab.ops.linear import working_dtype
from contextlab.ops.precision import with_room
from contextlab.registry import register
from contextlab.state import State, tensor_bytes


@register(
    "mixer",
    "sse",
    family="linear",
    papers=("2507.16577",),
    cases=(
        {},
        {"partitions": 5, "top_k": 2, "heads": 2, "key_dim": 5, "rows": 2, "short_conv": 4},
        {"partitions": 3, "always_on": False, "rows": 3, "gate_rank": 3, "gate_scale": 1.0, "layout": "masked"},
        {"partitions": 2, "top_k": 2, "always_on": False, "heads": 3, "balance": 0.0},
    ),
)
class SparseStateExpansion(MatrixMixer):
    """SSE: a gated linear-attention state in partitions, of which each token writes and reads the few it is classed to.

    With e = softmax(W_e x), the partitions i of the top_k largest e obey S_i = diag(a) S_i + e_i k v^T, the others
    stay as they are, and the token answers with the sum over the same i of e_i S_i^T q. The key is a softmax, so it
    classes the token to rows of the state; with `rows` all but the largest are zero, and those rows do not decay
    either. All partitions share q, k, v and the decays, so that a larger state costs no parameters.

    Paper and public code differ in details: the read-out (silu of q and v, a norm for each head, an output gate) is
    that of the code, which lets q and k of the selected partitions differ from those of the one that is always on by a
    low-rank term, and their decays too; here they are the same.

    width: size of a token's vector.
    partitions: partitions that tokens are classed to.
    top_k: partitions that a token writes and reads.
    rows: rows of a partition that a token writes; None for all.
    always_on: whether there is one more partition, which all tokens write and read with a gate of 1.
    heads: number of heads, a divisor of width; they choose the same partitions.
    key_dim: size of a head's key, the rows of a partition; default the size of its value.
    gate_rank: rank of the map to the decays.
    gate_scale: tau; the decay is sigmoid(.)^(1 / tau), so that a large one forgets slowly.
    balance: weight of the loss that spreads tokens over partitions; it is part of the gradient of `W_e` alone.
    short_conv: width of the causal convolution before q, k and v; 0 for none.
    layout: packed brings the tokens of a partition together, so that the time does not grow with partitions; masked
        reads all tokens in all partitions, with no shape that depends on the data. Both give the same.
    """

    hard_choices: ClassVar[bool] = True
    trains_alone = "how many tokens a partition gets depends on the data"

    def __init__(
        self,
        width: PositiveInt,
        partitions: PositiveInt = 4,
        top_k: PositiveInt = 1,
        rows: PositiveInt | None = None,
        always_on: bool = True,
        heads: PositiveInt = 4,
        key_dim: PositiveInt | None = None,
        gate_rank: PositiveInt = 16,
        gate_scale: PositiveFloat = 16.0,
        balance: NonNegativeFloat = 0.01,
        short_conv: NonNegativeInt = 0,
        layout: Literal["packed", "masked"] = "packed",
    ) -> None:
        value = head_size(width, heads)
        key = value if key_dim is None else key_dim
        if top_k > partitions:
            raise InputError(f"top_k {top_k} is more than the {partitions} partitions; the nearest is {partitions}")
        if rows is not None and rows > key:
            raise InputError(f"rows {rows} is more than the {key} rows of a partition; the nearest is {key}")
        convolved = 2 * heads * key + width
        self.parts = (convolved, width, gate_rank)  # q, k, v; the output gate; the low rank of the decays
        super().__init__(width, heads, key, value, sum(self.parts), convolved, short_conv)
        self.partitions, self.top_k, self.rows, self.always_on = partitions, top_k, rows, always_on
        self.gate_scale, self.balance, self.layout = gate_scale, balance, layout
        self.class_proj = Linear(width, partitions)
        self.decay_proj = Linear(gate_rank, heads * key, bias=True)
        self.norm = RMSNorm(value, eps=1e-6)
        self._project_out(width)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. At padding k is zero, so that the state stays as it started."""
        before = recurrent(state)
        x = without_padding(x, mask)
        qkv, gate, low = self.in_proj(x).split(self.parts, -1)
        qkv, conv = self._convolved(qkv, before, keep_state, None)
        qk, v = qkv.split((2 * self.heads * self.key, self.width), -1)
        q, k = qk.unflatten(-1, (2, self.heads, self.key)).unbind(2)
        g = F.logsigmoid(self.decay_proj(low)).unflatten(-1, (self.heads, self.key)) / self.gate_scale
        if self.rows is not None and self.rows < self.key:
            written = torch.zeros_like(k, dtype=torch.bool).scatter(-1, k.topk(self.rows, -1).indices, True)
            k, g = k.masked_fill(~written, -torch.inf), g.masked_fill(~written, 0.0)
        k = without_padding(k.softmax(-1), mask)
        q, v = F.silu(q), F.silu(v).unflatten(-1, (self.heads, self.value))
        e = with_room(self.class_proj(x)).softmax(-1)
        chosen = torch.zeros_like(e, dtype=torch.bool).scatter(-1, e.topk(self.top_k, -1).indices, True)
        initial = [None, None] if before is None else before["matrix"].split(self._states(), 1)
        read = self._masked if self.layout == "masked" or x.shape[1] < 2 else self._packed
        o, matrix = read(q, k, v, g, e * chosen, chosen, initial[1], keep_state)
        if self.always_on:
            near, first = gla(q, k, v, g, None, initial[0], keep_state)
            o = o + near
            matrix = torch.cat((first, matrix), 1) if first is not None and matrix is not None else None
        y = self._answer(self.norm(o).flatten(2) * F.silu(gate), x)
        if self.balance and self.training and torch.is_grad_enabled() and not keep_state:
            # Whole sequences only: a mean over pieces would depend on how they are cut.
            y = with_loss(y, self._imbalance(x.detach(), chosen, mask))
        return y, self._kept(x, before, matrix, conv) if keep_state else None

    def _states(self) -> tuple[int, int]:
        """Heads of the partition that is always on, and of all others."""
        return self.heads * self.always_on, self.heads * self.partitions

    def _masked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        e: Tensor,
        chosen: Tensor,
        state: Tensor | None,
        final: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Partitions as further heads; where a token does not choose one its q, k and log decay are zero there.

        q, k, g: [B, T, H, K]. v: [B, T, H, V]. e: [B, T, N], zero where not chosen. state: [B, N H, K, V] or None.
        Returns the sum over partitions [B, T, H, V] and the state.
        """
        e, chosen = e[..., None, None], chosen[..., None, None]
        q, k, g = ((y.unsqueeze(2) * w).flatten(2, 3) for y, w in ((q, e), (k, e), (g, chosen)))
        o, last = gla(q, k, v.repeat(1, 1, self.partitions, 1), g, None, state, final)
        return o.unflatten(2, (self.partitions, -1)).sum(2), last

    def _packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        e: Tensor,
        chosen: Tensor,
        state: Tensor | None,
        final: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """As `_masked`, with the tokens of each partition brought together, in order, as a sequence of their own."""
        batch, length = v.shape[:2]
        most = max(1, int(chosen.sum(1).max())) if chosen.numel() else 1
        # Those that are chosen first, in order; what stands behind them in shorter sequences has e = 0.
        index = chosen.mT.byte().argsort(dim=-1, descending=True, stable=True)[..., :most]  # [B, N, most]
        e, chosen = (y.mT.gather(-1, index)[..., None, None].flatten(0, 1) for y in (e, chosen))
        tokens = torch.cat((q, k, g, v), -1).flatten(2)
        index = index.flatten(1).unsqueeze(-1)  # [B, N most, 1]
        tokens = tokens.gather(1, index.expand(-1, -1, tokens.shape[-1]))
        tokens = tokens.view(batch * self.partitions, most, self.heads, -1)
        q, k, g, v = tokens.split((self.key, self.key, self.key, self.value), -1)
        initial = None if state is None else state.reshape(-1, self.heads, *state.shape[2:])
        o, last = gla(q * e, k * e, v, g * chosen, None, initial, final)
        o = o.reshape(batch, index.shape[1], -1)
        total = o.new_zeros(batch, length, o.shape[-1]).scatter_add(1, index.expand_as(o), o)
        last = None if last is None else last.reshape(batch, -1, *last.shape[2:])
        return total.unflatten(-1, (self.heads, -1)), last

    def _imbalance(self, x: Tensor, chosen: Tensor, mask: Tensor | None) -> Tensor:
        """N / top_k times the sum over partitions of the part of tokens that choose it and the mean of its gate."""
        e, chosen = self.class_proj(x).softmax(-1), chosen.to(x.dtype)
        count = chosen.shape[0] * chosen.shape[1] if mask is None else mask.sum().clamp_min(1)
        part, mean = (without_padding(y, mask).sum((0, 1)) / count for y in (chosen, e))
        return self.balance * self.partitions / self.top_k * (part * mean).sum()

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length."""
        more = sum(self._states()) - self.heads
        rest = tensor_bytes(batch, more, self.key, self.value, dtype=working_dtype(dtype))
        return super().state_nbytes(length, batch, dtype) + rest

    def _op_flops(self, length: int) -> int:
        """Counted as if all partitions were chosen equally often."""
        each = length if self.layout == "masked" else -(-length * self.top_k // self.partitions)
        products = gla_flops(each, self.heads * self.partitions, self.key, self.value)
        products += gla_flops(length, self.heads, self.key, self.value) if self.always_on else 0
        return products + 2 * length * (multiplications(self.decay_proj) + multiplications(self.class_proj))
