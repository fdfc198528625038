"""Mixers: `nn.Module`s that mix tokens, `(x, state) -> (y, state)`; one family a file."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveInt

from contextlab import registry
from contextlab.mixers import recurrent, softmax  # importing registers them
from contextlab.mixers.base import Mixer
from contextlab.mixers.recurrent import Gru, Lstm
from contextlab.mixers.softmax import Attention, SlidingWindow

__all__ = ["Attention", "Gru", "Lstm", "Mixer", "SlidingWindow", "build_mixer", "recurrent", "softmax"]


def build_mixer(name: str, *, width: PositiveInt, **options: Any) -> Mixer:
    """Build a registered mixer.

    name: as `contextlab list mixers` prints it. width: size of a token's vector. options: the mixer's own.
    Raises InputError on unknown, ill-typed or impossible names and options, with the nearest valid choice.
    """
    mixer = registry.lookup("mixer", name).build(width=width, **options)
    assert isinstance(mixer, Mixer)
    return mixer
