"""Slots of a cache: what is appended is held, with and without gradients, and the state before stays valid."""

from __future__ import annotations

import pytest
import torch

from contextlab.policies.core.slots import Slots


@pytest.mark.parametrize("gradients", [True, False])
def test_appending_holds_all_and_leaves_the_state_before_as_it_was(gradients: bool) -> None:
    values = {name: torch.randn(2, 3, 9, *rest) for name, rest in (("keys", (4,)), ("position", ()))}
    with torch.set_grad_enabled(gradients):
        slots = Slots.of({name: x[:, :, :4] for name, x in values.items()}, room=6, length=10)
        first = slots.append({name: x[:, :, 4:5] for name, x in values.items()}, room=8)
        second = first.append({name: x[:, :, 5:9] for name, x in values.items()}, room=8)
        other = first.append({name: -x[:, :, 5:9] for name, x in values.items()}, room=8)
    for state, used in ((slots, 4), (first, 5), (second, 9)):
        assert (state.used, state.length) == (used, 10 + used - 4)
        assert state.room >= used
        for name, x in values.items():
            assert torch.equal(state[name], x[:, :, :used])
    for name, x in values.items():
        assert torch.equal(other[name], torch.cat((x[:, :, :5], -x[:, :, 5:9]), 2))
