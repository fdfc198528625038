"""Offloading by heads changes nothing but where tokens are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.policies import build_policy
from contextlab.policies.storage import offload
from contextlab.state import KVState
from contextlab.testing import policies as base


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("heads", [1, 2, 3, 7])
def test_nothing_changes_but_where_tokens_are(heads: int, position: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, x = base.model(position=position, kv_heads=4), base.tokens()
    mask = base.masked(x, (0, 7))
    expected, full, _ = base.read(reader, x, [40], mask)
    seen: list[int] = []

    def watched(layer: offload.KVLayer, q: Tensor, kv: KVState, new: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if new is None:
            seen.append(kv.keys.shape[1])
        return attend(layer, q, kv, new)

    attend = offload.attend_kv
    monkeypatch.setattr(offload, "attend_kv", watched)
    with build_policy("head_offload", heads=heads).attach(reader):
        got, state, _ = base.read(reader, x, [40], mask)
    assert mask is not None
    torch.testing.assert_close(got[mask], expected[mask], rtol=0, atol=1e-9)
    assert max(seen) <= heads
    for mine, other in zip(state.layers, full.layers, strict=True):
        assert (mine.resident_nbytes, mine.offloaded_nbytes) == (0, other.nbytes)
        assert mine.read_nbytes == 2 * 4 * 60 * 16 * 8


def test_a_state_read_without_it_is_offloaded() -> None:
    reader, x = base.model(), base.tokens()
    expected, _, _ = base.read(reader, x, [40])
    policy = build_policy("head_offload")
    with torch.no_grad():
        _, state = reader.read(x[:, :40])
        kept = policy.apply(state, reader)
        with policy.attach(reader):
            y, _ = reader.read(x[:, 40:], kept)
    torch.testing.assert_close(y, expected[:, 40:], rtol=0, atol=1e-9)


def test_no_heads_are_refused() -> None:
    with pytest.raises(InputError, match="heads: expected a whole number of at least 1, got 0"):
        build_policy("head_offload", heads=0)
