"""Arithmetic: each text against one written by plain Python; how operands are drawn and held out; exact match."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from contextlab.errors import InputError
from contextlab.learners.arithmetic import ALPHABET, FORMATS, question, root, solution, squeeze
from contextlab.tasks import Arithmetic
from contextlab.tasks.arithmetic import carries, held_out

CASES = [(operation, form) for operation, forms in FORMATS.items() for form in forms]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decode(tokens) -> str:
    return "".join(ALPHABET[token - 1] for token in tokens.tolist() if token)


def as_float(value: int, places: int) -> str:
    """value / 10^places as str() writes a float, in exact arithmetic."""
    sign, value = ("-" if value < 0 else ""), abs(value)
    fraction = str(value % 10**places).zfill(places).rstrip("0") or "0"
    return f"{sign}{value // 10**places}.{fraction}"


def brackets(items) -> str:
    return "[" + ",".join(str(item) for item in items) + "]"


def add(x: int, y: int, simple: bool) -> str:
    a, b, carry, answer, lines = [int(c) for c in str(x)], [int(c) for c in str(y)], 0, [], []
    for _ in range(max(len(a), len(b))):
        p, q = (a[-1] if a else 0), (b[-1] if b else 0)
        total = p + q + carry
        if simple:
            lines.append(f"A->{total % 10} , C->{total // 10}")
        else:
            lines.append(
                f"{brackets(a)} + {brackets(b)} , A={brackets(answer)} , C={carry} , {p}+{q}+{carry}={total} , "
                f"A->{total % 10} , C->{total // 10}"
            )
        answer, carry, a, b = [total % 10, *answer], total // 10, a[:-1], b[:-1]
    if simple:
        return "\n".join(lines) + f".\n{x + y}\n"
    lines.append(f"[] + [] , A={brackets(answer)} C={carry} , END\n</scratch>")
    return "\n".join(lines) + "\n" + " ".join(str(x + y)) + "\n"


def subtract(x: int, y: int, simple: bool) -> str:
    a, b, borrow, answer, lines = [int(c) for c in str(x)], [int(c) for c in str(y)], 0, [], []
    places = max(len(a), len(b))
    for i in range(places):
        p, q = (a[-1] if a else 0), (b[-1] if b else 0)
        left = p - q - borrow
        ten = left < 0 and i < places - 1
        written = left + 10 if ten else left
        if simple:
            lines.append(f"A->{written} , C->{-int(left < 0)}")
        else:
            lines.append(
                f"{brackets(a)} - {brackets(b)} , A={brackets(answer)} , C={-borrow} , {p}-{q}-{borrow}"
                f"{'+10' if ten else ''}={written} , A->{written} , C->{-int(left < 0)}"
            )
        answer, borrow, a, b = [written, *answer], int(left < 0), a[:-1], b[:-1]
    top, rest = answer[0] * 10 ** (places - 1), int("".join(map(str, answer[1:])) or 0)
    assert top + rest == x - y
    whole = f"{top}+{rest}={x - y}"
    if simple:
        return "\n".join([*lines, f"{whole}.", str(x - y)]) + "\n"
    lines += [f"[] - [] , A={brackets(answer)}", f"{whole} , END", "</scratch>"]
    return "\n".join(lines) + "\n" + ("-" if x < y else "") + " ".join(str(abs(x - y))) + "\n"


def multiply(x: int, y: int) -> str:
    total, lines = 0, []
    for i, digit in enumerate(reversed(str(y))):
        part = int(digit) * x
        line = f"{brackets(str(x))} * {digit} , A={brackets(str(part))} , k={10**i} , "
        lines.append(line + f"B={brackets(str(part * 10**i))} , C={total}+{part * 10**i}={total + part * 10**i}")
        total += part * 10**i
    return "\n".join(lines) + " , END\n</scratch>\n" + " ".join(str(x * y)) + "\n"


def newton(x: int, places: int) -> str:
    value, one = Fraction(x, 10**places), 10**places
    at, shown = Fraction(math.isqrt(x * one) // one), str(math.isqrt(x * one) // one)
    lines = [f"x_0={shown}"]
    for i in range(1, 5):
        after = math.floor((at + value / at) / 2 * one)
        text = as_float(after, places)
        lines.append(f"x_{i}: 1/2*({shown}+{as_float(x, places)}/{shown})={text}, x_{i}={text}")
        at, shown = Fraction(after, one), text
    return "\n".join(lines) + f" , END\n</scratch>\n{shown}\n"


def taylor(x: int, places: int) -> str:
    at, lines = x, [f"x_0={as_float(x, places)}"]
    for i in range(1, 5):
        k = 2 * i + 1
        # in floats: exactly, a term that is too small to see would lower a whole number by one
        at = math.floor(at + (-1) ** i * ((x / 10**places) ** k / math.factorial(k) * 10**places))
        lines.append(f"x_{i}: x_{i - 1} {'-+'[i % 2 == 0]} 1/{k}! * (x^{k}) , x_{i}={as_float(at, places)}")
    return "\n".join(lines) + f" , END\n</scratch>\n{as_float(at, places)}\n"


def written(operation: str, form: str, x: int, y: int, size: int) -> tuple[str, str]:
    """The question and the answer."""
    sign = {"addition": "+", "subtraction": "-", "multiplication": "*"}.get(operation)
    if sign is None:
        name = {"sine": "sin", "square_root": "sqrt"}[operation]
        asked = f"{name}({as_float(x, size)})"
        if form == "plain":
            exact = (
                math.isqrt(x * 10**size)
                if operation == "square_root"
                else math.floor(math.sin(x / 10**size) * 10**size)
            )
            return f"{asked}=", as_float(exact, size) + "\n"
        steps = taylor(x, size) if operation == "sine" else newton(x, size)
        return f"Input:\n{asked}\nTarget:\n", "<scratch>\n" + steps
    result = {"+": x + y, "-": x - y, "*": x * y}[sign]
    if form == "plain":
        return f"{x}{sign}{y}=", f"{result}\n"
    if form == "reversed":
        return f"${x}{sign}{y}=", str(result)[::-1] + "$"
    simple = form == "simple"
    steps = {"+": lambda: add(x, y, simple), "-": lambda: subtract(x, y, simple), "*": lambda: multiply(x, y)}[sign]()
    head = "".join(f"{brackets(str(v))} has {len(str(v))} digits.\n" for v in (x, y))
    return f"Input:\n{x}{sign}{y}\nTarget:\n", steps if simple else "<scratch>\n" + head + steps


@pytest.mark.parametrize(("operation", "form"), CASES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_texts_are_those_of_plain_python(operation: str, form: str, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 6))
    if operation == "sine":
        low, high = -int(math.pi / 2 * 10**size), int(math.pi / 2 * 10**size)
    else:
        low, high = (10**size if operation == "square_root" else 0), 10 ** (size + (operation == "square_root")) - 1
    x, y = data.draw(st.integers(low, high)), data.draw(st.integers(low, high))
    both = torch.tensor([[x, 0 if operation != "square_root" else 10**size], [y, 0]])  # a shorter row beside it
    for block, wanted in zip((question, solution), written(operation, form, x, y, size), strict=True):
        found = squeeze(block(operation, form, *both, size))[0]
        assert decode(found[0]) == wanted
        assert "\x00" not in decode(found[1])


def test_the_published_example_comes_out_and_roots_are_exact() -> None:
    """The example sum of the paper's public code."""
    first = [torch.tensor([128]), torch.tensor([367])]
    assert decode(squeeze(solution("addition", "simple", *first, 3))[0][0]) == (
        "A->5 , C->1\nA->9 , C->0\nA->4 , C->0.\n495\n"
    )
    squares = torch.arange(1, 2000) ** 2
    assert torch.equal(root(squares, 0), torch.arange(1, 2000))
    assert torch.equal(root(squares - 1, 0), torch.arange(0, 1999))


@pytest.mark.parametrize(("operation", "form"), CASES)
def test_prompts_are_the_texts_of_their_operands_and_only_answers_are_scored(operation: str, form: str) -> None:
    task = Arithmetic(operation=operation, format=form, problems=3)
    prompt = task.sample(40, generator(1))
    end = "\n" if form == "reversed" else ""
    for row in range(40):
        whole, spans = "", []
        for x, y in zip(*(prompt.hidden[name][row].tolist() for name in "xy"), strict=True):
            asked, answer = written(operation, form, x, y, task.size)
            spans += [False] * len(asked) + [True] * len(answer) + [False] * len(end)
            whole += asked + answer + end
        tokens = torch.cat([prompt.inputs[row, :1], prompt.targets[row]])
        assert decode(tokens) == whole
        assert torch.equal(prompt.inputs[row, 1:], prompt.targets[row, :-1])
        assert prompt.scored[row, : len(whole) - 1].tolist() == spans[1:]
        assert not prompt.scored[row, len(whole) - 1 :].any()
        shots = prompt.shot[row][prompt.scored[row]]
        assert torch.equal(shots.unique_consecutive(), torch.arange(3))


@pytest.mark.parametrize("operation", ["addition", "subtraction"])
def test_digits_and_carries_are_balanced(operation: str) -> None:
    task = Arithmetic(operation=operation, digits=3, operands="carries")
    prompt = task.sample(20_000, generator(2))
    x, y = (prompt.hidden[name][:, 0] for name in "xy")
    # Both below 10^k with weights 1, 9, 90; each number of carries that k places can have equally likely.
    mass = torch.zeros(1000, 1000, dtype=torch.float64)
    for k, weight in ((1, 1), (2, 9), (3, 90)):
        a, b = torch.meshgrid(torch.arange(10**k), torch.arange(10**k), indexing="ij")
        count = carries(a, b, 3)
        for c in range(k + 1):
            mass[: 10**k, : 10**k] += weight / (k + 1) * (count == c).double() / (count == c).sum()
    a, b = torch.meshgrid(torch.arange(1000), torch.arange(1000), indexing="ij")
    mass = torch.where(held_out(a, b), 0, mass)
    mass /= mass.sum()

    def group(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return ((torch.maximum(p, q) >= 100).long() + (torch.maximum(p, q) >= 10)) * 4 + carries(p, q, 3)

    wanted = 20_000 * torch.zeros(12, dtype=torch.float64).scatter_add_(0, group(a, b).flatten(), mass.flatten())
    found = torch.bincount(group(x, y), minlength=12)
    assert torch.equal(found > 0, wanted > 0)
    assert stats.chisquare(found[found > 0].numpy(), wanted[wanted > 0].numpy()).pvalue > 1e-3
    # where the last place carries, its pair of digits is one of the 45 that do so, each equally likely
    last = (x % 10 + y % 10 >= 10) & (torch.maximum(x, y) >= 100)
    digit = torch.bincount((x % 10)[last], minlength=10)[1:].double()
    assert stats.chisquare(digit.numpy(), (torch.arange(1, 10).double() / 45 * digit.sum()).numpy()).pvalue > 1e-3
    assert carries(torch.tensor([95, 999, 444, 5]), torch.tensor([17, 1, 555, 5]), 3).tolist() == [2, 3, 0, 1]


def test_other_ways_to_draw_operands() -> None:
    for operands, low in (("uniform", 0), ("longest", 100), ("digits", 0)):
        prompt = Arithmetic(operands=operands).sample(5000, generator(3))
        both = torch.cat([prompt.hidden["x"], prompt.hidden["y"]], 1)
        assert both.min() >= low
        assert both.max() <= 999
        if operands != "digits":
            assert stats.kstest(both.flatten().numpy(), stats.randint(low, 1000).cdf).pvalue > 1e-4
        else:
            assert (both.amax(1) < 10).double().mean() > 0.005
    x = Arithmetic(operation="sine").sample(5000, generator(4)).hidden["x"] / 10**4
    assert stats.kstest(x.flatten().numpy(), stats.uniform(-math.pi / 2, math.pi).cdf).pvalue > 1e-4
    x = Arithmetic(operation="square_root").sample(5000, generator(4)).hidden["x"] / 10**4
    assert stats.kstest(x.flatten().numpy(), stats.uniform(1, 9).cdf).pvalue > 1e-4


def test_train_and_test_operands_are_disjoint_in_either_order() -> None:
    a, b = torch.meshgrid(torch.arange(1000), torch.arange(1000), indexing="ij")
    away = held_out(a, b)
    assert torch.equal(away, away.T)
    assert away.double().mean().item() == pytest.approx(0.1, abs=0.002)
    assert 0 < away[:10, :10].sum() < 30  # some of the one-digit sums too
    for operation in FORMATS:
        task = Arithmetic(operation=operation)
        pairs = []
        for part in (task, task.splits()["held-out operands"]):
            hidden = part.sample(4000, generator(5)).hidden
            rows = zip(hidden["x"].flatten().tolist(), hidden["y"].flatten().tolist(), strict=True)
            pairs.append({tuple(sorted(pair)) for pair in rows})
        assert len(pairs[0]) > 500
        assert len(pairs[1]) > 100
        assert not pairs[0] & pairs[1]


def test_longer_splits_have_only_longer_operands() -> None:
    splits = Arithmetic().splits()
    assert list(splits) == ["train", "held-out operands", "digits=4", "digits=6"]
    for digits in (4, 6):
        hidden = splits[f"digits={digits}"].sample(500, generator(6)).hidden
        assert min(hidden["x"].min(), hidden["y"].min()) >= 10 ** (digits - 1)
    assert list(Arithmetic(operation="multiplication", digits=5).splits())[2:] == ["digits=6"]
    assert splits["digits=4"].input_size == splits["train"].input_size


def test_exact_match_needs_every_character_of_the_answer() -> None:
    task = Arithmetic(problems=2)
    prompt = task.sample(3, generator(7))
    sure = torch.nn.functional.one_hot(prompt.targets, task.output_size).float() * 20
    assert task.errors(sure, prompt)["exact_match"][prompt.scored].min() == 1
    at = prompt.scored[1].nonzero()[1, 0]
    sure[1, at] = sure[1, at].roll(1)
    found = task.errors(sure, prompt)
    first, second = (prompt.scored & (prompt.shot == i) for i in (0, 1))
    assert found["accuracy"][1, at] == 0
    assert found["accuracy"][prompt.scored].mean() < 1
    assert not found["exact_match"][1][first[1]].any()
    assert found["exact_match"][1][second[1]].all()
    assert found["exact_match"][0][prompt.scored[0]].all()
    # what is wrong where nothing is asked does not count
    sure[2, 0] = sure[2, 0].roll(1)
    assert task.errors(sure, prompt)["exact_match"][2][prompt.scored[2]].all()


def test_facets_words_and_what_is_refused() -> None:
    task = Arithmetic(digits=2)
    prompt = task.sample(50, generator(8))
    facets = task.facets(prompt)
    x, y = prompt.hidden["x"], prompt.hidden["y"]
    assert torch.equal(facets["digits"][:, 0], (torch.maximum(x, y)[:, 0] >= 10).long() + 1)
    assert torch.equal(facets["carries"][:, 0], carries(x, y, 2)[:, 0])
    assert task.words(prompt, 3).rstrip() == f"{x[3].item()}+{y[3].item()}=«{(x + y)[3].item()}\n»"
    with pytest.raises(InputError, match="format 'simple' is not defined for sine; use one of plain, detailed"):
        Arithmetic(operation="sine", format="simple")
    with pytest.raises(
        InputError, match="digits 9 are too many for multiplication: numbers must fit 64 bits; at most 8"
    ):
        Arithmetic(operation="multiplication", digits=9)
    with pytest.raises(InputError, match="operands 'longest' are for two numbers; use 'balanced' for sine"):
        Arithmetic(operation="sine", operands="longest")
