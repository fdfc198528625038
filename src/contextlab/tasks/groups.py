"""Finite groups as tables of their products."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MOST_ELEMENTS = 1000
"""Elements of a group at most; its table has their square."""


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group; element 0 is the identity.

    names: of the elements.
    table: [G, G] int64, the product of row and column.
    generators: elements that make all others.
    swaps: the identity and the transpositions, of a symmetric group.
    """

    names: tuple[str, ...]
    table: Tensor
    generators: tuple[int, ...]
    swaps: tuple[int, ...] = ()

    def drawn(self, elements: str) -> tuple[int, ...]:
        """The elements of that kind."""
        return {"all": tuple(range(len(self.names))), "generators": self.generators, "swaps": self.swaps}[elements]


@lru_cache(maxsize=16)
def group_of(name: str) -> Group:
    """The group called so; see `GroupWord.group`."""
    first, *rest = [_cyclic(size) if kind == "Z" else _permutations(kind, size) for kind, size in _factors(name)]
    for other in rest:
        left, right = torch.cartesian_prod(torch.arange(len(first.names)), torch.arange(len(other.names))).unbind(1)
        table = first.table[left][:, left] * len(other.names) + other.table[right][:, right]
        names = tuple(f"{a},{b}" for a, b in itertools.product(first.names, other.names))
        generators = (*(g * len(other.names) for g in first.generators), *(g for g in other.generators if g))
        first = Group(names, table, tuple(dict.fromkeys(generators)))
    return first


def _factors(name: str) -> list[tuple[str, int]]:
    return [(part[0], int(part[1:])) for part in name.split("x")]


def _cyclic(size: int) -> Group:
    numbers = torch.arange(size)
    table = (numbers.unsqueeze(1) + numbers) % size
    return Group(tuple(str(i) for i in range(size)), table, tuple(range(min(size, 2))))


def _permutations(kind: str, size: int) -> Group:
    found = [p for p in itertools.permutations(range(size)) if kind == "S" or _even(p)]
    images = torch.tensor(found)
    code = size ** torch.arange(size)
    order = (images * code).sum(1).sort()
    # (a b)(i) = b(a(i)), as a is applied first
    products = images[:, images].permute(1, 0, 2)
    table = order.indices[torch.searchsorted(order.values, (products * code).sum(2))]
    names = tuple(_cycles(p) for p in found)
    index = {p: i for i, p in enumerate(found)}
    moved = [sum(i != image for i, image in enumerate(p)) for p in found]
    if kind == "A":
        generators = tuple(index[_cycle((0, 1, k), size)] for k in range(2, size))
        return Group(names, table, generators)
    generators = (index[_cycle((0, 1), size)], index[_cycle(tuple(range(size)), size)])
    return Group(names, table, tuple(dict.fromkeys(generators)), tuple(i for i, m in enumerate(moved) if m in (0, 2)))


def _even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


def _cycle(places: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The permutation of so many places that moves each of `places` to the next."""
    image = list(range(size))
    for place, following in zip(places, (*places[1:], places[0]), strict=True):
        image[place] = following
    return tuple(image)


def _cycles(permutation: tuple[int, ...]) -> str:
    left, text = set(range(len(permutation))), ""
    while left:
        cycle = [min(left)]
        while permutation[cycle[-1]] != cycle[0]:
            cycle.append(permutation[cycle[-1]])
        left -= set(cycle)
        text += f"({''.join(str(i + 1) for i in cycle)})" if len(cycle) > 1 else ""
    return text or "e"
