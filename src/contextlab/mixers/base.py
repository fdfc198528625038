"""The Mixer contract: an `nn.Module` that mixes tokens, `(x, state) -> (y, state)`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.state import State


class Mixer(nn.Module, ABC):
    """Base of every token mixer.

    width: D, the size of a token's vector.
    """

    causal: ClassVar[bool] = True

    def __init__(self, width: int) -> None:
        super().__init__()
        if width < 1:
            raise InputError(f"width must be at least 1, got {width}")
        self.width = width

    @abstractmethod
    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """Read tokens.

        x: [B, T, D]. state: what was read before, None at the start.
        mask: [B, T] bool or None; False marks left padding. In the whole sequence (earlier pieces included) no
            padding may follow a real token. Padded tokens change nothing; what is returned at them is undefined
            but finite.
        keep_state: False says that the caller drops the state, so that its cost can be saved; None is then returned.

        Returns y [B, T, D] and the state after the last token. The state passed in stays valid (it can be used
        again, as in beam search), and an input state that requires gradients is differentiated through.
        """

    @abstractmethod
    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """The exact `state.nbytes` after reading `length` tokens in one or many pieces."""

    @abstractmethod
    def flops(self, length: int) -> int:
        """Multiply-adds x 2 of one forward over `length` tokens of one sequence, matrix products counted."""


def state_growth(mixer: Mixer) -> str:
    """How the bytes of the state grow with the tokens read: "none", "constant", "logarithmic" or "linear".

    Found from `state_nbytes` at 2^10, 2^14 and 2^18 tokens, not declared.
    """
    if not mixer.causal:
        return "none"
    few, some, many = (mixer.state_nbytes(2**n) for n in (10, 14, 18))
    if few == many:
        return "constant"
    return "linear" if many > 4 * some else "logarithmic"


def head_size(width: int, heads: int, what: str = "heads") -> int:
    """width // heads. Raises InputError that names the nearest number of heads that divides the width."""
    if heads < 1:
        raise InputError(f"{what} must be at least 1, got {heads}")
    if width % heads:
        fits = min((h for h in range(1, width + 1) if width % h == 0), key=lambda h: (abs(h - heads), h))
        raise InputError(f"width {width} is not divisible by {heads} {what}; the nearest that divides it is {fits}")
    return width // heads
