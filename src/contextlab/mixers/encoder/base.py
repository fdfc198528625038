"""The base of mixers that read both ways."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from contextlab.mixers.base import Mixer
from contextlab.state import State


class Encoder(Mixer):
    """Base of the mixers that read both ways: no state; subclasses define `mix`."""

    causal: ClassVar[bool] = False

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. Returns (y, None); a state is refused."""
        return self.mix(x, mask), None

    @abstractmethod
    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x: [B, T, width]. mask: [B, T] bool, False at left padding, or None. Returns [B, T, width]."""

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """0: an encoder holds nothing."""
        return 0


def left_aligned(x: Tensor, mask: Tensor, fill: float = 0.0) -> Tensor:
    """x [B, T, ...] with each row's real tokens first and `fill` after them. mask: [B, T] bool, False at padding."""
    place = torch.arange(mask.shape[1], device=x.device)
    real = mask.sum(1, keepdim=True)
    index = ((place - real) % max(1, mask.shape[1])).view(*mask.shape, *(1,) * (x.ndim - 2))
    beyond = (place >= real).view(index.shape)
    return x.gather(1, index.expand(x.shape)).masked_fill(beyond, fill)
