"""Policies that differ from layer to layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer
from contextlab.policies.core.base import Policy
from contextlab.policies.core.budget import Amount, Budget
from contextlab.state import KVState, State


class PerLayer(Policy):
    """A policy for each layer: `PerLayer({0: None, 1: h2o}, default=snapkv | quantize)`.

    A budget in tokens or percent holds for the layers that its policy serves; one in bytes is divided by all layers of
    the model, so that policies of the same budget keep to it together. `PerLayer(...) | quantize` stores in few bits
    what each of its policies keeps, and everything in the layers that none evicts from.

    policies: by the layer's index among those with keys and values, from 0; None leaves a layer alone.
    default: of all other layers.
    """

    def __init__(self, policies: Mapping[int, Policy | None], default: Policy | None = None) -> None:
        for index, policy in policies.items():
            if isinstance(index, bool) or not isinstance(index, int) or index < 0:
                raise InputError(f"PerLayer: expected indices of layers from 0, got {index!r}")
            if policy is not None and not isinstance(policy, Policy):
                raise InputError(f"PerLayer: expected a policy or None for layer {index}, got {policy!r}")
        if default is not None and not isinstance(default, Policy):
            raise InputError(f"PerLayer: expected a policy or None as the default, got {default!r}")
        self.policies, self.default = dict(policies), default
        if not self._each:
            raise InputError("PerLayer: no layer has a policy; give one for a layer, or a default")
        bounds = {policy.bounds for policy in self._each if policy.takes_budget}
        self.bounds = bounds.pop() if len(bounds) == 1 else "held"
        self.fits_budget = any(policy.fits_budget for policy in self._each)

    @property
    def _each(self) -> list[Policy]:
        """Its policies, each once."""
        given = (*self.policies.values(), self.default)
        return list({id(policy): policy for policy in given if policy is not None}.values())

    @property
    def lossless(self) -> bool:
        """See `Policy.lossless`."""
        return all(policy.lossless for policy in self._each)

    @property
    def chunk_invariant(self) -> bool:
        """See `Policy.chunk_invariant`."""
        return all(policy.chunk_invariant for policy in self._each)

    @property
    def needs(self) -> str:
        """See `Policy.needs`."""
        return " and ".join(dict.fromkeys(policy.needs for policy in self._each if policy.needs))

    @property
    def takes_budget(self) -> bool:
        """See `Policy.takes_budget`."""
        return any(policy.takes_budget for policy in self._each)

    @property
    def limits(self) -> list[Budget]:
        """See `Policy.limits`."""
        return list(dict.fromkeys(limit for policy in self._each for limit in policy.limits))

    def with_budget(self, budget: Amount) -> PerLayer:
        """See `Policy.with_budget`: all of its policies with the same one."""
        other = {id(policy): policy.with_budget(budget) for policy in self._each}
        return PerLayer(
            {index: policy and other[id(policy)] for index, policy in self.policies.items()},
            self.default and other[id(self.default)],
        )

    @property
    def reads_first(self) -> Literal["", "prompt", "everything"]:
        """See `Policy.reads_first`: the most that any of its policies must."""
        return max((policy.reads_first for policy in self._each), key=("", "prompt", "everything").index)

    def prepare(self, model: nn.Module, tokens: Tensor, prompt: int, mask: Tensor | None = None) -> None:
        """See `Policy.prepare`."""
        for policy in self._each:
            policy.prepare(model, tokens, prompt, mask)

    @property
    def untrained(self) -> str:
        """See `Policy.untrained`."""
        return " and ".join(dict.fromkeys(policy.untrained for policy in self._each if policy.untrained))

    def train_on(self, model: nn.Module, tokens: Tensor, answer: int, *, steps: int, seed: int = 0) -> None:
        """See `Policy.train_on`: each as if it served all layers."""
        for policy in self._each:
            if policy.untrained:
                policy.train_on(model, tokens, answer, steps=steps, seed=seed)

    def __or__(self, other: Policy) -> PerLayer:
        """See `Policy.__or__`."""
        if other.storage is None:
            raise InputError(f"PerLayer | {type(other).__name__}: it does not store what another policy keeps")
        stored = {index: _stored(policy, other) for index, policy in self.policies.items()}
        return PerLayer(stored, _stored(self.default, other))

    def check(self, layers: list[KVLayer]) -> None:
        """See `Policy.check`."""
        beyond = [index for index in self.policies if index >= len(layers)]
        if beyond:
            raise InputError(
                f"PerLayer: there is no layer {beyond[0]}; the model has {len(layers)} with keys and values, "
                f"the last is {len(layers) - 1}"
            )
        for policy in self._each:
            served = [layer for layer in layers if self._of(layer) is policy]
            if served:
                policy.check(served)

    def at(self, layer: KVLayer) -> Policy | None:
        """See `Policy.at`."""
        policy = self._of(layer)
        return None if policy is None else policy.at(layer)

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
        return self._serving(layer).attend(layer, q, k, v, state, mask, keep_state)

    def convert(self, layer: KVLayer, state: KVState) -> State:
        """See `Policy.convert`."""
        return self._serving(layer).convert(layer, state)

    def _of(self, layer: KVLayer) -> Policy | None:
        return self.policies.get(layer.index, self.default)

    def _serving(self, layer: KVLayer) -> Policy:
        policy = self.at(layer)
        if policy is None:
            raise InputError(f"PerLayer: layer {layer.index} has no policy; call its own attention")
        return policy


def _stored(policy: Policy | None, storage: Policy) -> Policy:
    return storage if policy is None else policy | storage
