"""Policies that must have read a text before they serve it: their base, and what notes what attention reads."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer
from contextlab.policies.core.slots import gathered
from contextlab.policies.eviction.base import EvictionPolicy
from contextlab.policies.eviction.seen import Seen
from contextlab.state import State


@dataclass
class Read:
    """What a layer's attention read of a text: q [B, T, H, D], k [B, T, Hkv, D], v [B, T, Hkv, V], start [B]."""

    q: Tensor
    k: Tensor
    v: Tensor
    start: Tensor


@dataclass(eq=False)
class Recorder(EvictionPolicy):
    """Keeps everything, and the queries, keys and values of the piece read last, by layer."""

    only_scores = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.last: dict[int, Read] = {}

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`; nothing is dropped, so the later may count more."""
        return seen.positions.to(torch.float32)

    def attend(
        self,
        layer: KVLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: State | None,
        mask: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, State | None]:
        """See `Policy.attend`."""
        y, after = super().attend(layer, q, k, v, state, mask, True)
        self.last[layer.index] = Read(q, k, v, getattr(after, "start"))  # noqa: B009  (any state of a policy has it)
        return y, after if keep_state else None


@dataclass(eq=False)
class TwoPassPolicy(EvictionPolicy):
    """Base of the eviction policies that read a text with `watch` before they serve it."""

    watched: int = field(init=False, default=0)
    """Tokens of the text that it has read, padding included; 0 before `watch`."""
    layers_watched: int = field(init=False, default=0)
    """Layers of the model that it has watched."""
    _keys: Read = field(init=False, repr=False)
    """What the first layer read: its keys tell another text; what was dropped shows in later layers only."""

    @property
    def reads_first(self) -> Literal["", "prompt", "everything"]:
        """See `Policy.reads_first`."""
        return "prompt"

    def prepare(self, model: nn.Module, tokens: Tensor, prompt: int, mask: Tensor | None = None) -> None:
        """See `Policy.prepare`: `watch` of as much as it must read."""
        last = prompt if self.reads_first == "prompt" else tokens.shape[1]
        self.watch(model, tokens[:, :last], None if mask is None else mask[:, :last])

    def watch(self, model: nn.Module, tokens: Tensor, mask: Tensor | None = None) -> None:
        """Read a text with all of it in view; then the policy serves this text's rows, padded as they are here.

        model: ours, or `contextlab.models.HuggingFaceModel`. tokens: [B, T] ids (or inputs). mask: [B, T] bool, False
            at left padding.

        Raises InputError when the model has no KV state or does not read.
        """
        if not callable(getattr(model, "read", None)):
            raise InputError(
                f"watch: a {type(model).__name__} has no read(tokens, state, mask); wrap a model of transformers in "
                "contextlab.models.HuggingFaceModel"
            )
        if tokens.ndim < 2 or not tokens.shape[1]:
            raise InputError(f"watch: expected tokens [batch, time] of at least one token, got {list(tokens.shape)}")
        recorder = Recorder()
        layers = recorder.layers(model)
        with recorder.attach(model), torch.no_grad():
            self._watch(model, recorder, layers, tokens, mask)
        self.watched, self.layers_watched = tokens.shape[1], len(layers)

    @abstractmethod
    def _watch(
        self, model: Any, recorder: Recorder, layers: list[KVLayer], tokens: Tensor, mask: Tensor | None
    ) -> None:
        """Read and note what `score` needs; the recorder is attached."""

    def check(self, layers: list[KVLayer]) -> None:
        """See `Policy.check`."""
        name = type(self).__name__
        if not self.watched:
            raise InputError(
                f"{name} chooses what to keep after a first reading; call policy.watch(model, tokens) first"
            )
        if layers[0].times > 1:
            raise InputError(
                f"{name} watches what each layer reads, but this model runs them {layers[0].times} times, each time "
                "with other queries; take snapkv"
            )
        if layers[0].count != self.layers_watched:
            raise InputError(f"{name} watched a model of {self.layers_watched} layers, this one has {layers[0].count}")
        super().check(layers)

    def _must_be_known(self, seen: Seen) -> None:
        """Raises InputError where the rows are not those that were watched, as far as their keys tell."""
        name, theirs = type(self).__name__, self._keys
        if len(seen.keys) != len(theirs.k):
            raise InputError(f"{name} watched {len(theirs.k)} texts, this is a batch of {len(seen.keys)}")
        if seen.layer.index or not self.lossless:
            return
        slots = (seen.positions + theirs.start[:, None, None]).clamp(0, self.watched - 1)
        expected = gathered(theirs.k.transpose(1, 2), slots)
        off = (seen.keys - expected).abs().amax(-1)
        off = off.masked_fill(
            (seen.positions < 0) | (seen.positions >= self.watched - theirs.start[:, None, None]), 0.0
        )
        if bool((off > 0.02 * theirs.k.abs().amax()).any()):
            raise InputError(
                f"{name} watched another text, or this one with other padding; watch the text that the model reads"
            )
