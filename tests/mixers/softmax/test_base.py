"""The seams of softmax attention: what each mixer is handed, and which of them a policy may serve."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab import registry
from contextlab.mixers import build_mixer
from contextlab.mixers.softmax.base import AttentionMixer, AttentionOptions, Tokens
from contextlab.ops.kv import KVLayer
from contextlab.state import KVState, State

KIN = [
    entry
    for entry in registry.entries("mixer")
    if isinstance(entry.factory, type) and issubclass(entry.factory, AttentionMixer)
]
CASES = [pytest.param(e.name, options, id=f"{e.name}-{i}") for e in KIN for i, options in enumerate(e.cases)]


class Server:
    """What a policy that keeps everything does, written from what `kv_layer` says of the layer."""

    def __init__(self, layer: KVLayer) -> None:
        self.layer = layer

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, mask: Tensor | None, keep_state: bool
    ) -> tuple[Tensor, State | None]:
        before = KVState.empty(k, v) if state is None else state
        assert isinstance(before, KVState)
        after = before.append(k, v, mask)
        k, v = (x.repeat_interleave(self.layer.heads // self.layer.kv_heads, 2) for x in after.cached())
        at = torch.arange(k.shape[1])
        distance = at[-q.shape[1] :, None] - at
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * self.layer.scale
        if self.layer.slopes is not None:
            scores = scores - self.layer.slopes[:, None, None] * distance
        weights = scores.masked_fill(distance < 0, float("-inf")).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", weights, v), after


@pytest.mark.parametrize(("name", "options"), CASES)
def test_what_a_policy_may_serve_is_attention_over_all_keys(name: str, options: Mapping[str, Any]) -> None:
    mixer = build_mixer(name, width=24, **options).double()
    assert isinstance(mixer, AttentionMixer)
    layer = mixer.kv_layer()
    if layer is None:
        assert not mixer.policies_may_serve or mixer.position == "xpos"
        return
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    expected, _ = mixer(x)
    mixer.served = Server(layer)
    first, state = mixer(x[:, :5])
    second, _ = mixer(x[:, 5:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("entry", KIN, ids=lambda entry: entry.name)
def test_options_go_by_name(entry: registry.Entry) -> None:
    _, *rest = inspect.signature(entry.factory).parameters.values()
    assert rest
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in rest)


def test_scores_see_the_tokens_themselves() -> None:
    """A mixer of one method: answers are scaled by a channel of the token that asks."""

    class OwnChannel(AttentionMixer):
        def _score(
            self, new: Tokens, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None
        ) -> Tensor:
            return super()._score(new, k, v, q_position, k_position) * new.x[..., :1, None]

    mixer = OwnChannel(8, AttentionOptions())
    plain = build_mixer("attention", width=8)
    plain.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 6, 8)
    torch.testing.assert_close(mixer(x)[0], plain(x)[0] * x[..., :1])
