"""What is told of a softmax attention layer that keeps keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True)
class KVLayer:
    """What a policy knows of the softmax attention layer that it serves.

    index, count: which of the model's layers with keys and values this is, and how many there are.
    heads, kv_heads: query heads, and key and value heads (a divisor).
    key_dim, value_dim: numbers of a head's key and value as they are held. A value_dim of 0 says that keys are the
        values, too, and held once, as where a model keeps one latent of both: values then have size 0 wherever they
        are handed on or held, answers are means of whole keys, and of these `latent` numbers are wanted.
    scale: of the scores.
    slopes: [H], ALiBi's; None for none.
    turn: rotates what was rotated already by further steps: x [B, T, H, D], steps [B or 1, T, H or 1] int64; None
        when positions are not rotary.
    by_row: whether rotary positions count from each row's first token, as in transformers; otherwise, as in our
        mixers, they count its padding, too. Only distances matter to attention.
    fixed: whether places matter beyond distances (first tokens with other angles than the rest), so that no key can be
        turned to another place: `turn` raises InputError.
    sink: [H], the scores of learned sinks, which take attention and give nothing; None for none.
    cap: what no score is beyond: each is cap tanh(score / cap), before slopes, sinks and masks; None for none.
    latent: where keys are the values, too, how many of a key's first numbers are a value; 0 elsewhere.
    times: how often the model runs the layer in a forward, each time with a state of its own (looped models).
    peers: the layers among which a policy divides its budget, this one at its place, each without peers; empty
        where all `count` layers are like this one.
    """

    index: int
    count: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    slopes: Tensor | None = None
    turn: Callable[[Tensor, Tensor], Tensor] | None = None
    by_row: bool = False
    fixed: bool = False
    sink: Tensor | None = None
    cap: float | None = None
    latent: int = 0
    times: int = 1
    peers: tuple[KVLayer, ...] = ()

    @cached_property
    def unlike(self) -> bool:
        """Whether tokens of its peers differ in size."""
        return len({(each.kv_heads, each.key_dim, each.value_dim) for each in self.peers}) > 1

    @property
    def states(self) -> int:
        """States of layers like this one that the model has, among which a budget in bytes is divided."""
        return self.count * self.times

    def values(self, keys: Tensor, values: Tensor) -> Tensor:
        """The values themselves, of keys [..., D] and what is held of values [..., V]."""
        return keys[..., : self.latent] if self.latent else values

    def per_kv_head(self, x: Tensor) -> Tensor:
        """[B, H, ...] of query heads, summed over those that share a key head: [B, Hkv, ...]."""
        return x if self.heads == self.kv_heads else x.unflatten(1, (self.kv_heads, -1)).sum(2)


def values_of(keys: Tensor, values: Tensor) -> Tensor:
    """The values [..., V]: the keys [..., D] themselves where values have size 0, see `KVLayer`."""
    return values if values.shape[-1] else keys
