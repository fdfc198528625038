"""What a block has in a mixer's place that mixes nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from contextlab.mixers.base import Mixer
from contextlab.state import RecurrentState, State


class NoMixer(Mixer):
    """Gives zeros and remembers nothing, so that its block is its MLP alone: a layer of mixer "none" has it.

    width: size of a token's vector.
    """

    parallel_form = "none"

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`: y [B, T, D] is zero."""
        length = x.shape[1] + (0 if state is None else state.length)
        return torch.zeros_like(x), RecurrentState(length=length) if keep_state else None

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: none."""
        return 0

    def flops(self, length: int) -> int:
        """See `Mixer.flops`: none."""
        return 0
