"""What Mamba-2 and Mamba-3 share."""

from __future__ import annotations

from contextlab.errors import InputError, nearest_divisor
from contextlab.mixers.base import head_size


def heads_and_size(inner: int, heads: int | None, head_dim: int | None, groups: int) -> tuple[int, int]:
    """The number of heads and the size of each, of `inner` channels; 4 heads where neither is given.

    Raises InputError when the two do not make up `inner`, or when `groups` does not divide the heads.
    """
    if heads is None:
        heads = 4 if head_dim is None else head_size(inner, head_dim, "values a head")
    size = head_size(inner, heads)
    if head_dim is not None and head_dim != size:
        raise InputError(f"heads {heads} x head_dim {head_dim} is not expand x width = {inner}; head_dim {size} fits")
    if heads % groups:
        fits = nearest_divisor(heads, groups)
        raise InputError(f"groups {groups} does not divide heads {heads}; the nearest that does is {fits}")
    return heads, size
