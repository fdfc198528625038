"""Numbers and signs as blocks of characters, one row a problem, with gaps that are closed in the end."""

from __future__ import annotations

import torch
from torch import Tensor

ALPHABET = "\n !$()*+,-./0123456789:<=>ABCDEINT[]^_acdeghiknpqrstux"
"""Character i has the id i + 1; 0 pads."""
VOCABULARY = len(ALPHABET) + 1
NOTHING = -1
ZERO = ALPHABET.index("0") + 1


def text(characters: str, like: Tensor, where: Tensor | None = None) -> Tensor:
    """The same characters in each row, [N, len]; like: [N]; where: [N] bool, rows that have them."""
    ids = torch.tensor([ALPHABET.index(c) + 1 for c in characters], dtype=torch.int64, device=like.device)
    block = ids.expand(len(like), -1)
    return block if where is None else torch.where(where.unsqueeze(1), block, NOTHING)


def digits(value: Tensor, width: int) -> Tensor:
    """Decimal digits of value [N] >= 0, highest first, [N, width]; -1 before the first."""
    power = 10 ** torch.arange(width - 1, -1, -1, device=value.device)
    shown = (value.unsqueeze(1) >= power) | (power == 1)
    return torch.where(shown, value.unsqueeze(1).div(power, rounding_mode="floor") % 10, NOTHING)


def number(value: Tensor, width: int, *, backwards: bool = False) -> Tensor:
    """A whole number, with - where it is negative, [N, 1 + width]; backwards: with its characters reversed."""
    found = digits(value.abs(), width)
    block = torch.cat([text("-", value, value < 0), torch.where(found >= 0, found + ZERO, NOTHING)], 1)
    return block.flip(1) if backwards else block


def fixed(value: Tensor, places: int) -> Tensor:
    """value [N] / 10^places as Python writes a float, [N, 4 + places]: no zeros at the end, but one digit stays."""
    size, one = value.abs(), 10**places
    power = 10 ** torch.arange(places - 1, -1, -1, device=value.device)
    fraction = (size % one).unsqueeze(1)
    shown = (fraction % (10 * power) != 0) | (power == one // 10)
    places_shown = torch.where(shown, fraction.div(power, rounding_mode="floor") % 10 + ZERO, NOTHING)
    whole = digits(size.div(one, rounding_mode="floor"), 2)
    whole = torch.where(whole >= 0, whole + ZERO, NOTHING)
    return torch.cat([text("-", value, value < 0), whole, text(".", value), places_shown], 1)


def listed(items: list[Tensor], like: Tensor) -> Tensor:
    """[item,item,...]; items: blocks [N, k], of which a row leaves out those without a character."""
    block, begun = [text("[", like)], torch.zeros_like(like, dtype=torch.bool)
    for item in items:
        there = (item >= 0).any(1)
        block += [text(",", like, begun & there), item]
        begun = begun | there
    return torch.cat([*block, text("]", like)], 1)


def spaced(block: Tensor) -> Tensor:
    """A space after each digit but the last; block: [N, 1 + width] as `number` gives."""
    parts = [block[:, :1]]
    for column in block[:, 1:].split(1, 1):
        parts += [column, text(" ", column[:, 0], column[:, 0] >= 0)]
    return torch.cat(parts[:-1], 1)  # the last digit is always there


def squeeze(block: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Close the gaps of block [N, W]: characters move left, 0 fills the end; `others` [N, W] move with them."""
    there = block >= 0
    to = torch.where(there, there.cumsum(1) - 1, block.shape[1])
    moved = []
    for each in (block, *others):
        room = each.new_zeros(len(each), block.shape[1] + 1)
        moved.append(room.scatter_(1, to, each)[:, :-1])
    return tuple(moved)
