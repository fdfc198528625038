"""The detailed and the simple scratchpads of arithmetic (2307.03381), written for all problems of a batch at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from contextlab.learners.arithmetic_text import NOTHING, ZERO, digits, fixed, listed, number, spaced, text

STEPS = 4
"""Of Newton's iteration and of the Taylor series."""


def sine(x: Tensor, places: int) -> Tensor:
    """sin(x / 10^places) [N], rounded down to so many places."""
    return ((x.double() / 10**places).sin() * 10**places).floor().long()


def root(x: Tensor, places: int) -> Tensor:
    """The square root of x / 10^places [N], rounded down to so many places."""
    square = x * 10**places
    guess = square.double().sqrt().floor().long()
    guess = torch.where(guess * guess > square, guess - 1, guess)
    return torch.where((guess + 1) * (guess + 1) <= square, guess + 1, guess)


def length_of(value: Tensor) -> Tensor:
    """Number of decimal digits, [N]."""
    return (value.unsqueeze(1) >= 10 ** torch.arange(1, 18, device=value.device)).sum(1) + 1


def list_of_digits(value: Tensor, width: int, dropped: int = 0) -> Tensor:
    """The digits of a number in brackets, without so many of the last ones, [N, W]."""
    found = digits(value, width)[:, : width - dropped]
    return listed([torch.where(d >= 0, d + ZERO, NOTHING) for d in found.split(1, 1)], value)


def _place(value: Tensor, i: int) -> Tensor:
    """The digit that stands for 10^i."""
    return value.div(10**i, rounding_mode="floor") % 10


def _masked(where: Tensor, *parts: Tensor) -> Tensor:
    return torch.where(where.unsqueeze(1), torch.cat(parts, 1), NOTHING)


def _so_far(x: Tensor, sign: str, y: Tensor, size: int, i: int, answer: list[Tensor]) -> list[Tensor]:
    """How each line begins: the digits that are left of both numbers, and those of the answer that are there."""
    return [
        *(list_of_digits(x, size, i), text(sign, x), list_of_digits(y, size, i)),
        *(text(" , A=", x), listed(answer, x)),
    ]


def add(x: Tensor, y: Tensor, size: int) -> Tensor:
    """The detailed scratchpad of x + y, [N, W], from its first step on."""
    steps, carry = length_of(torch.maximum(x, y)), torch.zeros_like(x)
    lines: list[Tensor] = []
    answer: list[Tensor] = []
    for i in range(size):
        a, b = _place(x, i), _place(y, i)
        total, active = a + b + carry, steps > i
        lines.append(
            _masked(
                active,
                *_so_far(x, " + ", y, size, i, answer),
                *(text(" , C=", x), number(carry, 1), text(" , ", x), number(a, 1), text("+", x), number(b, 1)),
                *(text("+", x), number(carry, 1), text("=", x), number(total, 2), text(" , A->", x)),
                *(number(total % 10, 1), text(" , C->", x), number(total // 10, 1), text("\n", x)),
            )
        )
        answer = [_masked(active, number(total % 10, 1)), *answer]
        carry = torch.where(active, total // 10, carry)
    end = [
        text("[] + [] , A=", x),
        listed(answer, x),
        text(" C=", x),
        number(carry, 1),
        text(" , END\n</scratch>\n", x),
    ]
    return torch.cat([*lines, *end, spaced(number(x + y, size + 1)), text("\n", x)], 1)


def add_simply(x: Tensor, y: Tensor, size: int) -> Tensor:
    """The simple scratchpad of x + y, [N, W]."""
    steps, carry = length_of(torch.maximum(x, y)), torch.zeros_like(x)
    lines = []
    for i in range(size):
        total = _place(x, i) + _place(y, i) + carry
        carry = total // 10
        line = (text("A->", x), number(total % 10, 1), text(" , C->", x), number(carry, 1))
        lines += [_masked(steps > i, *line, text(".", x, steps == i + 1), text("\n", x))]
    return torch.cat([*lines, number(x + y, size + 1), text("\n", x)], 1)


def _borrowed(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, ...]]:
    """Of each place: whether it is there, a, b, the borrow before, what is written, the borrow after.

    The highest place keeps a negative result; all others add 10 to it.
    """
    steps, borrow = length_of(torch.maximum(x, y)), torch.zeros_like(x)
    found: list[tuple[Tensor, ...]] = []
    for i in range(size):
        a, b = _place(x, i), _place(y, i)
        less = a - b - borrow
        after = (less < 0).long()
        written = torch.where((less < 0) & (steps > i + 1), less + 10, less)
        found.append((steps > i, a, b, borrow, written, after))
        borrow = torch.where(steps > i, after, borrow)
    return found


def _recombined(x: Tensor, y: Tensor, size: int) -> list[Tensor]:
    """The highest place times its power, and the rest, make the result: 0+45=45."""
    steps = length_of(torch.maximum(x, y))
    power = (10 ** torch.arange(size, device=x.device))[steps - 1]
    highest = (x - y).div(power, rounding_mode="floor") * power
    rest = x - y - highest
    return [number(highest, size + 1), text("+", x), number(rest, size), text("=", x), number(x - y, size)]


def subtract(x: Tensor, y: Tensor, size: int) -> Tensor:
    """The detailed scratchpad of x - y, [N, W], from its first step on."""
    steps = length_of(torch.maximum(x, y))
    lines: list[Tensor] = []
    answer: list[Tensor] = []
    for i, (active, a, b, borrow, written, after) in enumerate(_borrowed(x, y, size)):
        ten = (after > 0) & (steps > i + 1)
        lines.append(
            _masked(
                active,
                *_so_far(x, " - ", y, size, i, answer),
                *(text(" , C=", x), number(-borrow, 1), text(" , ", x), number(a, 1), text("-", x), number(b, 1)),
                *(text("-", x), number(borrow, 1), text("+10", x, ten), text("=", x), number(written, 2)),
                *(text(" , A->", x), number(written, 2), text(" , C->", x), number(-after, 1), text("\n", x)),
            )
        )
        answer = [_masked(active, number(written, 2)), *answer]
    end = [text("[] - [] , A=", x), listed(answer, x), text("\n", x), *_recombined(x, y, size)]
    result = [text(" , END\n</scratch>\n", x), spaced(number(x - y, size)), text("\n", x)]
    return torch.cat([*lines, *end, *result], 1)


def subtract_simply(x: Tensor, y: Tensor, size: int) -> Tensor:
    """The simple scratchpad of x - y, [N, W]."""
    lines = [
        _masked(active, text("A->", x), number(written, 2), text(" , C->", x), number(-after, 1), text("\n", x))
        for active, _, _, _, written, after in _borrowed(x, y, size)
    ]
    return torch.cat([*lines, *_recombined(x, y, size), text(".\n", x), number(x - y, size), text("\n", x)], 1)


def multiply(x: Tensor, y: Tensor, size: int) -> Tensor:
    """The detailed scratchpad of x y, [N, W], from its first step on."""
    steps, total, lines = length_of(y), torch.zeros_like(x), []
    for i in range(size):
        b = _place(y, i)
        part = b * x
        shifted = part * 10**i
        lines.append(
            _masked(
                steps > i,
                *(text("\n" if i else "", x), list_of_digits(x, size), text(" * ", x), number(b, 1), text(" , A=", x)),
                *(list_of_digits(part, size + 1), text(f" , k={10**i} , B=", x), list_of_digits(shifted, size + 1 + i)),
                *(text(" , C=", x), number(total, size + i), text("+", x), number(shifted, size + 1 + i)),
                *(text("=", x), number(total + shifted, size + 1 + i)),
            )
        )
        total = torch.where(steps > i, total + shifted, total)
    return torch.cat([*lines, text(" , END\n</scratch>\n", x), spaced(number(x * y, 2 * size)), text("\n", x)], 1)


def newton(x: Tensor, places: int) -> list[Tensor]:
    """Newton's iterates [N] for the root of x / 10^places, each rounded down, from the whole part of the root on."""
    one = 10**places
    found = [root(x, places).div(one, rounding_mode="floor") * one]
    for _ in range(STEPS):
        at = found[-1]
        found.append((at * at + x * one).div(2 * at, rounding_mode="floor"))
    return found


def taylor(x: Tensor, places: int) -> list[Tensor]:
    """The partial sums [N] of the sine's series at x / 10^places, each rounded down."""
    found, one = [x], 10**places
    for i in range(1, STEPS + 1):
        k = 2 * i + 1
        term = (x.double() / one) ** k / math.factorial(k) * one
        found.append((found[-1] + (-1) ** i * term).floor().long())
    return found


def newton_steps(x: Tensor, places: int) -> Tensor:
    """The scratchpad of a root by Newton's iterates, [N, W], from the first one on."""
    at = newton(x, places)
    # the first iterate is a whole number, written without a point
    shown = [number(at[0].div(10**places, rounding_mode="floor"), 2), *(fixed(value, places) for value in at[1:])]
    parts = [text("x_0=", x), shown[0]]
    for i in range(1, STEPS + 1):
        before = shown[i - 1]
        parts += [text(f"\nx_{i}: 1/2*(", x), before, text("+", x), fixed(x, places), text("/", x), before]
        parts += [text(")=", x), shown[i], text(f", x_{i}=", x), shown[i]]
    return torch.cat([*parts, text(" , END\n</scratch>\n", x), shown[-1], text("\n", x)], 1)


def taylor_steps(x: Tensor, places: int) -> Tensor:
    """The scratchpad of a sine by its series, [N, W], from the first term on."""
    shown = [fixed(value, places) for value in taylor(x, places)]
    parts = [text("x_0=", x), shown[0]]
    for i in range(1, STEPS + 1):
        k, sign = 2 * i + 1, "-" if i % 2 else "+"
        parts += [text(f"\nx_{i}: x_{i - 1} {sign} 1/{k}! * (x^{k}) , x_{i}=", x), shown[i]]
    return torch.cat([*parts, text(" , END\n</scratch>\n", x), shown[-1], text("\n", x)], 1)
