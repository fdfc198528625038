"""The matrix memory of xLSTM."""

from __future__ import annotations

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.mixers.base import Mixer, head_size
from contextlab.mixers.convolution import ShortConv, without_padding
from contextlab.mixers.layers import Linear, multiplications
from contextlab.mixers.matrix import MatrixMixer, recurrent
from contextlab.ops.linear import working_dtype
from contextlab.ops.mlstm import mlstm
from contextlab.ops.precision import with_room
from contextlab.ops.slstm import slstm
from contextlab.registry import register
from contextlab.state import RecurrentState, State, own, tensor_bytes


@register(
    "mixer",
    "mlstm",
    family="recurrent",
    papers=("2405.04517", "2503.13427"),
    cases=({}, {"heads": 2, "key_dim": 5, "short_conv": 4}, {"heads": 1, "gate_cap": 2.0}),
)
class Mlstm(MatrixMixer):
    """mLSTM of xLSTM: linear attention with exponential input gates, a normaliser state and a gated output.

    width: size of a token's vector.
    heads: number of heads, a divisor of width.
    key_dim: size of a head's key; default half of its value, as in xLSTM 7B.
    short_conv: width of the causal convolution before q and k (xLSTM's first block has 4); 0 for none.
    gate_cap: c of the soft cap c tanh(x / c) of both gates (xLSTM 7B).
    """

    tells_mixing = True

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt = 4,
        key_dim: PositiveInt | None = None,
        short_conv: NonNegativeInt = 0,
        gate_cap: PositiveFloat = 15.0,
    ) -> None:
        value = head_size(width, heads)
        key = max(1, value // 2) if key_dim is None else key_dim
        # q and k, which are convolved; v; the output gate; the input and forget gates of each head
        self.parts = (2 * heads * key, width, width, 2 * heads)
        super().__init__(width, heads, key, value + 1, sum(self.parts), 2 * heads * key, short_conv)
        self.gate_cap = gate_cap
        self.gate_bias = nn.Parameter(torch.cat((0.1 * torch.randn(heads), torch.linspace(3, 6, heads))))
        self.norm_weight = nn.Parameter(torch.ones(width))
        self._project_out(width)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. At padding the gates keep the state as it started."""
        before = recurrent(state)
        qk, v, gate, gates = self.in_proj(without_padding(x, mask)).split(self.parts, -1)
        qk, conv = self._convolved(qk, before, keep_state, "silu" if self.conv is not None else None)
        q, k = qk.unflatten(-1, (2, self.heads, self.key)).unbind(2)
        i, f = (self.gate_cap * torch.tanh((gates + self.gate_bias) / self.gate_cap)).chunk(2, -1)
        if mask is not None:  # gates that write nothing and forget nothing
            i, f = (x.masked_fill(~mask.unsqueeze(-1), closed) for x, closed in ((i, -1e4), (f, 1e4)))
        v = with_room(v).unflatten(-1, (self.heads, -1))
        q, k, v, i, f = self.sites(q=q, k=k, v=v, i=i, f=f)
        initial = None if before is None else (before["matrix"], before["max"])
        h, last = mlstm(q, k, v, i, f, None, initial, keep_state)
        h = self.site("heads", h)
        y = F.layer_norm(h, h.shape[-1:], eps=1e-6).flatten(2) * self.norm_weight
        y = self._answer(y * gate.sigmoid(), x)
        if last is None:
            return y, None
        kept = self._kept(x, before, last[0], conv)
        return y, RecurrentState({**kept.memory, "max": own(last[1])}, length=kept.length)

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length."""
        running = tensor_bytes(batch, self.heads, dtype=working_dtype(dtype))
        return super().state_nbytes(length, batch, dtype) + running


@register(
    "mixer",
    "slstm",
    family="recurrent",
    papers=("2405.04517",),
    cases=({}, {"heads": 2, "short_conv": 0}, {"heads": 1, "short_conv": 2}),
)
class Slstm(Mixer):
    """sLSTM of xLSTM: scalar memories with exponential gates, and hidden values that go into the next token's gates.

    As in xLSTM the convolution feeds the input and forget gates, and the output is normalised head by head. Because of
    the recurrent weights it can track states that linear recurrences cannot, and has no parallel form.

    width: size of a token's vector.
    heads: number of heads, a divisor of width; the recurrent weights stay within a head.
    short_conv: width of the causal convolution before the input and forget gates; 0 for none.
    """

    parallel_form = "loop"

    def __init__(self, width: PositiveInt, heads: PositiveInt = 4, short_conv: NonNegativeInt = 4) -> None:
        super().__init__(width)
        self.heads, self.size = heads, head_size(width, heads)
        self.conv = ShortConv(width, short_conv, bias=True) if short_conv else None
        self.straight_proj = Linear(width, 2 * width)  # z and o, from the token
        self.gate_proj = Linear(width, 2 * width)  # i and f, from the convolved tokens
        # Forget gates from short to long memories.
        bias = torch.zeros(heads, 4, self.size)
        bias[:, 2] = torch.linspace(3.0, 6.0, self.size)
        self.bias = nn.Parameter(bias)
        self.R = nn.Parameter(torch.randn(heads, self.size, 4 * self.size) * self.size**-0.5)
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.out_proj = Linear(width, width)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. At padding the state stays as it is."""
        before, work = recurrent(state), working_dtype(x.dtype)
        x = without_padding(x, mask)
        gated, conv = x, None
        if self.conv is not None:
            gated, conv = self.conv(x, None if before is None else before["conv"], keep_state, "silu")
        z, o = (y.unflatten(-1, (self.heads, -1)) for y in self.straight_proj(x).chunk(2, -1))
        i, f = (y.unflatten(-1, (self.heads, -1)) for y in self.gate_proj(gated).chunk(2, -1))
        gates = (torch.stack((z, i, f, o), 3) + self.bias).to(work)
        initial = None if before is None else tuple(before[name] for name in "hcnm")
        h, after = slstm(gates, self.R.to(work), initial, mask)  # type: ignore[arg-type]
        y = F.layer_norm(h, h.shape[-1:], eps=1e-6).to(x.dtype).flatten(2) * self.norm_weight
        y = self.out_proj(y)
        if not keep_state:
            return y, None
        memory = {name: own(tensor) for name, tensor in zip("hcnm", after, strict=True)}
        if conv is not None:
            memory["conv"] = own(conv)
        return y, RecurrentState(memory, length=x.shape[1] + (0 if before is None else before.length))

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length."""
        memory = tensor_bytes(batch, 4, self.width, dtype=working_dtype(dtype))
        return memory + (0 if self.conv is None else self.conv.state_nbytes(batch, dtype))

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        layers = (self.straight_proj, self.gate_proj, self.out_proj)
        products = sum(multiplications(layer) for layer in layers) + self.R.numel()
        return 2 * length * (products + (0 if self.conv is None else self.conv.weight.numel()))
