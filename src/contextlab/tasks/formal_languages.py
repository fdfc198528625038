"""Languages: how many strings of each length there are, how to draw them evenly, and what may follow a prefix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

DEAD = -1
"""In a table of next states: no string of the language goes on like this."""


@dataclass(frozen=True)
class Language(ABC):
    """What a language's strings are made of, how they are drawn, and what may follow each prefix."""

    symbols: str

    @abstractmethod
    def counts(self, longest: int) -> Tensor:
        """The number of strings of each length 0 .. longest, up to a factor; [longest + 1]."""

    @abstractmethod
    def draw(self, lengths: Tensor, longest: int, generator: torch.Generator) -> Tensor:
        """Strings of the given lengths [B], uniform among those of their length; [B, longest], any symbols after."""

    @abstractmethod
    def follow(self, strings: Tensor) -> Tensor:
        """What may follow each prefix of strings [B, n], from the empty one: [B, n + 1, symbols + 1] bool.

        The last says whether the prefix is a string of the language; all are False where no string begins so.
        """

    @abstractmethod
    def sets(self) -> list[int]:
        """The sets that `follow` can give, as binary numbers (symbol i is bit i), the empty one first."""


@dataclass(frozen=True)
class Regular(Language):
    """A regular language by its automaton.

    table: state -> next state for each symbol; DEAD where there is none. accepting: the states a string may end in.
    """

    table: tuple[tuple[int, ...], ...]
    accepting: frozenset[int]

    @cached_property
    def _following(self) -> Tensor:
        ends = [state in self.accepting for state in range(len(self.table))]
        # every state of the tables below leads to an accepting one, so that an edge is a symbol that may follow
        rows = [[after != DEAD for after in row] + [end] for row, end in zip(self.table, ends, strict=True)]
        return torch.tensor([*rows, [False] * (len(self.symbols) + 1)])  # DEAD is the last row

    def _ways(self, longest: int) -> Tensor:
        """Strings of r symbols from each state to an accepting one, [longest + 1, states + 1], each row scaled."""
        table = torch.tensor(self.table)
        ways = self._following[:, -1].double()
        rows = [ways]
        for _ in range(longest):
            ways = torch.cat([ways[table].sum(1), ways.new_zeros(1)])
            ways = ways / ways.max().clamp(min=torch.finfo(ways.dtype).tiny)
            rows.append(ways)
        return torch.stack(rows)

    def counts(self, longest: int) -> Tensor:
        return self._ways(longest)[:, 0]

    def draw(self, lengths: Tensor, longest: int, generator: torch.Generator) -> Tensor:
        return self._walk(lengths, longest, generator)[0]

    def _walk(self, lengths: Tensor, longest: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Symbols [B, longest], and the state before each."""
        device = lengths.device
        ways, table = self._ways(longest).to(device), torch.tensor(self.table, device=device)
        uniform = torch.rand(longest, len(lengths), generator=generator, device=device, dtype=torch.float64)
        state = torch.zeros_like(lengths)
        symbols, states = [], []
        for t in range(longest):
            left = (lengths - t - 1).clamp(min=0)
            weight = ways[left.unsqueeze(1), table[state]].cumsum(1)
            symbol = (weight <= uniform[t].unsqueeze(1) * weight[:, -1:]).sum(1).clamp(max=len(self.symbols) - 1)
            symbols.append(symbol)
            states.append(state)
            state = torch.where(t + 1 < lengths, table[state, symbol], 0)
        return torch.stack(symbols, 1), torch.stack(states, 1)

    def follow(self, strings: Tensor) -> Tensor:
        following = self._following.to(strings.device)
        dead = torch.full((1, len(self.symbols)), DEAD, device=strings.device)
        table = torch.cat([torch.tensor(self.table, device=strings.device), dead])
        state = torch.zeros_like(strings[:, 0])
        out = [following[state]]
        for symbol in strings.unbind(1):
            state = table[state, symbol]
            out.append(following[state])
        return torch.stack(out, 1)

    def sets(self) -> list[int]:
        return _distinct([sum(1 << i for i, may in enumerate(row) if may) for row in self._following.tolist()])


@dataclass(frozen=True)
class Dyck(Language):
    """Well-nested brackets of several types, at most so deep. symbols: the opening ones, then the closing ones."""

    depth: int

    @property
    def types(self) -> int:
        return len(self.symbols) // 2

    @cached_property
    def _depths(self) -> Regular:
        """The language of one type, whose states are depths; each of its strings stands for equally many."""
        rows = [(d + 1 if d < self.depth else DEAD, d - 1) for d in range(self.depth + 1)]
        return Regular("()", tuple(rows), frozenset({0}))

    def counts(self, longest: int) -> Tensor:
        return self._depths.counts(longest)

    def draw(self, lengths: Tensor, longest: int, generator: torch.Generator) -> Tensor:
        closing, depth = self._depths._walk(lengths, longest, generator)
        kinds = torch.randint(self.types, closing.shape, generator=generator, device=lengths.device)
        base = torch.arange(len(lengths), device=lengths.device) * (self.depth + 2)
        stack = torch.zeros(len(lengths) * (self.depth + 2), dtype=torch.int64, device=lengths.device)
        out = []
        for closes, before, kind in zip(closing.unbind(1), depth.unbind(1), kinds.unbind(1), strict=True):
            at = base + before  # the last bracket still open lies at the depth that it leads to
            out.append(torch.where(closes == 1, self.types + stack[at], kind))
            stack[at + 1] = kind
        return torch.stack(out, 1)

    def follow(self, strings: Tensor) -> Tensor:
        batch, device = len(strings), strings.device
        # all stacks in one row; the place `aside` takes what is written by prompts that push nothing
        base, aside = torch.arange(batch, device=device) * (self.depth + 1), batch * (self.depth + 1)
        stack = torch.zeros(aside + 1, dtype=torch.int64, device=device)
        depth, alive = torch.zeros_like(base), torch.ones(batch, dtype=torch.bool, device=device)
        depths, tops, lives = [depth], [depth], [alive]
        for symbol in strings.unbind(1):
            opens = symbol < self.types
            alive = alive & torch.where(opens, depth < self.depth, (depth > 0) & (symbol - self.types == tops[-1]))
            depth = depth + torch.where(opens, 1, -1) * alive
            stack[torch.where(opens & alive, base + depth, aside)] = symbol
            depths.append(depth)
            tops.append(stack[base + depth])
            lives.append(alive)
        depth, top, alive = (torch.stack(each, 1).unsqueeze(-1) for each in (depths, tops, lives))
        opening = (depth < self.depth).expand(-1, -1, self.types)
        closing = (torch.arange(self.types, device=device) == top) & (depth > 0)
        return torch.cat([opening, closing, depth == 0], -1) & alive

    def sets(self) -> list[int]:
        opens, k = (1 << self.types) - 1, self.types
        closes = [1 << k + i for i in range(k)]
        return _distinct([0, opens | 1 << 2 * k, *(opens | c for c in closes), *closes])


@dataclass(frozen=True)
class Equal(Language):
    """Each symbol n times, one after another, n > 0: a^n b^n, a^n b^n c^n."""

    def counts(self, longest: int) -> Tensor:
        length = torch.arange(longest + 1)
        return ((length % len(self.symbols) == 0) & (length > 0)).double()

    def draw(self, lengths: Tensor, longest: int, generator: torch.Generator) -> Tensor:
        times = (lengths // len(self.symbols)).clamp(min=1).unsqueeze(1)
        return (torch.arange(longest, device=lengths.device) // times).clamp(max=len(self.symbols) - 1)

    def follow(self, strings: Tensor) -> Tensor:
        size = len(self.symbols)
        each = torch.nn.functional.one_hot(strings, size).cumsum(1)
        each = torch.cat([torch.zeros_like(each[:, :1]), each], 1)  # [B, n + 1, size]
        latest = torch.cat([torch.zeros_like(strings[:, :1]), strings], 1)
        first, own = each[..., :1], each.gather(2, latest.unsqueeze(-1))
        whole = (each == first) | (torch.arange(size, device=strings.device) >= latest.unsqueeze(-1))
        ordered = latest == latest.cummax(1).values
        alive = ordered.unsqueeze(-1) & whole.all(2, keepdim=True) & (own <= first)
        alive = alive.cummin(1).values
        full, number = own == first, torch.arange(size + 1, device=strings.device)
        same = (number == latest.unsqueeze(-1)) & (~full | (latest == 0).unsqueeze(-1))
        onward = (number == latest.unsqueeze(-1) + 1) & full & (first > 0)
        return (same | onward) & alive

    def sets(self) -> list[int]:
        singles = [1 << i for i in range(len(self.symbols) + 1)]
        return [0, *singles, 3]


def _distinct(numbers: list[int]) -> list[int]:
    return list(dict.fromkeys([0, *numbers]))


TOMITA: dict[str, tuple[tuple[tuple[int, int], ...], frozenset[int]]] = {
    "tomita1": (((DEAD, 0),), frozenset({0})),
    "tomita2": (((DEAD, 1), (0, DEAD)), frozenset({0})),
    "tomita3": (((0, 1), (2, 0), (3, DEAD), (2, 3)), frozenset({0, 1, 3})),
    "tomita4": (((1, 0), (2, 0), (DEAD, 0)), frozenset({0, 1, 2})),
    "tomita5": (((1, 2), (0, 3), (3, 0), (2, 1)), frozenset({0})),
    "tomita6": (((1, 2), (2, 0), (0, 1)), frozenset({0})),
    "tomita7": (((0, 1), (2, 1), (2, 3), (DEAD, 3)), frozenset({0, 1, 2, 3})),
}
"""State -> next state on 0 and on 1, and the accepting states."""


@lru_cache(maxsize=64)
def language_of(name: str, types: int, depth: int) -> Language:
    """The language called `name`."""
    if name in TOMITA:
        return Regular("01", *TOMITA[name])
    if name == "dyck":
        return Dyck("([{<"[:types] + ")]}>"[:types], depth)
    return Equal("ab" if name == "anbn" else "abc")
