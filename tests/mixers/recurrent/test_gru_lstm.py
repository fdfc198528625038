from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from contextlab.mixers import Gru, Lstm, build_mixer


@pytest.mark.parametrize(("ours", "cell"), [(Lstm, nn.LSTMCell), (Gru, nn.GRUCell)])
def test_agrees_with_the_cell_step_by_step(ours: Any, cell: Any) -> None:
    mixer = ours(6, hidden=5).double()
    step = cell(6, 5).double()
    for mine, theirs in zip(mixer.rnn.all_weights[0], step.parameters(), strict=True):
        theirs.data.copy_(mine.data)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    memory = None
    outputs = []
    for t in range(7):
        memory = step(x[:, t], memory)
        outputs.append(memory[0] if isinstance(memory, tuple) else memory)
    y, state = mixer(x)
    torch.testing.assert_close(y, mixer.out_proj(torch.stack(outputs, 1)))
    torch.testing.assert_close(state["h"], outputs[-1])
    if isinstance(memory, tuple):
        torch.testing.assert_close(state["c"], memory[1])


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_padding_leaves_the_state_alone(name: str) -> None:
    mixer = build_mixer(name, width=6).double()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    mask = torch.arange(5) >= torch.tensor([5, 2, 0])[:, None]
    y, state = mixer(x, None, mask)
    assert y.isfinite().all()
    assert state["h"][0].eq(0).all()  # a row of padding keeps its initial state
    _, alone = mixer(x[1:2, 2:])
    torch.testing.assert_close(state["h"][1], alone["h"][0])
    _, after = mixer(x, state, torch.zeros(3, 5, dtype=torch.bool))
    torch.testing.assert_close(after["h"], state["h"])


def test_the_lstm_starts_with_an_open_forget_gate() -> None:
    bias = Lstm(6).rnn.all_weights[0][2]
    assert bias.tolist() == [0.0] * 6 + [1.0] * 6 + [0.0] * 12


@pytest.mark.parametrize(("name", "gates", "parts"), [("lstm", 4, 2), ("gru", 3, 1)])
def test_bytes_and_flops(name: str, gates: int, parts: int) -> None:
    mixer = build_mixer(name, width=6, hidden=5)
    assert mixer.state_nbytes(10) == mixer.state_nbytes(10**6) == parts * 5 * 4
    assert mixer.flops(10) == 2 * 10 * (gates * 5 * (6 + 5) + 5 * 6)
