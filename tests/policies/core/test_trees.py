"""A policy's states are trees: what is read on from one state knows nothing of what else was read on from it.

tests/policies/core/test_base.py holds registered cases to that law; here are those that must be trained or prepared.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from contextlab import registry
from contextlab.policies import Slots
from contextlab.testing.policies import READS_ONE_TEXT, hold_to_trees

CASELESS = [e for e in registry.entries("policy") if not e.cases and e.name not in READS_ONE_TEXT]


@pytest.mark.parametrize("entry", CASELESS, ids=lambda entry: entry.name)
def test_a_branch_is_what_it_is_alone(entry: registry.Entry) -> None:
    hold_to_trees(entry, {})


@pytest.mark.parametrize(("name", "options"), [("h2o", {}), ("ada_kv", {}), ("dmc", {}), ("low_rank", {"window": 1})])
def test_the_law_sees_a_buffer_that_is_written_twice(name: str, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    append = Slots.append

    def careless(slots: Slots, new: dict[str, Tensor], room: int) -> Slots:
        slots._written = [slots.used]  # as if nothing had been written behind what it holds
        return append(slots, new, room)

    monkeypatch.setattr(Slots, "append", careless)
    with pytest.raises(AssertionError):
        hold_to_trees(registry.lookup("policy", name), options)
