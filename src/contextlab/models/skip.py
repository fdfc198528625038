"""SkipSpec: that only some tokens go through a block, as data."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, NonNegativeInt

from contextlab.spec import Spec

LEEWAY = 1e-9
"""Taken off before rounding up, so that a tenth of thirty tokens is three, not four."""


class SkipSpec(Spec):
    """Only some tokens go through a block (Mixture-of-Depths, 2404.02258). A plain number stands for `{share: number}`.

    share: of a text's tokens that go through, above 0; at 1 all do, and the router only weighs what the block adds.
    ahead: tokens beyond the share that may have gone through at any place of a text that is read causally, since what
        is worth the block need not be spread evenly.
    """

    share: Annotated[float, Field(gt=0, le=1)]
    ahead: NonNegativeInt = 8

    def chosen(self, tokens: int) -> int:
        """How many of a text's tokens go through in training: the share, rounded up."""
        return min(tokens, math.ceil(self.share * tokens - LEEWAY))

    def most(self, tokens: int) -> int:
        """How many of `tokens` read causally may have gone through."""
        return min(tokens, self.chosen(tokens) + self.ahead) if tokens else 0
