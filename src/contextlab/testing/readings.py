"""What the laws of mixers draw: batches of sequences, how they are cut and padded; and mixers to read them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from zlib import crc32

import torch
from hypothesis import strategies as st
from torch import Tensor

from contextlab.mixers.base import Mixer
from contextlab.state import State
from contextlab.testing.law import Component

WIDTH = 24  # many numbers of heads divide it
SHORT = 40
"""Tokens of every second reading, at most."""
PIECES = 20
"""Of what a mixer reads one after another in a loop: more of them tell nothing new, and take seconds."""
PIECE_SIZES = ("segment", "chunk", "block", "batch_tokens")
"""Options that say how many tokens such a piece has."""


@dataclass
class Reading:
    """One example: a batch of sequences, how they are cut, how much of each is left padding.

    x: [B, T, WIDTH]. cuts: where a piece ends, ascending. mask: [B, T] bool, False at left padding, or None.
    at: a position before the last, for laws about one. seed: that x was drawn with, to be shown.
    """

    x: Tensor
    cuts: list[int]
    mask: Tensor | None
    at: int = 0
    seed: int | None = None

    @property
    def pieces(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each piece of x, [B, t, D], with its part of the mask, [B, t] bool."""
        for start, stop in pairwise([0, *self.cuts, self.x.shape[1]]):
            yield self.x[:, start:stop], None if self.mask is None else self.mask[:, start:stop]

    @property
    def real(self) -> Tensor:
        """[B, T] bool: where the outputs count."""
        return torch.ones(self.x.shape[:2], dtype=torch.bool) if self.mask is None else self.mask

    def __str__(self) -> str:
        """Without the numbers."""
        batch, length = self.x.shape[:2]
        words = [f"batch {batch}", f"{length} tokens", f"cut at {self.cuts}" if self.cuts else "uncut"]
        if self.mask is not None:
            words.append(f"left padding {(~self.mask).sum(1).tolist()}")
        return ", ".join([*words, f"position {self.at}", f"x of seed {self.seed}"])


@st.composite
def readings(
    draw: st.DrawFn, longest: int = 150, dtype: torch.dtype = torch.float64, padded: bool | None = None
) -> Reading:
    """Strategy: batches of 1 to 3 rows and 2 to `longest` tokens, cut up to seven times, with or without padding."""
    batch = draw(st.integers(1, 3))
    length = draw(st.integers(2, min(longest, SHORT)) | st.integers(2, longest))
    near = near_chunks(length)
    cut = st.integers(1, length - 1) | st.sampled_from(near) if near else st.integers(1, length - 1)
    cuts = draw(st.lists(cut, min_size=1, max_size=4, unique=True))
    if draw(st.booleans()):  # a run of one-token pieces
        first = draw(st.integers(1, length - 1))
        cuts = list({*cuts, *range(first, min(first + 3, length))})
    seed = draw(st.integers(0, 2**31))
    x = drawn(batch, length, dtype, seed)
    mask = None
    if draw(st.booleans()) if padded is None else padded:
        pads = draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
        mask = torch.arange(length) >= torch.tensor(pads)[:, None]
    return Reading(x, sorted(cuts), mask, draw(st.integers(0, length - 2)), seed)


@dataclass(frozen=True)
class Readings:
    """`readings` for a component: of at most `PIECES` tokens, segments or chunks that it reads one after another."""

    longest: int = 150
    dtype: torch.dtype = torch.float64

    def __call__(self, component: Component) -> st.SearchStrategy[Reading]:
        """Any of them."""
        return readings(self._most(component), self.dtype)

    def typical(self, component: Component, number: int, chance: random.Random) -> Reading:
        """Two or three rows, padded in turn, cut near where a chunk ends, with a run of one-token pieces."""
        most = self._most(component)
        length = chance.randint(min(8, most), most if chance.random() < 0.5 else min(most, SHORT))
        batch, first = chance.randint(2, 3), chance.randint(1, length - 1)
        near = near_chunks(length) or [first]
        cuts = {chance.choice(near), chance.randint(1, length - 1), *range(first, min(first + 3, length))}
        turn = number + crc32(component.label.encode())
        seed = 2 * chance.randrange(2**30) + (turn + turn // 4) % 2  # its last bit says whether gradients are taken
        mask = None
        if turn % 2:
            pads = [chance.randint(0, length) for _ in range(batch)]
            mask = torch.arange(length) >= torch.tensor(pads)[:, None]
        return Reading(drawn(batch, length, self.dtype, seed), sorted(cuts), mask, chance.randint(0, length - 2), seed)

    def _most(self, component: Component) -> int:
        sizes = [size for name in PIECE_SIZES if isinstance(size := component.options.get(name), int)]
        if getattr(component.factory, "parallel_form", "") == "loop":
            sizes.append(1)
        return min([self.longest, *(PIECES * size for size in sizes)])


def near_chunks(length: int) -> list[int]:
    """Places within so many tokens where chunks end, and those next to them."""
    return [n + d for n in (16, 32, 64, 128) for d in (-1, 0, 1) if n + d < length]


def drawn(batch: int, length: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers [batch, length, WIDTH]."""
    return torch.randn(batch, length, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def read(mixer: Mixer, reading: Reading) -> tuple[Tensor, State]:
    """Read in pieces, the state handed on. Returns all outputs [B, T, D] and the last state."""
    outputs, state = [], None
    for piece, mask in reading.pieces:
        y, state = mixer(piece, state, mask)
        outputs.append(y)
    if state is None:
        raise AssertionError("no state was handed on")
    return torch.cat(outputs, 1), state


class WithTokens(Mixer):
    """A mixer that reads token ids, as one that makes them of x: four symbols, by the signs of two channels."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__(mixer.width)
        self.inner = mixer
        for name in ("parallel_form", "causal", "hard_choices", "amplifies_rounding"):
            self.__dict__[name] = getattr(mixer, name)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        y, after = self.inner(x, state, mask, keep_state, (x[..., 0] > 0).long() + 2 * (x[..., 1] > 0))
        return y, after

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`."""
        return self.inner.state_nbytes(length, batch, dtype)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        return self.inner.flops(length)


def noisy(mixer: Mixer) -> Mixer:
    """The mixer with noise on every parameter, so that parts that start at zero or one count too."""
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer
