"""A looped model that is a computer of one instruction: each loop carries out a line of the prompt's program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import PositiveInt

from contextlab.constructions.base import Construction, Stream, construction, put, weight_of
from contextlab.errors import InputError
from contextlab.learners import Learner
from contextlab.learners.subleq import PARTS, SubleqInterpreter, most_steps
from contextlab.models import Model
from contextlab.prompt import Task

Terms = Mapping[str, float]
"""A sum of named parts of a token's vector, each with its factor."""
Unit = tuple[Terms, str, float]
"""Of an MLP: the sum, the part to which it is added where it is above 0, and times what."""

APART = 1024.0
"""Between the scores of the token that is meant and of the next: e^-1024 is 0 in float32 and float64."""
SIZE = 4
"""Of a head; the mixer divides scores by its root, 2, which rounds nothing."""
STEEP = 64.0
"""At whole numbers n, GELU(64 n) / 64 is max(n, 0), to the last bit."""
OFF = 2.0**22
"""What is taken from a unit that a gate closes. Up to twice this, float32 adds whole numbers exactly."""
LARGEST = 2**21 - 1
"""The largest number of the memory: what a closed gate must hold back, a difference of two, is then below OFF."""
MOST = 2048
"""Addresses: with their squares, scores are whole numbers that float32 holds."""
CLEARED = ("a_now", "b_now", "c_now", "from", "to", "jumps", "target", "result", "here")


@construction(
    "subleq_construction",
    papers=("2301.13196",),
    cases=({"lines": 4, "cells": 3, "steps": 4}, {"lines": 6, "cells": 2, "steps": 7}),
)
@dataclass(frozen=True)
class SubleqConstruction(Construction):
    """Six blocks of softmax attention and GELU MLPs, looped: each loop is one instruction of a SUBLEQ program.

    After 2301.13196: the prompt holds program and memory, and a token "run" the number of the line that is next. In a
    loop that token attends to its line, then to the two cells that the line names; an MLP tells whether the difference
    is 0 or less, and another moves on or jumps. All tokens then attend to "run", and the cell whose address is meant
    takes the difference as its value. The last block's heads, one a cell, bring the memory to "run", where it is read.

    Attention to an address n has scores -APART (n - address)^2, up to what all share, and gates are pairs of units from
    which a large number is taken. All numbers are whole, and none is rounded: it equals the learner subleq_interpreter
    in float32, too, at every token. (In the paper addresses are vectors of signs, and numbers are in bits.)

    It reads both ways and answers once, at the last token of a prompt of the task subleq. Programs whose numbers could
    grow beyond 2^21 are refused.

    lines: of the program.
    cells: of the memory.
    steps: instructions that are carried out, one a loop.
    """

    lines: PositiveInt = 8
    cells: PositiveInt = 4
    steps: PositiveInt = 8

    def __post_init__(self) -> None:
        for name in ("lines", "cells"):
            if getattr(self, name) > MOST:
                raise InputError(
                    f"{name} {getattr(self, name)}: the squares of addresses are exact in float32 up to {MOST}; use at "
                    f"most {MOST}"
                )
        if self.steps > (most := most_steps(1, LARGEST)):
            raise InputError(
                f"steps {self.steps}: the numbers of the memory may grow beyond {LARGEST}, up to which the weights are "
                f"exact; use at most {most}"
            )

    def stream(self) -> Stream:
        """The parts of a token's vector: those of the prompt, then what the machine works with.

        one: 1 at every token; square: of the address; next: the number of the next line. a_now, b_now, c_now: the line
        that is carried out; from, to: the numbers in its cells; jumps: whether it jumps; target, result: the cell that
        changes, and to what, told to all tokens; here: whether a token is that cell. memory_0, ...: as "run" knows it.
        """
        return Stream(**dict.fromkeys((*PARTS, "one", "square", "next", *CLEARED, *self._memory()), 1))

    def _memory(self) -> list[str]:
        return [f"memory_{cell}" for cell in range(self.cells)]

    def fields(self) -> dict[str, Any]:
        width = self.stream().width

        def block(heads: int = 0, units: int = 0) -> dict[str, Any]:
            options = {"heads": heads, "head_dim": SIZE, "position": "none"}
            mixer = {"mixer": "encoder_attention", "options": options} if heads else {"mixer": "none"}
            mlp = {"kind": "gelu", "options": {"ratio": units / width}} if units else {"kind": "none"}
            return {**mixer, "mlp": mlp}

        layers = [
            block(1),
            block(2, 2),
            block(0, 3),
            block(1, 3),
            block(0, 2 + 2 * (len(CLEARED) + self.cells)),
            block(self.cells),
        ]
        return {
            "width": width,
            "depth": len(layers),
            "loops": self.steps,
            "input_injection": False,
            "heads": 1,
            "layers": layers,
            "mlp": "none",
            "norm": "none",
            "position": "learned",
            "max_length": self.lines + self.cells + 1,
            "read_in": "vector",
            "input_size": len(PARTS),
            "output_size": self.cells + 1,
            "read_out_bias": False,
        }

    def write(self, model: Model) -> None:
        at, places = self.stream(), weight_of(model.positions)
        put(weight_of(model.read_in), slice(0, len(PARTS)), slice(0, len(PARTS)))
        places[:, at["one"]] = 1.0
        address = [*range(self.lines), *range(self.cells), 0]
        places[:, at["square"]] = places.new_tensor([[each**2] for each in address])
        for number, name in enumerate((*self._memory(), "next")):
            put(weight_of(model.read_out), slice(number, number + 1), at[name])
        fetching, reading, moving, telling, writing, showing = model.blocks
        _put_head(fetching, at, 0, *_at_address("next", "line"), {"a": "a_now", "b": "b_now", "c": "c_now"})
        for head, (named, to) in enumerate((("a_now", "from"), ("b_now", "to"))):
            _put_head(reading, at, head, *_at_address(named, "cell"), {"value": to})
        # max(1 - left, 0) - max(-left, 0) is 1 where left = to - from is 0 or less, else 0
        left = {"to": 1.0, "from": -1.0}
        _put_units(reading, at, [({"one": 1.0, **_minus(left)}, "jumps", 1.0), (_minus(left), "jumps", -1.0)])
        jump = {"c_now": 1.0, "next": -1.0, "one": -1.0}
        _put_units(moving, at, [*_gated(jump, ("jumps", "run"), "next"), ({"run": 1.0}, "next", 1.0)])
        told = {"b_now": "target", "to": "result", "from": "result"}
        _put_head(telling, at, 0, [{"one": APART}], [{"run": 1.0}], told)
        to_all: Any = telling.mixer
        weight_of(to_all.out_proj)[at["result"], 2] = -1.0  # the result is to - from
        # of cells, max(n + 1, 0) - 2 max(n, 0) + max(n - 1, 0) of n = address - target is 1 at n = 0, else 0
        apart = {"address": 1.0, "target": -1.0, "cell": OFF}
        bends = ((1.0, 1.0), (0.0, -2.0), (-1.0, 1.0))
        _put_units(telling, at, [({**apart, "one": shift - OFF}, "here", factor) for shift, factor in bends])
        # x - max(x, 0) + max(-x, 0) is 0
        clear: list[Unit] = [({n: sign}, n, -sign) for n in (*CLEARED, *self._memory()) for sign in (1.0, -1.0)]
        _put_units(writing, at, [*_gated({"result": 1.0, "value": -1.0}, ("here",), "value"), *clear])
        for cell, name in enumerate(self._memory()):  # all but "run" attend to it, whose value is 0
            query = [{"run": 2 * APART * cell}, {"run": -APART}, {"run": 4 * APART}, {"one": APART, "run": -APART}]
            key: list[Terms] = [{"address": 1.0}, {"square": 1.0}, {"cell": 1.0}, {"run": 1.0}]
            _put_head(showing, at, cell, query, key, {"value": name})

    def learner(self) -> Learner:
        return SubleqInterpreter(self.lines, self.cells, self.steps)

    def check_task(self, task: Task) -> None:
        wanted = {name: getattr(task, name, None) for name in ("lines", "cells", "steps", "values")}
        if None in wanted.values() or task.input_size != len(PARTS):
            raise InputError(f"{self.name} runs programs as the task subleq draws them; name that task")
        for name in ("lines", "cells", "steps"):
            if wanted[name] != getattr(self, name):
                raise InputError(
                    f"{self.name} is written for {name} {getattr(self, name)}, the task has {wanted[name]}; give "
                    f"{name}: {wanted[name]}"
                )
        if self.steps > (most := most_steps(task.values, LARGEST)):  # type: ignore[attr-defined]
            raise InputError(
                f"{self.name}: from values of up to {wanted['values']}, {self.steps} steps may reach numbers above "
                f"{LARGEST}, up to which it is exact; give the task at most {most} steps, or smaller values"
            )


def _at_address(named: str, kind: str) -> tuple[list[Terms], list[Terms]]:
    """Queries and keys by which a token attends to the one of this kind whose address a part of it names."""
    return (
        [{named: 2 * APART}, {"one": -APART}, {"one": 4 * APART}],
        [{"address": 1.0}, {"square": 1.0}, {kind: 1.0}],
    )


def _put_row(weight: Any, row: int, at: Stream, terms: Terms) -> None:
    for name, factor in terms.items():
        put(weight, slice(row, row + 1), at[name], factor)


def _put_head(
    block: Any, at: Stream, head: int, query: Sequence[Terms], key: Sequence[Terms], told: Mapping[str, str]
) -> None:
    """Head number `head`: its queries, its keys, and which part it brings where."""
    into, out = weight_of(block.mixer.qkv_proj), weight_of(block.mixer.out_proj)
    first, heads = head * SIZE, len(into) // 3
    for row, terms in enumerate(query, first):
        _put_row(into, row, at, {name: SIZE**0.5 * factor for name, factor in terms.items()})
    for row, terms in enumerate(key, first):
        _put_row(into, heads + row, at, terms)
    for row, (name, to) in enumerate(told.items(), first):
        _put_row(into, 2 * heads + row, at, {name: 1.0})
        put(out, at[to], slice(row, row + 1))


def _put_units(block: Any, at: Stream, units: Sequence[Unit]) -> None:
    """An MLP's units, as many as it has."""
    up, out = weight_of(block.mlp.up), weight_of(block.mlp.out_proj)
    assert len(up) == len(units)
    for row, (terms, to, factor) in enumerate(units):
        _put_row(up, row, at, {name: STEEP * each for name, each in terms.items()})
        put(out, at[to], slice(row, row + 1), factor / STEEP)


def _minus(terms: Terms) -> Terms:
    return {name: -factor for name, factor in terms.items()}


def _gated(terms: Terms, gates: Sequence[str], to: str) -> list[Unit]:
    """Units that add a sum to a part where all gates are 1, and 0 where one is 0."""
    closed = dict.fromkeys(gates, OFF)
    units: list[Unit] = []
    for sign in (1.0, -1.0):
        both = {name: sign * factor for name, factor in terms.items()} | closed
        both["one"] = sign * terms.get("one", 0.0) - OFF * len(gates)
        units.append((both, to, sign))
    return units
