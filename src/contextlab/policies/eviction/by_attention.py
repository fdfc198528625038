"""Training-free scores of the tokens held, by attention: which of them the queries so far looked at."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer, attention_with_mass
from contextlab.policies.core.slots import KeptState, Slots
from contextlab.policies.eviction.base import EvictionPolicy, Seen
from contextlab.registry import register
from contextlab.state import tensor_bytes


@register("policy", "h2o", family="by attention", papers=("2306.14048",), cases=({}, {"every": 1}))
@dataclass(eq=False)
class H2O(EvictionPolicy):
    """Heavy hitters (H2O): the tokens that got the most attention from all queries so far, and the last ones.

    The attention of the query heads that share a key head is summed.

    sinks: first tokens of each row that are never dropped; the paper has none.
    window: last tokens that are never dropped; the paper takes half of the budget.
    every: slots made free at a time while decoding; default an eighth; 1 as in the paper.
    """

    accumulates = True
    sinks: int = 0

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: the attention received so far."""
        assert seen.mass is not None
        return seen.mass


class WindowJudged(EvictionPolicy):
    """Base of the policies whose window's queries judge the other tokens."""

    @property
    def observe(self) -> int:
        """See `EvictionPolicy.observe`: those of the window."""
        return self.window


@register("policy", "snapkv", family="by attention", papers=("2404.14469",), cases=({}, {"window": 4, "kernel": 3}))
@dataclass(eq=False)
class SnapKV(WindowJudged):
    """SnapKV: the tokens that the last queries attend to, and their neighbours.

    The attention of the last `window` queries is averaged over them and the query heads that share a key head, and
    pooled over `kernel` neighbouring tokens; the window itself is kept.

    sinks: first tokens of each row that are never dropped; the paper has none.
    window: last tokens, whose queries judge and which are never dropped.
    kernel: tokens over which attention is averaged, odd; 1 for none.
    every: slots made free at a time while decoding; default an eighth. The paper compresses the prompt only.
    pyramid, reposition: see `EvictionPolicy`; SnapKV with pyramid=20 is PyramidKV.
    """

    sinks: int = 0
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        kernel = self.kernel
        if isinstance(kernel, bool) or not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
            raise InputError(f"kernel: expected an odd whole number, got {kernel!r}; the nearest is {abs(kernel) | 1}")

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: the pooled attention of the last queries."""
        assert seen.attention is not None
        votes = seen.layer.per_kv_head(seen.attention.mean(2))
        votes = votes.masked_fill(seen.positions > seen.positions[..., -1:] - self.window, 0.0)  # no neighbours' votes
        return torch.nn.functional.avg_pool1d(votes, self.kernel, 1, self.kernel // 2)


@register("policy", "tova", family="by attention", papers=("2401.06104",))
@dataclass(eq=False)
class TOVA(EvictionPolicy):
    """TOVA: the tokens that the last query attends to; all heads of a layer keep the same ones.

    The attention of the last query is averaged over all query heads of the layer. Differs from the paper in that the
    token read last is always kept, and in when the budget is met: there each query sees one token more than the
    budget, then one is dropped; here one is dropped first, so that the budget holds at every step.

    sinks: first tokens of each row that are never dropped; the paper has none.
    window: last tokens that are never dropped; the paper has none.
    every: slots made free at a time while decoding; default an eighth; 1 as in the paper.
    """

    observe = 1
    sinks: int = 0
    window: int = 1

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: the attention of the last query, over the heads' mean."""
        assert seen.attention is not None
        return seen.attention[:, :, -1].mean(1, keepdim=True).expand(-1, seen.layer.kv_heads, -1)


@register("policy", "a2sf", family="by attention", papers=("2407.20485",), cases=({"forget": 0.3, "every": 1},))
@dataclass(eq=False)
class A2SF(H2O):
    """Accumulated attention that fades (A2SF): each query's attention counts `forget` times less a query later.

    A token that has been held for long does not win by age alone, as it does in H2O, which is forget=1.

    sinks: first tokens of each row that are never dropped; the paper has none.
    window: last tokens that are never dropped.
    forget: factor in (0, 1] by which accumulated attention fades with each query.
    every: slots made free at a time while decoding; default an eighth; 1 as in the paper.
    """

    forget: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.forget <= 1:
            raise InputError(f"forget: expected a factor in (0, 1], got {self.forget!r}; 1 forgets nothing")

    @property
    def forgetting(self) -> float:
        """See `EvictionPolicy.forgetting`."""
        return self.forget


@register(
    "policy",
    "attendre",
    family="by attention",
    papers=("2401.04881",),
    cases=({}, {"order": "frequency", "share": 0.05, "every": 1}),
)
@dataclass(eq=False)
class Attendre(H2O):
    """Attendre's memory of keys and values: the tokens that were attended last (LRA), or most often (LFA), are kept.

    A query attends to the tokens that get `share` of its attention or more, so to 1 / share of them at most; of the
    query heads that share a key head each counts. To be read counts as the first time for recency, and not for
    frequency. What is attended is ours: only the paper's abstract was at hand, which names the two orders and that
    the memory is read by retrieval. Its third order, FIFO, is streaming_llm with sinks=0.
    The paper's layer also lets queries wait in a memory of their own and attend when they leave it, so that they see
    what was read after them. It is trained so; a causal model's queries must not, and none waits here.

    sinks: first tokens of each row that are never dropped; the paper has none.
    window: last tokens that are never dropped.
    order: "recency" drops the tokens that were attended least recently, "frequency" those attended least often.
    share: part of its attention from which on a query attends to a token, above 0 and at most 1.
    every: slots made free at a time while decoding; default an eighth; 1 as in the paper.
    """

    only_scores = False
    order: Literal["recency", "frequency"] = "recency"
    share: float = 1 / 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ("recency", "frequency"):
            raise InputError(f"order: expected 'recency' or 'frequency', got {self.order!r}")
        if not 0 < self.share <= 1:
            raise InputError(f"share: expected a part in (0, 1], got {self.share!r}; 0.02 lets a query attend to 50")

    def _answer(
        self, layer: KVLayer, q: Tensor, slots: Slots, state: KeptState, places: Tensor, padded: bool
    ) -> tuple[Tensor, Tensor | None]:
        count, latest = q.shape[1], self.order == "recency"
        times = torch.arange(state.length + 1, state.length + count + 1, device=q.device, dtype=torch.float32)
        y, got = attention_with_mass(
            q, slots["keys"], slots["values"], scale=layer.scale, weight=times if latest else torch.ones_like(times),
            visible=slots["position"][:, 0] >= 0 if padded else None, share=self.share, latest=latest,
        )  # fmt: skip
        mass = got.unflatten(1, (layer.kv_heads, -1))
        mass = (mass.amax(2) if latest else mass.sum(2)).to(torch.float32)
        old = state.mass if state.mass is not None else mass[..., :0]
        if latest:
            mass[..., mass.shape[2] - count :].clamp_min_(times)
            mass[..., : old.shape[2]].clamp_min_(old)
        else:
            mass[..., : old.shape[2]] += old
        return y, mass


@register("policy", "alisa", family="by attention", papers=("2403.17312",), cases=({"queries": 2},))
@dataclass(eq=False)
class ALISA(EvictionPolicy):
    """ALISA's sparse window attention: the last tokens, and those that the last queries attend to.

    The attention of the last `queries` queries is summed for each key head. Differs from the paper in that dropped
    tokens are gone: there they stay in host memory, or are computed again, and may come back.

    sinks: first tokens of each row that are never dropped; the paper has none.
    window: last tokens that are never dropped; the paper takes half of the budget.
    queries: last queries whose attention counts, at most `window`; default all of the window's.
    every: slots made free at a time while decoding; default an eighth; 1 as in the paper.
    """

    sinks: int = 0
    queries: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        within("queries", self.observe, self.window)

    @property
    def observe(self) -> int:
        """See `EvictionPolicy.observe`."""
        return self.window if self.queries is None else self.queries

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: the attention of the last queries."""
        assert seen.attention is not None
        return seen.layer.per_kv_head(seen.attention.sum(2))


@register("policy", "vatp", family="by attention", papers=("2406.12335",), cases=({"every": 1},))
@dataclass(eq=False)
class VATP(H2O):
    """Accumulated attention times the size of the value (VATP): what a token adds to the outputs.

    The attention that each token got from all queries so far, times the sum of its value's magnitudes. The first
    tokens get much attention and have small values; they are kept whatever their score.

    sinks: first tokens of each row that are never dropped.
    window: last tokens that are never dropped; the paper takes half of the budget.
    every: slots made free at a time while decoding; default an eighth; 1 as in the paper.
    """

    sinks: int = 4

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: the attention received so far, times the value's L1 norm."""
        return super().score(seen) * seen.values.abs().sum(-1)


@register(
    "policy",
    "pyramid_kv",
    family="by attention",
    papers=("2406.02069",),
    cases=({"pyramid": 1.5, "kernel": 3},),
)
@dataclass(eq=False)
class PyramidKV(SnapKV):
    """PyramidKV: SnapKV with large budgets in the first layers and small ones in the last.

    Differs from the paper in that the budgets that are divided include the window; a small total budget needs a small
    `pyramid`, so that the last layer holds its window.

    sinks: first tokens of each row that are never dropped; the paper has none.
    window: last tokens, whose queries judge and which are never dropped.
    kernel: tokens over which attention is averaged, odd; 1 for none.
    every: slots made free at a time while decoding; default an eighth. The paper compresses the prompt only.
    pyramid: the last layer gets 1/pyramid of the average, the first as much more, those between evenly less.
    reposition: see `EvictionPolicy`.
    """

    pyramid: float | None = 20.0


@register(
    "policy",
    "pyramid_infer",
    family="by attention",
    papers=("2405.12532",),
    cases=({"pyramid": 1.5, "sinks": 0},),
)
@dataclass(eq=False)
class PyramidInfer(WindowJudged):
    """PyramidInfer's choice: the tokens that the last queries attend to, the later queries counting more.

    The attention of the last `window` queries is averaged over all heads of the layer, which keep the same tokens.
    Differs from the paper in that each layer chooses alone: there a prompt's token that one layer drops is not
    computed in those after it, and the layers' sizes follow a ratio by which each keeps less than the one before.

    window: last tokens, whose queries judge and which are never dropped; the paper takes a fifth of the prompt.
    recency: weight of the last query; the first one's is 1, and those between rise evenly.
    """

    recency: float = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.recency > 0:
            raise InputError(f"recency: expected a weight above 0, got {self.recency!r}; 1 weighs all queries the same")

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: the weighted attention of the last queries, over the heads' mean."""
        assert seen.attention is not None
        rows = seen.attention.mean(1)
        weight = torch.linspace(1.0, self.recency, self.window, dtype=rows.dtype, device=rows.device)
        return (weight[-rows.shape[1] :] @ rows)[:, None].expand(-1, seen.layer.kv_heads, -1)


@register("policy", "fastgen", family="by attention", papers=("2310.01801",), cases=({"recovery": 0.5},))
@dataclass(eq=False)
class FastGen(WindowJudged):
    """FastGen's profiles: each head keeps the last tokens, or those that got the most attention, as its prompt shows.

    When a row first holds more than the budget, each key head is judged by the attention of the last `window`
    queries: where the last tokens that fit, with the sinks, hold at least `recovery` of it, the head keeps these from
    then on; else it keeps the tokens with the most attention so far and the window, as H2O does. Differs from the
    paper in that all heads have as many slots (there those with a simple profile take fewer), and in that punctuation
    is not told apart: a policy sees no text. Special tokens are those at the start.

    window: last tokens, whose queries judge heads and which are never dropped.
    recovery: part in [0, 1] of the attention that the last tokens must hold; 0 makes all heads local.
    """

    only_scores = False
    accumulates = True
    recovery: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recovery <= 1:
            raise InputError(f"recovery: expected a part from 0 to 1, got {self.recovery!r}; 0.95 asks for 95%")

    def notes_nbytes(self, layer: KVLayer, batch: int, dtype: torch.dtype) -> int:
        """See `EvictionPolicy.notes_nbytes`."""
        return tensor_bytes(batch, layer.kv_heads, dtype=torch.int8)

    def remember(
        self, layer: KVLayer, notes: dict[str, Tensor], q: Tensor, places: Tensor, length: int
    ) -> dict[str, Tensor]:
        """See `EvictionPolicy.remember`: "profile" [B, Hkv], 1 of heads that are local, 0 of others, -1 of unknown."""
        return notes or {"profile": torch.full((len(q), layer.kv_heads), -1, dtype=torch.int8, device=q.device)}

    def _evict(self, layer: KVLayer, state: KeptState, limit: int, full: int | None = None) -> KeptState:
        seen, profile = self.seen(layer, state), state.notes["profile"]
        assert seen.attention is not None
        last = seen.positions[..., -1:]
        local = (seen.positions < self.sinks) | (seen.positions > last - (limit - self.sinks))
        recovered = layer.per_kv_head(seen.attention.sum(2)) * (seen.positions >= 0)
        part = (recovered * local).sum(-1) / recovered.sum(-1).clamp_min(torch.finfo(recovered.dtype).tiny)
        judged = (profile < 0) & ((seen.positions >= 0).sum(-1) > limit - (full is not None))  # those that drop now
        profile = torch.where(judged, (part >= self.recovery).to(torch.int8), profile)
        return super()._evict(layer, dataclasses.replace(state, notes={"profile": profile}), limit, full)

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: places in local heads, the attention received so far in others."""
        assert seen.mass is not None
        return torch.where((seen.notes["profile"] == 1)[..., None], seen.positions.to(seen.mass.dtype), seen.mass)


def within(name: str, value: int, window: int) -> None:
    """Raises InputError unless `value`, a number of last tokens, is a whole one that the window holds."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= window:
        raise InputError(f"{name}: expected 1 to {window} (window), got {value!r}; raise window or take {window}")
