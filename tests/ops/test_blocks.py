"""Ops that work on a block of chunks at a time: what one block hands to the next, forwards and backwards."""

from __future__ import annotations

import pytest
import torch

from contextlab.ops import blocks
from tests.ops.test_resets import case, results


@pytest.mark.parametrize("elements", [1, 300])
@pytest.mark.parametrize("name", ["simple_gla", "gated_delta_rule", "gla", "rwkv6"])
def test_several_blocks_agree_with_the_recurrence(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "ELEMENTS", elements)
    chosen = case(name)
    expected, slopes = results(chosen.naive, chosen.inputs)
    got, found = results(chosen.op, chosen.inputs, output_final_state=True)
    with torch.no_grad():
        got += chosen.op(**chosen.inputs, output_final_state=True)[::-1]
    for y, truth in zip(got + found, expected + expected + slopes, strict=True):
        torch.testing.assert_close(y, truth, rtol=1e-9, atol=1e-10)


def test_a_plan_covers_all_chunks() -> None:
    assert blocks.blocks(1, 10**9, 32, 64) == [(0, 1)]
    step = blocks.ELEMENTS // (8 * 32 * 64)
    assert blocks.blocks(2 * step + 1, 8, 32, 64) == [(0, step), (step, step), (2 * step, 1)]
