"""What mixers tell policies of their layers is what they do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.mixers.base import Mixer
from contextlab.state import KVState
from contextlab.testing import components
from contextlab.testing.readings import WIDTH

PADDING = 5


@torch.no_grad()
def keys(mixer: Mixer, pad: int) -> Tensor:
    """The keys [1, 9, Hkv, D] that it holds of nine tokens after so much padding."""
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(pad + 9)[None] >= pad
    _, state = mixer(torch.nn.functional.pad(x, (0, 0, pad, 0)), None, mask if pad else None)
    while not isinstance(state, KVState):
        state = state.attended  # type: ignore[union-attr]  # beside what a short convolution holds, say
    return state.cached()[0][:, pad:]


def test_keys_are_turned_as_the_layer_says() -> None:
    """`turn` gives the keys that tokens have so many places later; without it they are the same wherever they stand.

    So are those whose places are fixed, which no one may turn.
    """
    served = set()
    for component in components("mixer"):
        mixer = component.build().double() if hasattr(component.factory, "kv_layer") else None
        layer = None if mixer is None else mixer.kv_layer()
        if mixer is None or layer is None:  # no policy serves it
            continue
        before = keys(mixer, 0)
        later = torch.full((1, 9, 1), PADDING)
        if layer.fixed:
            assert layer.turn is not None
            with pytest.raises(InputError, match="plain_tokens: .*cannot be turned"):
                layer.turn(before, later)
        expected = before if layer.turn is None or layer.fixed else layer.turn(before, later)
        torch.testing.assert_close(keys(mixer, PADDING), expected, rtol=0, atol=1e-9, msg=component.label)
        assert before.shape[2:] == (layer.kv_heads, layer.key_dim)
        served |= {(component.name, layer.turn is None), layer.fixed}
    assert {("attention", True), ("attention", False), ("mla", False), True} <= served
