"""How policies reach a library's attention layers: the contract, our own models, and where others register theirs."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer
from contextlab.state import KVState, State

if TYPE_CHECKING:
    from contextlab.policies.core.base import Policy, Served

Places = list[tuple[nn.Module, "Served"]]
"""Attention modules, and what serves each."""


class Adapter(ABC):
    """The attention layers of one library's models, as policies see them.

    A module is served through its attribute `served`, which a policy sets while it is attached.
    """

    everything: Policy | None = None
    """What serves layers that a policy leaves alone; None where their own attention does."""

    @abstractmethod
    def serves(self, model: nn.Module) -> bool:
        """Whether this is a model of the library, or wraps one."""

    @abstractmethod
    def layers(self, model: nn.Module) -> list[tuple[nn.Module, KVLayer]]:
        """The attention modules that keep all keys and values, in order, and what a policy needs to know of each.

        `KVLayer.index` and `count` are set by the caller. Raises InputError where a module keeps all keys and values
        but not so that a policy can take its place.
        """

    @abstractmethod
    def attached(self, modules: list[nn.Module]) -> AbstractContextManager[None]:
        """While open, these modules ask the `Served` that each has as its attribute."""

    @abstractmethod
    def applied(self, places: Places, state: Any, model: nn.Module) -> Any:
        """The state that the model left without a policy, as the policies keep it; see `Policy.apply`."""

    @abstractmethod
    def states(self, places: Places, state: Any, model: nn.Module) -> list[tuple[Served, State]]:
        """What the policies left at each of the places, in a state that the model returned; see `Policy.states`."""


class OwnModels(Adapter):
    """Models of contextlab, whose mixers describe themselves (`kv_layer`) and ask `served` of their own accord."""

    def serves(self, model: nn.Module) -> bool:
        """See `Adapter.serves`."""
        return any(callable(getattr(m, "kv_layer", None)) for m in model.modules())

    def layers(self, model: nn.Module) -> list[tuple[nn.Module, KVLayer]]:
        """See `Adapter.layers`."""
        found: list[Any] = [m for m in model.modules() if callable(getattr(m, "kv_layer", None))]
        described = [(m, m.kv_layer()) for m in found]
        if why := next((why for m in model.modules() if (why := getattr(m, "refuses_policies", ""))), ""):
            raise InputError(f"policy: {why}")
        specs: list[Any] = [getattr(m, "spec", None) for m in model.modules()]
        times = next((spec.loops for spec in specs if hasattr(spec, "loops")), 1)
        return [(m, dataclasses.replace(layer, times=times)) for m, layer in described if layer is not None]

    def attached(self, modules: list[nn.Module]) -> AbstractContextManager[None]:
        """See `Adapter.attached`."""
        return contextlib.nullcontext()

    def applied(self, places: Places, state: Any, model: nn.Module) -> Any:
        """See `Adapter.applied`."""
        found = list(self._of_blocks(places, state, model))
        layers = list(state.layers)
        for i, place, layer_state in found:
            inner = getattr(layer_state, "attended", layer_state)
            if isinstance(inner, KVState):
                kept = place.policy.convert(place.layer, inner)
                layers[i] = dataclasses.replace(layer_state, attended=kept) if inner is not layer_state else kept
        return dataclasses.replace(state, layers=layers)

    def states(self, places: Places, state: Any, model: nn.Module) -> list[tuple[Served, State]]:
        """See `Adapter.states`."""
        return [
            (place, getattr(layer_state, "attended", layer_state))
            for _, place, layer_state in self._of_blocks(places, state, model)
        ]

    @staticmethod
    def _of_blocks(places: Places, state: Any, model: nn.Module) -> Iterator[tuple[int, Served, Any]]:
        """Each of the state's layers that is served: its number, by whom, and what it is."""
        served = {id(m): s for m, s in places}
        blocks = [b.mixer for b in getattr(model, "blocks", [])]
        if not blocks or not hasattr(state, "layers"):
            raise InputError("apply: expected a model of contextlab and the state that its `read` returned")
        for i, layer_state in enumerate(state.layers):
            place = served.get(id(blocks[i % len(blocks)]))
            if place is not None:
                yield i, place, layer_state


OWN = OwnModels()
_adapters: list[Adapter] = [OWN]
_modules: dict[str, str] = {}


def register_adapter(adapter: Adapter) -> None:
    """Make policies serve the models that an adapter serves; of several that serve one, the first is taken."""
    _adapters.append(adapter)


def register_adapter_of(library: str, module: str) -> None:
    """The same for an adapter that `module` registers; it is imported once `library` has been, and not before."""
    _modules[library] = module


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter of a model; ours where there is none, which says what a model must have."""
    for library in [each for each in _modules if each in sys.modules]:
        import_module(_modules[library])
        _modules.pop(library, None)
    return next((each for each in _adapters if each.serves(model)), OWN)
