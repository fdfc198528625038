"""Policies that must have read a text before they serve it: the oracle, and KVzip's reconstruction."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from contextlab.errors import InputError, check_whole
from contextlab.ops.kv import SCORES, KVLayer, attention_rows
from contextlab.policies.core.slots import gathered
from contextlab.policies.eviction.base import EvictionPolicy, Seen
from contextlab.registry import register
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
class ForesightPolicy(EvictionPolicy):
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
            raise InputError(f"{name} has not seen the text that it shall keep; call policy.watch(model, tokens) first")
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
            raise InputError(f"{name} watched another text, or this one padded differently; watch what is to be read")


def leave_one_out(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    *,
    scale: float,
    visible: Tensor | None = None,
    real: Tensor | None = None,
    slopes: Tensor | None = None,
    place: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """How much the attention outputs of queries to come would change without each token that is held.

    For one query with weights p and output y, dropping token j gives (y - p_j v_j) / (1 - p_j), which is
    p_j / (1 - p_j) (y - v_j) away from y; the squares of that are summed over queries and heads that share a key head.

    q: [B, F, H, D], of the tokens to come. keys: [B, Hkv, N, D] and values: [B, Hkv, N, V], held.
    new_keys: [B, Hkv, F, D], new_values: [B, Hkv, F, V], of the tokens to come, which see each other causally.
    visible: [B, N] or [B, Hkv, N] bool, where a slot holds a token; None for all. real: [B, F] bool, which queries
        count; None for all.
    slopes: [H] of ALiBi; then place [B, F] and position [B, Hkv, N] tell where tokens stand.

    Returns [B, Hkv, N] float64; infinite where a query would see nothing else. One pass over blocks of queries.
    """
    batch, length, heads, _ = q.shape
    kv_heads, held = keys.shape[1:3]
    shared = heads // kv_heads
    block = max(1, SCORES // max(1, batch * heads * (held + length)))
    all_keys, all_values = torch.cat((keys, new_keys), 2), torch.cat((values, new_values), 2)
    squares = values.square().sum(-1)[:, :, None, None]  # [B, Hkv, 1, 1, N]
    change = torch.zeros(batch, kv_heads, held, dtype=torch.float64, device=q.device)
    rows = (q * scale).transpose(1, 2).unflatten(1, (kv_heads, shared))
    for first in range(0, length, block):
        last = min(first + block, length)
        stop = held + last
        few = rows[..., first:last, :].flatten(2, 3)
        scores = (few @ all_keys[:, :, :stop].mT).unflatten(2, (shared, -1))  # [B, Hkv, shared, count, stop]
        if slopes is not None:
            assert place is not None
            assert position is not None
            everywhere = torch.cat((position, place[:, None].expand(-1, kv_heads, -1)), 2)[:, :, None, None, :stop]
            slope = slopes.to(q).view(kv_heads, shared, 1, 1)
            scores = scores + slope * (everywhere - place[:, None, None, first:last, None])
        seen = torch.arange(stop, device=q.device) <= torch.arange(held + first, stop, device=q.device)[:, None]
        if visible is not None:
            at = (visible[:, None] if visible.ndim == 2 else visible)[:, :, None, None]
            seen = seen & torch.nn.functional.pad(at, (0, last), value=True)
        scores = scores.masked_fill(~seen, -math.inf)
        p = scores.softmax(-1)
        y = p.flatten(2, 3) @ all_values[:, :, :stop]
        apart = (y.square().sum(-1, keepdim=True) - 2 * y @ values.mT).unflatten(2, (shared, -1)) + squares
        lost = (p[..., :held] / (1 - p[..., :held])).square() * apart.clamp_min(0)
        # Beside a weight near 1 the rest is lost in rounding; so a query's greatest weight is left out in earnest.
        top = p.argmax(-1, keepdim=True)
        rest = scores.scatter(-1, top, -math.inf).softmax(-1).flatten(2, 3) @ all_values[:, :, :stop]
        exact = (y - rest).square().sum(-1).nan_to_num(nan=math.inf).unflatten(2, (shared, -1))[..., None]
        lost = torch.where(torch.arange(held, device=q.device) == top, exact, lost)
        if real is not None:
            lost = lost.masked_fill(~real[:, None, None, first:last, None], 0.0)
        change += lost.to(torch.float64).sum((2, 3))
    return change


@register("policy", "oracle", family="two-pass", cases=())
@dataclass(eq=False)
class Oracle(ForesightPolicy):
    """A ceiling: keeps the tokens without which the queries to come would be answered most differently.

    It has read the whole text, what follows included (`watch`), so it is no method to use but one to compare with. A
    token's importance is how much dropping it alone would change the heads' outputs (before they are projected and
    added) for the text's queries to come, in squares; see `leave_one_out`. That is the best choice where one token is
    dropped and where the queries are those of the full cache; of several tokens dropped at once it is not the best of
    all subsets, whose number is too large, and what it knows of the text is not counted as memory.

    ahead: how many queries to come count; default all that were watched.
    """

    sinks: int = 0
    window: int = 1
    ahead: int | None = None
    reposition: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        ahead = self.ahead
        if ahead is not None and (isinstance(ahead, bool) or not isinstance(ahead, int) or ahead < 1):
            raise InputError(f"ahead: expected a whole number of at least 1, got {ahead!r}; leave it out for all")
        self._read: dict[int, Read] = {}

    @property
    def reads_first(self) -> Literal["", "prompt", "everything"]:
        """See `Policy.reads_first`."""
        return "everything"

    def _watch(
        self, model: Any, recorder: Recorder, layers: list[KVLayer], tokens: Tensor, mask: Tensor | None
    ) -> None:
        """See `ForesightPolicy._watch`: all queries, keys and values of the text."""
        model.read(tokens, None, mask)
        self._read = recorder.last
        self._keys = self._read[0]

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: the change of the outputs to come."""
        self._must_be_known(seen)
        if seen.length > self.watched:
            raise InputError(f"Oracle watched {self.watched} tokens, this is the next; watch all that is to be read")
        read, layer = self._read[seen.layer.index], seen.layer
        last = self.watched if self.ahead is None else min(self.watched, seen.length + self.ahead)
        future = slice(seen.length, last)
        place = torch.arange(seen.length, last, device=read.q.device) - read.start[:, None]
        return leave_one_out(
            read.q[:, future], seen.keys, seen.values, read.k[:, future].transpose(1, 2),
            read.v[:, future].transpose(1, 2), scale=layer.scale, visible=seen.visible, real=place >= 0,
            slopes=layer.slopes, place=place, position=seen.positions,
        )  # fmt: skip


@register("policy", "kvzip", family="two-pass", papers=("2505.23416",), cases=())
@dataclass(eq=False)
class KVzip(ForesightPolicy):
    """KVzip: the tokens that a model attends to when it is made to repeat the context, whatever is asked later.

    `watch` reads the context and then, with all of it in view, each chunk of it once more behind a request to repeat
    it. A token's importance is the greatest attention that any of these queries pays it, among its chunk, the sinks
    and the repetition itself. Tokens read after the context count more than any of it. Differs from the paper in that
    each head and layer gets an even share of the budget; with AdaKV(of=policy, floor=0) the heads of a layer share.

    window: last tokens that are never dropped; the paper protects none.
    chunk: tokens that are repeated at a time.
    request: the token ids that ask for a repetition; none by default, as for a model that knows no instructions.
    lead: last tokens of the chunk before that stand in front of a chunk, so that it is found.
    every: slots made free at a time while decoding; default an eighth. The paper compresses the context only.
    """

    window: int = 1
    chunk: int = 2048
    request: list[int] | None = None
    lead: int = 8
    reposition: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(chunk=(self.chunk, 1), lead=(self.lead, 0))
        self._importance: dict[int, Tensor] = {}

    def _watch(
        self, model: Any, recorder: Recorder, layers: list[KVLayer], tokens: Tensor, mask: Tensor | None
    ) -> None:
        """See `ForesightPolicy._watch`: the greatest attention of the queries that repeat the text."""
        if mask is not None and not bool(mask.all()):
            raise InputError("KVzip: expected texts of the same length without padding; watch each length alone")
        if tokens.ndim != 2:
            raise InputError(f"KVzip: expected token ids [batch, time], got {list(tokens.shape)}")
        length = tokens.shape[1]
        _, state = model.read(tokens)
        context = dict(recorder.last)
        self._keys = context[0]
        parts: dict[int, list[Tensor]] = {layer.index: [] for layer in layers}
        request = tokens.new_tensor(self.request or []).expand(len(tokens), -1)
        for first in range(0, length, self.chunk):
            last = min(first + self.chunk, length)
            lead = tokens[:, max(0, first - self.lead) : first]
            model.read(torch.cat((request, lead, tokens[:, first:last]), 1), state)
            for layer in layers:
                held, again = context[layer.index].k, recorder.last[layer.index]
                few = min(self.sinks, first)
                keys = torch.cat((held[:, :few], held[:, first:last], again.k), 1)
                place = (*range(few), *range(first, last), *range(length, length + again.q.shape[1]))
                best = greatest_attention(layer, again.q, keys, torch.tensor(place, device=keys.device))
                parts[layer.index].append(best[..., few : few + last - first])
        self._importance = {index: torch.cat(found, 2) for index, found in parts.items()}

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: the greatest attention while the context was repeated."""
        self._must_be_known(seen)
        known = gathered(self._importance[seen.layer.index], seen.positions.clamp(0, self.watched - 1))
        return known.masked_fill(seen.positions >= self.watched, 2.0)  # no attention is above 1


def greatest_attention(layer: KVLayer, q: Tensor, keys: Tensor, position: Tensor) -> Tensor:
    """The greatest weight that each key gets from any of the queries, of all heads that share its head.

    q: [B, T, H, D]. keys: [B, N, Hkv, D], the last T the queries' own. position: [N], where they stand (for ALiBi).

    Returns [B, Hkv, N]; one pass over blocks of queries.
    """
    batch, count, heads, _ = q.shape
    total, kv_heads = keys.shape[1:3]
    block = max(1, SCORES // max(1, batch * heads * total))
    best = q.new_zeros(batch, kv_heads, total)
    for first in range(0, count, block):
        last = min(first + block, count)
        stop = total - count + last
        rows = attention_rows(
            q[:, first:last], keys[:, :stop].transpose(1, 2), scale=layer.scale, slopes=layer.slopes,
            q_position=position[None, stop - (last - first) : stop],
            k_position=position[:stop].expand(batch, kv_heads, -1),
        )  # fmt: skip
        found = rows.amax(2).unflatten(1, (kv_heads, -1)).amax(2)
        best[..., :stop] = torch.maximum(best[..., :stop], found)
    return best
