"""The base of mixers with one linear recurrence for each element."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from contextlab.mixers.base import Mixer
from contextlab.mixers.convolution import ShortConv, without_padding
from contextlab.mixers.layers import Linear, multiplications, project_wide
from contextlab.mixers.matrix import recurrent
from contextlab.ops.linear import working_dtype
from contextlab.ops.precision import roomy
from contextlab.ops.scan import linear_scan
from contextlab.state import RecurrentState, State, own, tensor_bytes


class ElementwiseMixer(Mixer):
    """Base: project in, maybe convolve, recur h_t = exp(g_t) h_{t-1} + x_t in each channel, project out.

    width: size of a token's vector. inner: C, channels of the state. projected: outputs of the projection in.
    short_conv: width of the causal convolution over the first C of them; 0 for none. conv_bias: whether it has one.
    """

    parallel_form = "scan"

    activation: ClassVar[Literal["silu"] | None] = None  # of the convolution

    def __init__(self, width: int, inner: int, projected: int, short_conv: int = 0, conv_bias: bool = False) -> None:
        super().__init__(width)
        self.inner = inner
        self.in_proj = Linear(width, projected)
        self.conv = ShortConv(inner, short_conv, bias=conv_bias) if short_conv else None
        self.out_proj = Linear(inner, width)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. Padding writes zero, so that the state stays as it started."""
        before, dtype = recurrent(state), x.dtype
        projected, conv = self.in_proj(without_padding(x, mask)), None
        if self.conv is not None:
            first, rest = projected.split((self.inner, projected.shape[-1] - self.inner), -1)
            first, conv = self.conv(first, None if before is None else before["conv"], keep_state, self.activation)
            projected = torch.cat((first, rest), -1)
        y, h = self._recur(projected, None if before is None else before["h"], mask)
        y = project_wide(y.to(roomy(dtype)), self.out_proj, x.dtype)
        if not keep_state:
            return y, None
        memory = {"h": own(h)}
        if conv is not None:
            memory["conv"] = own(conv)
        return y, RecurrentState(memory, length=x.shape[1] + (0 if before is None else before.length))

    @abstractmethod
    def _recur(self, projected: Tensor, h: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """From the projection [B, T, ...] and the state: what is projected out [B, T, C], and the new state."""

    def _scan(self, write: Tensor, log_decay: Tensor, h: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """h_t = exp(log_decay_t) h_{t-1} + write_t in float32 at least."""
        work = working_dtype(write.dtype)
        write = without_padding(write, mask).to(work)
        if write.shape[1] == 0:
            return write, torch.zeros_like(write[:, :1].sum(1)) if h is None else h
        return linear_scan(write, log_decay.to(work), h)

    def _state_shape(self) -> tuple[int, ...]:
        return (self.inner,)

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length; h is kept in float32 at least."""
        h = tensor_bytes(batch, *self._state_shape(), dtype=working_dtype(dtype))
        return h + (0 if self.conv is None else self.conv.state_nbytes(batch, dtype))

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        products = multiplications(self.in_proj) + multiplications(self.out_proj)
        products += 0 if self.conv is None else self.conv.weight.numel()
        return 2 * length * (products + self._products())

    def _products(self) -> int:
        """Multiply-adds a token beside the projections and the convolution."""
        return self.inner
