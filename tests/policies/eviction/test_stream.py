"""Streams under a fixed budget: memory stays flat, positions bounded, keys true, losses finite.

`benchmarks/stream_policies.py` generates a million tokens one by one; here a million are read in pieces, and few are
generated.
"""

from __future__ import annotations

import pytest
import torch
from benchmarks.stream_policies import SYMBOLS, drift, peak_bytes, stream, tiny_model

from contextlab.policies import build_policy
from contextlab.testing import policies as laws

PIECE = 8192


@pytest.mark.parametrize(
    ("policy", "most"),
    [
        ("streaming_llm:reposition=true", 1e-6),
        ("h2o:reposition=true", 1e-6),
        ("h2o:reposition=true|quantize:bits=8,group=8,window=8", 0.05),
    ],
)
def test_generation_stays_as_it_began(policy: str, most: float) -> None:
    found = stream(policy, 900)
    assert found.faults(64) == []
    assert found.position == 63
    assert 0 < found.drift < most
    assert found.faults(60) == ["a token stood at position 63 of 60"]


def test_a_window_is_the_same_in_pieces() -> None:
    """Pieces that are longer than the budget, after a gap between the first tokens and the last that are held."""
    reader, x = laws.model(), laws.tokens(2, 200)
    for mask in (None, laws.masked(x, (0, 7))):
        with build_policy("streaming_llm", budget="24tok", every=1).attach(reader):
            whole, _, _ = laws.read(reader, x, [190], mask)
            pieces, _, _ = laws.read(reader, x, [60, 1, 70, 9], mask)
        real = slice(None) if mask is None else mask
        torch.testing.assert_close(pieces[real], whole[real], rtol=0, atol=1e-9)


@torch.inference_mode()
def test_a_million_tokens_leave_memory_flat() -> None:
    model, generator = tiny_model(), torch.Generator().manual_seed(0)
    history = torch.randint(0, SYMBOLS, (123, PIECE), generator=generator, dtype=torch.uint8)
    policy = build_policy("streaming_llm", budget="64tok", reposition=True)
    state, early = None, (0, 0)
    with policy.attach(model):
        for number, piece in enumerate(history):
            logits, state = model.read(piece[None].long(), state)
            if number == 9:
                early = state.nbytes, peak_bytes()
    assert state is not None
    assert state.length == history.numel() > 1_000_000
    assert state.nbytes == early[0]
    assert peak_bytes() - early[1] < 4 * 2**20
    assert logits.isfinite().all()
    held = state.layers[0]
    assert state.length - int(held.shift.max()) == held.slots.used == 64
    assert drift(model, held, history.flatten()) < 1e-6
