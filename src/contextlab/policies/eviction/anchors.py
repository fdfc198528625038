"""Anchor tokens: a segment of the text is forgotten but for its last token, which has read it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from contextlab.errors import InputError, check_whole
from contextlab.ops.kv import KVLayer, values_of
from contextlab.ops.softmax import attend
from contextlab.policies.core.base import Policy
from contextlab.policies.core.slots import KeptState, Slots, gathered, places_after, read_on, room_for, tokens_in_slots
from contextlab.policies.core.training import language_training
from contextlab.registry import register
from contextlab.state import KVState, State


@register("policy", "anllm", family="trained", papers=("2402.07616",), cases=({"segment": 32},))
@dataclass(eq=False)
class AnLLM(Policy):
    """AnLLM's anchors: a segment's last token sums it up and is kept; the segment's other tokens are dropped.

    A token sees its own segment up to itself, and the anchors of all segments before. An anchor, the last token of a
    segment, sees its own segment alone, so that it must sum it up (AnSAN; Section 3.2). Then the other tokens of the
    segment are dropped from the state: nothing sees them any more, so that the answers are those of full
    attention under this mask, however a text is cut into pieces.

    A model must be trained under this mask to work well with it: any training while the policy is attached does that,
    and `fit` is a short one, which changes the model's weights. An anchor sees itself, too, for a segment may be one
    anchor alone. Tokens keep their true places. There is no budget: the text decides what is kept.

    anchors: the token ids at which a segment ends, such as those of "." and of a line's end (AnLLM-EP), or of a token
        that was added for it (AnLLM-AC); seen at the model's token embedding, while attached.
    segment: where `anchors` is left out, every such token of a row is an anchor; default 64.
    """

    serves_caps = True

    anchors: list[int] | None = None
    segment: int | None = None

    def __post_init__(self) -> None:
        if self.anchors is not None and self.segment is not None:
            raise InputError("anchors and segment both say where a segment ends; give one of them")
        if self.anchors is None:
            self.segment = 64 if self.segment is None else self.segment
            check_whole(segment=(self.segment, 1))
        elif not isinstance(self.anchors, list | tuple) or not self.anchors:
            raise InputError(f"anchors: expected a list of token ids, as in [13, 29], got {self.anchors!r}")
        else:
            for token in self.anchors:
                check_whole(anchors=(token, 0))
        self._ids: Tensor | None = None

    @property
    def lossless(self) -> bool:
        """See `Policy.lossless`: what is not an anchor is forgotten whatever memory there is."""
        return False

    @property
    def chunk_invariant(self) -> bool:
        """See `Policy.chunk_invariant`: it is full attention under a mask that the text alone says."""
        return True

    @property
    def needs(self) -> str:
        """See `Policy.needs`."""
        return "" if self.anchors is None else "the token ids that the model reads"

    def __or__(self, other: Policy) -> Policy:
        """See `Policy.__or__`: refused."""
        raise InputError(f"AnLLM | {type(other).__name__}: anchors are stored unchanged; use one of the two alone")

    @contextlib.contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """See `Policy.attach`. Raises InputError where anchors are token ids and the model reads none."""
        with contextlib.ExitStack() as stack:
            if self.anchors is not None:
                embedding = _embedding(model)
                hook = embedding.register_forward_pre_hook(self._note, with_kwargs=True)
                stack.callback(hook.remove)
                stack.callback(setattr, self, "_ids", None)
            yield stack.enter_context(super().attach(model))

    def _note(self, _embedding: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        """The ids of the piece that is being read, for all layers."""
        self._ids = given[0] if given else options["input"]

    def _ends(self, places: Tensor) -> Tensor:
        """Which tokens at these places [B, T] of their rows are anchors, bool."""
        if self.anchors is None:
            assert self.segment is not None
            return (places >= 0) & (places % self.segment == self.segment - 1)
        if self._ids is None or self._ids.shape != places.shape:
            got = "none" if self._ids is None else list(self._ids.shape)
            raise InputError(
                f"AnLLM finds anchors by token ids {list(places.shape)}, but the model's embedding read {got}; "
                "attach the policy to a model that embeds every token that it reads, or use segment"
            )
        return (places >= 0) & torch.isin(self._ids, torch.tensor(self.anchors, device=self._ids.device))

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
        state = self._continued(KeptState, layer, k, v, state)
        if "since" not in state.notes:
            raise InputError("expected the state of this policy, a KeptState of AnLLM")
        count = q.shape[1]
        start, padded, length = read_on(state, mask, count)
        places = places_after(state.length, count, start, padded)
        ends, before = self._ends(places), state.notes["since"]
        # Where each token's segment begins, and, last, that of the token to come.
        begins = torch.cat((before[:, None], torch.where(ends, places + 1, 0)), 1).cummax(1).values
        position_held = state.slots["position"][:, 0].long()
        position = torch.cat((position_held, places.clamp_min(-1)), 1)
        anchor = torch.cat((position_held < before[:, None], ends), 1)
        new = tokens_in_slots(k, v, places)
        closed = bool(ends.any())
        if keep_state and not closed:
            slots = state.slots.append(new, room_for(state.slots.used + count, None))
        else:
            all_of = {name: torch.cat((state.slots[name], x), 2) for name, x in new.items()}
            slots = Slots(all_of, state.slots.used + count, length=length)
        y = _masked_attention(layer, q, slots, places, begins[:, :-1], ends, position, anchor)
        if not keep_state:
            return y, None
        since = begins[:, -1]
        after = KeptState(
            slots, start, notes={"since": since.clone()}, padded=state.padded or mask is not None, length=length,
        )  # fmt: skip
        return y, _without(after, (position >= since[:, None]) | (anchor & (position >= 0))) if closed else after

    def convert(self, layer: KVLayer, state: KVState) -> State:
        """See `Policy.convert`."""
        if state.length and self.needs:
            raise InputError(
                "AnLLM finds anchors by their token ids, and a state does not hold those; attach the policy before "
                "reading, or use segment"
            )
        keys, values = state.cached()
        if not state.length:
            return _empty(keys, values)
        places = torch.arange(state.length, device=keys.device) - state.start[:, None]
        ends = self._ends(places)
        since = torch.where(ends, places + 1, 0).amax(1)
        slots = Slots(tokens_in_slots(keys, values, places), state.length, length=state.length)
        kept = KeptState(
            slots, state.start, notes={"since": since}, padded=state.padded, length=state.length,
        )  # fmt: skip
        return _without(kept, (places >= 0) & (ends | (places >= since[:, None])))

    def fit(
        self, model: Any, tokens: Tensor, *, steps: int = 1000, batch: int = 8, lr: float = 1e-3, seed: int = 0
    ) -> list[float]:
        """Train the model to read through its anchors, by the next token under the mask; ALL ITS WEIGHTS CHANGE.

        model: ours, or `contextlab.models.HuggingFaceModel`. tokens: [N, T] ids, rows without padding. steps:
        optimizer steps, each on `batch` rows drawn anew. lr: the highest rate, after a tenth of the steps; it falls to
        0 at the end. seed: of the draws. The policy holds nothing trained; save the model.

        Returns the loss of each step, nats a token. Raises InputError on impossible options.
        """
        weights = [x for x in model.parameters() if x.requires_grad]
        with self.attach(model):
            return language_training(
                model, tokens, [{"params": weights, "lr": lr}], steps=steps, batch=batch, seed=seed
            )  # fmt: skip


def _embedding(model: nn.Module) -> nn.Module:
    """The model's token embedding: of ours, or of a transformers model."""
    for module in model.modules():
        found = getattr(module, "read_in", None)
        theirs = getattr(module, "get_input_embeddings", None)
        if found is None and callable(theirs):
            found = theirs()
        if isinstance(found, nn.Embedding):
            return found
    raise InputError("AnLLM: anchors are token ids, but this model embeds no tokens; use segment in place of anchors")


def _empty(k: Tensor, v: Tensor) -> KeptState:
    """A state that has read nothing, for k [B, T, Hkv, D] and v [B, T, Hkv, V]."""
    batch, _, kv_heads, _ = k.shape
    none = {
        "keys": k.transpose(1, 2)[:, :, :0],
        "values": v.transpose(1, 2)[:, :, :0],
        "position": torch.zeros(batch, kv_heads, 0, dtype=torch.int32, device=k.device),
    }
    zero = torch.zeros(batch, dtype=torch.int64, device=k.device)
    return KeptState(Slots.of(none, 0, 0), zero, notes={"since": zero.clone()})


def _masked_attention(
    layer: KVLayer,
    q: Tensor,
    slots: Slots,
    places: Tensor,
    begins: Tensor,
    ends: Tensor,
    position: Tensor,
    anchor: Tensor,
) -> Tensor:
    """Attention of queries q [B, T, H, D] over slots: each sees its own segment and, unless it is an anchor, anchors.

    places, begins, ends: [B, T], a query's place in its row, where its segment begins, whether it is an anchor.
    position, anchor: [B, N], a slot's place, negative for none, and whether it holds an anchor of an ended segment.

    Returns [B, T, H, V]. In blocks of 256 queries and the slots that these see, so that whole texts take less
    than full attention does.
    """
    keys = slots["keys"].transpose(1, 2)
    values = values_of(keys, slots["values"].transpose(1, 2))
    at, first_slot = position[:, None, None], torch.arange(position.shape[1], device=q.device) == 0
    outputs = []
    for first in range(0, q.shape[1], 256):
        few = slice(first, first + 256)
        place = places[:, None, few, None]
        seen = (at >= begins[:, None, few, None]) | (anchor[:, None, None] & ~ends[:, None, few, None])
        seen = (seen & (at >= 0) & (at <= place)) | ((place < 0) & first_slot)  # padding reads something, for no one
        some = seen.flatten(0, 2).any(0).nonzero().squeeze(1)  # the slots that any of them sees
        seen = seen[..., some]
        if layer.slopes is not None:
            bias = (place - at[..., some]) * -layer.slopes.to(q.device, q.dtype)[:, None, None]
            seen = bias.masked_fill(~seen, float("-inf"))
        outputs.append(attend(q[:, few], keys[:, some], values[:, some], layer.scale, seen, cap=layer.cap))
    return torch.cat(outputs, 1)


def _without(state: KeptState, stays: Tensor) -> KeptState:
    """Only the slots where stays [B, N], in fresh memory; a row that keeps fewer than another has empty ones in front.

    Heads keep the same tokens.
    """
    left = stays.sum(1)
    width = int(left.max())
    index = stays.to(torch.uint8).argsort(dim=1, stable=True)[:, stays.shape[1] - width :]
    index = index[:, None].expand(-1, state.slots.values["position"].shape[1], -1)
    kept = {name: gathered(state.slots[name], index) for name in ("keys", "values", "position")}
    empty = torch.arange(width, device=left.device) < (width - left)[:, None, None]
    kept["position"] = kept["position"].masked_fill(empty, -1)
    slots = Slots.of(kept, room_for(width, None), state.length)
    ragged = state.padded or bool(empty.any())
    return KeptState(slots, state.start, notes=state.notes, padded=ragged, length=state.length)
