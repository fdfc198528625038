"""What every policy shares: how it is attached to a model, and how an eviction policy keeps to its budget.

A policy serves each softmax attention layer of a model in the layer's place: it is given the new tokens' queries, keys
and values, answers them from what it holds, and hands on a state of its own. Our mixers and Hugging Face models call
the same method.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer
from contextlab.policies.core.adapters import adapter_of
from contextlab.policies.core.budget import Amount, Budget
from contextlab.policies.core.holders import Holder
from contextlab.state import KVState, State

S = TypeVar("S", bound=State)


@dataclass(frozen=True)
class Served:
    """A policy at one layer: what a mixer calls while the policy is attached."""

    policy: Policy
    layer: KVLayer

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Policy.attend`: q [B, T, H, D], k [B, T, Hkv, D], v [B, T, Hkv, V], mask [B, T] bool -> [B, T, H, V]."""
        if state is not None:
            rows = getattr(state, "start", None)  # most have it, and the first of all tensors takes longer to find
            rows = next(state.tensors()) if rows is None else rows
            if len(rows) != len(q):
                raise InputError(f"the state has {len(rows)} rows, the tokens have {len(q)}")
        try:
            y, after = self.policy.attend(self.layer, q, k, v, state, mask, keep_state)
        except RuntimeError as error:
            raise _mixed(state, q) or error from None
        if y.device != q.device:  # "meta" mixes with anything
            raise _mixed(state, q) or RuntimeError(f"{type(self.policy).__name__}: an answer on {y.device}")
        return y, after


def _mixed(state: State | None, q: Tensor) -> InputError | None:
    """What is wrong, where a state is of another dtype or on another device than the tokens; asked when that failed."""
    if state is None:
        return None
    devices = {x.device for x in state.tensors()}
    if q.device not in devices:
        found = ", ".join(sorted(map(str, devices)))
        return InputError(f"the state is on {found}, the tokens are on {q.device}; move it with state.to('{q.device}')")
    dtypes = {x.dtype for x in state.tensors() if x.is_floating_point()}
    if dtypes and q.dtype not in dtypes:
        found = ", ".join(sorted(str(each) for each in dtypes))
        return InputError(f"the state is of {found}, the tokens are of {q.dtype}; change it with state.to({q.dtype})")
    return None


def in_own_places(layer: KVLayer, x: Tensor, start: Tensor) -> Tensor:
    """Queries or keys x [B, T, H, D], turned back by the padding [B] of their rows where positions count it.

    Only distances matter to attention, but few bits blur a key differently when it is turned; so what is stored of a
    row does not depend on its padding.
    """
    return x if layer.turn is None or layer.by_row else layer.turn(x, -start[:, None, None])


class Policy(ABC):
    """What a KV state keeps of the tokens that were read."""

    bounds: Literal["held", "read", "prefill"] = "held"
    """What its budget limits: what is held; what a decoded token reads; or what a token of the prompt reads."""
    storage: Holder | None = None
    """How it stores tokens, where another policy may say which: `evict | store`."""
    only_scores: ClassVar[bool] = False
    """Whether all that it does is score tokens, so that another policy may use that score (`ada_kv:of=NAME`)."""
    values_apart: ClassVar[str] = ""
    """What it does to values apart from keys, in words, so that it serves no layer where both are one latent."""
    serves_sinks: ClassVar[bool] = False
    """Whether it serves layers with learned sinks (`KVLayer.sink`), as those of gpt_oss."""
    serves_caps: ClassVar[bool] = False
    """Whether it serves layers whose scores are capped (`KVLayer.cap`), as those of gemma2."""
    fits_budget: bool = False
    """Whether what is trained of it (`train_on`) is for its budget, and not for any."""

    @property
    def turns(self) -> bool:
        """Whether it turns rotary queries or keys to other places, so that it serves no layer of `fixed` places."""
        return False

    @property
    def takes_budget(self) -> bool:
        """Whether it has a budget, or a part of it has."""
        return hasattr(self, "budget")

    @property
    def limits(self) -> list[Budget]:
        """The budgets that limit it, each once; empty where it keeps everything."""
        budget = Budget.of(getattr(self, "budget", None))
        return [] if budget.everything else [budget]

    def with_budget(self, budget: Amount) -> Policy:
        """The same policy with another budget, what was trained of it shared; itself where it takes none."""
        if not self.takes_budget:
            return self
        other = copy.copy(self)
        other.budget = Budget.of(budget)  # type: ignore[attr-defined]
        return other

    @property
    def reads_first(self) -> Literal["", "prompt", "everything"]:
        """What of a text it must read before it serves it (`prepare`): nothing, what it chooses from, or all of it."""
        return ""

    def prepare(self, model: nn.Module, tokens: Tensor, prompt: int, mask: Tensor | None = None) -> None:  # noqa: B027
        """Read the text that is served next; see `reads_first`.

        model: ours, or `contextlab.models.HuggingFaceModel`. tokens: [B, T] ids, all that will be read.
        prompt: how many of the first it chooses from. mask: [B, T] bool, False at left padding.
        """

    @property
    def untrained(self) -> str:
        """What of it must be trained and is not, in words such as "its heads"; "" for nothing."""
        return ""

    def train_on(  # noqa: B027  (most need no training)
        self, model: nn.Module, tokens: Tensor, answer: int, *, steps: int, seed: int = 0
    ) -> None:
        """Train what is `untrained`; the model stays as it is.

        model: see `prepare`. tokens: [N, T] ids, prompts without padding. answer: how many of the last are the answer.
        """

    def bytes_read(self, state: State) -> int:
        """Bytes of keys and values, of all rows, that the last token read of a state it left at a layer.

        0 where it does not choose what a token reads.
        """
        return 0

    @property
    def lossless(self) -> bool:
        """Whether nothing changes as long as the budget holds all; what is stored in few bits, say, is never exact."""
        return True

    def __or__(self, other: Policy) -> Policy:
        """`evict | store`: the left policy says which tokens are kept, the right one how they are stored."""
        left, right = type(self).__name__, type(other).__name__
        raise InputError(f"{left} | {right}: {left} keeps every token; put an eviction policy on the left, as in h2o")

    @property
    def chunk_invariant(self) -> bool:
        """Whether the result is the same however the prompt is cut into pieces."""
        return False

    @property
    def needs(self) -> str:
        """What it must see besides keys and values, in words; "" for nothing."""
        return ""

    @abstractmethod
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
        """Answer new tokens from what is held and from each other (causally), and hold on.

        q: [B, T, H, D], k: [B, T, Hkv, D], v: [B, T, Hkv, V], positions applied as the model does.
        state: what this policy left at this layer before; None at the start. It stays valid.
        mask: [B, T] bool, False at left padding.
        keep_state: False says that the caller drops the state.

        Returns [B, T, H, V] and the state after the last token.
        """

    def _continued(self, kind: type[S], layer: KVLayer, k: Tensor, v: Tensor, state: State | None) -> S:
        """The state to go on from: this policy's own, what it keeps of a plain one, or an empty one at the start.

        Raises InputError where another policy left it.
        """
        if state is None or isinstance(state, KVState):
            state = self.convert(layer, KVState.empty(k, v) if state is None else state)
        if not isinstance(state, kind):
            raise InputError(f"expected the state of this policy, a {kind.__name__}, got {type(state).__name__}")
        return state

    @abstractmethod
    def convert(self, layer: KVLayer, state: KVState) -> State:
        """What it keeps of a layer that was read without it. Raises InputError where it needs more than the state."""

    def at(self, layer: KVLayer) -> Policy | None:
        """The policy that serves this layer: itself, another, or None to leave the layer alone."""
        return self

    def check(self, layers: list[KVLayer]) -> None:  # noqa: B027  (most can serve all)
        """Raises InputError when it cannot serve these layers."""

    @contextlib.contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """While the context is open the model's softmax attention reads through this policy.

        model: ours, or one of `transformers`. States that it hands on in the meantime can only be continued with
            the same policy attached.
        """
        with contextlib.ExitStack() as stack:
            places = self._places(model)
            for mixer, served in places:
                if getattr(mixer, "served", None) is not None:
                    raise InputError("a policy is attached to this model already; leave its context first")
                mixer.served = served  # type: ignore[assignment]
                stack.callback(setattr, mixer, "served", None)
            stack.enter_context(adapter_of(model).attached([mixer for mixer, _ in places]))
            yield model

    def layers(self, model: nn.Module) -> list[KVLayer]:
        """The model's layers that it serves. Raises InputError when it cannot serve the model."""
        return [served.layer for served in self.served(model)]

    def served(self, model: nn.Module) -> list[Served]:
        """The model's layers that it serves, and the policy that serves each. Raises InputError as `layers` does."""
        return [served for _, served in self._places(model)]

    def _places(self, model: nn.Module) -> list[tuple[nn.Module, Served]]:
        if any(getattr(m, "reads_other_keys", False) for m in model.modules()):
            raise InputError(
                f"{type(self).__name__} does not serve models whose layers share keys and values (kv: shared): what to "
                "keep of them would be chosen by the queries of one layer alone; use a model without"
            )
        adapter = adapter_of(model)
        described = adapter.layers(model)
        if not described:
            marks = ("state_nbytes", "layer_idx")  # of our mixers, of transformers' layers
            parts = [m for m in model.modules() if m is not model and any(hasattr(m, mark) for mark in marks)]
            kinds = sorted({type(m).__name__ for m in parts})
            raise InputError(
                f"{type(self).__name__} needs a model with a KV state, but none of its layers "
                f"({', '.join(kinds) or type(model).__name__}) keeps all keys and values; preset 'transformer' does"
            )
        layers = [dataclasses.replace(layer, index=i, count=len(described)) for i, (_, layer) in enumerate(described)]
        policies = [self.at(layer) for layer in layers]
        for one, layer in zip(policies, layers, strict=True):
            if one is not None:
                one._require_served(layer)
        self.check(layers)
        groups = {id(one): tuple(x for x, p in zip(layers, policies, strict=True) if p is one) for one in policies}
        layers = [
            dataclasses.replace(x, peers=groups[id(one)] if one else ())
            for x, one in zip(layers, policies, strict=True)
        ]
        served = [
            (m, policy or adapter.everything, layer)
            for (m, _), policy, layer in zip(described, policies, layers, strict=True)
        ]
        return [(m, Served(policy, layer)) for m, policy, layer in served if policy is not None]

    def _require_served(self, layer: KVLayer) -> None:
        """Raises InputError on a layer of a kind that this policy, by what it declares, does not serve."""
        name = type(self).__name__
        if layer.latent and self.values_apart:
            raise InputError(
                f"{name} {self.values_apart}, but this model keeps keys and values as one latent; take a policy that "
                "keeps tokens as they are, such as snapkv"
            )
        if layer.sink is not None and not self.serves_sinks:
            raise InputError(f"{name} does not serve layers with learned sinks; h2o and snapkv do")
        if layer.fixed and self.turns:
            raise InputError(
                f"{name} turns keys to other places, but the first tokens of this model keep plain rotary positions "
                "(plain_tokens); h2o and snapkv turn none"
            )
        if layer.cap is not None and not self.serves_caps:
            raise InputError(f"{name} does not serve layers whose scores are capped; h2o and snapkv do")

    def apply(self, state: Any, model: nn.Module) -> Any:
        """Compress the state that `model` left when it read without a policy.

        state: of our `Model`, with a KVState in each layer that the policy serves, or of our `HuggingFaceModel`; it
            stays valid.
        Returns a state to be continued while the policy is attached.
        """
        return adapter_of(model).applied(self._places(model), state, model)

    def states(self, model: nn.Module, state: Any) -> list[tuple[Served, State]]:
        """What it left in each layer that it serves, in the state that `model.read` returned while it was attached."""
        return adapter_of(model).states(self._places(model), state, model)
