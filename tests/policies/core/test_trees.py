"""A policy's states are trees: what is read on from one state knows nothing of what else was read on from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab import registry
from contextlab.policies import Slots
from tests.policies.core.test_base import masked, model, tokens

LEFT_OUT = {"oracle": "it has seen one text to its end, and reads no other branch"}
STEM, FIRST, REST = 27, 3, 6
BUDGETS = (None, "80tok", "20tok")  # none, one with room for all, one that is full by then


def cases() -> list[Any]:
    """Every registered policy under each of its cases, those that must be trained or prepared under their defaults."""
    found = []
    for entry in registry.entries("policy"):
        for options in entry.cases or ({},):
            label = "-".join([entry.name, *(f"{key}={value}" for key, value in options.items())])
            found.append(pytest.param(entry, options, id=label))
    return [each for each in found if each.values[0].name not in LEFT_OUT]


@torch.no_grad()
def read_on(reader: Any, state: Any, x: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    """What is answered to tokens that are read one by one, and the state after them."""
    outputs = []
    for t in range(x.shape[1]):
        y, state = reader.read(x[:, t : t + 1], state, mask[:, t : t + 1])
        outputs.append(y)
    return torch.cat(outputs, 1), state


def beginning(reader: Any, x: Tensor, mask: Tensor) -> Any:
    """The state of a prompt, and of three tokens after it, so that there is room in what they were written into."""
    _, state = reader.read(x[:, : STEM - 3], None, mask[:, : STEM - 3])
    return read_on(reader, state, x[:, STEM - 3 : STEM], mask[:, STEM - 3 : STEM])[1]


@pytest.mark.parametrize(("entry", "options"), cases())
def test_a_branch_is_what_it_is_alone(entry: registry.Entry, options: dict[str, Any]) -> None:
    reader = model(depth=1)
    x, other = tokens(2, STEM + FIRST + REST), tokens(2, FIRST + REST, seed=1)
    mask: Any = masked(x, (0, 3))
    known = {each.name for each in entry.parameters}
    small: dict[str, Any] = {"window": 4} if "window" in known else {}
    for budget in BUDGETS if "budget" in known else (None,):
        policy = entry.build(**{**small, **options}).with_budget(budget)
        if policy.untrained:
            policy.train_on(reader, x, 4, steps=2)
        if entry.name == "kvzip":  # it reads texts of one length only
            mask = torch.ones_like(mask)
        policy.prepare(reader, x, STEM, mask)
        with policy.attach(reader), torch.no_grad():
            start = beginning(reader, x, mask)
            expected, _ = read_on(reader, start, x[:, STEM:], mask[:, STEM:])
            start = beginning(reader, x, mask)  # afresh: nothing has been read on from it
            first, state = read_on(reader, start, x[:, STEM : STEM + FIRST], mask[:, STEM : STEM + FIRST])
            branch, _ = read_on(reader, start, other, mask[:, STEM:])
            rest, _ = read_on(reader, state, x[:, STEM + FIRST :], mask[:, STEM + FIRST :])
            again, _ = read_on(reader, start, other, mask[:, STEM:])
        torch.testing.assert_close(torch.cat((first, rest), 1), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(again, branch, rtol=0, atol=1e-12)
        assert not torch.allclose(branch, expected)


@pytest.mark.parametrize(("name", "options"), [("h2o", {}), ("ada_kv", {}), ("dmc", {}), ("low_rank", {"window": 1})])
def test_the_law_sees_a_buffer_that_is_written_twice(name: str, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    append = Slots.append

    def careless(slots: Slots, new: dict[str, Tensor], room: int) -> Slots:
        slots._written = [slots.used]  # as if nothing had been written behind what it holds
        return append(slots, new, room)

    monkeypatch.setattr(Slots, "append", careless)
    with pytest.raises(AssertionError):
        test_a_branch_is_what_it_is_alone(registry.lookup("policy", name), options)
