"""RWKV-7's time mixing: a matrix memory that decays by channel and is corrected by a transition of rank one."""

from __future__ import annotations

import math

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.mixers.base import head_size
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.layers import Linear, each_its_part, multiplications
from contextlab.mixers.matrix import MatrixMixer, after_token_before, recurrent
from contextlab.ops.dplr import dplr_delta_rule, dplr_flops
from contextlab.ops.precision import unit_length, with_room
from contextlab.registry import register
from contextlab.state import RecurrentState, State, own, tensor_bytes

GROUP_EPS = 64e-5
"""Of the normalisation of heads, whatever their size, as in the published code."""


@register(
    "mixer", "rwkv7", family="delta", papers=("2503.14456",), cases=({}, {"heads": 2, "decay_rank": 3, "gate_rank": 5})
)
class Rwkv7(MatrixMixer):
    """RWKV-7's time mixing: vector-valued decays and in-context learning rates, and a bonus for the token itself.

    S_t = diag(w_t) S_{t-1} - (a_t * k^_t) (k^_t^T S_{t-1}) + k~_t v_t^T, with the removal key k^ = normalised k * xi,
    the replacement key k~ = k (1 + (a - 1) alpha), decays w = exp(-e^(-1/2) sigmoid(.)) and rates a = sigmoid(.)
    (2503.14456). The paper also mixes the first layer's values into those of the others, which needs more
    than one layer and is left out.

    width: size of a token's vector.
    heads: number of heads, a divisor of width.
    decay_rank: rank of the maps to the decays and to the learning rates.
    gate_rank: rank of the map to the output gate.
    """

    tells_mixing = True

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt = 4,
        decay_rank: PositiveInt = 16,
        gate_rank: PositiveInt = 32,
    ) -> None:
        size = head_size(width, heads)
        # in_proj holds the three square projections, of r, k and v.
        super().__init__(width, heads, size, size, 3 * width, 0, 0)
        share = torch.arange(width) / width
        powers = torch.tensor([0.2, 0.7, 0.7, 0.9, 0.9, 0.2])
        # How much of the token before goes into r, k, v, the decay, the rate and the gate.
        self.shift = nn.Parameter(1 - share ** powers.unsqueeze(-1))
        self.decay_in, self.decay_out = Linear(width, decay_rank), Linear(decay_rank, width, bias=True)
        self.rate_in, self.rate_out = Linear(width, decay_rank), Linear(decay_rank, width, bias=True)
        self.gate_in, self.gate_out = Linear(width, gate_rank), Linear(gate_rank, width)
        self.removal = nn.Parameter(torch.full((width,), 0.71))
        self.replacement = nn.Parameter(torch.full((width,), 1.02))
        self.bonus = nn.Parameter(torch.full((heads, size), -0.04))
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.norm_bias = nn.Parameter(torch.zeros(width))
        with torch.no_grad():  # from slow to fast channels; the low-rank maps start at zero
            self.decay_out.bias.copy_(-5.5 + 6 * share)
            for layer in (self.decay_out, self.rate_out):
                layer.weight.zero_()
        self._project_out(width)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. At padding k and v are zero, so that the state stays as it started."""
        before = recurrent(state)
        x = without_padding(x, mask)
        seen = after_token_before(x, before)
        mixed = x.unsqueeze(2) + (seen[:, :-1] - x).unsqueeze(2) * self.shift
        r, k, v = with_room(each_its_part(mixed[:, :, :3], self.in_proj)).unbind(2)
        for_decay, for_rate, for_gate = mixed[:, :, 3:].unbind(2)
        g = -math.exp(-0.5) * self.decay_out(self.decay_in(for_decay).tanh()).sigmoid()
        rate = self.rate_out(self.rate_in(for_rate)).sigmoid()
        gate = self.gate_out(self.gate_in(for_gate).sigmoid())
        removed = (k * self.removal).unflatten(-1, (self.heads, -1))
        removed = unit_length(removed, eps=1e-12)
        k = k * (1 + (rate - 1) * self.replacement)
        r, k, v, g, rate = (y.unflatten(-1, (self.heads, -1)) for y in (r, k, v, g, rate))
        r, k, v, g = self.sites(q=r, k=k, v=v, g=g)
        initial = None if before is None else before["matrix"]
        o, matrix = dplr_delta_rule(r, k, v, -removed, removed * rate, g, 1.0, initial, keep_state)
        o = self.site("heads", o)
        o = F.layer_norm(o, o.shape[-1:], eps=GROUP_EPS).flatten(2) * self.norm_weight + self.norm_bias
        o = o + ((r * k * self.bonus).sum(-1, keepdim=True) * v).flatten(2)
        y = self._answer(o * gate, x)
        if not keep_state:
            return y, None
        kept = self._kept(x, before, matrix, None)
        return y, RecurrentState({**kept.memory, "shift": own(seen[:, -1])}, length=kept.length)

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length."""
        return super().state_nbytes(length, batch, dtype) + tensor_bytes(batch, self.width, dtype=dtype)

    def _op_flops(self, length: int) -> int:
        layers = (self.decay_in, self.decay_out, self.rate_in, self.rate_out, self.gate_in, self.gate_out)
        low_rank = sum(multiplications(layer) for layer in layers)
        return dplr_flops(length, self.heads, self.key, self.value) + 2 * length * low_rank
