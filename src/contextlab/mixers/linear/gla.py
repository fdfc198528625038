"""Matrix memories that decay by channel: GLA, HGRN2 and RWKV-6."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.mixers.base import head_size
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.gates import bounded_forget, exp_of_decay
from contextlab.mixers.layers import Linear, RMSNorm, each_its_part, multiplications
from contextlab.mixers.matrix import MatrixMixer, after_token_before, recurrent
from contextlab.ops.gla import gla, gla_flops, rwkv6
from contextlab.ops.precision import with_room
from contextlab.registry import register
from contextlab.state import RecurrentState, State, own, tensor_bytes


class ChannelDecayMixer(MatrixMixer):
    """Base: a matrix state whose rows decay by gates of their own."""

    def _op_flops(self, length: int) -> int:
        return gla_flops(length, self.heads, self.key, self.value) + 2 * length * self._gate_products()

    def _gate_products(self) -> int:
        """Multiply-adds a token of the products that make the gates."""
        return 0


@register(
    "mixer",
    "gla",
    family="linear",
    papers=("2312.06635",),
    cases=({}, {"heads": 2, "key_dim": 5, "short_conv": 4}, {"gate_rank": 3, "gate_scale": 1.0}),
)
class GatedLinearAttention(ChannelDecayMixer):
    """GLA: linear attention with a learned decay for each channel of the key, normalised and gated output.

    width: size of a token's vector.
    heads: number of heads, a divisor of width.
    key_dim: size of a head's key; default half of its value, as in the paper.
    gate_rank: rank of the map to the decays.
    gate_scale: tau; the decay is sigmoid(.)^(1 / tau), so that a large one forgets slowly.
    short_conv: width of the causal convolution before q, k and v; 0 for none, as in the paper.
    """

    tells_mixing = True

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt = 4,
        key_dim: PositiveInt | None = None,
        gate_rank: PositiveInt = 16,
        gate_scale: PositiveFloat = 16.0,
        short_conv: NonNegativeInt = 0,
    ) -> None:
        value = head_size(width, heads)
        key = max(1, value // 2) if key_dim is None else key_dim
        convolved = 2 * heads * key + width
        self.parts = (convolved, width, gate_rank)  # q, k, v; the output gate; the low rank of the decays
        super().__init__(width, heads, key, value, sum(self.parts), convolved, short_conv)
        self.gate_scale = gate_scale
        self.decay_proj = Linear(gate_rank, heads * key, bias=True)
        self.norm = RMSNorm(value, eps=1e-6)
        self._project_out(width)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. At padding k is zero, so that the state stays as it started."""
        before = recurrent(state)
        qkv, gate, low = self.in_proj(without_padding(x, mask)).split(self.parts, -1)
        qkv, conv = self._convolved(qkv, before, keep_state, "silu" if self.conv is not None else None)
        qk, v = qkv.split((2 * self.heads * self.key, self.width), -1)
        q, k = qk.unflatten(-1, (2, self.heads, self.key)).unbind(2)
        g = F.logsigmoid(self.decay_proj(low)).unflatten(-1, (self.heads, self.key)) / self.gate_scale
        v = v.unflatten(-1, (self.heads, self.value))
        q, k, v, g = self.sites(q=q, k=without_padding(k, mask), v=v, g=g)
        o, matrix = gla(q, k, v, g, None, None if before is None else before["matrix"], keep_state)
        y = self._answer(self.norm(self.site("heads", o)).flatten(2) * F.silu(gate), x)
        return y, self._kept(x, before, matrix, conv) if keep_state else None

    def _gate_products(self) -> int:
        return multiplications(self.decay_proj)


@register(
    "mixer",
    "hgrn2",
    family="linear",
    papers=("2404.07904",),
    cases=({}, {"heads": 2, "lower_bound": 0.4}, {"short_conv": 3}),
)
class Hgrn2(ChannelDecayMixer):
    """HGRN2: HGRN's gated recurrence with its state expanded to a matrix; what a gate forgets, it writes.

    The key is 1 - f with the lower-bounded forget gate f = b + (1 - b) sigmoid(.), and f is the decay.

    width: size of a token's vector.
    heads: number of heads, a divisor of width.
    lower_bound: b, below which no gate forgets; the paper lets it grow with depth.
    short_conv: width of the causal convolution before q, gate and v; 0 for none, as in the paper.
    """

    tells_mixing = True

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt = 4,
        lower_bound: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        short_conv: NonNegativeInt = 0,
    ) -> None:
        size = head_size(width, heads)
        super().__init__(width, heads, size, size, 3 * width, 3 * width, short_conv)
        self.lower_bound = lower_bound
        self.norm = RMSNorm(width, eps=1e-6)
        self._project_out(width)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. At padding k is zero, so that the state stays as it started."""
        before = recurrent(state)
        projected, conv = self._convolved(self.in_proj(without_padding(x, mask)), before, keep_state, None)
        q, forget, v = projected.unflatten(-1, (3, self.heads, -1)).unbind(2)
        k, log_f = bounded_forget(forget, self.lower_bound)
        q, k, v, g = self.sites(q=F.silu(q), k=without_padding(k, mask), v=v, g=log_f)
        o, matrix = gla(q, k, v, g, None, None if before is None else before["matrix"], keep_state)
        y = self._answer(self.norm(self.site("heads", o).flatten(2)), x)
        return y, self._kept(x, before, matrix, conv) if keep_state else None


@register(
    "mixer",
    "rwkv6",
    family="linear",
    papers=("2404.05892",),
    cases=({}, {"heads": 2, "shift_rank": 4, "decay_rank": 3}),
)
class Rwkv6(ChannelDecayMixer):
    """RWKV-6's time mixing: data-dependent token shift and decay by channel, and a bonus for the token itself.

    width: size of a token's vector.
    heads: number of heads, a divisor of width.
    shift_rank: rank of the maps that mix a token with the one before it (ddlerp).
    decay_rank: rank of the map to the decays.
    """

    tells_mixing = True

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt = 4,
        shift_rank: PositiveInt = 16,
        decay_rank: PositiveInt = 16,
    ) -> None:
        size = head_size(width, heads)
        # in_proj holds the four square projections, of r, k, v and the output gate.
        super().__init__(width, heads, size, size, 4 * width, 0, 0)
        share = torch.linspace(0, 1, width)
        self.shift = nn.Parameter(share.repeat(6, 1))  # of the first mix, then of w, r, k, v and the gate
        self.shift_in = Linear(width, 5 * shift_rank)
        self.shift_out = nn.Parameter(torch.zeros(5, shift_rank, width))
        self.decay_in = Linear(width, decay_rank)
        self.decay_out = nn.Parameter(torch.zeros(decay_rank, width))
        self.decay = nn.Parameter(-6 + 5 * share**0.7)  # log of -w: from slow to fast channels
        self.bonus = nn.Parameter(0.5 * torch.randn(heads, size))
        self.norm_weight = nn.Parameter(torch.ones(width))
        self._project_out(width)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. At padding k is zero, so that the state stays as it started."""
        before = recurrent(state)
        x = without_padding(x, mask)
        seen = after_token_before(x, before)
        delta = seen[:, :-1] - x
        low = self.shift_in(x + delta * self.shift[0]).unflatten(-1, (5, -1)).tanh()
        mix = torch.einsum("btnr,nrd->btnd", low, self.shift_out) + self.shift[1:]
        mixed = x.unsqueeze(2) + delta.unsqueeze(2) * mix
        r, k, v, gate = each_its_part(mixed[:, :, 1:], self.in_proj).unbind(2)
        decay = -exp_of_decay(self.decay + self.decay_in(mixed[:, :, 0]).tanh() @ self.decay_out)
        r, k, v, decay = (with_room(y).unflatten(-1, (self.heads, -1)) for y in (r, k, v, decay))
        r, k, v, decay = self.sites(q=r, k=k, v=v, g=decay)
        o, matrix = rwkv6(r, k, v, decay, self.bonus, None, None if before is None else before["matrix"], keep_state)
        o = self.site("heads", o)
        o = F.layer_norm(o, o.shape[-1:], eps=64e-5).flatten(2) * self.norm_weight
        y = self._answer(o * F.silu(gate), x)
        if not keep_state:
            return y, None
        kept = self._kept(x, before, matrix, None)
        return y, RecurrentState({**kept.memory, "shift": own(seen[:, -1])}, length=kept.length)

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length."""
        return super().state_nbytes(length, batch, dtype) + tensor_bytes(batch, self.width, dtype=dtype)

    def _gate_products(self) -> int:
        shift = multiplications(self.shift_in) + self.shift_out.numel()
        return shift + multiplications(self.decay_in) + self.decay_out.numel()
