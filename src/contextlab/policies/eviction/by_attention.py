"""Training-free scores of the tokens held, by attention: which of them the queries so far looked at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.policies.eviction.base import EvictionPolicy
from contextlab.policies.eviction.seen import Seen
from contextlab.registry import register


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

    Each layer has its window and one token more; what of a part or of bytes the first cannot use, as they hold all that
    was read, the others have. Differs from the paper in that the budgets that are divided include the window.

    sinks: first tokens of each row that are never dropped; the paper has none.
    window: last tokens, whose queries judge and which are never dropped.
    kernel: tokens over which attention is averaged, odd; 1 for none.
    every: slots made free at a time while decoding; default an eighth. The paper compresses the prompt only.
    pyramid: the last layer gets 1/pyramid of the average and the first as much above it; those between fall evenly.
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


def within(name: str, value: int, window: int) -> None:
    """Raises InputError unless `value`, a number of last tokens, is a whole one that the window holds."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= window:
        raise InputError(f"{name}: expected 1 to {window} (window), got {value!r}; raise window or take {window}")
