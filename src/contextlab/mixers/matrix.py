"""The base of mixers whose state is a matrix for each head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.mixers.base import Mixer
from contextlab.mixers.convolution import ShortConv
from contextlab.mixers.layers import Linear, multiplications, project_wide
from contextlab.ops.linear import (
    simple_gla_flops,
    working_dtype,
)
from contextlab.ops.precision import with_room
from contextlab.state import RecurrentState, State, own, tensor_bytes


class MatrixMixer(Mixer):
    """What mixers with a matrix state per head share: input projection, short convolution, the state's form.

    width: size of a token's vector. heads: H. key, value: K and V, the sides of a head's state.
    projected: outputs of the input projection, the C channels that are convolved first or as the subclass
        says.
    conv_channels, conv_size: of the short convolution; size 0 for none.
    """

    parallel_form = "chunks"

    def __init__(
        self, width: int, heads: int, key: int, value: int, projected: int, conv_channels: int, conv_size: int
    ) -> None:
        super().__init__(width)
        self.heads, self.key, self.value = heads, key, value
        self.in_proj = Linear(width, projected)
        self.conv_channels, self.conv_size = conv_channels, conv_size
        self.conv = ShortConv(conv_channels, conv_size) if conv_size else None

    def _project_out(self, inner: int) -> None:
        self.out_proj = Linear(inner, self.width)

    def _convolved(
        self, x: Tensor, state: RecurrentState | None, keep: bool, activation: Literal["silu"] | None
    ) -> tuple[Tensor, Tensor | None]:
        """The short convolution (if any) and the activation, of `with_room`: products of what it makes are summed."""
        if self.conv is None:
            return with_room(F.silu(x) if activation == "silu" else x), None
        y, last = self.conv(x, None if state is None else state["conv"], keep, activation)
        return with_room(y), last

    def _answer(self, y: Tensor, x: Tensor) -> Tensor:
        """The output projection of y [..., inner] for the input x; see `project_wide`."""
        return project_wide(y, self.out_proj, x.dtype)

    def _kept(
        self, x: Tensor, state: RecurrentState | None, matrix: Tensor | None, conv: Tensor | None
    ) -> RecurrentState:
        assert matrix is not None
        memory = {"matrix": own(matrix.to(working_dtype(x.dtype)))}
        if conv is not None:
            memory["conv"] = own(conv)
        return RecurrentState(memory, length=x.shape[1] + (0 if state is None else state.length))

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length. The matrix is kept in float32 at least."""
        matrix = tensor_bytes(batch, self.heads, self.key, self.value, dtype=working_dtype(dtype))
        return matrix + (0 if self.conv is None else self.conv.state_nbytes(batch, dtype))

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        projections = multiplications(self.in_proj) + multiplications(self.out_proj)
        convolution = self.conv_channels * self.conv_size
        return 2 * length * (projections + convolution) + self._op_flops(length)

    def _op_flops(self, length: int) -> int:
        return simple_gla_flops(length, self.heads, self.key, self.value)


def recurrent(state: State | None) -> RecurrentState | None:
    """`state` as the RecurrentState that it must be."""
    if state is not None and not isinstance(state, RecurrentState):
        raise InputError(f"expected a RecurrentState or None, got {type(state).__name__}")
    return state


def after_token_before(x: Tensor, state: RecurrentState | None) -> Tensor:
    """x [B, T, D] behind the token that was read last, zeros at the start: [B, T + 1, D] (RWKV's token shift)."""
    before = x.new_zeros(x.shape[0], 1, x.shape[2]) if state is None else state["shift"].unsqueeze(1)
    return torch.cat((before, x), 1)
