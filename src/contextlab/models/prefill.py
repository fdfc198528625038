"""Prompts read for less: several short ones in a row of tokens, or fewer tokens in the upper layers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from contextlab.errors import InputError, check_whole
from contextlab.models.faults import first_fault
from contextlab.models.stack import Model, ModelState
from contextlab.ops.kv import KVLayer, attend_cached, attention_rows
from contextlab.ops.packed import packed_attention
from contextlab.policies.core.base import Policy
from contextlab.policies.core.ranking import in_order
from contextlab.policies.core.slots import KeptState, Slots
from contextlab.policies.eviction.by_key import StreamingLLM
from contextlab.spec import describe
from contextlab.state import KVState, State


class Prepacked:
    """A model that reads a batch of prompts of unequal length without computing their padding (2404.09529).

    Prompts are packed into rows as long as the longest of them; each sees itself alone and counts its positions from
    its own start. What comes out, and the state, are those of the padded batch. Where nothing is padded, and once
    there is a state, it is the model itself. Differs from the paper in that the predictions of all tokens come out.

    model: ours, all of whose mixers are softmax attention over all that was read. No policy may be attached while
        prompts are read; one that needs no queries can be applied to the state (`Policy.apply`).
    """

    def __init__(self, model: Model) -> None:
        if not isinstance(model, Model):
            raise InputError(f"prepacking: expected a model of contextlab, got {describe(model)}")
        _check_blocks(model, "prepacking", "prompts in one row would not stay apart")
        self.model = model

    def read(
        self, inputs: Tensor, state: ModelState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """As `Model.read`: predictions [B, T, output_size], zeros at padding, and the state after the last token.

        inputs: [B, T, input_size] float, or [B, T] int64. mask: [B, T] bool, False at left padding.
        """
        if state is not None or mask is None or bool(mask.all()) or not bool(mask.any()):
            return self.model.read(inputs, state, mask)
        _check_prompt(self.model, "prepacking", inputs, mask)
        packing = Packing.of(mask)
        rows = inputs.flatten(0, 1)[packing.source]
        with _Packed(packing).attach(self.model):
            y, after = self.model._read(rows, None, None, packing.position)
        whole = y.new_zeros(*mask.shape, y.shape[-1])
        whole[mask] = y.flatten(0, 1)[packing.place[mask]]
        start = (~mask).sum(1) if self.model.spec.counts_padding else None
        return whole, dataclasses.replace(after, start=start, length=mask.shape[1])


@dataclass(frozen=True)
class Packing:
    """Which token of a padded batch stands where in R rows of S places.

    mask: [B, T] bool, where the batch has tokens. place: [B, T] int64, of each token, its place among all R * S.
    source: [R, S] int64, of each place, its token among all B * T. prompt: [R, S] int64, its prompt; -1 where the
        place is free. position: [R, S] int64, in the prompt.
    """

    mask: Tensor
    place: Tensor
    source: Tensor
    prompt: Tensor
    position: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Packing:
        """The longest prompts first, each into the first row that has room (first-fit decreasing).

        mask: [B, T] bool, where the batch has tokens.
        """
        batch, length = mask.shape
        sizes: list[int] = mask.sum(1).tolist()
        longest = max(sizes)
        first, rooms = [0] * batch, list[int]()
        for i in sorted(range(batch), key=lambda i: -sizes[i]):
            row = next((r for r, room in enumerate(rooms) if room >= sizes[i]), len(rooms))
            if row == len(rooms):
                rooms.append(longest)
            first[i] = row * longest + longest - rooms[row]
            rooms[row] -= sizes[i]
        at = torch.arange(length, device=mask.device) - (~mask).sum(1, keepdim=True)
        place = at + torch.tensor(first, device=mask.device)[:, None]

        def placed(x: Tensor, free: int) -> Tensor:
            rows = torch.full((len(rooms) * longest,), free, device=mask.device)
            rows[place[mask]] = x.expand(batch, length)[mask]
            return rows.view(-1, longest)

        tokens = torch.arange(batch * length, device=mask.device).view(batch, length)
        prompts = torch.arange(batch, device=mask.device)[:, None]
        return cls(mask, place.masked_fill(~mask, 0), placed(tokens, 0), placed(prompts, -1), placed(at, 0))


class _Packed(Policy):
    """Answers packed rows, and leaves the state of the padded batch."""

    def __init__(self, packing: Packing) -> None:
        self.packing = packing

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
        """See `Policy.attend`; q, k and v of rows, the state of prompts."""
        packing = self.packing
        y = packed_attention(q, k, v, segment=packing.prompt, scale=layer.scale, slopes=layer.slopes)
        if not keep_state:
            return y, None
        there = packing.mask[..., None, None]
        k, v = (x.flatten(0, 1)[packing.place] * there for x in (k, v))
        if layer.turn is not None:  # from the places in the row to those in the padded batch
            last = packing.place[:, -1] % q.shape[1]
            k = layer.turn(k, (packing.mask.shape[1] - 1 - last)[:, None, None])
        return y, KVState.empty(k, v).append(k, v, packing.mask)

    def convert(self, layer: KVLayer, state: KVState) -> State:
        """See `Policy.convert`: as it is."""
        return state


class LazyPrefill:
    """A model whose upper layers read only the tokens of a prompt that matter to its end (LazyLLM, 2407.14057).

    After some layers the tokens to which the last one attends least, on the mean of the layer's heads, are left out:
    the layers above compute neither keys and values nor anything else of them, and never hold them. What is read
    after the prompt is computed in all layers and sees in each what that layer holds. Differs from the paper in that
    a token that was left out stays so: there its hidden vector is kept, and a later token can ask for it.

    model: ours, all of whose mixers are softmax attention over all that was read. No policy may be attached.
    keep: after which layers tokens are left out, counted from 0, and which part of the prompt each leaves; falling,
        such as {3: 0.7, 7: 0.4}.
    window, sinks: last and first tokens of each prompt that are never left out.
    """

    def __init__(self, model: Model, keep: dict[int, float], window: int = 1, sinks: int = 0) -> None:
        if not isinstance(model, Model):
            raise InputError(f"lazy prefill: expected a model of contextlab, got {describe(model)}")
        _check_blocks(model, "lazy prefill", "tokens cannot be left out")
        if model.spec.loops > 1:
            raise InputError("lazy prefill: not for a model that runs its layers several times")
        check_whole(window=(window, 1), sinks=(sinks, 0))
        depth, before = len(model.blocks), 1.0
        for layer, part in sorted(keep.items()):
            if not 0 <= layer < depth - 1:
                raise InputError(f"keep: layer {layer} has none above it; expected 0 to {depth - 2}")
            if not 0 < part <= before:
                raise InputError(
                    f"keep: expected parts above 0, each below the one before, got {part} after {before:g}"
                )
            before = part
        self.model, self.keep, self.window, self.sinks = model, dict(keep), window, sinks

    def read(
        self, inputs: Tensor, state: ModelState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """As `Model.read`, but of a prompt (state None) the prediction of its last token only: [B, 1, output_size].

        inputs: [B, T, input_size] float, or [B, T] int64. mask: [B, T] bool, False at left padding.
        """
        model = self.model
        if state is not None:
            with StreamingLLM().attach(model):  # keeps everything
                return model.read(inputs, state, mask)
        _check_prompt(model, "lazy prefill", inputs, mask)
        batch, length = inputs.shape[:2]
        real = torch.ones(batch, length, dtype=torch.bool, device=inputs.device) if mask is None else mask
        policy = _Lazy(real, mask is not None, self.window, self.sinks)
        embedded, start = model.read_in(inputs), None
        if model.spec.position in ("learned", "sinusoidal"):
            embedded, start = model._add_positions(embedded, 0, None, mask, None)
        tokens = inputs if model.spec.read_in == "token" else None
        x, layers = embedded, list[State]()
        with policy.attach(model):
            for i, block in enumerate(model.blocks):
                policy.judges = i in self.keep
                x, after = block(x, None, policy.mask, True, embedded, tokens)
                layers.append(after)
                if policy.judges:
                    index = policy.leave_out(self.keep[i])
                    x, embedded = (_at(each, index) for each in (x, embedded))
                    tokens = None if tokens is None else tokens.gather(1, index)
        prediction = model.read_out(model.read_out_norm(x[:, -1:]))
        if not bool(prediction.isfinite().all()):
            raise InputError(first_fault(model, inputs, None, mask))
        return prediction, ModelState(layers=layers, start=start, length=length)


class _Lazy(Policy):
    """Answers the tokens that are left, in their true places, and holds these."""

    def __init__(self, real: Tensor, padded: bool, window: int, sinks: int) -> None:
        self.length, self.padded = real.shape[1], padded
        self.window, self.sinks, self.judges = window, sinks, False
        self.start, self.have = (~real).sum(1), real.sum(1)
        self.slots = torch.arange(self.length, device=real.device).expand(real.shape)  # in the batch, of those left
        self.there, self.attention = real, torch.zeros(())

    @property
    def mask(self) -> Tensor | None:
        """[B, n] bool, where there is a token among those left; None without padding."""
        return self.there if self.padded else None

    def leave_out(self, part: float) -> Tensor:
        """Go on with this part of each prompt: the places [B, m] of the chosen among those left so far, in order."""
        place = self.slots - self.start[:, None]
        left = (part * self.have.double() - 1e-9).ceil().long().clamp_min(self.window + self.sinks).minimum(self.have)
        ends = (place < self.sinks) | (place >= self.have[:, None] - self.window)
        score = self.attention.masked_fill(ends, float("inf")).masked_fill(~self.there, float("-inf"))
        order = in_order(score, int(left.max()))
        chosen = torch.arange(order.shape[1], device=order.device) < left[:, None]
        index = order.masked_fill(~chosen, -1).sort(1).values  # shorter prompts are padded in front
        self.there, index = index >= 0, index.clamp_min(0)
        self.slots = self.slots.gather(1, index)
        return index

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
        count = q.shape[1]
        if layer.turn is not None and count < self.length:
            steps = (self.slots - torch.arange(count, device=q.device))[..., None]
            q, k = layer.turn(q, steps), layer.turn(k, steps)
        place = self.slots - self.start[:, None]
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        places = place[:, None].expand(-1, layer.kv_heads, -1)
        given: dict[str, Any] = {"scale": layer.scale, "visible": self.mask, "slopes": layer.slopes}
        y = attend_cached(q, keys, values, **given, q_position=place, k_position=places)
        if self.judges:
            rows = attention_rows(q[:, -1:], keys, **given, q_position=place[:, -1:], k_position=places)
            self.attention = rows[:, :, 0].mean(1)
        tokens = {"keys": keys, "values": values, "position": places.where(self.there[:, None], -1).to(torch.int32)}
        slots = Slots.of(tokens, count, self.length)
        return y, KeptState(slots, self.start, padded=self.padded, length=self.length)

    def convert(self, layer: KVLayer, state: KVState) -> State:
        """See `Policy.convert`: as it is."""
        return state


def _at(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, D] at index [B, n]: [B, n, D]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _check_blocks(model: Model, what: str, why: str) -> None:
    if model.spec.exit is not None or model.state_varies:
        raise InputError(f"{what}: not for a model whose tokens leave early (exit) or skip blocks (skip)")
    for i, block in enumerate(model.blocks):
        mixer: Any = block.mixer
        found = getattr(mixer, "kv_layer", lambda: None)()
        if found is None or found.latent or mixer.conv is not None or block.reads_shared or found.fixed:
            raise InputError(
                f"{what}: {why} in block {i} ({type(mixer).__name__}); it needs softmax attention over all that was "
                "read, without short_conv, plain_tokens and shared keys, in all blocks"
            )


def _check_prompt(model: Model, what: str, inputs: Tensor, mask: Tensor | None) -> None:
    model._check(inputs)
    model._check_state(None)
    if not inputs.shape[1]:
        raise InputError(f"{what}: expected a prompt of at least one token")
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != inputs.shape[:2] or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise InputError(f"{what}: expected mask bool {list(inputs.shape[:2])}, False at left padding only")
