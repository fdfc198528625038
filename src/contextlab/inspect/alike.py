"""Which heads of a layer look alike: correlations of their matrices, and groups of heads by them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def head_correlations(matrix: Tensor, causal: bool = True) -> Tensor:
    """How alike the heads of a layer look, [B, H, H] in each prompt: correlations of their matrices.

    matrix: [B, H, T, T] (see `contextlab.inspect.mixing`). causal: whether no token looks ahead.
    Each row is made to sum to 1 in absolute values, and its mean over the tokens that it may look at is taken off: that
    rows of few tokens have larger entries would make all heads alike. 0 where a head looks at all alike.
    """
    length = matrix.shape[-1]
    may = torch.ones(length, length, dtype=torch.bool, device=matrix.device)
    may = may.tril() if causal else may
    share = matrix.double() * may
    share = share / share.abs().sum(-1, keepdim=True).clamp_min(1e-300)
    apart = ((share - share.sum(-1, keepdim=True) / may.sum(-1, keepdim=True)) * may).flatten(2)
    size = apart.norm(dim=-1, keepdim=True)
    apart = torch.where(size > 1e-9, apart / size.clamp_min(1e-300), 0.0)  # not what rounding left
    return apart @ apart.mT


def groups_of(correlations: np.ndarray, alike: float) -> list[list[int]]:
    """Groups of heads each two of which are alike at least so much, by complete linkage; the members rise.

    correlations: [H, H]. The two groups whose least correlation is largest are put together, as long as it is enough.
    """
    groups = [[head] for head in range(len(correlations))]
    least = correlations.copy()  # between groups
    np.fill_diagonal(least, -np.inf)
    while len(groups) > 1:
        one, other = sorted(int(each) for each in np.unravel_index(least.argmax(), least.shape))
        if least[one, other] < alike:
            break
        groups[one] = sorted(groups[one] + groups.pop(other))
        merged = np.minimum(least[one], least[other])
        least[one], least[:, one] = merged, merged
        least[one, one] = -np.inf
        least = np.delete(np.delete(least, other, 0), other, 1)
    return sorted(groups)
