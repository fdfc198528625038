"""Mamba-3: trapezoidal writing and a complex state, without a short convolution."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.layers import RMSNorm, initial_dt_bias
from contextlab.mixers.matrix import MatrixMixer, recurrent
from contextlab.mixers.state_space.base import heads_and_size
from contextlab.ops.linear import working_dtype
from contextlab.ops.mamba3 import Mamba3State, mamba3
from contextlab.ops.precision import with_room
from contextlab.registry import register
from contextlab.state import RecurrentState, State, own, tensor_bytes


@register(
    "mixer",
    "mamba3",
    family="state space",
    papers=("2603.15569",),
    cases=(
        {"state_size": 8},
        {"heads": 6, "state_size": 5, "groups": 2, "rope_fraction": 1.0},
        {"state_size": 4, "rope_fraction": 0.0},
        {"head_dim": 12, "state_size": 6, "expand": 1, "groups": 2, "output_norm": True},
    ),
)
class Mamba3(MatrixMixer):
    """Mamba-3: a state-space model that writes by a learnt trapezoidal rule and turns its state by learnt angles.

    Each token writes a mix of its own and the previous input, so no convolution is needed; B and C are normalised,
    biased for each head and turned by angles summed over the tokens, so that the state can count in circles (parity).
    The single-input single-output form of the paper; its multi-input form is not built. The bounds on the angles
    (pi tanh, times the step) and on the decay are those of the authors' implementation.

    width: size of a token's vector.
    heads: number of heads, a divisor of expand * width; default 4, or what head_dim gives.
    head_dim: size of a head; default expand * width / heads.
    state_size: N, the size of B and C, the keys and queries of the state.
    expand: inner size over width.
    groups: heads of a group share B and C before the biases; a divisor of heads.
    rope_fraction: part of state_size whose pairs are turned; 0 for a real state, which cannot turn.
    output_norm: RMS-normalise what each head reads, before the gate; off by default, as in the authors' implementation.
    """

    tells_mixing = True

    slowest: ClassVar[float] = 1e-4  # A is at most -slowest, so that every memory fades

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        state_size: PositiveInt = 64,
        expand: PositiveInt = 2,
        groups: PositiveInt = 1,
        rope_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5,
        output_norm: bool = False,
    ) -> None:
        inner = expand * width
        heads, value = heads_and_size(inner, heads, head_dim, groups)
        angles = int(state_size * rope_fraction) // 2
        if rope_fraction and not angles:
            least = f"the least is {math.ceil(2000 / state_size) / 1000:g}" if state_size > 1 else "0 turns none"
            raise InputError(
                f"rope_fraction {rope_fraction:g} of state_size {state_size} has no pair to rotate; {least}"
            )
        sizes = (inner, inner, groups * state_size, groups * state_size, heads, heads, heads, angles)
        super().__init__(width, heads, state_size, value, sum(sizes), 0, 0)
        self.sizes, self.groups, self.angles = sizes, groups, angles
        self.dt_bias = nn.Parameter(initial_dt_bias(heads))
        self.B_norm, self.C_norm = RMSNorm(state_size, eps=1e-5), RMSNorm(state_size, eps=1e-5)
        self.B_bias, self.C_bias = (nn.Parameter(torch.ones(heads, state_size)) for _ in range(2))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm_weight = nn.Parameter(torch.ones(inner)) if output_norm else None
        self._project_out(inner)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. At padding values and angles are zero, so that the state stays as it started."""
        before = recurrent(state)
        work = working_dtype(x.dtype)
        z, values, B, C, dt, A, mix, theta = self.in_proj(without_padding(x, mask)).split(self.sizes, -1)
        q, k = self._per_head(self.C_norm, C, self.C_bias), self._per_head(self.B_norm, B, self.B_bias)
        q, k, v = self.sites(q=q, k=k, v=with_room(values).unflatten(-1, (self.heads, self.value)))
        o, after = mamba3(
            v,
            F.softplus((dt + self.dt_bias).to(work)),
            -F.softplus(A.to(work)).clamp_min(self.slowest),
            k,
            q,
            mix.to(work).sigmoid(),
            math.pi * theta.to(work).tanh().unsqueeze(2) if self.angles else None,
            self.D,
            None if before is None else _from_memory(before),
            keep_state,
        )
        o = self.site("heads", o)
        if self.norm_weight is not None:
            o = F.rms_norm(o, o.shape[-1:], eps=1e-5) * self.norm_weight.view(self.heads, self.value)
        y = self._answer(o.flatten(2) * F.silu(z), x)
        if after is None:
            return y, None
        after = after._replace(value=after.value.to(values.dtype))
        memory = {name: own(tensor) for name, tensor in after._asdict().items() if tensor is not None}
        return y, RecurrentState(memory, length=x.shape[1] + (0 if before is None else before.length))

    def _per_head(self, norm: RMSNorm, x: Tensor, bias: Tensor) -> Tensor:
        """[B, T, G N] -> normalised, for each head, with its bias: [B, T, H, N]."""
        each = norm(x.unflatten(-1, (self.groups, self.key)))
        return each.repeat_interleave(self.heads // self.groups, 2) + bias

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length. Matrix and angles are kept in float32 at least."""
        last = tensor_bytes(batch, self.heads, self.key + self.value, dtype=dtype)
        turned = tensor_bytes(batch, self.heads, self.angles, dtype=working_dtype(dtype))
        return super().state_nbytes(length, batch, dtype) + last + turned


def _from_memory(state: RecurrentState) -> Mamba3State:
    return Mamba3State(state["matrix"], state["key"], state["value"], state.memory.get("angle"))
