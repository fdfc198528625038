"""What is foretold of memory is what the tensors take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from contextlab.models import ModelSpec, room

TOKENS = {"read_in": "token", "input_size": 7}
VECTORS = {"read_in": "vector", "input_size": 5}


@pytest.mark.parametrize("read_in", [TOKENS, VECTORS], ids=lambda each: each["read_in"])
def test_the_bytes_of_prompts_are_those_of_what_is_read_and_predicted(read_in: dict[str, Any], monkeypatch) -> None:
    foretold: list[float] = []
    monkeypatch.setattr(room, "require_bytes", lambda what, size, instead: foretold.append(size))
    spec = ModelSpec(width=16, heads=2, output_size=3, **read_in)
    room.require_room_for_tokens(spec, length=11, batch=2)
    inputs = torch.zeros(2, 11, dtype=torch.int64) if read_in is TOKENS else torch.zeros(2, 11, 5)
    tensors = (inputs, torch.zeros(2, 11, spec.width), torch.zeros(2, 11, spec.output_size))
    assert foretold == [sum(each.nbytes for each in tensors)]
