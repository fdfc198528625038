"""LongRoPE's search for factors of RoPE's frequencies (2402.13753, algorithm 1)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from contextlab.ops.position import RopeScaling, longrope_temperature, rope_factors, rope_frequencies

ROOM = 1.25
"""Factors are searched up to so many times that of the length."""
MUTATED = 0.3
"""Chance that a factor, or the temperature, is drawn anew in a mutation."""
PARENTS = 8
"""The best candidates so far, which others are made of."""
PLAIN = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)
"""First tokens that may keep plain angles, as the paper searches them (table 4)."""


@dataclass(frozen=True)
class Candidate:
    """factors: by which each pair's frequency is divided, not falling. sharpen: of rotated queries and keys.

    plain: the first tokens, which keep plain angles.
    """

    factors: tuple[float, ...]
    sharpen: float
    plain: int = 0


@dataclass(frozen=True)
class Found:
    """best: the candidate of the least loss. losses: of the starts by name, then "found". trials: measured."""

    best: Candidate
    losses: dict[str, float]
    trials: int

    def words(self) -> str:
        """What was found, for a person."""
        low, high = self.best.factors[0], self.best.factors[-1]
        plain = f", but of the first {self.best.plain} tokens" if self.best.plain else ""
        *before, found = self.losses.items()
        told = ", ".join(f"{name} {loss:.4g}" for name, loss in before)
        return f"frequencies divided by {low:.3g} to {high:.3g}{plain}; loss of {told}, {found[0]} {found[1]:.4g}"


NAMES = ("linear", "ntk", "yarn")


def starts(size: int, base: float, factor: float, length: int, plain: int = 0) -> list[Candidate]:
    """Position interpolation, NTK-aware scaling and YaRN, each with its own temperature.

    size: rotated dimensions. factor: new length over `length`, that of the training. plain: first plain tokens.
    """
    given = (
        RopeScaling(kind="linear", factor=factor), RopeScaling(kind="ntk", factor=factor),
        RopeScaling(kind="yarn", factor=factor, original_length=length),
    )  # fmt: skip
    return [
        Candidate(tuple(rope_factors(size, base, each)), rope_frequencies(size, base, each)[1], plain) for each in given
    ]


def search(
    loss: Callable[[Candidate], float],
    size: int,
    base: float,
    factor: float,
    length: int,
    trials: int,
    generator: torch.Generator,
    plain: tuple[int, ...] = (0,),
) -> Found:
    """The candidate of the least loss among `trials` of them, the starts first; of equals the first that was met.

    loss: of a candidate. size, base: of RoPE. factor, length: see `starts`. generator: of what is drawn.
    plain: how many first tokens may keep plain angles; the starts have the first of these numbers.
    """
    first = starts(size, base, factor, length, plain[0])
    if factor == 1:  # nothing is to be extended
        return Found(first[0], {"linear": (only := loss(first[0])), "found": only}, 1)
    heats = (1.0, first[-1].sharpen, longrope_temperature(factor, length))
    seen = {each: loss(each) for each in first[:trials]}
    losses = dict(zip(NAMES, seen.values(), strict=False))
    while len(seen) < trials:
        best = sorted(seen, key=seen.__getitem__)[:PARENTS]
        for _ in range(1000):  # of few pairs all that can be drawn may have been
            child = _crossed(best, generator) if len(seen) % 2 else _mutated(best, factor, heats, plain, generator)
            if child not in seen:
                break
            child = _mutated(best, factor, heats, plain, generator)
        seen[child] = loss(child)
    found = min(seen, key=seen.__getitem__)
    return Found(found, {**losses, "found": seen[found]}, len(seen))


def _mutated(
    parents: list[Candidate],
    factor: float,
    heats: tuple[float, ...],
    plain: tuple[int, ...],
    generator: torch.Generator,
) -> Candidate:
    """One of the parents, some of whose factors go a part of the way to others, drawn between their neighbours."""
    parent = parents[_below(len(parents), generator)]
    factors = list(parent.factors)
    must = _below(len(factors), generator)
    for j in range(len(factors)):
        if j == must or _uniform(generator) < MUTATED:
            low = factors[j - 1] if j else 1.0
            high = factors[j + 1] if j + 1 < len(factors) else ROOM * factor
            drawn = low + (high - low) * _uniform(generator)
            factors[j] += (drawn - factors[j]) * _uniform(generator)
    again = _uniform(generator) < MUTATED
    sharpen = heats[_below(len(heats), generator)] if again else parent.sharpen
    first = parent.plain
    if len(plain) > 1 and _uniform(generator) < MUTATED:
        first = plain[_below(len(plain), generator)]
    return Candidate(tuple(factors), sharpen, first)


def _crossed(parents: list[Candidate], generator: torch.Generator) -> Candidate:
    """Each factor from one of two parents, none below the one before it; temperature and plain tokens of one each."""
    one, other = (parents[_below(len(parents), generator)] for _ in range(2))
    chosen = [pair[_below(2, generator)] for pair in zip(one.factors, other.factors, strict=True)]
    sharpen = (one, other)[_below(2, generator)].sharpen
    plain = one.plain if one.plain == other.plain else (one, other)[_below(2, generator)].plain
    return Candidate(tuple(itertools.accumulate(chosen, max)), sharpen, plain)


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator, device=generator.device))


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, device=generator.device, dtype=torch.float64))
