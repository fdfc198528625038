"""A policy of one's own: keep the tokens whose values are long vectors, as they can change an answer most."""

from dataclasses import dataclass

from contextlab import register
from contextlab.policies.eviction.base import EvictionPolicy


@register("policy", "longest_values", family="by key", cases=({}, {"window": 8}))
@dataclass(eq=False)
class LongestValues(EvictionPolicy):
    """The tokens with the largest Euclidean norm of their value, the first ones and the last.

    sinks: first tokens of each row that are never dropped.
    window: last tokens that are never dropped.
    """

    def score(self, seen):
        return seen.values.float().norm(dim=-1)  # [B, Hkv, N]: the higher, the sooner it is kept
