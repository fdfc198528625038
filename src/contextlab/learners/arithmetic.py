"""Arithmetic written out character by character: the formats, and the learner that evaluates them exactly.

Formats are those of 2307.03381 and its public code. A text is built from blocks of columns [N, width] of character
ids, in which -1 is no character, so that texts of different lengths are written at once; `squeeze` closes the gaps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.answers import sure_of
from contextlab.learners.text import token_ids
from contextlab.prompt import Learner, Prompt
from contextlab.registry import register

Operation = Literal["addition", "subtraction", "multiplication", "sine", "square_root"]
Format = Literal["plain", "reversed", "simple", "detailed"]
ALPHABET = "\n !$()*+,-./0123456789:<=>ABCDEINT[]^_acdeghiknpqrstux"
"""Character i has the id i + 1; 0 pads."""
VOCABULARY = len(ALPHABET) + 1
NOTHING = -1
ZERO = ALPHABET.index("0") + 1
SIGN: dict[str, str] = {"addition": "+", "subtraction": "-", "multiplication": "*"}
FUNCTION: dict[str, str] = {"sine": "sin", "square_root": "sqrt"}
FORMATS: dict[str, tuple[str, ...]] = {
    "addition": ("plain", "reversed", "simple", "detailed"),
    "subtraction": ("plain", "reversed", "simple", "detailed"),
    "multiplication": ("plain", "reversed", "detailed"),
    "sine": ("plain", "detailed"),
    "square_root": ("plain", "detailed"),
}
"""Those that the paper's code defines."""
MOST_DIGITS: dict[str, int] = {"addition": 16, "subtraction": 16, "multiplication": 8, "sine": 8, "square_root": 8}
"""Up to which everything fits int64, and sines are exact in float64."""
STEPS = 4
"""Of Newton's iteration and of the Taylor series."""


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


def question(operation: str, form: str, x: Tensor, y: Tensor, size: int) -> Tensor:
    """What the model is given, up to the first character that it must write: [N, W].

    x, y: [N] int64, the operands; functions leave y.
    """
    if operation in FUNCTION:
        name = FUNCTION[operation]
        asked = torch.cat([text(f"{name}(", x), fixed(x, size), text(")", x)], 1)
    else:
        asked = torch.cat([number(x, size), text(SIGN[operation], x), number(y, size)], 1)
    if form in ("plain", "reversed"):
        return torch.cat([text("$" if form == "reversed" else "", x), asked, text("=", x)], 1)
    return torch.cat([text("Input:\n", x), asked, text("\nTarget:\n", x)], 1)


def solution(operation: str, form: str, x: Tensor, y: Tensor, size: int) -> Tensor:
    """What the model must write, with the character that ends it.

    x, y: operands [N] int64; of a function x / 10^size. size: most digits of an operand, or digits after the point.
    """
    if form == "detailed":
        detailed = {"addition": _add, "subtraction": _subtract, "multiplication": _multiply}
        if operation in detailed:
            head = [torch.cat([_list(v, size), text(" has ", v), number(_length(v), 2)], 1) for v in (x, y)]
            lines = [part for block in head for part in (block, text(" digits.\n", x))]
            return torch.cat([text("<scratch>\n", x), *lines, detailed[operation](x, y, size)], 1)
        return torch.cat([text("<scratch>\n", x), _sine(x, size) if operation == "sine" else _root(x, size)], 1)
    if form == "simple":
        return (_add_simply if operation == "addition" else _subtract_simply)(x, y, size)
    if operation in FUNCTION:
        value = sine(x, size) if operation == "sine" else root(x, size)
        return torch.cat([fixed(value, size), text("\n", x)], 1)
    value = {"addition": x + y, "subtraction": x - y, "multiplication": x * y}[operation]
    width = 2 * size if operation == "multiplication" else size + 1
    return torch.cat(
        [number(value, width, backwards=form == "reversed"), text("$" if form == "reversed" else "\n", x)], 1
    )


def sine(x: Tensor, places: int) -> Tensor:
    """sin(x / 10^places) [N], rounded down to so many places."""
    return ((x.double() / 10**places).sin() * 10**places).floor().long()


def root(x: Tensor, places: int) -> Tensor:
    """The square root of x / 10^places [N], rounded down to so many places."""
    square = x * 10**places
    guess = square.double().sqrt().floor().long()
    guess = torch.where(guess * guess > square, guess - 1, guess)
    return torch.where((guess + 1) * (guess + 1) <= square, guess + 1, guess)


def _length(value: Tensor) -> Tensor:
    """Number of decimal digits."""
    return (value.unsqueeze(1) >= 10 ** torch.arange(1, 18, device=value.device)).sum(1) + 1


def _list(value: Tensor, width: int, dropped: int = 0) -> Tensor:
    """The digits of a number in brackets, without so many of the last ones."""
    found = digits(value, width)[:, : width - dropped]
    return listed([torch.where(d >= 0, d + ZERO, NOTHING) for d in found.split(1, 1)], value)


def _place(value: Tensor, i: int) -> Tensor:
    """The digit that stands for 10^i."""
    return value.div(10**i, rounding_mode="floor") % 10


def _masked(where: Tensor, *parts: Tensor) -> Tensor:
    return torch.where(where.unsqueeze(1), torch.cat(parts, 1), NOTHING)


def _add(x: Tensor, y: Tensor, size: int) -> Tensor:
    steps, carry = _length(torch.maximum(x, y)), torch.zeros_like(x)
    lines: list[Tensor] = []
    answer: list[Tensor] = []
    for i in range(size):
        a, b = _place(x, i), _place(y, i)
        total, active = a + b + carry, steps > i
        lines.append(
            _masked(
                active,
                *(_list(x, size, i), text(" + ", x), _list(y, size, i), text(" , A=", x), listed(answer, x)),
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


def _add_simply(x: Tensor, y: Tensor, size: int) -> Tensor:
    steps, carry = _length(torch.maximum(x, y)), torch.zeros_like(x)
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
    steps, borrow = _length(torch.maximum(x, y)), torch.zeros_like(x)
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
    steps = _length(torch.maximum(x, y))
    power = (10 ** torch.arange(size, device=x.device))[steps - 1]
    highest = (x - y).div(power, rounding_mode="floor") * power
    rest = x - y - highest
    return [number(highest, size + 1), text("+", x), number(rest, size), text("=", x), number(x - y, size)]


def _subtract(x: Tensor, y: Tensor, size: int) -> Tensor:
    steps = _length(torch.maximum(x, y))
    lines: list[Tensor] = []
    answer: list[Tensor] = []
    for i, (active, a, b, borrow, written, after) in enumerate(_borrowed(x, y, size)):
        ten = (after > 0) & (steps > i + 1)
        lines.append(
            _masked(
                active,
                *(_list(x, size, i), text(" - ", x), _list(y, size, i), text(" , A=", x), listed(answer, x)),
                *(text(" , C=", x), number(-borrow, 1), text(" , ", x), number(a, 1), text("-", x), number(b, 1)),
                *(text("-", x), number(borrow, 1), text("+10", x, ten), text("=", x), number(written, 2)),
                *(text(" , A->", x), number(written, 2), text(" , C->", x), number(-after, 1), text("\n", x)),
            )
        )
        answer = [_masked(active, number(written, 2)), *answer]
    end = [text("[] - [] , A=", x), listed(answer, x), text("\n", x), *_recombined(x, y, size)]
    result = [text(" , END\n</scratch>\n", x), spaced(number(x - y, size)), text("\n", x)]
    return torch.cat([*lines, *end, *result], 1)


def _subtract_simply(x: Tensor, y: Tensor, size: int) -> Tensor:
    lines = [
        _masked(active, text("A->", x), number(written, 2), text(" , C->", x), number(-after, 1), text("\n", x))
        for active, _, _, _, written, after in _borrowed(x, y, size)
    ]
    return torch.cat([*lines, *_recombined(x, y, size), text(".\n", x), number(x - y, size), text("\n", x)], 1)


def _multiply(x: Tensor, y: Tensor, size: int) -> Tensor:
    steps, total, lines = _length(y), torch.zeros_like(x), []
    for i in range(size):
        b = _place(y, i)
        part = b * x
        shifted = part * 10**i
        lines.append(
            _masked(
                steps > i,
                *(text("\n" if i else "", x), _list(x, size), text(" * ", x), number(b, 1), text(" , A=", x)),
                *(_list(part, size + 1), text(f" , k={10**i} , B=", x), _list(shifted, size + 1 + i)),
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


def _root(x: Tensor, places: int) -> Tensor:
    at = newton(x, places)
    # the first iterate is a whole number, written without a point
    shown = [number(at[0].div(10**places, rounding_mode="floor"), 2), *(fixed(value, places) for value in at[1:])]
    parts = [text("x_0=", x), shown[0]]
    for i in range(1, STEPS + 1):
        before = shown[i - 1]
        parts += [text(f"\nx_{i}: 1/2*(", x), before, text("+", x), fixed(x, places), text("/", x), before]
        parts += [text(")=", x), shown[i], text(f", x_{i}=", x), shown[i]]
    return torch.cat([*parts, text(" , END\n</scratch>\n", x), shown[-1], text("\n", x)], 1)


def _sine(x: Tensor, places: int) -> Tensor:
    shown = [fixed(value, places) for value in taylor(x, places)]
    parts = [text("x_0=", x), shown[0]]
    for i in range(1, STEPS + 1):
        k, sign = 2 * i + 1, "-" if i % 2 else "+"
        parts += [text(f"\nx_{i}: x_{i - 1} {sign} 1/{k}! * (x^{k}) , x_{i}=", x), shown[i]]
    return torch.cat([*parts, text(" , END\n</scratch>\n", x), shown[-1], text("\n", x)], 1)


def check_format(operation: str, form: str, size: int) -> None:
    """Raises InputError for a format that the operation has not, and for operands that do not fit."""
    if form not in FORMATS[operation]:
        raise InputError(f"format {form!r} is not defined for {operation}; use one of {', '.join(FORMATS[operation])}")
    if size > MOST_DIGITS[operation]:
        raise InputError(
            f"digits {size} are too many for {operation}: numbers must fit 64 bits; at most {MOST_DIGITS[operation]}"
        )


@register(
    "learner",
    "arithmetic_evaluator",
    family="state tracking",
    papers=("2307.03381",),
    cases=({"operation": "addition"}, {"operation": "sine", "format": "detailed", "digits": 4}),
)
@dataclass(frozen=True)
class ArithmeticEvaluator(Learner):
    """Reads the operands of each problem, computes, and writes the answer in the format: makes no error.

    Over the characters of a problem it knows nothing, and predicts them all alike.

    operation: "addition", "subtraction", "multiplication", "sine" or "square_root".
    format: "plain", "reversed", "simple" or "detailed".
    digits: most digits of an operand; of functions, digits after the point.
    """

    operation: Operation
    format: Format = "plain"
    digits: PositiveInt = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_format(self.operation, self.format, self.digits)

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, T, characters], float32. Raises InputError for prompts of another task."""
        tokens = token_ids(prompt, VOCABULARY, "arithmetic_evaluator")
        x, y, asked, begun = self._read(tokens)
        rows, problems = x.shape
        (answer,) = squeeze(solution(self.operation, self.format, x.flatten(), y.flatten(), self.digits))
        answer = answer.view(rows, problems, -1)
        at = torch.arange(tokens.shape[1], device=tokens.device)
        which = begun.clamp(min=1) - 1
        place = at - asked.gather(1, which)
        inside = (place >= 0) & (place < answer.shape[2])
        table = answer.flatten(1)
        following = table.gather(1, which * answer.shape[2] + place.clamp(0, answer.shape[2] - 1))
        known = inside & (following > 0)
        return sure_of(following, known, VOCABULARY)

    def _read(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Operands [B, P], where the answer is asked for [B, P] (T if it is not), problems begun so far [B, T]."""
        code = {character: i + 1 for i, character in enumerate(ALPHABET)}
        line = tokens == code["\n"]
        scratch = self.format in ("simple", "detailed")
        before = torch.cat([torch.zeros_like(line[:, :1]), line[:, :-1]], 1)
        first = torch.zeros_like(line)
        first[:, 0] = True
        starts = tokens == code["I"] if scratch else (first | before) & (tokens > 0)
        begun = starts.cumsum(1)
        problems = int(begun.max())
        if not problems:
            raise InputError(
                f"arithmetic_evaluator: no {self.operation} of format {self.format!r} begins in these prompts"
            )
        # Within each problem: the line, counted from 0, and whether the answer has been asked for.
        which = begun.clamp(min=1) - 1
        lines_before = before.cumsum(1)
        row = lines_before - self._since(lines_before, starts)
        if scratch:
            asks, statement = line & (row == 2), row == 1
        else:
            asks = tokens == code["="]
            statement = torch.ones_like(line)
        last = tokens.shape[1]
        at = torch.arange(last, device=tokens.device).expand_as(tokens)
        shape = (len(tokens), problems)
        asked = torch.full(shape, last, device=tokens.device)
        asked = asked.scatter_reduce(1, which, at.masked_fill(~asks | (begun == 0), last), "amin")
        statement = statement & (at < asked.gather(1, which)) & (begun > 0)
        return *self._operands(tokens, statement, which, problems, code), asked, begun

    @staticmethod
    def _since(values: Tensor, starts: Tensor) -> Tensor:
        """The value at the last start, [B, T]; values must not fall."""
        return torch.where(starts, values, 0).cummax(1).values

    def _operands(
        self, tokens: Tensor, statement: Tensor, which: Tensor, problems: int, code: dict[str, int]
    ) -> tuple[Tensor, Tensor]:
        """Both operands of each problem, [B, problems], 0 where there is none."""
        is_digit = statement & (tokens >= ZERO) & (tokens < ZERO + 10)
        values = [torch.zeros(len(tokens), problems, dtype=torch.int64, device=tokens.device) for _ in range(2)]
        function = self.operation in FUNCTION
        splits = code["."] if function else code[SIGN[self.operation]]
        second = torch.zeros_like(which)
        marks = torch.zeros_like(values[0]).scatter_add_(1, which, (statement & (tokens == splits)).long())
        passed = (statement & (tokens == splits)).cumsum(1)
        second = passed - (marks.cumsum(1) - marks).gather(1, which) > 0
        for side, value in enumerate(values):
            mine = is_digit & (second == bool(side))
            count = mine.long()
            total = torch.zeros_like(value).scatter_add_(1, which, count)
            seen = count.cumsum(1) - (total.cumsum(1) - total).gather(1, which)
            # A digit stands for the power of ten by the digits after it; after a point, by those before it.
            place = self.digits - seen if function and side else total.gather(1, which) - seen
            power = 10 ** place.clamp(0, 17)
            value.scatter_add_(1, which, torch.where(mine & (place >= 0), (tokens - ZERO) * power, 0))
        if not function:
            return values[0].clamp(max=10**self.digits - 1), values[1].clamp(max=10**self.digits - 1)
        minus = torch.zeros_like(marks).scatter_add_(1, which, (statement & (tokens == code["-"])).long())
        x = values[0].clamp(max=99) * 10**self.digits + values[1]
        x = torch.where(minus > 0, -x, x)
        if self.operation == "square_root":
            x = x.clamp(min=10**self.digits)  # the format starts from the root's whole part, which must not be 0
        return x, torch.zeros_like(x)
